"""How much gradient an activation passes below 0 and in its dead band. Pure functions, streamed over batches.

They take the `SlopeStatistics` of one layer: `slope_statistics` of each batch, together by `combine_slopes`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from linked_jax.arrays import wide_dtype
from linked_jax.diagnostics import by_member, kept_rows
from linked_jax.linking import Layout

FLAT = 1e-3
"""A slope below it is of the dead band."""


class SlopeStatistics(NamedTuple):
    """The slopes of one layer's C units over all batches so far; made by `slope_statistics`. All zeros: no data.

    Attributes:
      count: samples times positions, ().
      below: how many z were below 0, (C,).
      negative: the sum of g_i'(z) over the z below 0, for each of the d members, (d, C).
      flat: for how many z no member was as steep as 0.001, (C,).
    """

    count: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    below: Float[Array, " c"]
    negative: Float[Array, "d c"]
    flat: Float[Array, " c"]


def slope_statistics(
    z: Float[Array, "*n c"],
    slopes: Float[Array, "*n c_linked"],
    *,
    arity: int = 1,
    layout: Layout = "blocked",
    where: Bool[Array, "*n"] | None = None,
) -> SlopeStatistics:
    """The statistics of one batch, to be combined with those of others.

    Args:
      z: the pre-activations, (*N, C), channels last.
      slopes: the members' derivatives g_i'(z), (*N, d*C), laid out like the link's outputs.
      arity: the link's number of members d.
      layout: the link's layout.
      where: which samples and positions count; all if None. The others may hold anything, NaN too.

    Returns:
      A `SlopeStatistics`.

    Raises:
      ValueError: if the shapes do not fit the arity or z, or the layout is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.slopes import slope_statistics
      >>> slope_statistics(jnp.array([[-1.0], [2.0]]), jnp.array([[0.0, -1.0], [1.0, 0.0]]), arity=2).negative
      Array([[ 0.],
             [-1.]], dtype=float32)
    """
    if slopes.shape != (*z.shape[:-1], arity * z.shape[-1]):
        raise ValueError(
            f"slopes have the shape {(*z.shape[:-1], arity * z.shape[-1])} for z of shape {z.shape} and arity {arity}, "
            f"got {slopes.shape}; pass the derivatives of one link at z"
        )
    dtype = wide_dtype(z.dtype)
    by_unit, kept = by_member(slopes, arity, layout).astype(dtype), kept_rows(where, z)  # (n, d, C), (n, 1)
    z = z.reshape(by_unit.shape[0], 1, by_unit.shape[-1])
    kept = kept[..., None]
    below = (z < 0) & kept
    flat = (jnp.abs(by_unit) < FLAT).all(axis=1) & ~jnp.isnan(z[:, 0]) & kept[:, 0]
    return SlopeStatistics(
        count=kept.sum(dtype=dtype),
        below=below[:, 0].sum(axis=0, dtype=dtype),
        negative=jnp.where(below, by_unit, 0).sum(axis=0),
        flat=flat.sum(axis=0, dtype=dtype),
    )


def combine_slopes(a: SlopeStatistics, b: SlopeStatistics) -> SlopeStatistics:
    """The statistics of two disjoint batches together: their sums.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.slopes import combine_slopes, slope_statistics
      >>> one = slope_statistics(jnp.array([[-1.0]]), jnp.array([[0.5]]))
      >>> combine_slopes(one, one).negative
      Array([[1.]], dtype=float32)
    """
    return jax.tree.map(jnp.add, a, b)


def effective_negative_slope(stats: SlopeStatistics) -> Float[Array, " d"]:
    """The mean derivative below 0, of each member over all units of a layer; NaN if no z was below 0.

        E[g_i'(z) | z < 0]

    The literature on plasticity defines it for a plain activation: 0 for relu, a for a leaky relu of slope a. A link
    has it for each member, as for a plain activation, since one that is not flat is enough: a mirrored relu has 0 and
    -1. The mean of the members would be 0 for (z, -z), of which none is flat.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax import lk_relu
      >>> from linked_jax.slopes import effective_negative_slope, slope_statistics
      >>> z = jnp.array([[-1.0, 2.0], [-3.0, 1.0]])
      >>> slopes = jax.jvp(lk_relu, (z,), (jnp.ones_like(z),))[1]
      >>> effective_negative_slope(slope_statistics(z, slopes, arity=2))
      Array([ 0., -1.], dtype=float32)

    Reference: Lillo and Cheney, Activation function design sustains plasticity in continual learning, 2025.
    """
    below = stats.below.sum()
    return jnp.where(below == 0, jnp.nan, stats.negative.sum(axis=-1) / jnp.where(below == 0, 1, below))


def dead_band(stats: SlopeStatistics) -> Float[Array, " c"]:
    """Each unit's share of the data in the dead band, where no member passes a gradient to speak of; NaN of no data.

        P(max_i |g_i'(z)| < 0.001)

    `linked_jax.Certificate.dead_band` is the width of the band itself, whatever the data are.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.slopes import dead_band, slope_statistics
      >>> z = jnp.array([[0.0, 5.0], [-9.0, 6.0]])
      >>> dead_band(slope_statistics(z, jax.jvp(jnp.tanh, (z,), (jnp.ones_like(z),))[1]))
      Array([0.5, 1. ], dtype=float32)

    Reference: Lillo and Cheney, Activation function design sustains plasticity in continual learning, 2025.
    """
    return jnp.where(stats.count == 0, jnp.nan, stats.flat / jnp.where(stats.count == 0, 1, stats.count))
