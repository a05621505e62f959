import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from linked_jax.updates import update_ratios
from tests.cases import first_fast

RATIOS = jax.jit(update_ratios)


@pytest.mark.parametrize("dtype", first_fast([jnp.float32, jnp.bfloat16, jnp.float64, jnp.complex64]))
def test_ratios_are_those_of_the_norms_in_float64(dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == jnp.float64):
        trees = [{"a": jnp.asarray(rng.normal(size=(5, 3)), dtype), "b": [jnp.asarray(-2.5, dtype)]} for _ in range(2)]
        found = RATIOS(*trees)
        wide = complex if dtype == jnp.complex64 else float
        for one, u, w in zip(*map(jax.tree.leaves, (found, *trees)), strict=True):
            norms = [np.linalg.norm(np.asarray(x).astype(wide)) for x in (u, w)]
            np.testing.assert_allclose(one, norms[0] / norms[1], rtol=1e-12 if dtype == jnp.float64 else 1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(trees[0])


def test_zeros_are_safe():
    zero, one = jnp.zeros(3), jnp.ones(3)
    assert [float(RATIOS(*pair)) for pair in ((zero, zero), (zero, one), (one, zero))] == [0.0, 0.0, np.inf]
    assert float(RATIOS(zero[:0], zero[:0])) == 0


@pytest.mark.parametrize("scale", first_fast([1e-30, 1e30]))
def test_no_square_overflows_or_underflows(scale):
    u, w = scale * jnp.array([3.0, 4.0]), scale * jnp.array([30.0, 40.0])
    np.testing.assert_allclose(RATIOS(u, w), 0.1, rtol=1e-6)


@pytest.mark.parametrize("ratio", [jax.jit(update_ratios), update_ratios], ids=["jit", "eager"])
def test_norms_near_the_largest_float_are_measured(ratio):
    u, w = jnp.full(4, 1e35), jnp.full(4, 1e38)
    np.testing.assert_allclose([ratio(u, w), ratio(w, w), ratio(w, u)], [1e-3, 1, 1e3], rtol=1e-6)


def test_nan_and_infinity_are_not_hidden():
    assert np.isnan(RATIOS(jnp.array([jnp.nan, 1.0]), jnp.ones(2)))
    assert not np.isfinite(RATIOS(jnp.array([jnp.inf, 1.0]), jnp.ones(2)))


def test_it_takes_what_optax_and_nnx_give():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    updates, _ = optax.sgd(0.1).update(params, optax.sgd(0.1).init(params), params)
    ratios = RATIOS(updates, params)
    np.testing.assert_allclose(ratios["kernel"][...], 0.1, rtol=1e-6)
    assert ratios["bias"][...] == 0


BAD = {
    "structures": ({"a": 1.0}, {"b": 1.0}, "trees of one structure"),
    "shapes": (jnp.ones(3), jnp.ones((3, 1)), r"float32 of shape \(3,\) and float32 of shape \(3, 1\)"),
    "integers": (jnp.ones(3), jnp.arange(3), "int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_trees_that_do_not_fit_are_refused(name):
    *trees, message = BAD[name]
    with pytest.raises(ValueError, match=message) as raised:
        update_ratios(*trees)
    assert len(str(raised.value).splitlines()) == 1
