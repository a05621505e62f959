import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from linked_jax import LinkedPReLU, lk_relu, lk_tanh, min_max
from linked_jax.remedies.drelu import drelu
from linked_jax.remedies.quasi_recurrent import QuasiRecurrent, fo_pool
from tests.cases import first_fast


def white(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(0.3, 1.5, shape).astype(dtype)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


CANDIDATES = {
    "tanh": ("tanh", 1, lambda a: np.tanh(a)),
    "drelu": ("drelu", 2, lambda a, b: np.maximum(a, 0) - np.maximum(b, 0)),
    "lk_relu": (lk_relu, 1, lambda a: np.concatenate([np.maximum(a, 0), np.maximum(-a, 0)], -1)),
    "lk_tanh": (lk_tanh, 1, lambda a: np.concatenate([np.tanh(a), np.tanh(-a)], -1)),
    "function": (jnp.sin, 1, np.sin),
}
over_candidates = pytest.mark.parametrize("name", first_fast(CANDIDATES))


def fresh(name="drelu", features=3, hidden=4, **options):
    return QuasiRecurrent(features, hidden, candidate=CANDIDATES[name][0], rngs=nnx.Rngs(0), **options)


def float64(layer):
    for _, variable in nnx.iter_graph(layer):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            variable.set_value(jnp.asarray(variable[...], jnp.float64))
    return layer


def by_hand(layer, x, name, mean=None, var=None):
    """Step by step in NumPy. Without given statistics those of the batch; returns also those."""
    _, count, candidate = CANDIDATES[name]
    kernel, bias = np.asarray(layer.conv.kernel[...]), np.asarray(layer.conv.bias[...])
    n, steps, _ = x.shape
    out = np.zeros((n, steps, kernel.shape[2]))
    for t in range(steps):
        out[:, t] = bias
        for tap in range(len(kernel)):
            earlier = t - (len(kernel) - 1 - tap)
            if earlier >= 0:
                out[:, t] += x[:, earlier] @ kernel[tap]
    hidden = 4 * count
    branches, gates = out[..., :hidden], sigmoid(out[..., hidden:])
    if layer.norm is not None:
        mean = branches.mean((0, 1)) if mean is None else mean
        var = branches.var((0, 1)) if var is None else var
        branches = np.asarray(layer.norm.scale[...]) * (branches - mean) / np.sqrt(var + 1e-5)
        branches = branches + np.asarray(layer.norm.bias[...])
    z = candidate(*np.split(branches, count, -1))
    f, o = np.split(gates, 2, -1)
    c, h = np.zeros_like(z[:, 0]), np.zeros_like(z)
    for t in range(steps):
        c = f[:, t] * c + (1 - f[:, t]) * z[:, t]
        h[:, t] = o[:, t] * c
    return h, mean, var


# --- the function


@given(st.integers(0, 2**32 - 1))
def test_values_are_those_of_numpy(seed):
    a, b = white(2, 7, seed=seed)
    with jax.enable_x64(True):
        found = drelu(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(found, np.maximum(a, 0) - np.maximum(b, 0), atol=1e-15)


def test_drelu_sums_the_members_of_the_min_max_link_each_at_its_own_pre_activation():
    a, b = white(2, 50, dtype=np.float32)
    positive, negative = min_max(jnp.asarray(a))[:50], min_max(jnp.asarray(-b))[50:]
    np.testing.assert_array_equal(drelu(jnp.asarray(a), jnp.asarray(b)), positive + negative)
    np.testing.assert_array_equal(drelu(jnp.asarray(a), jnp.asarray(-a)), a)


def test_derivatives_and_those_at_the_kinks():
    by_a, by_b = (lambda a, b, i=i: jax.grad(drelu, i)(jnp.float32(a), jnp.float32(b)) for i in (0, 1))
    assert (by_a(2.0, 5.0), by_b(5.0, 2.0)) == (1, -1)
    assert (by_a(0.0, 5.0), by_b(5.0, 0.0)) == (0, 0)
    assert (by_a(-2.0, 5.0), by_b(5.0, -2.0)) == (0, 0)


def test_both_signs_swap_with_the_branches_and_the_dtype_stays():
    a, b = jnp.asarray(white(2, 9), jnp.bfloat16)
    assert drelu(a, b).dtype == jnp.bfloat16
    np.testing.assert_array_equal(drelu(a, b), -drelu(b, a))


# --- the cell


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
@settings(max_examples=5)
def test_pooling_is_the_loop(seed, steps):
    f, o = sigmoid(white(2, 2, steps, 3, seed=seed))
    z = white(2, steps, 3, seed=seed + 1)
    c, h = np.zeros((2, 3)), []
    for t in range(steps):
        c = f[:, t] * c + (1 - f[:, t]) * z[:, t]
        h.append(o[:, t] * c)
    with jax.enable_x64(True):
        found = jax.jit(fo_pool)(*map(jnp.asarray, (f, o, z)))
        one = fo_pool(*(jnp.asarray(x)[0] for x in (f, o, z)))
        four_axes = fo_pool(*(jnp.asarray(x)[None] for x in (f, o, z)))
    np.testing.assert_allclose(found, np.stack(h, 1), atol=1e-14)
    np.testing.assert_allclose(one, found[0], atol=1e-14)
    np.testing.assert_allclose(four_axes[0], found, atol=1e-14)


@pytest.mark.slow
@over_candidates
@pytest.mark.parametrize("use_norm", [True, False])
@pytest.mark.parametrize("kernel_size", [2, 1, 3])
def test_layer_equals_the_loop(name, use_norm, kernel_size):
    x = white(3, 6, 3)
    with jax.enable_x64(True):
        layer = float64(fresh(name, use_norm=use_norm, kernel_size=kernel_size, momentum=0.9))
        layer.conv.bias[...] = jnp.asarray(white(*layer.conv.bias.shape, seed=5))
        wanted, mean, var = by_hand(layer, x, name)
        np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, jnp.asarray(x)), wanted, atol=1e-12)
        layer.eval()
        stored = (0.1 * mean, 0.9 + 0.1 * var) if use_norm else (None, None)
        wanted, _, _ = by_hand(layer, x, name, *stored)
        np.testing.assert_allclose(layer(jnp.asarray(x)), wanted, atol=1e-12)


@pytest.mark.slow
@over_candidates
def test_later_inputs_do_not_change_earlier_outputs(name):
    layer = fresh(name, kernel_size=3)
    layer.eval()
    x = jnp.asarray(white(2, 7, 3, dtype=np.float32))
    before = np.asarray(layer(x))
    for t in range(7):
        after = np.asarray(layer(x.at[:, t].add(5.0)))
        np.testing.assert_allclose(after[:, :t], before[:, :t], atol=1e-6)
        assert np.abs(after[:, t] - before[:, t]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("candidate", "states"), [(lk_relu, 8), ("drelu", 4), (LinkedPReLU(4), 8)], ids=str)
def test_a_link_doubles_the_states_and_each_has_gates(candidate, states):
    layer = QuasiRecurrent(3, 4, candidate=candidate, rngs=nnx.Rngs(0))
    branches = 8 if candidate == "drelu" else 4
    assert layer(jnp.ones((2, 5, 3))).shape == (2, 5, states)
    assert layer.conv.kernel.shape == (2, 3, branches + 2 * states)
    np.testing.assert_array_equal(layer.norm.scale[...], np.full(branches, 0.5, np.float32))


@pytest.mark.slow
def test_training_updates_the_statistics_and_evaluation_does_not():
    layer, x = fresh(momentum=0.5), jnp.asarray(white(4, 5, 3, dtype=np.float32))
    start = np.asarray(layer.norm.mean[...])
    layer(x)
    trained = np.asarray(layer.norm.mean[...])
    assert (trained != start).all()
    layer.eval()
    layer(x)
    np.testing.assert_array_equal(layer.norm.mean[...], trained)
    layer(x, use_running_average=False)
    assert (np.asarray(layer.norm.mean[...]) != trained).all()
    layer.eval()
    np.testing.assert_allclose(jnp.concatenate([layer(one[None]) for one in x]), layer(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "drelu", "lk_tanh"])
def test_gradients_against_differences(name):
    with jax.enable_x64(True):
        layer = float64(fresh(name))
        layer.eval()
        graph, state = nnx.split(layer)
        x = jnp.asarray(white(2, 4, 3))
        check_grads(jax.jit(lambda state, x: nnx.merge(graph, state)(x)), (state, x), order=1, modes=["rev"])


@pytest.mark.slow
@over_candidates
def test_gradients_are_finite_where_everything_is_zero(name):
    graph, params, rest = nnx.split(fresh(name), nnx.Param, ...)

    @jax.jit
    def gradients(params, rest, x):
        return jax.grad(lambda params, x: nnx.merge(graph, params, rest, copy=True)(x).sum(), (0, 1))(params, x)

    by = gradients(params, rest, jnp.zeros((2, 4, 3)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by))


@pytest.mark.slow
def test_bfloat16_comes_out_and_is_near_float32():
    x = jnp.asarray(white(4, 20, 3, dtype=np.float32))
    exact, rough = fresh()(x), fresh(dtype=jnp.bfloat16)(x)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.05)


@pytest.mark.slow
def test_a_long_memory_survives_bfloat16():
    # 300 steps, each a 1/512: in bfloat16 a running mean near 0.4 would not move any more
    f, ones = jnp.full((1, 300, 1), 511 / 512, jnp.float32), jnp.ones((1, 300, 1), jnp.bfloat16)
    c = jax.jit(fo_pool)(f, ones, ones)
    assert c.dtype == jnp.bfloat16
    assert float(c[0, -1, 0]) == pytest.approx(1 - (511 / 512) ** 300, rel=0.01)


@pytest.mark.slow
def test_vmap_over_seeds_equals_one_by_one():
    x = jnp.asarray(white(2, 5, 3, dtype=np.float32))
    layers = [QuasiRecurrent(3, 4, candidate="drelu", use_norm=False, rngs=nnx.Rngs(seed)) for seed in range(3)]
    graph = nnx.split(layers[0])[0]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(layer)[1] for layer in layers))
    together = jax.vmap(lambda state: nnx.merge(graph, state)(x))(states)
    np.testing.assert_allclose(together, jnp.stack([layer(x) for layer in layers]), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    first_fast(
        [
            ({"candidate": "relu"}, ValueError, "candidate is 'tanh', 'drelu' or a link, got 'relu'"),
            ({"candidate": LinkedPReLU}, TypeError, "a function or a built link"),
            ({"candidate": 3}, TypeError, "a function or a built link, got 3"),
            ({"candidate": lk_relu.__class__(lk_relu.members, axis=1)}, ValueError, "axis=1"),
            ({"hidden_features": 0}, ValueError, "hidden_features is at least 1, got 0"),
            ({"kernel_size": 0}, ValueError, "kernel_size is at least 1, got 0"),
        ]
    ),
)
def test_wrong_arguments_are_named(options, error, message, unchecked):
    arguments = {"in_features": 3, "hidden_features": 4, **options}
    with pytest.raises(error, match=message.replace("(", r"\(")):
        QuasiRecurrent(**arguments, rngs=nnx.Rngs(0))
