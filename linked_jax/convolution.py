"""A convolution that is fast on a CPU as well, and its derivatives too. Elsewhere it is `jax.lax`'s.

    y = x * K,    dL/dx = g * flipped(K),    dL/dK = correlation of x and g,    g = dL/dy

Wide layers: XLA's gradient of a kernel is slower on a CPU than the convolution. Here it is one matrix product for every
few images, of x and of g at all shifts of the window, side by side:

    dL/dK = x' [g shifted by tap 1, ..., g shifted by tap T]

Narrow layers: for few channels the product of patches and kernel is too thin to be fast. Here B pixels of a row, with
the pixels around them, are one patch, and the kernel is a band of copies of K; x * K and both gradients are products,
which are as fast within a loop, where XLA's convolutions on a CPU are many times slower. Outside of one they are faster
too, unless the patches are many megabytes (results/benchmarks/convolution.json):

    Y = patches(x) band(K),    dL/dX = patches(g) band(flipped(K)),    dL/dband(flipped(K)) = patches(g)' X

A window of one pixel: a matrix product of the pixels and K, of every s-th of them at strides s.

The derivative in forward mode is written as the transpose of the gradient, so transposing it gives the gradient back,
and no rule of JAX is lost: both modes of any order, vmap and checkpoint see plain JAX. (Its `jet` refuses every custom
derivative, that of `jax.nn.relu` too. For it, and to export from a CPU to another platform, pass
conv_general_dilated=jax.lax.conv_general_dilated to a layer.)
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

NARROW = 36  # channels in times channels out, at most
WIDE = 96  # channels in, at least
_PIXELS = 2  # B; these are measured: python -m benchmarks.convolution
_IMAGES = 4  # a product; more take more memory and are slower

Pads = tuple[tuple[int, int], ...]


def conv_general_dilated(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "..."]:
    """`jax.lax.conv_general_dilated`, in a form that is fast on a CPU where there is one.

    Args:
      lhs: images, (N, *space, C).
      rhs: the kernel, (*window, C, C_out).
      window_strides: as for `jax.lax`.
      padding: as for `jax.lax`.
      **options: all else that `jax.lax.conv_general_dilated` takes.

    Returns:
      What `jax.lax` gives, and on a CPU the same sums in another order: where dilations are 1, there is one group, axes
      lie as Flax has them, and the window is one pixel, or strides are 1 and channels are few (in times out at most
      36) or many (96 in, and one device). With few channels a number that is not finite makes NaN of one pixel more
      on each side.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.convolution import conv_general_dilated
      >>> conv = nnx.Conv(192, 64, (3, 3), conv_general_dilated=conv_general_dilated, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((8, 16, 16, 192))).shape
      (8, 16, 16, 64)
    """

    def plain(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

    pads = _covered(lhs, rhs, window_strides, padding, options) if _on_cpu() else None
    if pads is not None and math.prod(rhs.shape[:-2]) == 1:
        return pointwise(lhs, rhs, window_strides, options.get("precision"))
    narrow, wide = math.prod(rhs.shape[-2:]) <= NARROW, rhs.shape[-2] >= WIDE and not _several_devices()
    if pads is None or not (narrow or wide):
        return plain(lhs, rhs)
    precision, y = options.get("precision"), jax.eval_shape(plain, lhs, rhs)

    def by_dx(dx: Array, kernel: Array) -> Array:
        """Linear in dx."""
        return _transpose(lambda g: image_gradient(g, kernel, pads, precision), y)(dx) if narrow else plain(dx, kernel)

    def by_dkernel(x: Array, dkernel: Array) -> Array:
        """Linear in dkernel."""

        def gradient(g: Array) -> Array:
            if narrow:
                return _transpose(lambda kernel: image_gradient(g, kernel, pads, precision), dkernel)(x)
            return kernel_gradient(x, g, pads, precision)

        return _transpose(gradient, y)(dkernel)

    @jax.custom_jvp
    def fast_convolution(x: Array, kernel: Array) -> Array:
        return by_blocks(x, kernel, pads, precision) if narrow else plain(x, kernel)

    fast_convolution.defjvps(lambda dx, _, x, kernel: by_dx(dx, kernel), lambda dk, _, x, kernel: by_dkernel(x, dk))
    return fast_convolution(lhs, rhs)


def _transpose(linear: Callable[[Array], Array], argument: Any) -> Callable[[Array], Array]:
    return lambda ct: jax.linear_transpose(linear, jax.ShapeDtypeStruct(argument.shape, argument.dtype))(ct)[0]


def image_gradient(g: Array, kernel: Array, pads: Pads, precision: Any = None) -> Array:
    """dL/dx of y = x * K from g = dL/dy, for few channels: a convolution of g with the flipped kernel."""
    around = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape, pads, strict=False))
    return by_blocks(g, jnp.flip(kernel, range(kernel.ndim - 2)).swapaxes(-1, -2), around, precision)


def pointwise(x: Array, kernel: Array, strides: Sequence[int], precision: Any = None) -> Array:
    """x * K for a window of one pixel."""
    x = x[:, *(slice(None, None, stride) for stride in strides)]
    return jnp.matmul(x, kernel.reshape(kernel.shape[-2:]), precision=precision)


def kernel_gradient(x: Array, g: Array, pads: Pads, precision: Any = None) -> Array:
    """dL/dK of y = x * K from g = dL/dy: for every few images one product of x and all shifts of g."""
    c, c_out = x.shape[-1], g.shape[-1]
    window = [n + sum(pad) - m + 1 for n, m, pad in zip(x.shape[1:-1], g.shape[1:-1], pads, strict=True)]
    around = [(k - 1 - low, k - 1 - high) for k, (low, high) in zip(window, pads, strict=True)]
    shifts = [
        tuple(slice(k - 1 - t, k - 1 - t + n) for k, t, n in zip(window, tap, x.shape[1:-1], strict=True))
        for tap in itertools.product(*map(range, window))
    ]

    def of_images(x: Array, g: Array) -> Array:
        g = jnp.pad(g, [(0, 0), *around, (0, 0)])
        shifted = jnp.concatenate([g[:, *shift] for shift in shifts], axis=-1)
        return jnp.matmul(x.reshape(-1, c).T, shifted.reshape(-1, shifted.shape[-1]), precision=precision)

    def add(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
        return total + of_images(*images), None

    at_once = math.gcd(len(x), _IMAGES)
    parts = x.reshape(-1, at_once, *x.shape[1:]), g.reshape(-1, at_once, *g.shape[1:])
    total, _ = lax.scan(add, jnp.zeros((c, len(shifts) * c_out), x.dtype), parts)
    return jnp.moveaxis(total.reshape(c, *window, c_out), 0, -2)


def by_blocks(x: Array, kernel: Array, pads: Pads, precision: Any = None) -> Array:
    """x * K for few channels: one product of patches, each of B pixels of a row and those around them, and a band."""
    *window, c, c_out = kernel.shape
    out = [n + sum(pad) - k + 1 for n, pad, k in zip(x.shape[1:-1], pads, window, strict=True)]
    blocks, seen = -(-out[-1] // _PIXELS), _PIXELS + window[-1] - 1
    (*around, (low, _)), width = pads, x.shape[-2]
    x = jnp.pad(x, [(0, 0), *around, (low, blocks * _PIXELS - _PIXELS + seen - low - width), (0, 0)])
    rows = jnp.stack([x[..., b * _PIXELS : b * _PIXELS + seen, :] for b in range(blocks)], axis=-3)
    rows = rows.reshape(*rows.shape[:-2], seen * c)
    taps = itertools.product(*map(range, window[:-1]))
    near = [[slice(t, t + n) for t, n in zip(tap, out[:-1], strict=True)] for tap in taps]
    patches = jnp.concatenate([rows[:, *some] for some in near], axis=-1)

    shifts = jnp.stack([jnp.eye(seen, _PIXELS, -t, dtype=kernel.dtype) for t in range(window[-1])])
    band = jnp.einsum("tsp,...tio->...sipo", shifts, kernel, precision="highest")  # row, pixel seen, in, pixel, out
    y = jnp.matmul(patches, band.reshape(-1, _PIXELS * c_out), precision=precision)
    return y.reshape(len(x), *out[:-1], -1, c_out)[..., : out[-1], :]


def _covered(x: Any, kernel: Any, strides: Sequence[int], padding: Any, options: dict[str, Any]) -> Pads | None:
    """The padding of a convolution that has a form here; None of any other."""
    numbers = options.get("dimension_numbers")
    if numbers is None or not 3 <= x.ndim == kernel.ndim or not x.size:
        return None
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, numbers)
    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    groups = options.get("feature_group_count", 1), options.get("batch_group_count", 1)
    if (
        numbers != lax.conv_dimension_numbers(x.shape, kernel.shape, _as_in_flax(x.ndim))
        or max(*dilations, *groups) > 1
        or (max(strides) > 1 and math.prod(kernel.shape[:-2]) > 1)
        or x.dtype != kernel.dtype
        or any(jax.typeof(x).sharding.spec)  # split on an Explicit mesh, where a reshape may have no rule
        or options.get("out_sharding") is not None
        or options.get("preferred_element_type") not in (None, x.dtype)
    ):
        return None
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:-2], strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return pads if all(0 <= p < k for k, pad in zip(kernel.shape, pads, strict=False) for p in pad) else None


def _as_in_flax(ndim: int) -> tuple[str, str, str]:
    space = "DHW"[3 - (ndim - 2) :]
    return f"N{space}C", f"{space}IO", f"N{space}C"


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _several_devices() -> bool:
    """Images may lie on several devices, and a loop over them would bring all to each."""
    return jax.device_count() > 1
