"""A row of a table: an activation, the width that it gets, and batch norm or none. And where its kernels start."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

from experiments.engine.errors import UsageError
from linked_jax import (
    ChannelPReLU,
    Link,
    LinkedPReLU,
    activation_arity,
    default_kernel_init,
    get_activation,
    looks_linear,
    relu,
    variance_preserving,
)
from linked_jax.initializers import Initializer

Norm = Literal["none", "batch"]
Activation = Link | ChannelPReLU | LinkedPReLU
identity = Link((lambda z: z,))


@dataclasses.dataclass(frozen=True)
class Row:
    """An activation as the tables name it: NAME, NAME_sqrt2, NAME_bn or NAME_sqrt2_bn; `bn` is relu_bn.

    >>> from experiments.engine.rows import Row
    >>> Row.parse("relu_sqrt2").units(4), Row.parse("bn").name
    (5, 'relu_bn')
    """

    act: str  # a name of `linked_jax.get_activation`
    sqrt2: bool = False  # int(width * sqrt(2)) units: a plain net with about the parameters of a linked one
    norm: Norm = "none"  # "batch" puts batch norm before every activation

    @classmethod
    def parse(cls, name: str) -> "Row":
        """Read a name; the error has the nearest activation and the list."""
        act = "relu_bn" if name == "bn" else name
        act, norm = (act.removesuffix("_bn"), "batch") if act.endswith("_bn") else (act, "none")
        row = cls(act.removesuffix("_sqrt2"), act.endswith("_sqrt2"), norm)
        try:
            activation_arity(row.act)
        except ValueError as error:
            raise UsageError(f"--act: {error}; add _sqrt2 or _bn for those rows") from error
        return row

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        return self.act + "_sqrt2" * self.sqrt2 + "_bn" * (self.norm == "batch")

    def units(self, width: int) -> int:
        """The width, or int(width * sqrt(2)) to match a linked net's parameters."""
        return int(width * math.sqrt(2)) if self.sqrt2 else width

    def activation(self, features: int) -> Activation:
        """A link, or a new module with parameters for that many features."""
        return get_activation(self.act, features)

    def plain(self, features: int) -> Activation:
        """The same without its mirror: relu for lk_relu. Links that are no mirror of a named one get relu."""
        name = self.act.removeprefix("lk_")
        return get_activation(name, features) if activation_arity(name) == 1 else relu


InitName = Literal["auto", "looks_linear", "glorot", "glorot_normal", "he"]
KernelInit = Callable[..., Initializer]
INITS: dict[str, KernelInit] = {
    "auto": default_kernel_init,
    "looks_linear": looks_linear,
    "glorot": lambda _link, **_: jax.nn.initializers.glorot_uniform(),
    "glorot_normal": lambda _link, **_: jax.nn.initializers.glorot_normal(),
    "he": lambda _link, **_: jax.nn.initializers.he_normal(),
}
"""Name -> (link, strides=1) -> init(key, shape, dtype) for the layer after that link."""


def stem_init(name: str) -> Initializer:
    """For the layer that sees the image: few channels in and many out, where no isometry exists."""
    return variance_preserving(identity) if name in ("auto", "looks_linear") else INITS[name](identity)


def check_init(name: str, row: Row) -> None:
    """Refuse an initialiser that its link does not allow."""
    try:
        INITS[name](row.activation(1).link)
    except ValueError as error:
        raise UsageError(f"--init {name} does not fit --act {row.act}: {error}; take --init auto") from error


def batch_norm(width: int, norm: Norm, rngs: nnx.Rngs) -> nnx.BatchNorm | None:
    """Batch norm with Keras' defaults, or None."""
    return nnx.BatchNorm(width, momentum=0.99, epsilon=1e-3, rngs=rngs) if norm == "batch" else None


def normalised(z: jax.Array, norm: Any, train: bool) -> jax.Array:
    """z after a norm or a dropout in its mode; z itself for None."""
    if norm is None:
        return z
    taken = inspect.signature(type(norm).__call__).parameters
    return norm(z, **{mode: not train for mode in ("use_running_average", "deterministic") if mode in taken})
