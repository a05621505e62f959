"""What lets a run resume after it was killed: its last snapshot, saved atomically with Orbax."""

import time
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.engine.errors import UsageError, first_line
from experiments.engine.training import Snapshot


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

    def save(self, snapshot: Snapshot, position: dict[str, Any]) -> None:
        """Save a snapshot and where in the run it is (JSON values). It is complete on disk, or not there."""
        where = {name: getattr(snapshot, name) for name in ("epoch", "step", "diverged")}
        where["losses"] = snapshot.losses.shape
        arrays = {"arrays": _numbered(snapshot.arrays), "losses": snapshot.losses}
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

    def snapshot(self, like: Snapshot) -> Snapshot:
        """The last one's snapshot, on the devices of `like`.

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
        return Snapshot(
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
            raise UsageError(
                f"the checkpoint in {self._manager.directory} cannot be read ({first_line(error)}); delete that "
                "folder, and --resume starts from the beginning"
            ) from error


def _numbered(tree: Any) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
