"""Is a unit dead, dormant, linear or saturated? Pure functions of arrays, streamed over batches.

    stats = unit_statistics(z, h, slopes)  of each batch,  combine(stats, stats') of two,  dead_units(stats), ...

A unit is one pre-activation channel. It is scored by its whole link and never by its members: half of the members of
a mirrored relu are zero by construction. A unit that saw NaN is never called dead, dormant, linear or saturated; its
mean is NaN. `not_finite_units` finds it.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from linked_jax.arguments import as_array, brief
from linked_jax.arrays import wide_dtype
from linked_jax.linking import Layout


class UnitStatistics(NamedTuple):
    """What one layer's C units did over all batches so far; made by `unit_statistics`, and a pytree for JAX.

    All zeros is the statistics of no data: the start of a `lax.scan`. The dtype is float32, or float64 for such data.

    Attributes:
      count: samples times positions, ().
      live: whether any member's output was not 0, (C,).
      steepest: the largest |g_i'(z)| over the data and the members, (C,).
      negative: whether any z was below 0, (C,).
      active: how many z were above 0, (C,).
      mean: of z, (C,).
      m2: the sum of (z - mean)^2, (C,).
      magnitude: the sum over the data of the mean over members of |h|, (C,).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.diagnostics import UnitStatistics, unit_statistics
      >>> stats = unit_statistics(jnp.ones((8, 3)), jnp.ones((8, 3)), jnp.ones((8, 3)))
      >>> none_yet: UnitStatistics = jax.tree.map(jnp.zeros_like, stats)
      >>> stats.active, none_yet.active
      (Array([8., 8., 8.], dtype=float32), Array([0., 0., 0.], dtype=float32))
    """

    count: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    live: Bool[Array, " c"]
    steepest: Float[Array, " c"]
    negative: Bool[Array, " c"]
    active: Float[Array, " c"]
    mean: Float[Array, " c"]
    m2: Float[Array, " c"]
    magnitude: Float[Array, " c"]


def unit_statistics(
    z: Float[Array, "*n c"],
    h: Float[Array, "*n c_linked"],
    slopes: Float[Array, "*n c_linked"],
    *,
    arity: int = 1,
    layout: Layout = "blocked",
    where: Bool[Array, "*n"] | None = None,
) -> UnitStatistics:
    """The statistics of one batch, to be combined with those of others.

    Args:
      z: the pre-activations, (*N, C), channels last.
      h: the link's outputs f(z), (*N, d*C).
      slopes: the members' derivatives g_i'(z), laid out like h: the tangent of `jax.jvp(f, (z,), (ones,))`.
      arity: the link's number of members d.
      layout: the link's layout.
      where: which samples and positions count; all if None. The others may hold anything, NaN too.

    Returns:
      A `UnitStatistics`.

    Raises:
      ValueError: if the shapes do not fit the arity or z, or the layout is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax import lk_relu
      >>> from linked_jax.diagnostics import dead_units, linearised_units, unit_statistics
      >>> z = jnp.array([[-1.0, -2.0], [3.0, -4.0]])
      >>> h, slopes = jax.jvp(lk_relu, (z,), (jnp.ones_like(z),))
      >>> stats = unit_statistics(z, h, slopes, arity=2)
      >>> dead_units(stats).tolist(), linearised_units(stats).tolist()
      ([False, False], [False, True])
    """
    wanted = (*z.shape[:-1], arity * z.shape[-1])
    if h.shape != wanted or slopes.shape != wanted:
        raise ValueError(
            f"h and slopes have the shape {wanted} for z of shape {z.shape} and arity {arity}, got {h.shape} and "
            f"{slopes.shape}; pass the outputs and derivatives of one link at z"
        )
    dtype = wide_dtype(z.dtype)
    x = z.astype(dtype).reshape(math.prod(z.shape[:-1]), z.shape[-1])
    outputs, derivatives = (jnp.abs(by_member(a, arity, layout)).astype(dtype) for a in (h, slopes))
    count = jnp.asarray(len(x), dtype)
    kept = kept_rows(where, z)
    if where is not None:
        count = kept.sum(dtype=dtype)
        x, outputs, derivatives = (
            jnp.where(kept.reshape(-1, *[1] * (a.ndim - 1)), a, 0) for a in (x, outputs, derivatives)
        )
    mean = x.sum(axis=0) / jnp.maximum(count, 1)
    return UnitStatistics(
        count=count,
        live=(outputs != 0).any(axis=(0, 1)),
        steepest=derivatives.max(axis=(0, 1), initial=0),
        negative=(x < 0).any(axis=0),
        active=(x > 0).sum(axis=0, dtype=dtype),
        mean=mean,
        m2=jnp.square(x - mean[None]).sum(axis=0, where=kept),
        magnitude=outputs.mean(axis=1).sum(axis=0),
    )


def kept_rows(where: Bool[Array, "*n"] | None, z: Float[Array, "*n c"]) -> Bool[Array, "rows 1"]:
    """`where` as a column, one place for each sample and position of z; ValueError if it does not fit."""
    wanted = z.shape[:-1]
    if where is None:
        return jnp.ones((math.prod(wanted), 1), bool)
    where = as_array(where)
    if where.shape != wanted or where.dtype != bool:
        raise ValueError(
            f"where has a boolean for each sample and position, of shape {wanted} for z of shape {z.shape}, got "
            f"{where.dtype} of shape {where.shape}; broadcast it, or compare with 0"
        )
    return where.reshape(-1, 1)


def combine(a: UnitStatistics, b: UnitStatistics) -> UnitStatistics:
    """The statistics of two disjoint batches together; associative and commutative but for rounding.

        mean = mean_a + delta n_b / n,   m2 = m2_a + m2_b + delta^2 n_a n_b / n,   delta = mean_b - mean_a

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import combine, unit_statistics
      >>> z = jnp.arange(6.0).reshape(6, 1)
      >>> halves = [unit_statistics(part, part, jnp.ones_like(part)) for part in (z[:2], z[2:])]
      >>> both = combine(*halves)
      >>> both.count, both.mean, both.m2
      (Array(6., dtype=float32), Array([2.5], dtype=float32), Array([17.5], dtype=float32))

    Reference: Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983.
    """
    count, share, delta, mean = combined_mean(a, b)
    return UnitStatistics(
        count=count,
        live=a.live | b.live,
        steepest=jnp.maximum(a.steepest, b.steepest),
        negative=a.negative | b.negative,
        active=a.active + b.active,
        mean=mean,
        m2=a.m2 + b.m2 + delta**2 * a.count * share,
        magnitude=a.magnitude + b.magnitude,
    )


def combined_mean(a: Any, b: Any) -> tuple[Array, Array, Array, Array]:
    """n, n_b / n, delta and the mean of two batches with a count and a mean; see `combine`.

    delta is 0 where one has no data, or the means are equal: infinite ones too, of which inf - inf would make NaN.
    """
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    delta = jnp.where((a.count > 0) & (b.count > 0) & (a.mean != b.mean), b.mean - a.mean, 0)
    return count, share, delta, jnp.where(a.count > 0, a.mean + delta * share, b.mean)


def live_units(h: Float[Array, "... c_linked"], *, arity: int = 1, layout: Layout = "blocked") -> Bool[Array, " c"]:
    """Which units have a non-zero output for at least one sample and position of this batch.

        live_c = any over samples, positions n and members i of g_i(z_nc) != 0

    A unit that is live in no batch is dead (the paper's definition); combine batches with a logical or.

    Args:
      h: the outputs of a link, (..., d*C), channels last.
      arity: the link's number of members d.
      layout: the link's layout.

    Returns:
      A boolean for each of the C units.

    Raises:
      ValueError: if the channels are not a multiple of the arity, or the layout is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax import live_units, lk_relu, relu
      >>> z = jnp.array([[-1.0, 2.0], [-3.0, -4.0]])
      >>> live_units(relu(z)).tolist(), live_units(lk_relu(z), arity=2).tolist()
      ([False, True], [True, True])
    """
    return (by_member(as_array(h), arity, layout) != 0).any(axis=(0, 1))


def _measured(stats: UnitStatistics) -> Bool[Array, " c"]:
    """Units whose numbers say something: there was data, and no NaN in z or in the outputs."""
    return (stats.count > 0) & ~jnp.isnan(stats.mean) & ~jnp.isnan(stats.magnitude)


def dead_units(stats: UnitStatistics) -> Bool[Array, " c"]:
    """The paper's dead units: every member's output is 0 for every sample and position.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import dead_units, unit_statistics
      >>> h = jnp.array([[0.0, 1.0], [0.0, 0.0]])
      >>> dead_units(unit_statistics(h, h, jnp.ones_like(h))).tolist()
      [True, False]
    """
    return ~stats.live & _measured(stats)


def dead_links(stats: UnitStatistics) -> Bool[Array, " c"]:
    """Units that no gradient can pass: g_i'(z) = 0 for every member, sample and position.

    For relu these are the dead units. A tanh far out has outputs and no gradient: a dead link, not a dead unit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.diagnostics import dead_links, dead_units, unit_statistics
      >>> z = jnp.array([[0.0, 50.0], [1.0, 60.0]])
      >>> stats = unit_statistics(z, *jax.jvp(jnp.tanh, (z,), (jnp.ones_like(z),)))
      >>> dead_units(stats).tolist(), dead_links(stats).tolist()
      ([False, False], [False, True])
    """
    return (stats.steepest == 0) & _measured(stats)


def dormancy(stats: UnitStatistics) -> Float[Array, " c"]:
    """Each unit's mean output relative to its layer's; 0 throughout a layer whose outputs are all 0.

        s_c = m_c / mean_k m_k,   m_c = mean over data and members of |h_c|,   k over the finite units

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import dormancy, unit_statistics
      >>> h = jnp.array([[1.0, 3.0, 0.0, 0.0]])
      >>> dormancy(unit_statistics(h, h, jnp.ones_like(h)))
      Array([1., 3., 0., 0.], dtype=float32)

    Reference: Sokar et al., The dormant neuron phenomenon in deep reinforcement learning, 2023.
    """
    return relative_sizes(stats.magnitude, finite=~not_finite_units(stats))


def relative_sizes(sizes: Float[Array, " c"], *, finite: Bool[Array, " c"]) -> Float[Array, " c"]:
    """The units' sizes over the mean of the finite ones: `dormancy` of arrays; 0 for each unit where all are 0.

    >>> import jax.numpy as jnp
    >>> from linked_jax.diagnostics import relative_sizes
    >>> relative_sizes(jnp.array([1.0, 3.0, jnp.inf]), finite=jnp.array([True, True, False]))
    Array([0.5, 1.5, inf], dtype=float32)
    """
    layer = sizes.mean(where=finite)
    return sizes / jnp.where(layer == 0, 1, layer)


def dormant_units(stats: UnitStatistics, tau: float = 0.025) -> Bool[Array, " c"]:
    """The tau-dormant units: `dormancy` <= tau. Sokar uses 0 and 0.025.

    Args:
      stats: of one layer.
      tau: at least 0.

    Returns:
      A boolean for each unit.

    Raises:
      ValueError: if tau is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import dormant_units, unit_statistics
      >>> h = jnp.array([[1.0, 0.001, 0.0]])
      >>> stats = unit_statistics(h, h, jnp.ones_like(h))
      >>> dormant_units(stats).tolist(), dormant_units(stats, 0.0).tolist()
      ([False, True, True], [False, False, True])

    Reference: Sokar et al., The dormant neuron phenomenon in deep reinforcement learning, 2023.
    """
    if not tau >= 0:
        raise ValueError(f"tau is at least 0, got {tau}; 0 finds the units that are always zero")
    return (dormancy(stats) <= tau) & _measured(stats)


def linearised_units(stats: UnitStatistics) -> Bool[Array, " c"]:
    """Live units whose z never changes sign over the data: a mirrored relu is then alive and yet linear.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import linearised_units, unit_statistics
      >>> z = jnp.array([[1.0, 1.0], [2.0, -2.0]])
      >>> linearised_units(unit_statistics(z, z, jnp.ones_like(z))).tolist()
      [True, False]
    """
    return stats.live & ~((stats.active > 0) & stats.negative) & _measured(stats)


def saturated_units(stats: UnitStatistics, epsilon: float = 0.01) -> Bool[Array, " c"]:
    """Units whose members are all flat on all the data: no |g_i'(z)| is above epsilon. Dead links are among them.

    Args:
      stats: of one layer.
      epsilon: the steepest slope that counts as flat, at least 0.

    Returns:
      A boolean for each unit.

    Raises:
      ValueError: if epsilon is negative.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.diagnostics import saturated_units, unit_statistics
      >>> z = jnp.array([[0.0, 4.0], [4.0, -5.0]])
      >>> saturated_units(unit_statistics(z, *jax.jvp(jnp.tanh, (z,), (jnp.ones_like(z),)))).tolist()
      [False, True]
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon is at least 0, got {epsilon}; 0 finds the dead links alone")
    return (stats.steepest <= epsilon) & _measured(stats)


def not_finite_units(stats: UnitStatistics) -> Bool[Array, " c"]:
    """Units that saw NaN or infinity, in z or in an output; they do not change the `dormancy` of the others.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import not_finite_units, unit_statistics
      >>> z = jnp.array([[1.0, jnp.inf], [2.0, 0.0]])
      >>> not_finite_units(unit_statistics(z, z, jnp.ones_like(z))).tolist()
      [False, True]
    """
    return ~(jnp.isfinite(stats.mean) & jnp.isfinite(stats.magnitude))


def by_member(x: Array, arity: int, layout: Layout) -> Array:
    """(..., d*C) -> (n, d, C), whatever the layout."""
    if arity < 1 or x.ndim < 1 or x.shape[-1] % arity:
        raise ValueError(f"the channels of h are a multiple of the arity, got h of shape {x.shape} and arity {arity}")
    if layout not in ("blocked", "interleaved"):
        raise ValueError(f"layout is 'blocked' or 'interleaved', got {brief(layout)}")
    n, c = math.prod(x.shape[:-1]), x.shape[-1] // arity
    return x.reshape(n, arity, c) if layout == "blocked" else x.reshape(n, c, arity).swapaxes(1, 2)
