import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax.activations import ACTIVATIONS, lk_relu
from linked_jax.linking import Link, linked
from linked_jax.slopes import FLAT, combine_slopes, dead_band, effective_negative_slope, slope_statistics
from tests.cases import first_fast

COMBINE = jax.jit(combine_slopes)


@functools.partial(jax.jit, static_argnums=0)
def statistics(link, z, where=None):
    slopes = jax.jvp(link, (z,), (jnp.ones_like(z),))[1]
    return slope_statistics(z, slopes, arity=link.arity, layout=link.layout, where=where)


def reference(slopes, z):
    """In NumPy float64: `slopes` are functions of z."""
    z = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
    by_member = np.stack([g(z) for g in slopes])
    negative = np.array([g[z < 0].mean() for g in by_member])
    return negative, (np.abs(by_member) < FLAT).all(0).mean(0)


def tanh_slope(z):
    return 1 - np.tanh(z) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))
@hypothesis.settings(max_examples=5)
@hypothesis.given(seed=st.integers(0, 99), shape=st.sampled_from([(6, 3), (6, 2, 3)]), cut=st.integers(0, 6))
def test_any_split_gives_the_definition_in_float64(layout, seed, shape, cut):
    z = jnp.asarray(np.random.default_rng(seed).normal(-0.5, 4.0, shape), jnp.float32)
    link = Link((jnp.tanh, lambda z: 2 * jnp.tanh(z - 1)), layout=layout)
    stats = COMBINE(statistics(link, z[:cut]), statistics(link, z[cut:]))
    negative, flat = reference([tanh_slope, lambda z: 2 * tanh_slope(z - 1)], z)
    np.testing.assert_allclose(effective_negative_slope(stats), negative, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dead_band(stats), flat, rtol=1e-6)


Z = jnp.array([[-1.0, -9.0], [2.0, 8.0], [-3.0, -0.5]])
KNOWN = {
    "relu": (ACTIVATIONS["relu"], [0.0], [2 / 3, 2 / 3]),
    "lk_relu": (lk_relu, [0.0, -1.0], [0.0, 0.0]),
    "leaky_relu": (Link((functools.partial(jax.nn.leaky_relu, negative_slope=0.2),)), [0.2], [0.0, 0.0]),
    "z, -z": (linked(lambda z: z), [1.0, -1.0], [0.0, 0.0]),
    "tanh": (Link((jnp.tanh,)), [tanh_slope(np.array([-1, -9, -3, -0.5])).mean()], [0.0, 2 / 3]),
}


@pytest.mark.parametrize(("link", "negative", "flat"), first_fast(KNOWN.values()), ids=KNOWN)
def test_slopes_that_one_can_see(link, negative, flat):
    stats = statistics(link, Z)
    np.testing.assert_allclose(effective_negative_slope(stats), negative, atol=1e-6)
    np.testing.assert_allclose(dead_band(stats), flat, rtol=1e-6)


@pytest.mark.slow
def test_what_is_masked_may_be_anything():
    z = jnp.concatenate([Z, jnp.full((2, 2), jnp.nan), jnp.full((1, 2), -5.0)])
    stats = statistics(lk_relu, z, jnp.array([True] * 3 + [False] * 3))
    jax.tree.map(np.testing.assert_array_equal, stats, statistics(lk_relu, Z))


def test_there_is_no_slope_below_zero_without_data_there_and_no_share_of_nothing():
    assert np.isnan(effective_negative_slope(statistics(lk_relu, jnp.ones((3, 2))))).all()
    nothing = statistics(lk_relu, Z[:0])
    assert not any(np.asarray(leaf).any() for leaf in nothing)
    assert np.isnan(dead_band(nothing)).all()
    jax.tree.map(np.testing.assert_array_equal, COMBINE(nothing, statistics(lk_relu, Z)), statistics(lk_relu, Z))


def test_nan_is_on_no_side():
    stats = statistics(lk_relu, jnp.array([[jnp.nan], [-2.0]]))
    assert effective_negative_slope(stats).tolist() == [0.0, -1.0]
    assert dead_band(stats).tolist() == [0.0]


def test_half_precision_is_summed_in_float32():
    stats = statistics(ACTIVATIONS["leaky_relu"], -jnp.ones((4096, 1), jnp.bfloat16))
    assert stats.negative.dtype == jnp.float32
    assert stats.below.tolist() == [4096.0]


def test_shapes_that_do_not_fit_are_refused(unchecked):
    with pytest.raises(ValueError, match="arity 2, got"):
        slope_statistics(jnp.ones((2, 2)), jnp.ones((2, 2)), arity=2)
    with pytest.raises(ValueError, match="'sideways'"):
        slope_statistics(jnp.ones((2, 2)), jnp.ones((2, 2)), layout="sideways")
