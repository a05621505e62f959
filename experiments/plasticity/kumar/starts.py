"""Where kernels and biases start: PyTorch's default, ours, and those that tell what in ours matters.

    name                    kernel after a link                                   linear   orthogonal   scale kept
    pytorch                 uniform +-1/sqrt(fan_in), biases too                  no       no           no
    ours                    looks-linear, else variance-preserving; biases 0      yes      yes          yes
    variance_preserving     gain(link) Q                                          no       yes          yes
    orthogonal              Q, orthonormal columns                                no       yes          no
    shuffled                ours, with a random sign of each mirrored row:        no       yes          yes
                            a unit starts as z or as |z|
    normal                  N(0, gain(link)^2 / fan_in)                           no       no           yes

Biases are 0 in all but pytorch. All but pytorch and normal have an orthogonal first layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from linked_jax import Link, default_kernel_init, gain, looks_linear, variance_preserving
from linked_jax.initializers import Initializer

Start = Callable[[Link, bool], tuple[Initializer, Callable[..., Array]]]
"""(link, whether it is the first layer) -> init(key, shape, dtype) of the kernel, init(key, shape, dtype, fan_in=) of
the bias."""
_identity = Link((lambda z: z,))


def pytorch(link: Link, is_first: bool) -> tuple[Initializer, Callable[..., Array]]:
    """torch.nn.Linear's and Conv2d's own start: U(-b, b) with b = 1 / sqrt(fan_in), of kernels and of biases."""
    del link, is_first

    def bias(key: PRNGKeyArray, shape: Sequence[int], dtype: Any, *, fan_in: int) -> Float[Array, " c"]:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), bias


def _zeros(_key: PRNGKeyArray, shape: Sequence[int], dtype: Any, *, fan_in: int) -> Float[Array, " c"]:
    del fan_in
    return jnp.zeros(shape, dtype)


def _after(kernel_init: Callable[[Link], Initializer]) -> Start:
    return lambda link, is_first: (_orthogonal(link) if is_first else kernel_init(link), _zeros)


def _orthogonal(_link: Link) -> Initializer:
    return variance_preserving(_identity)


def _shuffled(link: Link) -> Initializer:
    """The looks-linear kernel [a O | -a O] of a mirror link with [a O | s a O], s a random sign of each row."""
    start = looks_linear(link)

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "*window d_c c_out"]:
        of_kernel, of_signs = jax.random.split(key)
        plain, mirrored = jnp.split(start(of_kernel, shape, dtype), 2, axis=-2)
        signs = jax.random.rademacher(of_signs, (shape[-2] // 2, 1), dtype)
        return jnp.concatenate([plain, signs * mirrored], axis=-2)

    return init


def _normal(link: Link, is_first: bool) -> tuple[Initializer, Callable[..., Array]]:
    scale = gain(_identity if is_first else link) ** 2
    return jax.nn.initializers.variance_scaling(scale, "fan_in", "normal"), _zeros


STARTS: dict[str, Start] = {
    "pytorch": pytorch,
    "ours": _after(default_kernel_init),
    "variance_preserving": _after(variance_preserving),
    "orthogonal": _after(_orthogonal),
    "shuffled": _after(_shuffled),
    "normal": _normal,
}
