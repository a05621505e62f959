"""A training step of a net of the experiments, to be timed."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import loop, training
from experiments.engine.optimizers import adam
from experiments.engine.parallel import ONE_DEVICE, Placement

_ADAM = adam(1e-3)  # another one would compile anew


def noise(size: int, channels: int, images: int) -> data_lib.Dataset:
    """So many square images of noise, of ten classes."""
    rng = np.random.default_rng(0)
    x = jax.numpy.asarray(rng.integers(0, 256, (images, size, size, channels), np.uint8))
    y = jax.numpy.asarray(rng.integers(0, 10, images).astype(np.int32))
    return data_lib.Dataset("noise", 10, x, y, x[:1], y[:1], "none")


class Step:
    """The step that the experiments run, with Adam, always on the same images; of all models at once."""

    def __init__(
        self, models: Sequence[nnx.Module], data: data_lib.Dataset, batch_size: int, place: Placement = ONE_DEVICE
    ):
        self.plan = training.Plan(_ADAM, epochs=1, batch_size=batch_size, place=place)
        self.loop, snapshot = training.start(models, self.plan)
        self.carry, (self.data, self.lr) = snapshot.arrays, self.plan.arrays(data)
        batch, key = np.arange(batch_size, dtype=np.int32), jax.random.key(0)
        if place.stacked:
            batch, key = np.tile(batch, (len(models), 1)), jax.random.split(key, len(models))
        self.batch, self.key = place.batch(batch), place.of_seeds(key)

    def compile(self) -> Any:
        """The compiled program."""
        return loop.step.lower(*self._arguments()).compile()

    def take(self) -> Any:
        """One step, and its loss."""
        self.carry, loss = loop.step(*self._arguments())
        return loss

    def _arguments(self) -> tuple[Any, ...]:
        return self.loop, self.carry, self.data, self.batch, self.key, np.int32(0), self.lr
