"""Activations with learned slopes: PReLU and its link, as Flax NNX modules and as the function beneath them.

prelu(z, a) = z where z > 0, else a z (equation 3),   f(z) = (prelu(z, a), prelu(-z, b))
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.activations import linked_prelu, prelu
from linked_jax.arguments import as_array, brief, whole_numbers
from linked_jax.linking import Layout, Link, linked, scope

Share = Literal["layer", "channel", "element"]


def apply_slopes(
    z: Float[Array, "..."], *slopes: Float[Array, "..."], layout: Layout = "blocked"
) -> Float[Array, "..."]:
    """PReLU with one array of slopes, linked PReLU with two; `linked_jax.probe` sees one activation.

    Slopes are scalars or of the shape of z's last axes; else it is a ValueError.
    """
    z = as_array(z)
    for slope in slopes:
        if z.shape[z.ndim - slope.ndim :] != slope.shape:
            raise ValueError(
                f"slopes of shape {slope.shape} do not fit z of shape {z.shape}; build it with z's features"
            )
    if len(slopes) == 1:
        with scope("ChannelPReLU(z)"):
            return prelu(z, *slopes)
    with scope("LinkedPReLU(z)"):
        return linked_prelu(z, *slopes, layout=layout)


def check_share(share: Share) -> Share:
    """Raise ValueError if slopes cannot be shared like that."""
    if share not in ("layer", "channel", "element"):
        raise ValueError(f"share is 'layer', 'channel' or 'element', got {brief(share)}")
    return share


class ChannelPReLU(nnx.Module):
    """PReLU with learned slopes: z where z > 0, else a * z (equation 3).

    Args:
      features: the number of channels C; with share="element" the whole shape (*space, C) of one example.
      negative_slope: the slopes' initial value. 0.25 is He's; do not apply weight decay to slopes.
      share: "channel" (a slope per channel, He's), "layer" (one) or "element" (Keras' default).
      param_dtype: of the slopes.
      rngs: not used; there so that all layers are built alike.

    Raises:
      ValueError: if share is unknown or features do not fit it.

    Reference: He et al., Delving deep into rectifiers, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax import ChannelPReLU
      >>> ChannelPReLU(2)(jnp.array([-4.0, 4.0]))
      Array([-1.,  4.], dtype=float32)
    """

    arity: int = 1
    layout: Layout = "blocked"

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        negative_slope: float = 0.25,
        share: Share = "channel",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        shape = whole_numbers("features", features)
        if check_share(share) == "channel" and len(shape) != 1:
            raise ValueError(
                f"share='channel' takes the number of channels, got features={features}; pass its last number"
            )
        if min(shape, default=0) < 1:
            raise ValueError(f"features is at least 1, got {features}")
        self.negative_slope_init = float(negative_slope)
        self.negative_slope = nnx.Param(jnp.full(() if share == "layer" else shape, negative_slope, param_dtype))

    @property
    def link(self) -> Link:
        """The link that this module is at the start; initialisers read it."""
        return Link((functools.partial(prelu, negative_slope=self.negative_slope_init),))

    def __call__(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """z (..., C) -> (..., C)."""
        return apply_slopes(z, self.negative_slope[...])


class LinkedPReLU(nnx.Module):
    """Two PReLUs, each with its own slopes, on z and on -z; at z = 0 the Jacobian is that of z -> 0+.

        f(z) = (prelu(z, a), prelu(-z, b))

    Args:
      features: the number of channels C; with share="element" the whole shape (*space, C) of one example.
      negative_slope: the slopes' initial value; 0.25 is He's, 0 starts as lk_relu.
      share: "channel", "layer" or "element", see `ChannelPReLU`.
      layout: "blocked" or "interleaved", see `Link`.
      param_dtype: of the slopes.
      rngs: not used; there so that all layers are built alike.

    Raises:
      ValueError: if share or layout is unknown, or features do not fit.

    Reference: the authors' code, github.com/blauigris/linked_neurons.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax import LinkedPReLU
      >>> LinkedPReLU(1)(jnp.array([-4.0]))
      Array([-1.,  4.], dtype=float32)
    """

    arity: int = 2

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        negative_slope: float = 0.25,
        share: Share = "channel",
        layout: Layout = "blocked",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.positive, self.mirrored = (
            ChannelPReLU(features, negative_slope=negative_slope, share=share, param_dtype=param_dtype, rngs=rngs)
            for _ in range(2)
        )
        self.layout: Layout = linked(self.positive.link, layout=layout).layout  # linked() checks it

    @property
    def link(self) -> Link:
        """The link that this module is at the start; initialisers read it."""
        return linked(self.positive.link, layout=self.layout)

    def __call__(self, z: Float[Array, "... c"]) -> Float[Array, "... c_linked"]:
        """z (..., C) -> (..., 2*C)."""
        slopes = self.positive.negative_slope[...], self.mirrored.negative_slope[...]
        return apply_slopes(z, *slopes, layout=self.layout)
