"""How a layer's signal stands: shift, mean square, elimination, drift and rank. Pure functions of statistics.

They take the `UnitStatistics` of one layer; see `linked_jax.diagnostics` for how to stream them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from linked_jax.arguments import as_array
from linked_jax.arrays import wide
from linked_jax.diagnostics import UnitStatistics, combined_mean, kept_rows


class ActivationShift(NamedTuple):
    """The mean over units of their mean pre-activation, and the standard deviation over units of those means."""

    mean: Float[Array, ""]
    spread: Float[Array, ""]


class Elimination(NamedTuple):
    """Our proxies of the distance to elimination; see `elimination`."""

    spread_of_mean: Float[Array, ""]
    spread_of_std: Float[Array, ""]
    active: Float[Array, " c"]
    least_active: Float[Array, ""]


class Drift(NamedTuple):
    """The change of a layer's pre-activations between two steps, each the mean over units; see `covariate_drift`."""

    mean: Float[Array, ""]
    variance: Float[Array, ""]
    wasserstein: Float[Array, ""]


class FeatureMoments(NamedTuple):
    """The moments of a layer's features h over all batches so far; made by `feature_moments`. All zeros: no data.

    Attributes:
      count: of samples and positions, ().
      mean: of h, (k,).
      scatter: the sum of (h - mean) (h - mean)^T, (k, k).
    """

    count: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Float[Array, " k"]
    scatter: Float[Array, "k k"]


def mean_square(stats: UnitStatistics) -> Float[Array, ""]:
    """The mean of z^2 over samples, positions and units: what a good start keeps from layer to layer.

        mean over units of (var_c + mean_c^2)

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import unit_statistics
      >>> from linked_jax.signal_statistics import mean_square
      >>> z = jnp.array([[1.0, -3.0]])
      >>> mean_square(unit_statistics(z, z, jnp.ones_like(z)))
      Array(5., dtype=float32)
    """
    return (variance(stats) + jnp.square(stats.mean)).mean()


def variance(stats: UnitStatistics) -> Float[Array, " c"]:
    """Each unit's variance of z over samples and positions (biased: divided by the count).

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import unit_statistics
      >>> from linked_jax.signal_statistics import variance
      >>> z = jnp.array([[1.0], [3.0]])
      >>> variance(unit_statistics(z, z, jnp.ones_like(z)))
      Array([1.], dtype=float32)
    """
    return stats.m2 / stats.count


def activation_shift(stats: UnitStatistics) -> ActivationShift:
    """How far the pre-activations of a layer lie from 0: mean_k mean_k(z) and its spread over the units k.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import unit_statistics
      >>> from linked_jax.signal_statistics import activation_shift
      >>> z = jnp.array([[1.0, 5.0]])
      >>> activation_shift(unit_statistics(z, z, jnp.ones_like(z)))
      ActivationShift(mean=Array(3., dtype=float32), spread=Array(2., dtype=float32))
    """
    return ActivationShift(stats.mean.mean(), stats.mean.std())


def elimination(stats: UnitStatistics) -> Elimination:
    """How near a layer is to the elimination singularity, a unit that stays inactive: three proxies of our own.

        std_c mean_c,   std_c std_c,   Phi(mean_c / std_c)

    The last is the share of the data with z > 0 if z is Gaussian; a layer's worst unit has the least. The paper's own
    distance needs the teacher of its toy problem. A constant z is active always or never.

    Args:
      stats: of one layer.

    Returns:
      `spread_of_mean`, `spread_of_std` and `least_active`, scalars, and `active`, a share for each unit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import unit_statistics
      >>> from linked_jax.signal_statistics import elimination
      >>> z = jnp.array([[1.0, -4.0], [-1.0, -2.0]])
      >>> elimination(unit_statistics(z, z, jnp.ones_like(z))).active.round(4)
      Array([0.5   , 0.0013], dtype=float32)

    Reference: Qiao et al., Rethinking normalization and elimination singularity in neural networks, 2019.
    """
    std = jnp.sqrt(variance(stats))
    share = jax.scipy.stats.norm.cdf(stats.mean / jnp.where(std == 0, 1, std))
    active = jnp.where(std == 0, (stats.mean > 0).astype(share.dtype), share)
    return Elimination(stats.mean.std(), std.std(), active, active.min())


def covariate_drift(before: UnitStatistics, after: UnitStatistics) -> Drift:
    """How far a layer's pre-activations moved between two training steps, on the same data.

        mean_k |mean' - mean|,   mean_k |var' - var|,   mean_k W2_k
        W2_k = sqrt((mean'_k - mean_k)^2 + (std'_k - std_k)^2)

    W2 is the 2-Wasserstein distance between the two Gaussians of unit k's mean and variance, in units of z. It sees
    nothing beyond these two moments.

    Args:
      before: of one layer at one step.
      after: of the same layer at another step.

    Returns:
      `mean`, `variance` and `wasserstein`, scalars.

    Raises:
      ValueError: if the two have different numbers of units.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.diagnostics import unit_statistics
      >>> from linked_jax.signal_statistics import covariate_drift
      >>> z = jnp.array([[1.0], [-1.0]])
      >>> before, after = (unit_statistics(x, x, jnp.ones_like(x)) for x in (z, 5 * z + 3))
      >>> covariate_drift(before, after).wasserstein
      Array(5., dtype=float32)
    """
    if before.mean.shape != after.mean.shape:
        raise ValueError(
            f"drift compares one layer with itself, got {before.mean.size} and {after.mean.size} units; pass the same "
            "layer at two steps"
        )
    mean = jnp.abs(after.mean - before.mean)
    variances = variance(before), variance(after)
    std = jnp.sqrt(variances[1]) - jnp.sqrt(variances[0])
    return Drift(mean.mean(), jnp.abs(variances[1] - variances[0]).mean(), jnp.hypot(mean, std).mean())


def feature_moments(h: Float[Array, "n k"], *, where: Bool[Array, " n"] | None = None) -> FeatureMoments:
    """The moments of one batch's features, to be combined with those of others by `combine_features`.

    Args:
      h: features, (n, k).
      where: which rows count; all if None.

    Returns:
      A `FeatureMoments`.

    Raises:
      ValueError: if h has other than two axes, or where does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.signal_statistics import feature_moments
      >>> feature_moments(jnp.array([[1.0, 2.0], [3.0, 2.0]])).scatter
      Array([[2., 0.],
             [0., 0.]], dtype=float32)
    """
    h = wide(as_array(h))
    if h.ndim != 2:
        raise ValueError(f"features are of shape (n, k), got {h.shape}; pass h.reshape(-1, h.shape[-1])")
    rows = kept_rows(where, h)
    count = rows.sum(dtype=h.dtype)
    mean = h.sum(axis=0, where=rows) / jnp.maximum(count, 1)
    centred = jnp.where(rows, h - mean[None], 0)
    return FeatureMoments(count, mean, jnp.matmul(centred.T, centred, precision="highest"))


def combine_features(a: FeatureMoments, b: FeatureMoments) -> FeatureMoments:
    """The moments of two disjoint batches together, as `linked_jax.diagnostics.combine` for each unit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.signal_statistics import combine_features, feature_moments
      >>> halves = [feature_moments(jnp.array([[x]])) for x in (1.0, 3.0)]
      >>> combine_features(*halves).scatter
      Array([[2.]], dtype=float32)
    """
    count, share, delta, mean = combined_mean(a, b)
    scatter = a.scatter + b.scatter + jnp.outer(delta, delta) * a.count * share
    return FeatureMoments(count, mean, scatter)


def effective_rank(features: FeatureMoments) -> Float[Array, ""]:
    """How many directions a layer's features use: between 1 and k, and 0 for features that are all 0.

        exp(-sum_i p_i log p_i),   p_i = sigma_i / sum_j sigma_j

    sigma are the singular values of the features h over the data, (n, k). They are those of the root of the scatter
    matrix with one more row, sqrt(n) mean. The common mean of a wide layer (sigmoid, softplus, relu) would hide in
    the rounding of sum h h^T what is 0.1 % of it. Eigenvalues of the scatter below 4 epsilon of the largest are
    rounding, and count as 0. NaN where squares of the features leave the dtype: in float32 below about 1e-16 or above
    1e18.

    Args:
      features: from `feature_moments` and `combine_features`.

    Returns:
      A scalar.

    Raises:
      TypeError: if features are not `FeatureMoments`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.signal_statistics import effective_rank, feature_moments
      >>> effective_rank(feature_moments(jnp.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]]))).round(3)
      Array(2., dtype=float32)

    Reference: Roy and Vetterli, The effective rank: a measure of effective dimensionality, 2007.
    """
    sigma = _singular_values(features)
    total = sigma.sum()
    p = sigma / jnp.where(total == 0, 1, total)
    entropy = -(p * jnp.log(jnp.where(p == 0, 1, p))).sum()
    return jnp.where(total == 0, 0, jnp.exp(entropy))


def stable_rank(features: FeatureMoments) -> Float[Array, ""]:
    """How many directions carry the energy of a layer's features: at most their rank, and 0 if they are all 0.

        ||H||_F^2 / ||H||_2^2 = sum_k sigma_k^2 / sigma_1^2

    where sigma are the singular values of the features h over the data, as for `effective_rank`; small ones count less
    here. It is 1 where all features are one, and their common mean is among them. NaN as `effective_rank`.

    Args:
      features: from `feature_moments` and `combine_features`.

    Returns:
      A scalar.

    Raises:
      TypeError: if features are not `FeatureMoments`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.signal_statistics import feature_moments, stable_rank
      >>> stable_rank(feature_moments(jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
      Array(1.25, dtype=float32)

    Reference: Rudelson and Vershynin, Sampling from large matrices, 2007.
    """
    sigma = _singular_values(features)
    largest = sigma.max(initial=0)
    return jnp.square(sigma / jnp.where(largest == 0, 1, largest)).sum()


def _singular_values(features: FeatureMoments) -> Float[Array, " k"]:
    """Of the features over the data; see `effective_rank`."""
    if not isinstance(features, FeatureMoments):
        raise TypeError(
            f"a rank is of FeatureMoments, got {type(features).__name__}; pass feature_moments(h), h of shape (n, k)"
        )
    count, mean, scatter = features
    limits = jnp.finfo(scatter.dtype)
    size = jnp.square(mean).sum() + jnp.trace(scatter) / jnp.maximum(count, 1)
    lost = (mean.any() | scatter.any()) & ~(size > limits.tiny / limits.eps)  # squares of rounding's size underflow
    eigenvalues, vectors = jnp.linalg.eigh(scatter)
    noise = 4 * jnp.finfo(scatter.dtype).eps * eigenvalues.max()
    roots = jnp.sqrt(jnp.where(eigenvalues <= noise, 0, eigenvalues))
    sigma = jnp.linalg.svd(jnp.vstack([roots[:, None] * vectors.T, jnp.sqrt(count) * mean[None]]), compute_uv=False)
    return jnp.where(lost, jnp.nan, sigma)
