"""The named activations and their mirror links, one line each, and the table of names for command lines.

Plain activations are links with one member; `lk_` is the mirror link (g(z), g(-z)). The derivative of a plain
activation at its kink is JAX's own; an `lk_` link takes the limit z -> 0+ there (see `linked_jax.linking.Link`).

    name         g(z)                              g'(0) plain    Jacobian of lk_ at 0
    relu         max(z, 0)                         0              (1, 0)
    leaky_relu   z if z >= 0 else 0.01 z           1              (1, -0.01)
    prelu        z if z > 0 else slope * z         slope          (1, -slope)
    elu          z if z > 0 else exp(z) - 1        1              (1, -1)
    selu         1.0507 elu(z, 1.6733)             1.7581         (1.0507, -1.7581)
    swish        z sigmoid(z)                      0.5            (0.5, -0.5)
    gelu         z Phi(z), tanh form               0.5            (0.5, -0.5)
    softplus     log(1 + exp(z))                   0.5            (0.5, -0.5)
    tanh         tanh(z)                           1              (1, -1)
    sigmoid      1 / (1 + exp(-z))                 0.25           (0.25, -0.25)

`lk_tanh` and `lk_sigmoid` are mirror links but NOT linked in floating point: both members saturate. All the others
hold their certificate (`linked_jax.certify`) in float32, bfloat16 and float16.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from linked_jax.arguments import as_array
from linked_jax.arrays import like
from linked_jax.linking import Layout, Link, floating, fourier, from_the_right, join, linked, min_max


def prelu(z: Float[Array, "..."], negative_slope: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Parametric ReLU: z where z > 0, else negative_slope * z (equation 3).

    Args:
      z: pre-activations, (..., C).
      negative_slope: broadcast against z: a scalar, (C,) or one slope an element.

    Returns:
      An array like z. The derivative at z = 0 is negative_slope; inside a mirror link it is 1.

    Reference: He et al., Delving deep into rectifiers, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax import prelu
      >>> prelu(jnp.array([-2.0, 3.0]), 0.25)
      Array([-0.5,  3. ], dtype=float32)
    """
    z = floating(z)
    slope = as_array(negative_slope).astype(z.dtype)
    if 0 < slope.ndim < z.ndim:
        slope = like(slope, z)
    return jnp.where(z > 0, z, slope * jnp.where(z > 0, 0, z))  # 0 * inf in the derivative for a slope would be NaN


def linked_prelu(
    z: Float[Array, "..."],
    positive_slope: Float[ArrayLike, "..."],
    mirrored_slope: Float[ArrayLike, "..."],
    *,
    layout: Layout = "blocked",
) -> Float[Array, "..."]:
    """PReLU linked with its mirror image, each with slopes of its own.

        f(z) = (prelu(z, a), prelu(-z, b))

    Args:
      z: pre-activations, (..., C).
      positive_slope: a, broadcast against z.
      mirrored_slope: b, broadcast against z.
      layout: "blocked" or "interleaved", see `Link`.

    Returns:
      (..., 2*C). The Jacobian at z = 0 is the limit z -> 0+, (1, -b).

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.activations import linked_prelu
      >>> linked_prelu(jnp.array([-4.0]), 0.5, 0.25)
      Array([-2.,  4.], dtype=float32)
    """
    z = floating(z)
    members = (lambda z: prelu(z, positive_slope)), (lambda z: prelu(-z, mirrored_slope))
    return join([from_the_right(g)(z) for g in members], -1, layout)


def smooth_leaky(
    z: Float[Array, "..."], negative_slope: Float[ArrayLike, "..."] = 0.7, *, sharpness: float = 5.0
) -> Float[Array, "..."]:
    """Leaky ReLU with its kink smoothed out.

        f(z) = a z + (1 - a) z sigmoid(c z),   f(z) - f(-z) = (1 + a) z

    So its mirror link reads z back, and `looks_linear` knows it. a is the slope far below 0, where the literature on
    plasticity finds 0.6 to 0.9 best; with a = 0 and c = 1 it is swish.

    Args:
      z: pre-activations, (..., C).
      negative_slope: a, broadcast against z.
      sharpness: c, of the original's c / p.

    Returns:
      An array like z. The derivative at z = 0 is (1 + a) / 2.

    Reference: Lillo and Cheney, Activation function design sustains plasticity in continual learning, 2026.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.activations import smooth_leaky
      >>> smooth_leaky(jnp.array([-10.0, 0.0, 10.0]), 0.5)
      Array([-5.,  0., 10.], dtype=float32)
    """
    z = floating(z)
    slope = as_array(negative_slope).astype(z.dtype)
    return slope * z + (1 - slope) * z * jax.nn.sigmoid(sharpness * z)


def _gelu(z: Array) -> Array:
    # Beyond |z| = 10 the tanh is exactly +-1, so gelu is exactly max(z, 0); jax.nn.gelu computes z**3 there and its
    # derivative becomes 0 * inf. NaN is not outside, and stays NaN.
    outside = jnp.abs(z) >= 10
    return jnp.where(outside, jnp.where(z > 0, z, 0), jax.nn.gelu(jnp.where(outside, 0, z)))


_gelu.__name__ = "gelu"  # as a link and a report show it
relu = Link((jax.nn.relu,))
leaky_relu = Link((jax.nn.leaky_relu,))
elu = Link((jax.nn.elu,))
selu = Link((jax.nn.selu,))
swish = Link((jax.nn.silu,))  # the paper prints a piecewise form; its authors' code is z * sigmoid(z), and so is this
gelu = Link((_gelu,))
softplus = Link((jax.nn.softplus,))
tanh = Link((jnp.tanh,))
sigmoid = Link((jax.nn.sigmoid,))

lk_relu = crelu = linked(relu)
lk_leaky_relu = linked(leaky_relu)
lk_elu = linked(elu)
lk_selu = linked(selu)
lk_swish = linked(swish)
lk_gelu = linked(gelu)
lk_softplus = linked(softplus)
lk_tanh = linked(tanh)
"""(tanh(z), tanh(-z)). NOT linked in floating point: both are flat beyond |z| of about 8 (float32; 20 on old CPUs)."""
lk_sigmoid = linked(sigmoid)
"""(sigmoid(z), sigmoid(-z)). NOT linked in floating point: both members are flat beyond |z| of about 87 (float32)."""

ACTIVATIONS: dict[str, Link] = {
    "relu": relu, "leaky_relu": leaky_relu, "elu": elu, "selu": selu, "swish": swish, "gelu": gelu,
    "softplus": softplus, "tanh": tanh, "sigmoid": sigmoid,
    "lk_relu": lk_relu, "crelu": crelu, "lk_leaky_relu": lk_leaky_relu, "lk_elu": lk_elu, "lk_selu": lk_selu,
    "lk_swish": lk_swish, "lk_gelu": lk_gelu, "lk_softplus": lk_softplus, "lk_tanh": lk_tanh,
    "lk_sigmoid": lk_sigmoid, "min_max": min_max, "fourier": fourier,
}  # fmt: skip
"""Name -> link. `linked_jax.get_activation` also knows those with parameters, prelu and lk_prelu."""

SYNONYMS = {"silu": "swish", "lk_silu": "lk_swish", "minmax": "min_max", "lk_crelu": "lk_relu"}
