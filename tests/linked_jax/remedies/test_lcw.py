import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from linked_jax import fourier, lk_relu, relu, sigmoid
from linked_jax.linking import Link
from linked_jax.remedies.lcw import LCWConv, LCWLinear, keep_variance, zero_sum_kernel
from tests.cases import first_fast

seeds = st.integers(0, 2**32 - 1)
GEOMETRIES = {
    "linear": (functools.partial(LCWLinear, 3, 5), functools.partial(nnx.Linear, 3, 5), (2, 4, 3)),
    "conv": (functools.partial(LCWConv, 3, 5, (3, 3)), functools.partial(nnx.Conv, 3, 5, (3, 3)), (2, 6, 7, 3)),
    "strided, padded": (
        functools.partial(LCWConv, 3, 5, (3, 2), strides=(1, 2), padding=[(1, 0), (2, 1)], use_bias=False),
        functools.partial(nnx.Conv, 3, 5, (3, 2), strides=(1, 2), padding=[(1, 0), (2, 1)], use_bias=False),
        (2, 6, 7, 3),
    ),
    "one axis": (
        functools.partial(LCWConv, 3, 5, 3, strides=2, padding="VALID"),
        functools.partial(nnx.Conv, 3, 5, 3, strides=2, padding="VALID"),
        (2, 9, 3),
    ),
}
over_geometries = pytest.mark.parametrize(("make", "plain", "shape"), first_fast(GEOMETRIES.values()), ids=GEOMETRIES)
over_layers = pytest.mark.parametrize(
    ("make", "shape"), first_fast([(g[0], g[2]) for g in list(GEOMETRIES.values())[:2]])
)


def white(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(0.3, 2.0, shape).astype(dtype)


def helmert(m):
    """B of shape (m, m - 1), one entry at a time from its definition."""
    basis = np.zeros((m, m - 1))
    for j in range(1, m):
        for i in range(1, m + 1):
            basis[i - 1, j - 1] = (1 if i <= j else -j if i == j + 1 else 0) / np.sqrt(j * (j + 1))
    return basis


# --- the kernel ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.sampled_from([2, 12]), seeds)
def test_the_kernel_is_the_basis_times_v(m, seed):
    v = white(m - 1, 3, seed=seed)
    with jax.enable_x64(True):
        w = zero_sum_kernel(jnp.asarray(v))
        assert w.dtype == jnp.float64
        np.testing.assert_allclose(w, helmert(m) @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", first_fast([7, 2, 600]))
def test_the_basis_is_orthonormal_and_its_columns_sum_to_zero(m):
    with jax.enable_x64(True):
        basis = np.asarray(zero_sum_kernel(jnp.eye(m - 1)))
    np.testing.assert_allclose(basis.T @ basis, np.eye(m - 1), atol=1e-12)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("m", first_fast([4608, 2, 64]))  # 4608 = 3 * 3 * 512
def test_sums_are_zero_to_1e_6_in_float32(m):
    v = jnp.asarray(np.random.default_rng(m).normal(0, (m - 1) ** -0.5, (m - 1, 16)), jnp.float32)
    w = zero_sum_kernel(v)
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(w, np.float64).sum(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(w, axis=0), np.linalg.norm(v, axis=0), rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_summed_in_float32():
    v = jnp.asarray(white(999, 4), jnp.bfloat16)
    w = zero_sum_kernel(v)
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(w, helmert(1000) @ np.asarray(v, np.float64), atol=1e-4)


@pytest.mark.slow
def test_gradient_is_that_of_the_basis():
    with jax.enable_x64(True):
        v, g = jnp.asarray(white(6, 2)), jnp.asarray(white(7, 2, seed=1))
        _, pull = jax.vjp(zero_sum_kernel, v)
        np.testing.assert_allclose(pull(g)[0], helmert(7).T @ g, atol=1e-12)
        check_grads(jax.jit(zero_sum_kernel), (v,), order=2, modes=("fwd", "rev"))


# --- the layers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@over_geometries
def test_layer_is_flax_own_with_the_constrained_kernel_and_folds_to_it(make, plain, shape):
    layer, wanted = make(rngs=nnx.Rngs(0)), plain(rngs=nnx.Rngs(1))
    fan_in = wanted.kernel[..., 0].size
    kernel = helmert(fan_in) @ np.asarray(layer.v[...], np.float64)
    wanted.kernel[...] = jnp.asarray(kernel.reshape(wanted.kernel.shape), jnp.float32)
    if layer.bias is not None:
        layer.bias[...] = wanted.bias[...] = jnp.arange(5.0)
    x = jnp.asarray(white(*shape), jnp.float32)
    found = layer(x)
    np.testing.assert_allclose(found, wanted(x), atol=1e-4)
    np.testing.assert_allclose(jax.jit(layer)(x), found, atol=1e-4)
    np.testing.assert_allclose(layer(x[:1]), found[:1], atol=1e-4)
    folded = layer.fold()
    assert type(folded) is type(wanted)
    np.testing.assert_allclose(folded(x), found, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "one axis"])
@given(st.floats(-100, 100), seeds)
def test_a_constant_added_to_all_inputs_changes_nothing(name, constant, seed):
    make, _, shape = GEOMETRIES[name]
    with jax.enable_x64(True):
        layer = make(param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        layer.v[...] = jnp.asarray(white(*layer.v.shape, seed=seed))
        x = jnp.asarray(white(*shape, seed=seed + 1))
        np.testing.assert_allclose(layer(x + constant), layer(x), rtol=0, atol=1e-11)


@pytest.mark.slow
def test_zero_padding_breaks_it_at_the_border_and_only_there():
    layer = LCWConv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    x = jnp.asarray(white(2, 6, 6, 3), jnp.float32)
    change = np.abs(layer(x + 10) - layer(x)).max((0, -1))
    assert change[1:-1, 1:-1].max() < 1e-4
    border = np.pad(np.zeros((4, 4), bool), 1, constant_values=True)
    assert change[border].min() > 0.1


@pytest.mark.slow
@over_layers
def test_outputs_keep_the_variance_of_inputs_with_any_common_mean(make, shape):
    del shape
    conv = make.func is LCWConv
    layer = make.func(64, 256, *make.args[2:], rngs=nnx.Rngs(0))
    x = 5 + np.random.default_rng(0).normal(size=(4, 16, 16, 64) if conv else (2000, 64))
    z = np.asarray(layer(jnp.asarray(x, jnp.float32)))
    z = z[:, 1:-1, 1:-1] if conv else z
    np.testing.assert_allclose(z.var(), 1, atol=0.1)
    np.testing.assert_allclose(z.reshape(-1, 256).mean(0), 0, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("link", [sigmoid, relu, lk_relu], ids=str)
def test_keep_variance_keeps_it_through_an_activation(link):
    init = keep_variance(link)
    layer = LCWLinear(link.arity * 512, 512, kernel_init=init, rngs=nnx.Rngs(0))
    z = layer(link(jax.random.normal(jax.random.key(0), (1000, 512))))
    np.testing.assert_allclose(z.var(), 1, atol=0.1)
    assert float(z.mean(0).std()) < 0.1  # deviation of 1000 examples' means: 0.03


@pytest.mark.slow
def test_members_of_other_means_leave_a_shift():
    """Fourier's means are 0 and exp(-1/2): they are no multiple of 1."""
    z = jax.random.normal(jax.random.key(0), (1000, 512))
    layer = LCWLinear(1024, 512, kernel_init=keep_variance(fourier), rngs=nnx.Rngs(0))
    assert float(layer(fourier(z)).mean(0).std()) > 0.3


@pytest.mark.slow
def test_gradients_are_finite_and_right():
    with jax.enable_x64(True):
        layer = LCWConv(2, 3, (2, 2), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        graph, state = nnx.split(layer)
        x = jnp.asarray(white(1, 3, 3, 2))
        f = jax.jit(lambda state, x: jnp.sin(nnx.merge(graph, state)(x)))
        check_grads(f, (state, x), order=1, modes=("rev",))


@pytest.mark.slow
@over_layers
def test_training_keeps_sums_at_zero(make, shape):
    layer, x = make(rngs=nnx.Rngs(0)), jnp.asarray(white(*shape), jnp.float32)
    optimizer = nnx.Optimizer(layer, optax.adam(0.1), wrt=nnx.Param)
    before = np.asarray(layer.computed_kernel())
    for _ in range(5):
        optimizer.update(layer, nnx.grad(lambda layer: ((layer(x) - 1) ** 2).mean())(layer))
    kernel = np.asarray(layer.computed_kernel(), np.float64)
    assert np.abs(kernel - before).max() > 0.1
    np.testing.assert_allclose(kernel.reshape(-1, 5).sum(0), 0, atol=1e-6)


@pytest.mark.slow
def test_folding_leaves_the_layer_and_shares_nothing():
    layer = LCWLinear(4, 3, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(layer))
    folded = layer.fold()
    folded.kernel[...] += 1
    folded.bias[...] += 1
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), before)


@pytest.mark.slow
@over_layers
def test_bfloat16(make, shape):
    x = jnp.asarray(white(*shape), jnp.bfloat16)
    exact = make(rngs=nnx.Rngs(0))
    wanted = exact(x.astype(jnp.float32))
    for options in ({"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}):
        layer = make(rngs=nnx.Rngs(0), **options)
        layer.v[...] = exact.v[...].astype(layer.v.dtype)
        z = layer(x)
        assert z.dtype == layer.fold()(x).dtype == jnp.bfloat16
        assert layer.v.dtype == options.get("param_dtype", jnp.float32)
        np.testing.assert_allclose(z.astype(jnp.float32), wanted, atol=0.2)
    assert exact(x).dtype == jnp.float32


@pytest.mark.slow
def test_stacked_layers_scan():
    layers = nnx.vmap(lambda rngs: LCWLinear(4, 4, rngs=rngs))(nnx.Rngs(0).split(3))
    x = jnp.asarray(white(2, 4), jnp.float32)
    found = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, x)
    graph, state = nnx.split(layers)
    for number in range(3):
        x = nnx.merge(graph, jax.tree.map(lambda leaf, number=number: leaf[number], state))(x)
    np.testing.assert_allclose(found, x, atol=1e-6)


def test_bad_inputs_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"fan-in of 2 at least, got 1 .*\(1, 4\).* plain layer"):
        LCWLinear(1, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"fan-in of 2 at least, got 1 .*\(1, 1, 1, 4\)"):
        LCWConv(1, 4, (1, 1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="fan-in of 2 at least"):
        zero_sum_kernel(jnp.ones((0, 4)))
    with pytest.raises(ValueError, match=r"takes .* c_in = 3"):
        LCWLinear(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="constant link"):
        keep_variance(Link((jnp.ones_like,)))
    for bad in ({"in_features": 0}, {"out_features": 0}, {"kernel_size": (3, 0)}, {"strides": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is at least 1"):
            LCWConv(**({"in_features": 2, "out_features": 2, "kernel_size": (3, 3)} | bad), rngs=nnx.Rngs(0))
