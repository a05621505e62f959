"""What lets a run go on after it was killed: its last moment, saved atomically with Orbax."""

import time
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.engine.errors import UsageError
from experiments.engine.training import Moment


class Checkpoints:
    """The checkpoints of a run in its folder; only the last one is kept.

    Args:
      folder: of the run.
      every: seconds between two that `due` asks for.
    """

    def __init__(self, folder: Path, every: float):
        absl.logging.set_verbosity(
            absl.logging.ERROR
        )  # Orbax tells of what a killed run left half-written, and mends it
        self._every = every
        self._last = time.monotonic()
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager((folder / "checkpoint").absolute(), options=options)

    def due(self) -> bool:
        """Whether that many seconds have passed since the last one, or since the start."""
        return time.monotonic() - self._last >= self._every

    def save(self, moment: Moment, position: dict[str, Any]) -> None:
        """Save a moment and where in the run it is (JSON values). It is complete on disk, or not there."""
        where = {"epoch": moment.epoch, "step": moment.step, "diverged": moment.diverged, "losses": moment.losses.shape}
        arrays = {"arrays": _numbered(moment.arrays), "losses": moment.losses}
        save = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), position=ocp.args.JsonSave({**position, **where})
        )
        self._manager.save((self._manager.latest_step() or 0) + 1, args=save)
        self._last = time.monotonic()

    def position(self) -> dict[str, Any] | None:
        """Where the last one is in the run; None if there is none."""
        if self._manager.latest_step() is None:
            return None
        return self._restore(position=ocp.args.JsonRestore())["position"]

    def moment(self, like: Moment) -> Moment:
        """The last one's moment, on the devices of `like`.

        Raises:
          UsageError: if it does not have the arrays of `like`.
        """
        position = self.position()
        assert position is not None
        abstract = {
            "arrays": jax.tree.map(ocp.utils.to_shape_dtype_struct, _numbered(like.arrays)),
            "losses": jax.ShapeDtypeStruct(tuple(position["losses"]), np.float32),
        }
        found = self._restore(arrays=ocp.args.StandardRestore(abstract))["arrays"]
        treedef = jax.tree.structure(like.arrays)
        return Moment(
            jax.tree.unflatten(treedef, [found["arrays"][str(i)] for i in range(treedef.num_leaves)]),
            np.asarray(found["losses"]),
            position["epoch"],
            position["step"],
            tuple(position["diverged"]),
        )

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()

    def _restore(self, **items: Any) -> Any:
        try:
            return self._manager.restore(self._manager.latest_step(), args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises whatever its storage does
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(
                f"the checkpoint in {self._manager.directory} cannot be read ({first_line}); delete that folder, and "
                "--resume starts from the beginning"
            ) from error


def _numbered(tree: Any) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
