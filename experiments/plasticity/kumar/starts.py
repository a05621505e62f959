"""Where kernels and biases start: PyTorch's default, ours, and those that tell what in ours matters.

    name                    kernel after a link                                   linear   orthogonal   scale kept
    pytorch                 uniform +-1/sqrt(fan_in), biases too                  no       no           no
    ours                    looks-linear, else variance-preserving; biases 0      yes      yes          yes
    variance_preserving     gain(link) Q                                          no       yes          yes
    orthogonal              Q, orthonormal columns                                no       yes          no
    shuffled                ours, with a random sign of each mirrored row:        no       yes          yes
                            a unit starts as z or as |z|
    normal                  N(0, gain(link)^2 / fan_in)                           no       no           yes
    pytorch_unbiased        pytorch, with biases of 0                             no       no           no
    normal_biased           normal, with the biases of pytorch                    no       no           yes

Biases are 0 where nothing is said of them. Where Q is, the first layer is orthogonal too.
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


def _uniform(_link: Link, _is_first: bool) -> Initializer:
    """The kernel of torch.nn.Linear and Conv2d: U(-b, b) with b = 1 / sqrt(fan_in)."""
    return jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _uniform_bias(key: PRNGKeyArray, shape: Sequence[int], dtype: Any, *, fan_in: int) -> Float[Array, " c"]:
    """The bias of the same, with the same b."""
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def _zeros(_key: PRNGKeyArray, shape: Sequence[int], dtype: Any, *, fan_in: int) -> Float[Array, " c"]:
    del fan_in
    return jnp.zeros(shape, dtype)


def _after(kernel_init: Callable[[Link], Initializer]) -> Start:
    """An orthogonal first layer, and this after a link."""
    return _pair(lambda link, is_first: _orthogonal(link) if is_first else kernel_init(link), _zeros)


def _pair(kernel: Callable[[Link, bool], Initializer], bias: Callable[..., Array]) -> Start:
    return lambda link, is_first: (kernel(link, is_first), bias)


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


def _normal(link: Link, is_first: bool) -> Initializer:
    return jax.nn.initializers.variance_scaling(gain(_identity if is_first else link) ** 2, "fan_in", "normal")


STARTS: dict[str, Start] = {
    "pytorch": _pair(_uniform, _uniform_bias),
    "ours": _after(default_kernel_init),
    "variance_preserving": _after(variance_preserving),
    "orthogonal": _after(_orthogonal),
    "shuffled": _after(_shuffled),
    "normal": _pair(_normal, _zeros),
    "pytorch_unbiased": _pair(_uniform, _zeros),
    "normal_biased": _pair(_normal, _uniform_bias),
}
