import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from linked_jax.diagnostics import combine, unit_statistics
from linked_jax.signal_statistics import (
    activation_shift,
    combine_features,
    covariate_drift,
    effective_rank,
    elimination,
    feature_moments,
    mean_square,
    stable_rank,
    variance,
)
from tests.cases import first_fast

# Compiled, as a probe uses them; the doctests call them as they are.
UNIT_STATISTICS, ELIMINATION, DRIFT, JITTED, STABLE, MOMENTS, COMBINE = map(
    jax.jit,
    (unit_statistics, elimination, covariate_drift, effective_rank, stable_rank, feature_moments, combine_features),
)
RANK = jax.jit(lambda h: effective_rank(feature_moments(h)))


def statistics(z):
    z = jnp.asarray(z, jnp.float32)
    return UNIT_STATISTICS(z, z, z)


def with_moments(mean, std, n=8):
    """Data (n, C) whose mean and standard deviation are exactly these, up to rounding."""
    return np.where(np.arange(n)[:, None] % 2, 1.0, -1.0) * np.asarray(std) + np.asarray(mean)


def images(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(6, 4, 5, 3)) * np.array([0.5, 1.0, 3.0]) + np.array([-1.0, 0.0, 2.0])


@pytest.mark.slow
def test_moments_are_those_of_numpy_over_samples_and_positions():
    z = images()
    stats = combine(statistics(z[:2]), statistics(z[2:]))
    means, stds = z.mean((0, 1, 2)), z.std((0, 1, 2))
    np.testing.assert_allclose(variance(stats), stds**2, rtol=1e-5)
    np.testing.assert_allclose(mean_square(stats), (z**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(activation_shift(stats), (means.mean(), means.std()), rtol=1e-5)
    found = ELIMINATION(stats)
    np.testing.assert_allclose(found.spread_of_mean, means.std(), rtol=1e-5)
    np.testing.assert_allclose(found.spread_of_std, stds.std(), rtol=1e-5)
    np.testing.assert_allclose(found.active, scipy.special.ndtr(means / stds), rtol=1e-5)
    np.testing.assert_allclose(found.least_active, min(found.active), rtol=0)


def test_phi_is_the_active_share_of_gaussian_data():
    z = np.random.default_rng(1).normal(size=(20_000, 5)) * np.array([0.1, 1, 2, 3, 1]) + np.array([0.2, -1, 0, 3, -3])
    stats = statistics(z)
    np.testing.assert_allclose(ELIMINATION(stats).active, stats.active / stats.count, atol=0.01)
    np.testing.assert_allclose(ELIMINATION(stats).least_active, (z > 0).mean(0).min(), atol=0.01)


def test_a_constant_pre_activation_is_active_always_or_never():
    assert ELIMINATION(statistics(np.tile([2.0, -2.0, 0.0], (4, 1)))).active.tolist() == [1.0, 0.0, 0.0]


def test_normalised_units_are_far_from_elimination():
    found = ELIMINATION(statistics(with_moments(np.zeros(4), np.ones(4))))
    np.testing.assert_allclose((found.spread_of_mean, found.spread_of_std, found.least_active), (0, 0, 0.5), atol=1e-6)


def test_nothing_drifts_from_itself():
    stats = statistics(images())
    np.testing.assert_allclose(DRIFT(stats, stats), 0, atol=1e-6)  # compiled, a variance may differ from itself


@pytest.mark.parametrize(("mean", "std"), first_fast([(3.0, 5.0), (-2.0, 1.0), (0.0, 0.25), (1.0, 0.0)]))
def test_wasserstein_has_its_closed_form(mean, std):
    standard, other = statistics(with_moments([0.0], [1.0])), statistics(with_moments([mean], [std]))
    for drift in (DRIFT(standard, other), DRIFT(other, standard)):
        wanted = (abs(mean), abs(std**2 - 1), np.sqrt(mean**2 + (std - 1) ** 2))
        np.testing.assert_allclose(drift, wanted, atol=1e-5)


def test_wasserstein_is_the_distance_of_matched_quantiles():
    """In one dimension W2 is that of the sorted samples; for a Gaussian it has the closed form that is used."""
    quantiles = scipy.special.ndtri((np.arange(20_000) + 0.5) / 20_000)[:, None]
    before, after = 0.5 * quantiles - 1, 2 * quantiles + 0.3
    found = DRIFT(statistics(before), statistics(after)).wasserstein
    np.testing.assert_allclose(found, np.sqrt(((after - before) ** 2).mean()), rtol=1e-3)


def test_drift_is_the_mean_over_units():
    before, after = statistics(with_moments([0, 0], [1, 1])), statistics(with_moments([-3, 0], [1, 5]))
    np.testing.assert_allclose(DRIFT(before, after), (1.5, 12.0, 3.5), rtol=1e-5)  # W2 is 3 and 4


def test_drift_between_two_layers_is_refused(unchecked):
    with pytest.raises(ValueError, match="got 3 and 2 units"):
        covariate_drift(statistics(np.ones((4, 3))), statistics(np.ones((4, 2))))


# --- effective rank -----------------------------------------------------------------------------------------------


def reference_rank(h):
    return reference_ranks(h)[0]


def reference_ranks(h):
    """The effective and the stable rank, from the singular values of the features themselves."""
    sigma = np.linalg.svd(h, compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 0]
    return np.exp(-(p * np.log(p)).sum()), (sigma**2).sum() / sigma.max() ** 2


def features(k=12, seed=0):
    return np.random.default_rng(seed).normal(size=(100, k)) * np.linspace(1, 0.05, k)


@pytest.mark.parametrize(("dtype", "tolerance"), first_fast([(np.float32, 1e-3), (np.float64, 1e-9)]))
def test_effective_rank_is_that_of_the_singular_values_of_the_features(dtype, tolerance):
    h = features() + 3
    with jax.enable_x64(dtype == np.float64):
        found = RANK(jnp.asarray(h, dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, reference_rank(h), rtol=tolerance)
    with jax.enable_x64(dtype == np.float64):
        stable = STABLE(MOMENTS(jnp.asarray(h, dtype)))
    assert stable.dtype == dtype
    np.testing.assert_allclose(stable, reference_ranks(h)[1], rtol=tolerance / 10)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), first_fast([(1024, 512), (300, 512), (2048, 2048)]))
@pytest.mark.parametrize("name", first_fast(["sigmoid", "softplus", "relu", "low rank"]))
def test_effective_rank_of_wide_layers_is_that_of_float64(name, n, k):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n, k)) @ rng.normal(size=(k, k)) / np.sqrt(k) + 2
    low = rng.normal(size=(n, 20)) @ rng.normal(size=(20, k)) + 2
    forms = {
        "sigmoid": 1 / (1 + np.exp(-z)),
        "softplus": np.log1p(np.exp(z)),
        "relu": np.maximum(z, 0),
        "low rank": low,
    }
    h = forms[name].astype(np.float32)
    streamed = functools.reduce(COMBINE, map(MOMENTS, np.array_split(h, 4)))
    effective, stable = reference_ranks(h.astype(np.float64))
    np.testing.assert_allclose(JITTED(streamed), effective, rtol=1e-2)
    np.testing.assert_allclose(STABLE(streamed), stable, rtol=1e-3)


@pytest.mark.parametrize("rank", first_fast([1, 3, 63]))
def test_effective_rank_of_isotropic_features_is_their_dimension(rank):
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(64, 64)))[0][:, :rank]
    np.testing.assert_allclose(RANK(jnp.asarray(basis.T, jnp.float32)), rank, rtol=1e-3)
    np.testing.assert_allclose(STABLE(MOMENTS(jnp.asarray(basis.T, jnp.float32))), rank, rtol=1e-3)


def test_effective_rank_knows_no_rotation_and_no_scale():
    h = features()
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]
    ranks = [RANK(jnp.asarray(c * x, jnp.float32)) for x in (h, h @ rotation) for c in (1, 1e-3, 1e3)]
    np.testing.assert_allclose(ranks, ranks[0], rtol=1e-3)
    assert 1 < ranks[0] < 12


@pytest.mark.parametrize("rank", [effective_rank, stable_rank])
def test_ranks_of_features_whose_squares_underflow_are_nan_and_not_one(rank):
    h = jnp.asarray(features(), jnp.float32)
    exact = rank(feature_moments(h))
    for scale, is_known in ((1e-15, True), (1e15, True), (1e-20, False), (1e-30, False), (1e20, False)):
        found = rank(feature_moments(h * scale))
        assert jnp.isfinite(found) == is_known
        np.testing.assert_allclose(found, exact if is_known else jnp.nan, rtol=1e-3)


def test_effective_rank_lies_between_one_and_the_rank():
    h = features()[:, :5] @ np.random.default_rng(3).normal(size=(5, 12))
    assert 1 < RANK(jnp.asarray(h, jnp.float32)) < 5


@pytest.mark.slow
def test_effective_rank_of_silent_features_is_zero_and_of_nan_is_nan():
    assert RANK(jnp.zeros((4, 4))) == STABLE(MOMENTS(jnp.zeros((4, 4)))) == 0
    assert np.isnan(RANK(jnp.full((4, 4), jnp.nan)))
    assert np.isnan(STABLE(MOMENTS(jnp.full((4, 4), jnp.nan))))


def test_effective_rank_of_features_instead_of_their_moments_is_refused(unchecked):
    with pytest.raises(TypeError, match=r"pass feature_moments\(h\)"):
        effective_rank(jnp.ones((5, 4)))
    with pytest.raises(TypeError, match=r"pass feature_moments\(h\)"):
        stable_rank(jnp.ones((5, 4)))


def test_stable_rank_is_at_most_the_effective_rank_and_does_not_count_what_is_small():
    h = MOMENTS(jnp.asarray(np.diag([1.0] + [0.01] * 11), jnp.float32))
    np.testing.assert_allclose(STABLE(h), 1.0011, rtol=1e-4)
    assert JITTED(h) > 1.5
