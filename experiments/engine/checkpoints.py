"""What lets a run resume after it was killed: its arrays, in files that are whole or not there, and checked when read.

A file is NumPy's npz, of the leaves of a tree and of JSON facts, followed by the SHA-256 of all that. Nothing in it is
code. A file whose SHA-256 is another one is never trained on: the one before it is taken.
"""

import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.engine import processes
from experiments.engine.errors import UsageError
from experiments.engine.files import write_whole, writing

_KEPT = 2
_DIGEST = hashlib.sha256().digest_size
_FACTS = "facts"


class Saved(NamedTuple):
    """The content of a file: the leaves of the tree, and what was said of them."""

    path: Path
    leaves: list[np.ndarray]
    facts: dict[str, Any]


class Checkpoints:
    """The last two checkpoints of a run, in a folder of their own; `due` asks for one after so many seconds."""

    def __init__(self, folder: Path, every: float):
        self.folder = folder
        self._every = every
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self._last >= self._every

    def save(self, tree: Any, facts: Mapping[str, Any]) -> None:
        """Save a tree of arrays and JSON values; in a program of several processes, the first one writes."""
        leaves = [np.asarray(leaf) for leaf in processes.fetch([_plain(leaf) for leaf in jax.tree.leaves(tree)])]
        if processes.is_first():
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            before = self._files()
            number = int(before[-1].stem) + 1 if before else 1
            write_whole(self.folder / f"{number:06}.ckpt", _packed(leaves, facts))
            for path in [*before[: 1 - _KEPT], *self.folder.glob("*.tmp")]:
                path.unlink(missing_ok=True)
        self._last = time.monotonic()

    def load(self) -> Saved | None:
        """The newest one that is whole; None if there never was one. Refused if those that are there are damaged."""
        damaged: list[str] = []
        for path in reversed(self._files()):
            try:
                found = Saved(path, *_unpacked(path.read_bytes()))
            except (OSError, ValueError) as error:
                damaged.append(f"the checkpoint {path} is damaged ({error})")
                continue
            if damaged and processes.is_first():
                print(f"{damaged[0]}; going on from the one before it", file=sys.stderr)
            return found
        if damaged:
            raise UsageError(f"{damaged[0]}, and none before it is whole; delete {self.folder}, and begin again")
        return None

    def clear(self) -> None:
        """Remove all of them, and the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.ckpt") if path.stem.isdigit())


def like(saved: Saved, tree: Any) -> Any:
    """The saved tree, as host arrays and PRNG keys; refused where its shapes and dtypes are not those of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [(leaf.shape, leaf.dtype.itemsize) for leaf in map(_plain, leaves)]
    if shapes != [(leaf.shape, leaf.dtype.itemsize) for leaf in saved.leaves]:
        raise UsageError(f"the checkpoint {saved.path} is of another net; delete it, and begin again")
    return jax.tree.unflatten(structure, map(_as, saved.leaves, leaves))


def _packed(leaves: list[np.ndarray], facts: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    stored = {str(number): leaf for number, leaf in enumerate(leaves)}
    told = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez(buffer, allow_pickle=False, **stored, **{_FACTS: told})
    content = buffer.getvalue()
    return content + hashlib.sha256(content).digest()


def _unpacked(content: bytes) -> tuple[list[np.ndarray], dict[str, Any]]:
    content, digest = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its SHA-256 is another one")
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        leaves = [stored[str(number)] for number in range(len(stored.files) - 1)]
        return leaves, json.loads(stored[_FACTS].tobytes())


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _as(stored: np.ndarray, leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(jax.numpy.asarray(stored), impl=jax.random.key_impl(leaf))
    return stored.view(leaf.dtype)  # NumPy stores bfloat16 as bytes
