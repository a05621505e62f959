"""Where the first NaN or infinity of a training run was made: its step, and the operation in the net."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from experiments.engine.data import scale
from experiments.engine.loop import Carry, Loop, advance
from experiments.engine.processes import fetch
from linked_jax.probe import probe


class Watch:
    """The updates since a carry that was good, so that they can be done again; of a loop of `training.CrossEntropy`.

    Of the epoch `done` updates came before it.
    """

    def __init__(self, carry: Carry, done: int):
        self._good, self._done = _copied(carry), done
        self._batches: list[np.ndarray] = []
        self._losses: list[Array] = []

    def add(self, batches: np.ndarray, losses: Array) -> None:
        """Note updates: their batches and losses, as `advance` takes and gives them."""
        self._batches.append(batches)
        self._losses.append(losses)

    def not_finite(self) -> list[int]:
        """The places of the seeds of which a loss is not finite."""
        return np.flatnonzero(~np.isfinite(self._seen()).all(axis=1)).tolist()

    def explain(self, loop: Loop, data: Any, key: Array, lr: Any, place: int) -> str:
        """In which step of the epoch a seed first had what is not finite, and what made it.

        The updates are done again, one by one, and the net is evaluated operation by operation where they go wrong. Of
        several processes none has all arrays: there it is the first loss that is not finite.
        """
        if jax.process_count() > 1:
            losses = self._seen()[place]
            first = int(np.isfinite(losses).argmin())
            return f"step {self._done + first + 1}: the loss is {losses[first]}"
        carry, number = _copied(self._good), self._done
        for batch in (batches[..., i : i + 1, :] for batches in self._batches for i in range(batches.shape[-2])):
            before = _copied(carry)
            carry, losses = advance(loop, carry, data, batch, key, first=number, lr=lr)
            value = float(_by_seed(losses)[place, 0])
            number += 1
            if not np.isfinite(value):
                origin = _origin(loop, before, data, batch, key, number - 1, place)
                return f"step {number}: the loss is {value}; {origin}"
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(_of_seed(loop, carry.parameters, place))):
                return f"step {number}: the loss is {value:.4g}, and its gradient makes parameters that are not finite"
        return f"step {number}: a loss was not finite, but is when it is computed again"

    def _seen(self) -> np.ndarray:
        """The losses since, (seeds, updates)."""
        return np.concatenate([_by_seed(losses) for losses in jax.device_get(fetch(self._losses))], axis=1)


@jax.jit
def _copied(carry: Carry) -> Carry:
    return jax.tree.map(jnp.copy, carry)


def _by_seed(losses: Any) -> np.ndarray:
    """(seeds, updates)."""
    return np.atleast_2d(np.asarray(losses))


def _of_seed(loop: Loop, tree: Any, place: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[place], tree) if loop.place.stacked else tree


def _origin(loop: Loop, carry: Carry, data: Any, batch: np.ndarray, key: Array, number: int, place: int) -> str:
    """What in the net is not finite first, in the forward pass of an update."""
    images, _, inputs = data
    loss: Any = loop.loss
    index, of_epoch = _of_seed(loop, (batch, key), place)
    x = loss.images(images[index[0]], jax.random.fold_in(of_epoch, number))

    def call(variables: Any, x: Array) -> Array:
        return nnx.merge(loss.graph, *variables, copy=True)(scale(x, inputs), train=True)

    report = probe(_of_seed(loop, (carry.parameters, carry.state), place), [x], call=call)
    return str(report.not_finite_first or "all activations are finite")
