"""A convolution whose derivative for the kernel is fast on a CPU as well. Values are `jax.lax`'s, everywhere.

    y = x * K,    dy = dx * K + x * dK

XLA's gradient of a kernel is several times as slow on a CPU as the convolution. Here x * dK is written so that its
transpose, which is that gradient, is one matrix product for every few images:

    (x * dK)[p] = sum_t z_t[p + t],    z = x [dK_1, ..., dK_T]      T taps side by side

No derivative rule of JAX is lost: forward and reverse mode, of any order, vmap, jet and checkpoint see plain JAX.
Other platforms, and shapes for which XLA's own is as fast, get XLA's own.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_AT_ONCE = 4  # images a product: more take more memory and are slower, see benchmarks/kernel_gradient.py
_LEAST_CHANNELS = 32  # of inputs; below, XLA's own gradient is as fast

Pads = tuple[tuple[int, int], ...]


def conv_general_dilated(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "..."]:
    """`jax.lax.conv_general_dilated`, with a derivative for the kernel that is fast on a CPU as well.

    Args:
      lhs: images, (N, *space, C).
      rhs: the kernel, (*window, C, C_out).
      window_strides: as for `jax.lax`.
      padding: as for `jax.lax`.
      **options: all else that `jax.lax.conv_general_dilated` takes.

    Returns:
      The value that `jax.lax` gives. The derivative for the kernel is the same sum in another order, where strides
      and dilations are 1, there is one group, and axes lie as Flax has them; else it is `jax.lax`'s.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.convolution import conv_general_dilated
      >>> conv = nnx.Conv(64, 64, (3, 3), conv_general_dilated=conv_general_dilated, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((8, 16, 16, 64))).shape
      (8, 16, 16, 64)
    """
    pads = _plain(lhs, rhs, window_strides, padding, options)
    if pads is None:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)

    def conv(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

    def kernel_part(x: Array, kernel: Array) -> Array:
        return lax.platform_dependent(x, kernel, cpu=lambda x, k: _tap_by_tap(x, k, pads), default=conv)

    @jax.custom_jvp
    def with_fast_derivative(x: Array, kernel: Array) -> Array:
        return conv(x, kernel)

    with_fast_derivative.defjvps(
        lambda dx, _, x, kernel: conv(dx, kernel),
        lambda dkernel, _, x, kernel: kernel_part(x, dkernel),
    )
    return with_fast_derivative(lhs, rhs)


def _plain(lhs: Any, rhs: Any, strides: Sequence[int], padding: Any, options: dict[str, Any]) -> Pads | None:
    """The padding of a convolution that this file covers and that is worth it; None of any other."""
    numbers = options.get("dimension_numbers")
    if numbers is None or lhs.ndim != rhs.ndim or lhs.ndim < 3 or not lhs.size:
        return None
    axes = tuple(range(1, lhs.ndim - 1))
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
    images, kernels = (0, lhs.ndim - 1, *axes), (lhs.ndim - 1, lhs.ndim - 2, *range(lhs.ndim - 2))
    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    ours = (
        (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (images, kernels, images)
        and max(*strides, *dilations, options.get("feature_group_count", 1), options.get("batch_group_count", 1)) == 1
        and lhs.dtype == rhs.dtype
        and not _split()
        and lhs.shape[-1] >= _LEAST_CHANNELS
        and math.prod(rhs.shape[:-2]) > 1
    )
    if not ours:
        return None
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:-1], rhs.shape[:-2], strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    covered = all(0 <= p < k for k, pad in zip(rhs.shape, pads, strict=False) for p in pad)
    return pads if covered else None


def _split() -> bool:
    """Whether images may lie on several devices; a loop over them would bring all to each."""
    return jax.device_count() > 1


def _tap_by_tap(x: Array, kernel: Array, pads: Pads) -> Array:
    """x * K, linear in K, and made for its transpose: pad, take all shifts, one product with x."""
    *window, c, c_out = kernel.shape
    taps = list(itertools.product(*map(range, window)))
    side_by_side = jnp.moveaxis(kernel.reshape(-1, c, c_out), 1, 0).reshape(c, -1)
    first = [k - 1 - low for k, (low, _) in zip(window, pads, strict=True)]
    sizes = [n + sum(pad) - k + 1 for n, k, pad in zip(x.shape[1:-1], window, pads, strict=True)]
    crop = [slice(begin, begin + size) for begin, size in zip(first, sizes, strict=True)]

    def some_images(x: Array) -> Array:
        z = jnp.matmul(x.reshape(-1, c), side_by_side).reshape(*x.shape[:-1], -1)
        y = 0
        for tap, z_t in zip(taps, lax.split(z, [c_out] * len(taps), axis=z.ndim - 1), strict=True):
            around = [(k - 1 - t, t, 0) for k, t in zip(window, tap, strict=True)]
            y = y + lax.pad(z_t, jnp.zeros((), z.dtype), [(0, 0, 0), *around, (0, 0, 0)])
        return y[:, *crop]

    at_once = math.gcd(len(x), _AT_ONCE)
    y = lax.map(some_images, x.reshape(-1, at_once, *x.shape[1:]))
    return y.reshape(len(x), *y.shape[2:])
