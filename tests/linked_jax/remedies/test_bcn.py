import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from linked_jax.remedies.bcn import BatchChannelNorm, EstimatedBatchNorm, channel_normalize, estimate_statistics
from tests.cases import first_fast

FORMS = pytest.mark.parametrize("estimate", first_fast([True, False]), ids=["estimated", "batch"])
SHAPES = [((2, 3, 2, 6), 3), ((1, 4), 2), ((3, 4, 2), 2), ((2, 2, 1, 2, 6), 1)]
seeds = st.integers(0, 2**32 - 1)


def white(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(1.5, 2.0, shape).astype(dtype)


def group_norm_by_hand(x, num_groups, scale, bias, epsilon):
    """One example and one group at a time."""
    y = np.empty_like(x)
    size = x.shape[-1] // num_groups
    for n in range(x.shape[0]):
        for g in range(num_groups):
            part = x[n, ..., g * size : (g + 1) * size]
            std = np.sqrt(((part - part.sum() / part.size) ** 2).sum() / part.size + epsilon)
            y[n, ..., g * size : (g + 1) * size] = scale[g] * (part - part.sum() / part.size) / std + bias[g]
    return y


def float64_norm(make):
    """A norm all in float64, also the statistics that Flax keeps in float32; parameters are not at their start."""
    norm = make(param_dtype=jnp.float64)
    rng = np.random.default_rng(3)
    for _, variable in nnx.iter_graph(norm):
        if isinstance(variable, nnx.Param):
            variable.set_value(jnp.asarray(rng.uniform(0.5, 1.5, variable.shape)))
        elif isinstance(variable, nnx.BatchStat):
            variable.set_value(variable[...].astype(jnp.float64))
    return norm


# --- the channel part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "groups"), first_fast(SHAPES))
@given(seeds, st.floats(1e-6, 1.0))
def test_channel_normalize_is_its_equation(shape, groups, seed, epsilon):
    x, scale, bias = white(*shape, seed=seed), white(groups, seed=1), white(groups, seed=2)
    with jax.enable_x64(True):
        y = channel_normalize(jnp.asarray(x), groups, jnp.asarray(scale), jnp.asarray(bias), epsilon=epsilon)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, group_norm_by_hand(x, groups, scale, bias, epsilon), rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [3, 1, 6, 12])
def test_without_an_affine_it_is_flax_group_norm(groups):
    x = white(2, 3, 3, 12, dtype=np.float32)
    flax = nnx.GroupNorm(12, num_groups=groups, epsilon=1e-5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(channel_normalize(jnp.asarray(x), groups), flax(jnp.asarray(x)), atol=2e-6)


@pytest.mark.slow
def test_channel_part_does_not_see_the_other_examples():
    x = jnp.asarray(white(3, 4, 6, dtype=np.float32))
    alone = jnp.concatenate([channel_normalize(example[None], 2) for example in x])
    np.testing.assert_allclose(channel_normalize(x, 2), alone, atol=1e-6)


@pytest.mark.slow
def test_a_constant_group_gives_the_bias_and_a_finite_gradient():
    x, bias = jnp.full((2, 3, 4), 7.0), jnp.array([1.0, -2.0])
    np.testing.assert_allclose(channel_normalize(x, 2, None, bias)[0, 0], [1, 1, -2, -2], atol=1e-4)
    assert jnp.isfinite(jax.grad(lambda x: channel_normalize(x, 2, None, bias)[0, 0, 0])(x)).all()


def test_gradient_of_the_channel_part_against_differences():
    with jax.enable_x64(True):
        x, scale, bias = (jnp.asarray(white(*shape, seed=4)) for shape in ((2, 3, 4), (2,), (2,)))
        f = jax.jit(lambda x, scale, bias: channel_normalize(x, 2, scale, bias))
        check_grads(f, (x, scale, bias), order=1, modes=("rev",))


# --- the estimated batch part -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "channels"), first_fast([(3, 2), (1, 1), (1, 3)]))
@given(seeds, st.floats(0.0, 0.99))
def test_estimated_statistics_over_three_batches(batch, channels, seed, momentum):
    x = white(3, batch, 2, channels, seed=seed)
    mean, var = np.zeros(channels), np.ones(channels)
    with jax.enable_x64(True):
        norm = float64_norm(functools.partial(EstimatedBatchNorm, channels, momentum=momentum))
        for step in range(3):
            y = norm(jnp.asarray(x[step]))
            for c in range(channels):
                values, rate = x[step, ..., c].ravel(), 1 - momentum
                second = sum((value - mean[c]) ** 2 for value in values) / len(values)  # about the old mean
                mean[c] += rate * (sum(values) / len(values) - mean[c])
                var[c] += rate * (second - var[c])
            np.testing.assert_allclose(norm.mean[...], mean, atol=1e-12)
            np.testing.assert_allclose(norm.var[...], var, rtol=1e-12)
            wanted = np.asarray(norm.scale[...]) * (x[step] - mean) / np.sqrt(var + 1e-5) + np.asarray(norm.bias[...])
            np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_estimated_norm_has_the_gradient_of_constant_statistics():
    x = jnp.asarray(white(2, 3, dtype=np.float32))
    norm = EstimatedBatchNorm(3)
    gradient = nnx.grad(lambda norm, x: (norm(x) ** 3).sum(), argnums=1)(norm, x)
    scale = jax.lax.rsqrt(norm.var[...] + 1e-5)  # the updated statistics
    np.testing.assert_allclose(gradient, 3 * ((x - norm.mean[...]) * scale) ** 2 * scale, rtol=1e-5)


@pytest.mark.slow
def test_no_gradient_flows_through_estimated_statistics():
    pull = jax.vjp(lambda *a: estimate_statistics(*a), jnp.ones((2, 3)), jnp.zeros(3), jnp.ones(3))[1]
    assert all((leaf == 0).all() for leaf in pull((jnp.ones(3), jnp.ones(3))))


@pytest.mark.slow
def test_estimated_statistics_come_to_those_of_the_data():
    norm = EstimatedBatchNorm(1, momentum=0.99)
    step = nnx.jit(lambda norm, x: norm(x))
    x = white(2000, 1, 1, dtype=np.float32)  # batches of one value, mean 1.5 and variance 4
    for value in x:
        step(norm, value)
    assert abs(norm.mean[0] - 1.5) < 4 * 2.0 * np.sqrt(0.005)  # four standard errors of a window of 200
    assert abs(norm.var[0] - 4.0) < 4 * 4.0 * np.sqrt(2 * 0.005)


# --- the two together ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@FORMS
def test_bcn_is_batch_part_then_channel_part(estimate):
    x = white(3, 2, 2, 6)
    with jax.enable_x64(True):
        norm = float64_norm(functools.partial(BatchChannelNorm, 6, 3, estimate=estimate, rngs=nnx.Rngs(0)))
        y = np.asarray(norm(jnp.asarray(x)))
    batch = {name: np.asarray(getattr(norm.batch_norm, name)[...], np.float64) for name in ("scale", "bias")}
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    if estimate:
        mean, var = 0.1 * mean, 0.9 + 0.1 * (x**2).mean((0, 1, 2))
    x1 = batch["scale"] * (x - mean) / np.sqrt(var + 1e-5) + batch["bias"]
    wanted = group_norm_by_hand(x1, 3, np.asarray(norm.scale[...]), np.asarray(norm.bias[...]), 1e-5)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-10)


@pytest.mark.slow
@FORMS
def test_evaluation_uses_the_stored_statistics_and_leaves_them(estimate):
    norm, x = BatchChannelNorm(4, 2, estimate=estimate, rngs=nnx.Rngs(0)), jnp.asarray(white(3, 2, 4, dtype=np.float32))
    trained = norm(x)
    stored = jax.tree.map(jnp.copy, nnx.state(norm, nnx.BatchStat))
    norm.eval()
    alone = jnp.concatenate([norm(example[None]) for example in x])
    np.testing.assert_allclose(norm(x), alone, atol=1e-6)  # no example sees another
    jax.tree.map(np.testing.assert_array_equal, nnx.state(norm, nnx.BatchStat), stored)
    mean, var = norm.batch_norm.mean[...], norm.batch_norm.var[...]
    np.testing.assert_allclose(norm(x), channel_normalize((x - mean) / jnp.sqrt(var + 1e-5), 2), atol=1e-5)
    norm(x, use_running_average=False)  # the argument wins
    assert (norm.batch_norm.mean[...] != mean).all()
    norm.train()
    assert trained.shape == norm(x).shape


@pytest.mark.slow
@FORMS
def test_gradients_of_bcn_against_differences(estimate):
    with jax.enable_x64(True):
        norm = float64_norm(functools.partial(BatchChannelNorm, 4, 2, estimate=estimate, rngs=nnx.Rngs(0)))
        norm(jnp.asarray(white(5, 2, 4, seed=5)))
        if estimate:  # its training holds the statistics, and differences would not
            norm.eval()
        graph, parameters, rest = nnx.split(norm, nnx.Param, ...)

        @jax.jit
        def loss(parameters, x):
            return jnp.sin(nnx.merge(graph, parameters, rest, copy=True)(x)).sum()

        check_grads(loss, (parameters, jnp.asarray(white(2, 2, 4))), order=1, modes=("rev",))


@pytest.mark.slow
@FORMS
def test_training_step_under_jit_equals_eager(estimate):
    x = jnp.asarray(white(3, 2, 4, dtype=np.float32))
    eager, jitted = (BatchChannelNorm(4, 2, estimate=estimate, rngs=nnx.Rngs(0)) for _ in range(2))
    np.testing.assert_allclose(nnx.jit(lambda norm, x: norm(x))(jitted, x), eager(x), atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), nnx.state(jitted), nnx.state(eager))


@pytest.mark.slow
@FORMS
def test_a_batch_over_two_devices_gives_the_numbers_of_one(estimate):
    x = jnp.asarray(white(4, 2, 4, dtype=np.float32))
    sharded = jax.device_put(x, NamedSharding(jax.make_mesh((2,), ("batch",)), PartitionSpec("batch")))
    one, two = (BatchChannelNorm(4, 2, estimate=estimate, rngs=nnx.Rngs(0)) for _ in range(2))
    step = nnx.jit(lambda norm, x: norm(x))
    np.testing.assert_allclose(step(two, sharded), step(one, x), atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), nnx.state(two), nnx.state(one))


@pytest.mark.slow
@FORMS
def test_bfloat16_in_and_out_with_float32_statistics(estimate):
    norm = BatchChannelNorm(4, 2, estimate=estimate, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    exact = BatchChannelNorm(4, 2, estimate=estimate, rngs=nnx.Rngs(0))
    x = jnp.asarray(white(8, 3, 4), jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(norm))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(y.astype(jnp.float32), exact(x.astype(jnp.float32)), atol=0.05)


@FORMS
def test_a_view_and_the_dtype_are_as_flax_has_them(estimate):
    norm = BatchChannelNorm(4, 2, estimate=estimate, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(white(8, 3, 4), jnp.bfloat16)
    viewed, before = nnx.view(norm, use_running_average=True), norm.batch_norm.mean[...].copy()
    assert viewed(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm.batch_norm.mean[...], before)
    norm(x)  # the view has left the norm in training
    assert (norm.batch_norm.mean[...] != before).any()


@pytest.mark.slow
@FORMS
def test_batch_size_one_has_finite_outputs_and_gradients(estimate):
    norm = BatchChannelNorm(4, 2, estimate=estimate, rngs=nnx.Rngs(0))
    x = jnp.asarray(white(1, 4, dtype=np.float32))  # without space: a batch of one value a channel
    gradient = nnx.grad(lambda norm, x: (norm(x) ** 2).sum(), argnums=1)(norm, x)
    y = norm(x)
    assert jnp.isfinite(y).all()
    assert jnp.isfinite(gradient).all()
    assert bool((jnp.abs(y) > 0.1).any()) == estimate  # plain batch norm removes all there is


# --- bad inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "groups", "fits"),
    first_fast([(48, 32, 24), (48, 7, 6), (16, 32, 8), (7, 4, 1), (1, 32, 1), (8, 0, 1)]),
)
def test_a_group_count_that_does_not_fit_is_refused_with_one_that_does(unchecked, features, groups, fits):
    said = f"num_groups={groups} and num_features={features}; take e.g. num_groups={fits}$"
    with pytest.raises(ValueError, match=said):
        BatchChannelNorm(features, groups, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=said):
        channel_normalize(jnp.ones((2, 3, features)), groups)
    BatchChannelNorm(features, fits, rngs=nnx.Rngs(0))


def test_other_bad_inputs_are_refused(unchecked):
    with pytest.raises(ValueError, match="two values at least"):
        channel_normalize(jnp.ones((2, 4)), 4)
    for momentum in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match="momentum is at least 0"):
            BatchChannelNorm(4, 2, momentum=momentum, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="momentum is at least 0"):
            EstimatedBatchNorm(4, momentum=momentum)
    with pytest.raises(ValueError, match="num_features is at least 1"):
        EstimatedBatchNorm(0)
    with pytest.raises(ValueError, match="num_features is at least 1"):
        BatchChannelNorm(0, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has 4 channels"):
        EstimatedBatchNorm(4)(jnp.ones((2, 5)))
