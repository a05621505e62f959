import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax.histograms import BINS, HIGHEST, LOWEST, bin_edges, log_histogram
from tests.cases import first_fast

COUNT = jax.jit(log_histogram)
POWERS = [2.0**k for k in (LOWEST - 1, LOWEST, -1, 0, 1, HIGHEST, HIGHEST + 1, 100)]
NEAR = [np.nextafter(np.float32(x), np.float32(side)) for x in POWERS for side in (0, np.inf)]
VALUES = [sign * float(x) for x in [0.0, np.inf, 1e-45, 3.4e38, *POWERS, *NEAR] for sign in (1, -1)] + [float("nan")]


def by_counting(x):
    """The definition, one value after the other."""
    edges, counts = bin_edges(), np.zeros(BINS)
    for value in np.asarray(x, np.float64).ravel():
        for k, (low, high) in enumerate(itertools.pairwise(edges)):
            inside = low <= value < high or value == np.inf == high
            if k < BINS // 2:
                inside = low < value <= high or value == -np.inf == low
            if k == BINS // 2:
                inside = low < value < high
            counts[k] += inside
    return counts


@pytest.mark.slow
@hypothesis.given(x=hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=4), elements=st.sampled_from(VALUES)))
def test_every_value_is_in_its_bin(x):
    np.testing.assert_array_equal(COUNT(x), by_counting(x))


@pytest.mark.parametrize("dtype", first_fast([jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64]))
def test_counts_of_other_floats_are_exact(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)) ** 9, dtype)
        counts = COUNT(x)
        assert counts.dtype == jnp.float32
        np.testing.assert_array_equal(counts, by_counting(x.astype(jnp.float64 if dtype == jnp.float64 else None)))


@pytest.mark.slow
def test_counts_of_two_batches_are_added_and_a_mask_leaves_out():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(30, 4)), jnp.float32)
    np.testing.assert_array_equal(COUNT(x), COUNT(x[:7]) + COUNT(x[7:]))
    where = jnp.arange(30)[:, None] < 7
    np.testing.assert_array_equal(COUNT(x, where=where), COUNT(x[:7]))
    assert COUNT(x[:0]).sum() == 0


@pytest.mark.slow
def test_more_than_a_float_can_count_in_one_batch():
    """A sum of float32 ones would stop at 2^24."""
    n = 2**24 + 2**10
    assert COUNT(jnp.ones(n))[BINS // 2 - LOWEST + 1] == n


def test_edges_are_powers_of_two_in_rising_order():
    edges = bin_edges()
    assert edges.shape == (BINS + 1,)
    assert (np.diff(edges[1:-1]) > 0).all()
    np.testing.assert_array_equal(edges, -edges[::-1])
    assert edges[-2] == 2.0**HIGHEST


@pytest.mark.parametrize("where", [jnp.array([1, 0, 2]), jnp.ones((2, 3), bool), jnp.ones(2, bool)])
def test_a_mask_that_does_not_fit_is_refused(where, unchecked):
    with pytest.raises(ValueError, match="where has booleans"):
        log_histogram(jnp.ones(3), where=where)


def test_numpys_float64_is_counted_as_jax_has_it(unchecked):
    x = np.array([1.0, 3.0, -5.0, 1e-3])
    for given in (x, x.tolist()):
        np.testing.assert_array_equal(log_histogram(given), log_histogram(jnp.array(x, jnp.float32)))
