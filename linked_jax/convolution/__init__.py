"""A convolution that is fast on a CPU as well, and its derivatives too. Elsewhere it is `jax.lax`'s.

    y = x * K,    dL/dx = g * flipped(K),    dL/dK = correlation of x and g,    g = dL/dy

Few channels: `banded.py`. Many: `winograd.py` for windows of 3x3, `patched.py` at strides. A window of one pixel: a
matrix product of the pixels and K, of every s-th of them at strides s.

The derivative in forward mode is written as the transpose of the gradient, so transposing it gives the gradient back,
and no rule of JAX is lost: both modes of any order, vmap and checkpoint see plain JAX. (Its `jet` refuses every custom
derivative, that of `jax.nn.relu` too. For it, to export from a CPU to another platform and to count FLOPs, trace within
`plain_convolutions`.)
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from linked_jax.convolution import banded, patched, winograd
from linked_jax.convolution.geometry import Geometry

NARROW, WIDE, WIDE_FORWARD, STRIDED = 36, 16 * 16, 32 * 16, 48 * 48  # channels in times out, at most, and at least
"""Measured: python -m benchmarks.convolution. From WIDE on the gradients are faster, from WIDE_FORWARD on x * K too,
but for few small images."""
_plain = contextvars.ContextVar("plain", default=False)


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
      What `jax.lax` gives, and on a CPU the same in another order, where axes lie as Flax has them, dilations are 1,
      there is one group, and there is one of these: a window of one pixel; few channels (in times out at most 36) and
      strides of 1; a window of 3x3 in float32 or float64, at least 16 x 16 channels (below 32 x 16 in the gradients
      alone) and one device; strides, at least 48 x 48 channels and one device. A number that is not finite may make NaN
      of one or two pixels more around it.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.convolution import conv_general_dilated
      >>> conv = nnx.Conv(192, 64, (3, 3), conv_general_dilated=conv_general_dilated, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((8, 16, 16, 192))).shape
      (8, 16, 16, 64)
    """

    def plain(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

    on_cpu = jax.default_backend() == "cpu" and not _plain.get()
    at = _covered(lhs, rhs, window_strides, padding, options) if on_cpu else None
    if at is not None and math.prod(at.window) == 1:
        pixels = lhs[:, *(slice(None, None, stride) for stride in at.strides)]
        # Of a matrix of pixels: in the kernel gradient XLA sums over one axis faster than over several.
        y = jnp.matmul(pixels.reshape(-1, pixels.shape[-1]), rhs.reshape(rhs.shape[-2:]), precision=at.precision)
        return y.reshape(*pixels.shape[:-1], -1)
    form = None if at is None else _form(lhs, rhs, at)
    if form is None:
        return plain(lhs, rhs)
    y = jax.eval_shape(plain, lhs, rhs)
    plain_forward = form is winograd and math.prod(rhs.shape[-2:]) < WIDE_FORWARD

    @jax.custom_jvp
    def fast_convolution(x: Array, kernel: Array) -> Array:
        return plain(x, kernel) if plain_forward else form.convolve(x, kernel, at)

    def transposed(gradient: Callable[[Array], Array], tangent: Array) -> Array:
        return jax.linear_transpose(gradient, jax.ShapeDtypeStruct(y.shape, y.dtype))(tangent)[0]

    fast_convolution.defjvps(
        lambda dx, _, x, kernel: transposed(lambda g: form.image_gradient(g, kernel, at), dx),
        lambda dkernel, _, x, kernel: transposed(lambda g: form.kernel_gradient(x, g, at), dkernel),
    )
    return fast_convolution(lhs, rhs)


@contextlib.contextmanager
def plain_convolutions() -> Iterator[None]:
    """What is traced within it has `jax.lax`'s convolutions, on a CPU too.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import LinkedConv
      >>> from linked_jax.convolution import plain_convolutions
      >>> layer, z = LinkedConv(4, 4, (3, 3), rngs=nnx.Rngs(0)), jnp.ones((2, 8, 8, 4))
      >>> with plain_convolutions():
      ...     jaxpr = jax.make_jaxpr(layer)(z)
      >>> "conv_general_dilated" in str(jaxpr)
      True
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def _form(x: Any, kernel: Any, at: Geometry) -> Any:
    """The module with the form that is fast for this convolution."""
    channels, strided = math.prod(kernel.shape[-2:]), max(at.strides) > 1
    if channels <= NARROW and not strided:
        return banded
    if channels < (STRIDED if strided else WIDE) or _several_devices() or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    if strided:
        return patched
    return winograd if at.window == winograd.WINDOW and jnp.finfo(x.dtype).bits >= 32 else None


def _covered(x: Any, kernel: Any, strides: Sequence[int], padding: Any, options: dict[str, Any]) -> Geometry | None:
    """The geometry of a convolution that may have a form here; None of any other."""
    numbers = options.get("dimension_numbers")
    is_known = all(isinstance(n, int) for n in (*x.shape, *kernel.shape))  # an export may leave the batch open
    if numbers is None or not 3 <= x.ndim == kernel.ndim or not is_known or not x.size:
        return None
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, numbers)
    space = "DHW"[5 - x.ndim :]
    as_in_flax = f"N{space}C", f"{space}IO", f"N{space}C"
    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    groups = options.get("feature_group_count", 1), options.get("batch_group_count", 1)
    if (
        numbers != lax.conv_dimension_numbers(x.shape, kernel.shape, as_in_flax)
        or max(*dilations, *groups) > 1
        or x.dtype != kernel.dtype
        or any(jax.typeof(x).sharding.spec)  # split on an Explicit mesh, where a reshape may have no rule
        or _varies(x)
        or _varies(kernel)
        or options.get("out_sharding") is not None
        or options.get("preferred_element_type") not in (None, x.dtype)
    ):
        return None
    space, window = x.shape[1:-1], kernel.shape[:-2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(space, window, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    within = all(0 <= p < k for k, pad in zip(window, pads, strict=True) for p in pad)
    at = Geometry(space, window, tuple(strides), pads, options.get("precision"))
    return at if within and min(at.outputs) > 0 else None


def _varies(x: Any) -> bool:
    """Whether its type says that it differs between the devices of a shard_map: the rules here do not keep track."""
    kind = jax.typeof(x)  # JAX has had two names for it
    return bool(getattr(getattr(kind, "mat", None), "varying", None) or getattr(kind, "vma", None))


def _several_devices() -> bool:
    """Images may lie on several devices, and a loop over them would bring all to each."""
    return jax.device_count() > 1
