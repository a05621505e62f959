"""Flax NNX layers for linked networks: link, then layer.

    z' = f(z) K + b

They take the pre-activation z, so `in_features` counts pre-activations and nobody doubles widths by hand. For the
backward pass only z is kept: the link is computed again there. All options of Flax' own layers go through to them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.activations import lk_relu
from linked_jax.arguments import brief, whole_number, whole_numbers
from linked_jax.convolution import conv_general_dilated
from linked_jax.initializers import PADDINGS, Initializer, Padding, check_groups, default_kernel_init
from linked_jax.linking import Activation, floating


class WeightOptions(TypedDict, total=False):
    """What every Flax layer takes beside its sizes, kernel_init and rngs."""

    use_bias: bool
    bias_init: Initializer
    dtype: Any
    param_dtype: Any
    precision: Any
    promote_dtype: Callable[..., Any]
    preferred_element_type: Any
    kernel_metadata: Mapping[str, Any]
    bias_metadata: Mapping[str, Any]


class LinearOptions(WeightOptions, total=False):
    """The further options of `flax.nnx.Linear`."""

    dot_general: Callable[..., Any]


class ConvTransposeOptions(WeightOptions, total=False):
    """The further options of `flax.nnx.ConvTranspose`."""

    padding: Any
    kernel_dilation: int | Sequence[int] | None
    mask: Array | None


class ConvOptions(ConvTransposeOptions, total=False):
    """The further options of `flax.nnx.Conv`."""

    input_dilation: int | Sequence[int] | None
    feature_group_count: int
    conv_general_dilated: Callable[..., Any]


class LinkedLinear(nnx.Module):
    """A dense layer on linked pre-activations: z (..., in_features) -> f(z) K + b (..., out_features).

    Args:
      in_features: the number of pre-activations C; the kernel has shape (d*C, out_features).
      out_features: the number of outputs.
      link: a `Link`, or a module such as `LinkedPReLU`.
      kernel_init: init(key, shape, dtype) for the whole kernel; `default_kernel_init(link)` if None.
      rngs: Flax random streams; `params` is used.
      **options: all else that `flax.nnx.Linear` takes: use_bias, bias_init, dtype, param_dtype, precision, ...

    Raises:
      ValueError: if a size is below 1; when called, if z has other channels or too few axes.
      TypeError: if link is not a link, a size no integer, or rngs are no streams; when called, if z is not of floats.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import LinkedLinear, lk_swish
      >>> rngs = nnx.Rngs(0)
      >>> net = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), LinkedLinear(16, 3, link=lk_swish, rngs=rngs))
      >>> net(jnp.ones((2, 8))).shape
      (2, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        link: Activation = lk_relu,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
        **options: Unpack[LinearOptions],
    ):
        _check_sizes(in_features, out_features, rngs)
        self.link = check_link(link)
        kernel_init = kernel_init or default_kernel_init(link)
        self.linear = nnx.Linear(link.arity * in_features, out_features, kernel_init=kernel_init, rngs=rngs, **options)

    def __call__(self, z: Float[Array, "... c"], out_sharding: Any = None) -> Float[Array, "... c_out"]:
        """z (..., in_features) -> (..., out_features), sharded as `nnx.Linear` takes it."""
        return _after_link(self.linear, self.link, z, out_sharding=out_sharding)


class LinkedConv(nnx.Module):
    """A convolution on linked pre-activations: z (N, *space, in_features) -> f(z) * K + b (N, *space', out_features).

    With G groups (`feature_group_count`) the members of a unit stay in its group: the link's layout is "interleaved".

    Args:
      in_features: the number of pre-activation channels C; the kernel has shape (*kernel_size, d*C / G, out_features).
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      link: a `Link` with axis -1, or a module such as `LinkedPReLU`.
      strides: an integer or one per spatial axis.
      kernel_init: init(key, shape, dtype) for the whole kernel; `default_kernel_init` of the link and the geometry if
        None.
      rngs: Flax random streams; `params` is used.
      **options: all else that `flax.nnx.Conv` takes: padding, kernel_dilation, feature_group_count, mask, use_bias,
        bias_init, dtype, param_dtype, precision, ... conv_general_dilated is that of `linked_jax.convolution`, whose
        gradient of the kernel is fast on a CPU as well.

    Raises:
      ValueError: if a number of features is below 1; if the groups do not divide them, or would split a unit's members.
      TypeError: if link is not a link.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import LinkedConv, linked
      >>> conv = LinkedConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((2, 8, 8, 4))).shape
      (2, 4, 4, 8)
      >>> link = linked(jax.nn.relu, layout="interleaved")
      >>> LinkedConv(4, 4, (3, 3), link=link, feature_group_count=4, rngs=nnx.Rngs(0)).conv.kernel.shape  # depthwise
      (3, 3, 2, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        link: Activation = lk_relu,
        strides: int | Sequence[int] = 1,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
        **options: Unpack[ConvOptions],
    ):
        groups = options.get("feature_group_count", 1)
        padding = options.get("padding", "SAME")
        _check_sizes(in_features, out_features, rngs, kernel_size=kernel_size, strides=strides, padding=padding)
        kernel_size, strides, padding = map(_plain, (kernel_size, strides, padding))
        self.link = check_link(link)
        check_groups(link, groups)
        if in_features % groups or out_features % groups:
            raise ValueError(
                f"the groups divide in_features and out_features, got {groups} groups of {in_features} and "
                f"{out_features}; change feature_group_count"
            )
        self.conv = nnx.Conv(
            link.arity * in_features,
            out_features,
            kernel_size,
            strides=strides,
            kernel_init=kernel_init
            or conv_start(
                link,
                strides=strides,
                padding=padding,
                input_dilation=options.get("input_dilation"),
                kernel_dilation=options.get("kernel_dilation"),
                feature_group_count=groups,
            ),
            rngs=rngs,
            **{"conv_general_dilated": conv_general_dilated, **options, "padding": padding},
        )

    def __call__(self, z: Float[Array, "... c"], out_sharding: Any = None) -> Float[Array, "... c_out"]:
        """z (N, *space, in_features) -> (N, *space', out_features), sharded as `nnx.Conv` takes it."""
        return _after_link(self.conv, self.link, z, out_sharding=out_sharding)


class LinkedConvTranspose(nnx.Module):
    """A transposed convolution on linked pre-activations: z (N, *space, in_features) -> (N, *space', out_features).

    At strides s it makes images s times as large. At the start each pixel becomes a block of s x s pixels.

    Args:
      in_features: the number of pre-activation channels C; the kernel has shape (*kernel_size, d*C, out_features).
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      link: a `Link` with axis -1, or a module such as `LinkedPReLU`.
      strides: an integer or one per spatial axis.
      kernel_init: init(key, shape, dtype) for the whole kernel; `default_kernel_init` of the link and the strides if
        None.
      rngs: Flax random streams; `params` is used.
      **options: all else that `flax.nnx.ConvTranspose` takes but transpose_kernel.

    Raises:
      ValueError: if a size is below 1; when called, if z has other channels or too few axes.
      TypeError: if link is not a link, a size no integer, or rngs are no streams; when called, if z is not of floats.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import LinkedConvTranspose
      >>> LinkedConvTranspose(4, 2, (4, 4), strides=2, rngs=nnx.Rngs(0))(jnp.ones((1, 8, 8, 4))).shape
      (1, 16, 16, 2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        link: Activation = lk_relu,
        strides: int | Sequence[int] = 1,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
        **options: Unpack[ConvTransposeOptions],
    ):
        padding = options.get("padding", "SAME")
        _check_sizes(
            in_features, out_features, rngs, _TRANSPOSED, kernel_size=kernel_size, strides=strides, padding=padding
        )
        kernel_size, strides, padding = map(_plain, (kernel_size, strides, padding))
        self.link = check_link(link)
        if "transpose_kernel" in options:
            raise ValueError("a linked kernel has shape (*kernel_size, d*C, out_features); leave out transpose_kernel")
        self.conv = nnx.ConvTranspose(
            link.arity * in_features,
            out_features,
            kernel_size,
            strides=strides,
            kernel_init=kernel_init or default_kernel_init(link, strides=strides, transpose=True),
            rngs=rngs,
            **{**options, "padding": padding},
        )

    def __call__(self, z: Float[Array, "... c"]) -> Float[Array, "... c_out"]:
        """z (N, *space, in_features) -> (N, *space', out_features)."""
        return _after_link(self.conv, self.link, z)


def conv_start(
    link: Activation,
    *,
    strides: int | Sequence[int],
    padding: Padding,
    input_dilation: int | Sequence[int] | None,
    kernel_dilation: int | Sequence[int] | None,
    feature_group_count: int,
) -> Initializer:
    """The default kernel_init of a convolution; one that dilates its input is a transposed one."""
    transpose = input_dilation is not None and bool(np.max(input_dilation) > 1)
    return default_kernel_init(
        link,
        strides=input_dilation if transpose else strides,  # pyright: ignore[reportArgumentType]
        padding=padding,
        kernel_dilation=1 if kernel_dilation is None else kernel_dilation,
        transpose=transpose,
        feature_group_count=feature_group_count,
    )


def check_link(link: Activation) -> Activation:
    """The activation; TypeError or ValueError if a Flax layer cannot come after it."""
    if isinstance(link, type) or not isinstance(link, Activation):
        raise TypeError(
            f"link is a Link or a built module with an arity, got {brief(link)}; pass e.g. linked(jax.nn.relu)"
        )
    if (axis := getattr(link, "axis", -1)) != -1:
        raise ValueError(f"Flax layers have channels last, got a link with axis={axis}; pass one with axis=-1")
    return link


_TRANSPOSED = ("SAME", "VALID", "CIRCULAR")


def _plain(size: Any) -> Any:
    """A number of NumPy's as Python's, which Flax looks for."""
    return size.item() if isinstance(size, np.integer) else size


def _check_sizes(
    in_features: int, out_features: int, rngs: nnx.Rngs, paddings: Sequence[str] = PADDINGS, **sizes: Any
) -> None:
    """Refuse what Flax would fail on later, or in words about its own layers."""
    for name, features in {"in_features": in_features, "out_features": out_features}.items():
        whole_number(name, features)
    if min(in_features, out_features) < 1:
        raise ValueError(f"in_features and out_features are at least 1, got {in_features} and {out_features}")
    if not callable(getattr(rngs, "params", None)):
        raise TypeError(f"rngs are Flax' random streams, got {brief(rngs)}; pass nnx.Rngs(0)")
    padding = sizes.pop("padding", "SAME")
    if isinstance(padding, str) and padding.upper() not in paddings:
        raise ValueError(f"padding is one of {', '.join(paddings)}, or numbers, got {padding!r}")
    if not isinstance(padding, str | int | np.integer | list | tuple):
        raise TypeError(f"padding is a string, an integer or a sequence, got {brief(padding)}; pass e.g. 'SAME'")
    for name, value in sizes.items():
        if min(whole_numbers(name, value), default=0) < 1:
            raise ValueError(f"{name} is at least 1, got {value}")


def _after_link(layer: Any, link: Activation, z: Array, **options: Any) -> Array:
    """layer(link(z), **options), of which the backward pass keeps z alone."""
    z, channels = floating(z), layer.in_features // link.arity
    least = len(layer.kernel.shape) - 1
    if z.ndim < least or z.shape[-1] != channels:
        raise ValueError(
            f"z has {channels} channels on the last of {least} or more axes, got shape {z.shape}; build the layer with "
            f"z's in_features"
        )
    if not isinstance(link, nnx.Module):
        return jax.checkpoint(lambda z: layer(link(z), **options))(z)
    graph, state = nnx.split(link)

    @jax.checkpoint
    def outputs_and_changes(state: nnx.State, z: Array) -> tuple[Array, nnx.State]:
        inside = nnx.merge(graph, state)
        before = {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
        z = layer(inside(z), **options)
        after = nnx.to_flat_state(nnx.state(inside))
        return z, nnx.from_flat_state([(path, v) for path, v in after if v.get_value() is not before.get(path)])

    z, changes = outputs_and_changes(state, z)
    nnx.update(link, changes)  # such as running means, and counts of dropout; nothing else, it may be another trace's
    return z
