"""Kernels for the layer after a link: at the start, signals and gradients keep their size at any depth.

A linked layer computes z' = f(z) K with f(z) in R^(d*C) and K of shape (*window, d*C_in, C_out). Worth more than the
link alone: 50 mirror-ReLU layers with Glorot kernels shrink the signal by 1e-13, with `looks_linear` by nothing.

What each init does to the mean square of white signals, forward, and of gradients, backward, for one layer with C_in
and C_out pre-activations, over all channels and pixels. s is the stride in each of n spatial axes.

    layer                                init                   forward    backward
    dense, conv, grouped, dilated        looks_linear           1          C_out / (C_in s^n)
    dense, conv, grouped, dilated        variance_preserving    1          about C_out / (C_in s^n)
    transposed conv                      looks_linear           1          C_out s^n / C_in
    transposed conv                      variance_preserving    1          about C_out s^n / C_in

looks_linear starts exactly linear, and isometric where C_in = C_out and s = 1. variance_preserving keeps signals on
average over kernels; correlations grow with depth. Depthwise is grouped with C_in groups.

So square layers at stride 1 keep both. Widening (C_out > C_in) keeps the forward signal and enlarges gradients;
narrowing and read-outs keep the forward signal (for white inputs) and shrink gradients. At a stride the linear kernel
covers s x s pixels in blocks that tile the image, so no pixel is dropped; one pixel of each block, the usual delta
kernel, would throw away three quarters at s = 2. Where they lie in the window follows from the padding. A transposed
conv writes its s x s output pixels in the same blocks. With a dilated kernel the blocks tile only where dilation and
stride share no factor; a window smaller than the stride leaves the other pixels out. With VALID padding, border pixels
take no part in the gradient. A stem has no link before it: give it the link of one member `Link((lambda z: z,))`, for
which variance_preserving is orthogonal initialisation.

A function here takes a link, or a module such as `LinkedPReLU` for the link that it starts as; anything else is a
TypeError. Those for kernels return an init(key, shape, dtype) for the whole kernel of the layer, as Flax wants it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from linked_jax.arguments import as_array, whole_number, whole_numbers
from linked_jax.linking import Activation, join, link_of
from linked_jax.measurements import weights_of_z
from linked_jax.moments import mean_square

Initializer = Callable[..., Array]
Padding = str | int | np.integer | Sequence[Any]
"""As Flax' convolutions take it: a name, rows, or rows or (low, high) for each axis."""
PADDINGS = ("SAME", "VALID", "CAUSAL", "CIRCULAR", "REFLECT", "SAME_LOWER")

_READ_OUT_TOLERANCE = 1e-6


def gain(link: Activation) -> float:
    """The kernel scale that keeps the mean square of a standard normal pre-activation.

        gain = 1 / sqrt(mean_i E[g_i(z)^2]),   kernel entries of variance gain^2 / fan_in,   fan_in = d * C_in * window

    Args:
      link: any `Link`, or a module with one; sqrt(2) for relu and for lk_relu.

    Returns:
      A float.

    Raises:
      ValueError: if the members vanish or explode, so that no scale does it.

    Reference: He et al., Delving deep into rectifiers, 2015, for relu.

    Examples:
      >>> from linked_jax import gain, lk_relu
      >>> round(gain(lk_relu) ** 2, 9)
      2.0
    """
    link = link_of(link)
    size = sum(mean_square(member) for member in link.members) / link.arity
    if size <= 0:
        raise ValueError(f"no gain exists for {link}: its Gaussian mean square is {size}; pass a link that is not zero")
    return size**-0.5


def variance_preserving(
    link: Activation, *, strides: int | Sequence[int] = 1, feature_group_count: int = 1, transpose: bool = False
) -> Initializer:
    """An orthogonal kernel scaled by the link's gain: the forward mean square stays 1 on average.

        K = gain(link) * Q,   Q of shape (fan_in, C_out), columns orthonormal, or of norm 1 on average

    Each of G groups has its own Q, (fan_in, C_out / G). A transposed conv has sqrt(s^n) K, since a pixel of its output
    meets one entry of s^n.

    Args:
      link: any `Link`, or a module with one.
      strides: those of the convolution, an integer or one per spatial axis; only a transposed one depends on them.
      feature_group_count: the number of groups G that the convolution splits the channels into.
      transpose: whether the kernel is that of a transposed convolution.

    Returns:
      init(key, shape, dtype) for a kernel of shape (*window, d*C_in / G, C_out).

    Raises:
      ValueError: if groups would split the members of a unit, or a stride is below 1; by the init, if d does not divide
        the input channels or G the output channels.

    Examples:
      >>> import jax
      >>> from linked_jax import lk_selu, variance_preserving
      >>> variance_preserving(lk_selu)(jax.random.key(0), (3, 3, 8, 4)).shape
      (3, 3, 8, 4)
    """
    link = link_of(link)
    scale = gain(link)
    check_groups(link, feature_group_count)
    _check_strides(strides)

    def init(
        key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32
    ) -> Float[Array, "*window c_linked c_out"]:
        _check_shape(shape, link, feature_group_count)
        spread = math.prod(_block(strides, shape)) ** 0.5 if transpose else 1
        flat = _unit_columns(key, math.prod(shape[:-1]), shape[-1], dtype, feature_group_count)
        return scale * spread * flat.reshape(shape)

    return init


def read_out(link: Activation) -> tuple[float, ...]:
    """The coefficients that read z back from its link: sum_i a_i g_i(z) = z.

    Minimum-norm least squares over |z| from 1e-3 to 1e3, so that a saturating link is refused. For the mirror of relu,
    swish, gelu and softplus a = (1, -1); for leaky relu that over 1 + negative_slope; for min_max (1, 1).

    Args:
      link: any `Link`, or a module with one.

    Returns:
      d floats.

    Raises:
      ValueError: if there are none, with the measured deviation.

    Examples:
      >>> from linked_jax import lk_swish, read_out
      >>> [round(a, 6) for a in read_out(lk_swish)]
      [1.0, -1.0]
    """
    coefficients, deviation = weights_of_z((link := link_of(link)).members)
    if deviation > _READ_OUT_TOLERANCE:
        raise ValueError(
            f"looks_linear needs a link whose members sum to z with some weights; the best weights of {link} miss z by "
            f"{deviation:.2g} (relative; allowed {_READ_OUT_TOLERANCE:g}), so use variance_preserving(link)"
        )
    digits = 12 - math.floor(math.log10(np.abs(coefficients).max()))  # noise beside the largest one is none beside 1
    return tuple(float(round(a, digits)) for a in coefficients)


def looks_linear(
    link: Activation,
    *,
    strides: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    transpose: bool = False,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
) -> Initializer:
    """A kernel that undoes its link: the layer starts linear and, at C_in = C_out and stride 1, isometric.

        K = (a_1 O, ..., a_d O),   sum_i a_i g_i(z) = z   =>   f(z) K = z O

    O is orthogonal between pre-activations, in each group on its own, and a delta in space. At a stride s it is
    orthogonal on the s x s pixels of a block, which a transposed convolution writes and any other reads. O is drawn
    first and mirrored after. See the table at the top of this file for other shapes.

    Args:
      link: a link that has a `read_out`, or a module with one; both layouts.
      strides: those of the convolution, an integer or one per spatial axis.
      feature_group_count: the number of groups G that the convolution splits the channels into.
      transpose: whether the kernel is that of a transposed convolution.
      padding: the convolution's, which says where in the window the first rows of the image are; that of a transposed
        convolution is taken for SAME.
      kernel_dilation: the convolution's, an integer or one per spatial axis; it matters where padding is in numbers.

    Returns:
      init(key, shape, dtype) for a kernel of shape (*window, d*C_in / G, C_out).

    Raises:
      ValueError: if the link has no read-out (elu, selu, tanh, relu unlinked), groups would split the members of a
        unit, a stride is below 1 or the padding unknown; by the init, if the shape does not fit.

    Reference: Balduzzi et al., The shattered gradients problem, 2017; Xiao et al., Dynamical isometry and a mean field
    theory of CNNs, 2018 (the delta in space). The treatment of strides is ours.

    Examples:
      >>> import jax
      >>> from linked_jax import lk_relu, looks_linear
      >>> kernel = looks_linear(lk_relu)(jax.random.key(0), (8, 4))
      >>> bool((kernel[:4] == -kernel[4:]).all())
      True
    """
    link = link_of(link)
    coefficients = read_out(link)
    check_groups(link, feature_group_count)
    _check_strides(strides)
    if isinstance(padding, str) and padding.upper() not in PADDINGS:
        raise ValueError(f"padding is one of {', '.join(PADDINGS)}, or numbers, got {padding!r}")

    def init(
        key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32
    ) -> Float[Array, "*window c_linked c_out"]:
        half, (*window, _, c_out) = _check_shape(shape, link, feature_group_count), shape
        block = _block(strides, shape)
        pixels = math.prod(block)
        if transpose:  # (half, pixels * c_out): a block of outputs is a rotation of its one input pixel
            core = _unit_columns(key, half, pixels * c_out, dtype, feature_group_count)
            core = core.reshape(half, feature_group_count, *block, c_out // feature_group_count)
            core = jnp.moveaxis(core, (0, 1), (-3, -2)).reshape(*block, half, c_out)
        else:
            core = _unit_columns(key, pixels * half, c_out, dtype, feature_group_count).reshape(*block, half, c_out)
        before = _taps_before(padding, window, block, kernel_dilation, transpose)
        after = [size - width - low for size, width, low in zip(window, block, before, strict=True)]
        orthogonal = jnp.pad(core, [*zip(before, after, strict=True), (0, 0), (0, 0)])
        return join([jnp.asarray(a, dtype) * orthogonal for a in coefficients], -2, link.layout)

    return init


def default_kernel_init(
    link: Activation,
    *,
    strides: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    transpose: bool = False,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
) -> Initializer:
    """`looks_linear` where the link has a read-out, else `variance_preserving`.

    Args:
      link: any `Link`, or a module with one.
      strides: those of the convolution, see `looks_linear`.
      feature_group_count: the number of groups G that the convolution splits the channels into.
      transpose: whether the kernel is that of a transposed convolution.
      padding: the convolution's, see `looks_linear`.
      kernel_dilation: the convolution's, see `looks_linear`.

    Returns:
      init(key, shape, dtype) for a kernel of shape (*window, d*C_in / G, C_out).

    Raises:
      ValueError: if groups would split the members of a unit.

    Examples:
      >>> import jax
      >>> from linked_jax import default_kernel_init, selu
      >>> default_kernel_init(selu)(jax.random.key(0), (3, 3, 4, 4)).shape
      (3, 3, 4, 4)
    """
    options: dict[str, Any] = {"strides": strides, "feature_group_count": feature_group_count, "transpose": transpose}
    try:
        return looks_linear(link, padding=padding, kernel_dilation=kernel_dilation, **options)
    except ValueError:
        return variance_preserving(link, **options)


def embed_plain_kernel(
    kernel: Float[Array, "*window c_in c_out"], link: Activation, *, member: int = 0
) -> Float[Array, "*window c_linked c_out"]:
    """The linked kernel that computes what a plain layer after g_member did: zeros for all other members.

        f(z) K' = g_member(z) K

    Args:
      kernel: of the plain layer, (*window, C_in, C_out).
      link: the link that replaces the plain activation; one of its members is that activation.
      member: which one, from 0.

    Returns:
      A kernel of shape (*window, d*C_in, C_out) in the link's layout.

    Raises:
      ValueError: if the link has no such member or the kernel has fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax import embed_plain_kernel, lk_relu
      >>> embed_plain_kernel(jnp.ones((1, 2)), lk_relu).tolist()
      [[1.0, 1.0], [0.0, 0.0]]
    """
    kernel, link = as_array(kernel), link_of(link)
    if kernel.ndim < 2:
        raise ValueError(f"a kernel has shape (*window, c_in, c_out), got {kernel.shape}; pass the weights of a layer")
    if not 0 <= member < link.arity:
        raise ValueError(f"{link} has members 0 to {link.arity - 1}, got member={member}")
    parts = [kernel if i == member else jnp.zeros_like(kernel) for i in range(link.arity)]
    return join(parts, -2, link.layout)


def check_groups(link: Activation, feature_group_count: int) -> None:
    """TypeError if there is no whole number of groups, ValueError if they would split the members of a unit."""
    whole_number("feature_group_count", feature_group_count)
    if feature_group_count < 1:
        raise ValueError(f"feature_group_count is at least 1, got {feature_group_count}")
    if feature_group_count > 1 < link.arity and getattr(link, "layout", "blocked") != "interleaved":
        raise ValueError(
            f"{feature_group_count} groups split a unit's members in the blocked layout of {link!r}; build the link "
            f"with layout='interleaved'"
        )


def _check_strides(strides: int | Sequence[int]) -> None:
    if min(whole_numbers("strides", strides), default=0) < 1:
        raise ValueError(f"strides are at least 1, got {strides}")


def _unit_columns(
    key: PRNGKeyArray, rows: int, columns: int, dtype: Any, groups: int = 1
) -> Float[Array, "rows columns"]:
    """Orthonormal columns; if there are more columns than rows, orthogonal rows, and columns of norm 1 on average."""
    scale = max(1.0, columns / groups / rows) ** 0.5
    drawn_in = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32  # JAX has no QR in half precision
    orthogonal = jax.nn.initializers.orthogonal(scale)
    keys = key[None] if groups == 1 else jax.random.split(key, groups)
    blocks = jax.vmap(lambda key: orthogonal(key, (rows, columns // groups), drawn_in))(keys)
    return jnp.moveaxis(blocks, 0, 1).reshape(rows, columns).astype(dtype)


def _block(strides: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The pixels of a window that belong to one step, along each spatial axis of a kernel's shape."""
    window = tuple(shape[:-2])
    steps = (int(strides),) * len(window) if isinstance(strides, int | np.integer) else tuple(strides)
    if len(steps) != len(window):
        raise ValueError(f"strides {strides} do not fit a kernel of shape {tuple(shape)}; pass one per spatial axis")
    return tuple(min(step, size) for step, size in zip(steps, window, strict=True))


def _taps_before(
    padding: Padding, window: Sequence[int], block: Sequence[int], dilation: int | Sequence[int], transpose: bool
) -> list[int]:
    """The taps before the block in each axis: as many as there are before the image, so that blocks tile it."""
    sizes = list(zip(window, block, strict=True))
    # SAME puts (size - stride) / 2 rows there, rounded down, or up in a transposed conv. Without padding: the middle.
    middle = [(size - width + transpose) // 2 for size, width in sizes]
    if transpose:
        return middle
    if isinstance(padding, str):
        wrapped = [(size - 1) // 2 for size in window]
        lower = [(size - width + 1) // 2 for size, width in sizes]
        causal = [size - 1 for size in window]
        named = {"CAUSAL": causal, "CIRCULAR": wrapped, "REFLECT": wrapped, "SAME_LOWER": lower}
        rows = named.get(padding.upper(), middle)
    else:
        pads = [np.ravel(pad) for pad in (padding if isinstance(padding, Sequence) else [padding] * len(window))]
        if len(pads) != len(window) or not all(map(len, pads)) or not any(pad.any() for pad in pads):
            return middle  # of wrong pads Flax says what is wrong
        apart = np.broadcast_to(dilation, len(window))
        rows = [int(pad[0]) // int(step) for pad, step in zip(pads, apart, strict=True)]
    return [max(0, min(n, size - width)) for n, (size, width) in zip(rows, sizes, strict=True)]


def _check_shape(shape: Sequence[int], link: Activation, groups: int) -> int:
    """The number of pre-activations of a group in a linked kernel's shape."""
    if len(shape) < 2 or min(shape[:-1]) < 1 or shape[-2] % link.arity:
        raise ValueError(
            f"a kernel after a link of {link.arity} has shape (*window, {link.arity} * c_in, c_out) with c_in of 1 or "
            f"more, got {tuple(shape)}"
        )
    if shape[-1] % groups:
        raise ValueError(f"{groups} groups divide the outputs of a kernel, got {tuple(shape)}; change c_out")
    return shape[-2] // link.arity
