import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from linked_jax.remedies.ic import IndependentComponent


def white(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(1.5, 2.0, shape).astype(dtype)


def float64(ic):
    """All in float64, also the statistics that Flax keeps in float32."""
    for _, variable in nnx.iter_graph(ic):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            variable.set_value(variable[...].astype(jnp.float64))
    return ic


def fresh(features=4, **options):
    return IndependentComponent(features, rngs=nnx.Rngs(0), **options)


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.99))
def test_at_rate_zero_it_is_batch_norm(seed, momentum):
    x = white(5, 3, 2, seed=seed)
    with jax.enable_x64(True):
        ic = float64(fresh(2, rate=0.0, momentum=momentum))
        y = ic(jnp.asarray(x))
        mean, var = x.mean((0, 1)), x.var((0, 1))
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=0, atol=1e-10)
        ic.eval()
        stored_mean, stored_var = (1 - momentum) * mean, momentum + (1 - momentum) * var
        wanted = (x - stored_mean) / np.sqrt(stored_var + 1e-5)
        np.testing.assert_allclose(ic(jnp.asarray(x)), wanted, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.3, 0.05, 0.1, 0.6])
def test_values_are_dropped_or_scaled_up_at_the_rate(rate):
    x = jnp.asarray(white(200, 10, 4, dtype=np.float32))
    plain, y = fresh(rate=0.0)(x), np.asarray(fresh(rate=rate)(x))
    kept = y != 0
    np.testing.assert_allclose(y[kept], np.asarray(plain)[kept] / (1 - rate), rtol=1e-5)
    error = np.sqrt(rate * (1 - rate) / y.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * error


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.4, 0.05, 0.1, 0.8])
def test_the_correlation_of_a_pair_becomes_keep_probability_times_itself(rate):
    n, rho = 40_000, 0.8
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, n))
    x = np.stack([a, rho * a + np.sqrt(1 - rho**2) * b], -1).astype(np.float32)
    y = np.asarray(fresh(2, rate=rate)(jnp.asarray(x)), np.float64)
    before, after = (np.corrcoef(pair, rowvar=False)[0, 1] for pair in (x, y))
    # y1 y2 has the second moment (1 + 2 rho^2) / p^2, so 1 / sqrt(n) / p bounds the error up to a factor of about 2
    assert abs(after - (1 - rate) * before) < 5 * 2 / np.sqrt(n)


@pytest.mark.slow
def test_evaluation_drops_nothing_and_keeps_the_statistics():
    ic, x = fresh(rate=0.5, momentum=0.5), jnp.asarray(white(6, 4, dtype=np.float32))
    ic(x)
    ic.eval()
    stored = jax.tree.map(jnp.copy, nnx.state(ic, nnx.BatchStat))
    y = ic(x)
    mean, var = ic.batch_norm.mean[...], ic.batch_norm.var[...]
    np.testing.assert_allclose(y, (x - mean) / jnp.sqrt(var + 1e-5), atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate([ic(example[None]) for example in x]), y, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ic, nnx.BatchStat), stored)


@pytest.mark.slow
def test_each_argument_of_the_call_wins_over_its_mode():
    ic, x = fresh(rate=0.5), jnp.asarray(white(50, 4, dtype=np.float32))
    ic.eval()
    assert (ic(x, deterministic=False) == 0).any()
    before = ic.batch_norm.mean[...]
    assert not (ic(x, use_running_average=False) == 0).any()
    assert (ic.batch_norm.mean[...] != before).all()
    ic.train()
    assert not (ic(x, deterministic=True) == 0).any()
    stored = ic.batch_norm.mean[...]
    ic(x, use_running_average=True)
    np.testing.assert_array_equal(ic.batch_norm.mean[...], stored)


@pytest.mark.slow
def test_each_call_draws_anew_and_equal_seeds_draw_alike():
    x = jnp.asarray(white(20, 4, dtype=np.float32))
    one, two = fresh(rate=0.5), fresh(rate=0.5)
    first, again = one(x), one(x)
    assert ((first == 0) != (again == 0)).any()
    np.testing.assert_array_equal(first, two(x))


@pytest.mark.slow
def test_training_step_under_jit_equals_eager():
    x = jnp.asarray(white(8, 3, 4, dtype=np.float32))
    eager, jitted = fresh(rate=0.3), fresh(rate=0.3)
    np.testing.assert_allclose(nnx.jit(lambda ic, x: ic(x))(jitted, x), eager(x), atol=1e-5)
    kinds = (nnx.Param, nnx.BatchStat)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), nnx.state(jitted, kinds), nnx.state(eager, kinds)
    )


@pytest.mark.slow
def test_gradient_against_differences():
    with jax.enable_x64(True):
        ic = float64(fresh(rate=0.3))
        graph, parameters, rest = nnx.split(ic, nnx.Param, ...)  # rest has the key: each call drops the same values

        @jax.jit
        def loss(parameters, x):
            return jnp.sin(nnx.merge(graph, parameters, rest, copy=True)(x)).sum()

        check_grads(loss, (parameters, jnp.asarray(white(5, 2, 4))), order=1, modes=("rev",))


@pytest.mark.slow
def test_bfloat16():
    ic = fresh(rate=0.0, dtype=jnp.bfloat16)
    x = jnp.asarray(white(16, 4), jnp.bfloat16)
    y = ic(x)
    assert y.dtype == fresh(param_dtype=jnp.bfloat16)(x).dtype == jnp.bfloat16
    assert ic.batch_norm.mean.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), fresh(rate=0.0)(x.astype(jnp.float32)), atol=0.05)


@pytest.mark.slow
def test_batch_size_one_with_space():
    ic = fresh(rate=0.2)
    x = jnp.asarray(white(1, 5, 5, 4, dtype=np.float32))
    gradient = nnx.grad(lambda ic, x: (ic(x) ** 2).sum(), argnums=1)(ic, x)
    assert jnp.isfinite(gradient).all()
    y = ic(x, deterministic=True)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-4)


def test_bad_inputs_are_refused(unchecked):
    with pytest.raises(ValueError, match="num_features is at least 1"):
        fresh(0)
    for name in ("rate", "momentum"):
        for value in (-0.1, 1.0, 1.5):
            with pytest.raises(ValueError, match=f"{name} is at least 0 and below 1, got {value}"):
                fresh(**{name: value})
