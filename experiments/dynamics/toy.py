"""The toy: two moons in the plane, and a net with one hidden layer."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from linked_jax import LinkedLinear, get_activation


class Moons(NamedTuple):
    """Points in the plane, and the half circle, 0 or 1, that each is of."""

    points: Float[Array, "n 2"]
    labels: Int[Array, " n"]

    @property
    def identity(self) -> dict[str, str]:
        """What a record says of its data."""
        fingerprint = hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in self)).hexdigest()[:16]
        return {"name": "moons", "fingerprint": fingerprint, "description": str(self)}

    def __str__(self) -> str:
        return f"two moons: {len(self.labels)} points, coordinates within ±{np.abs(self.points).max():.1f}"


def moons() -> Moons:
    """200 points of two half circles, centred, and five times as large as usual: linked nets need no standard scale."""
    from sklearn.datasets import make_moons  # seconds

    points, labels = map(np.asarray, make_moons(200, noise=0.15, random_state=0))
    return Moons(jnp.asarray(5 * (points - points.mean(axis=0)), jnp.float32), jnp.asarray(labels, jnp.int32))


def unit_columns(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """A kernel whose columns have random directions and length 1."""
    kernel = jax.random.normal(key, shape, dtype)
    return kernel / jnp.linalg.norm(kernel, axis=0)


class Net(nnx.Module):
    """z = W x + b, logits = K f(z) + c; W has columns of length 1, b is the same for all units."""

    def __init__(self, units: int, act: str, bias: float, *, rngs: nnx.Rngs):
        constant = nnx.initializers.constant(bias)
        self.hidden = nnx.Linear(2, units, kernel_init=unit_columns, bias_init=constant, rngs=rngs)
        self.read_out = LinkedLinear(units, 2, link=get_activation(act, units), rngs=rngs)

    def __call__(self, x: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
        """x (n, 2) -> logits (n, 2)."""
        return self.read_out(self.hidden(x))


@dataclasses.dataclass(frozen=True)
class Toy:
    """What determines a run, beside its activation and its seed."""

    bias: float = -10.0
    """Where the bias of every hidden unit starts; from -10 down every ReLU is dead on all the data."""
    units: int = 8
    """Hidden units."""
    steps: int = 10_000
    """Updates, each on the whole set."""
    lr: float = 0.1
    """Learning rate."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd: a unit moves as far as its gradient says. adam rescales every gradient that is not exactly zero."""

    def __str__(self) -> str:
        return f"{self.units} units, first biases {self.bias:g}, {self.optimizer} at {self.lr:g}"

    def net(self, act: str, seed: int) -> Net:
        """A net before its first step."""
        return Net(self.units, act, self.bias, rngs=nnx.Rngs(seed))

    def restore(self, line: Mapping[str, Any]) -> Net:
        """The net of a line that has parameters."""
        graph, state = nnx.split(self.net(line["act"], line["seed"]))
        leaves = [jnp.asarray(values, jnp.float32) for values in line["parameters"]]
        return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
