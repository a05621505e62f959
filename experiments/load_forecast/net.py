"""A simple recurrent net that forecasts several hours at once, with any of four cells.

h_t = f(W x_t + U h_{t-1} + b),   h_0 = 0,   forecast = V h_T + c
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from experiments.load_forecast.series import FEATURES, HORIZON
from linked_jax import lk_relu
from linked_jax.initializers import looks_linear
from linked_jax.remedies.drelu import drelu


class Cell(NamedTuple):
    """What tells cells apart.

    Attributes:
      f: pre-activations (..., branches*C) -> state (..., states*C).
      branches: pre-activations of a unit.
      states: values of a unit.
    """

    f: Callable[[Any], Any]
    branches: int = 1
    states: int = 1


CELLS = {
    "tanh": Cell(jnp.tanh),
    "relu": Cell(jax.nn.relu),
    "lk_relu": Cell(lk_relu, states=2),
    "drelu": Cell(lambda z: drelu(*jnp.split(z, 2, axis=-1)), branches=2),
}


def recurrent_kernel(cell: Cell) -> Callable[..., Array]:
    """How U starts: orthogonal for each branch; after a link so that it undoes the link, z_t = W x_t + O z."""
    if cell.states == 2:
        return looks_linear(lk_relu)
    orthogonal = nnx.initializers.orthogonal()

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        square = (shape[0], shape[1] // cell.branches)
        return jnp.concatenate([orthogonal(k, square, dtype) for k in jax.random.split(key, cell.branches)], axis=1)

    return init


class RecurrentNet(nnx.Module):
    """x (N, T, features) -> forecasts (N, horizon), by so many units of a cell of `CELLS`."""

    def __init__(self, name: str, units: int, *, features: int = FEATURES, horizon: int = HORIZON, rngs: nnx.Rngs):
        cell = CELLS[name]
        self.f, self.states = cell.f, cell.states * units
        self.input = nnx.Linear(features, cell.branches * units, rngs=rngs)
        self.recurrent = nnx.Linear(
            self.states, cell.branches * units, use_bias=False, kernel_init=recurrent_kernel(cell), rngs=rngs
        )
        self.read_out = nnx.Linear(self.states, horizon, rngs=rngs)

    def __call__(self, x: Float[Array, "n t features"]) -> Float[Array, "n horizon"]:
        """The forecasts after the last step."""
        kernel = self.recurrent.kernel[...]

        def step(h, z):
            return self.f(z + h @ kernel), None

        h, _ = jax.lax.scan(step, jnp.zeros((len(x), self.states), x.dtype), jnp.moveaxis(self.input(x), 1, 0))
        return self.read_out(h)


def parameters(name: str, units: int, *, features: int = FEATURES, horizon: int = HORIZON) -> int:
    """How many numbers a net learns.

    >>> from experiments.load_forecast.net import parameters
    >>> parameters("tanh", 2, features=3, horizon=5)  # W 6, U 4, b 2, V 10, c 5
    27
    """
    cell = CELLS[name]
    return units * cell.branches * (features + cell.states * units + 1) + (cell.states * units + 1) * horizon


def units_for(name: str, count: int) -> int:
    """The number of units whose net has about that many parameters."""
    return min(range(1, 2 + int(count**0.5)), key=lambda units: abs(parameters(name, units) - count))
