import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from linked_jax.remedies.weight_standardization import WSConv, standardize
from tests.cases import first_fast

shapes = pytest.mark.parametrize(
    "shape", first_fast((each,) for each in [(3, 3, 2, 4), (2, 1), (3, 1, 2), (2, 1, 2, 1, 3)])
)
seeds = st.integers(0, 2**32 - 1)


def white(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(0.3, 2.0, shape).astype(dtype)


def by_hand(kernel, epsilon):
    """One filter at a time."""
    out = np.empty_like(kernel)
    for o in range(kernel.shape[-1]):
        w = kernel[..., o]
        centred = w - w.sum() / w.size
        var = (centred**2).sum() / (w.size - 1)
        out[..., o] = centred / (np.sqrt(var) + epsilon)
    return out


@shapes
@given(seeds, st.floats(1e-8, 0.1))
def test_standardize_is_its_equation(shape, seed, epsilon):
    kernel = white(*shape, seed=seed)
    with jax.enable_x64(True):
        found = standardize(jnp.asarray(kernel), epsilon=epsilon)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, by_hand(kernel, epsilon), rtol=0, atol=1e-11)


@pytest.mark.slow
@shapes
@given(seeds, st.floats(0.5, 4.0), st.floats(-3.0, 3.0))
def test_filters_are_centred_with_unit_deviation_whatever_their_scale_and_shift(shape, seed, scale, shift):
    kernel = white(*shape, seed=seed)
    kernel[(0,) * (len(shape) - 1)] += 5.0  # so that no deviation is small
    with jax.enable_x64(True):
        found = np.asarray(standardize(jnp.asarray(kernel), epsilon=1e-12))
        moved = standardize(jnp.asarray(scale * kernel + shift), epsilon=1e-12)
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(found.mean(axes), 0, atol=1e-10)
    np.testing.assert_allclose(found.std(axes, ddof=1), 1, atol=1e-10)
    np.testing.assert_allclose(moved, found, atol=1e-10)


@pytest.mark.slow
def test_gradient_against_differences():
    with jax.enable_x64(True):
        kernel = jnp.asarray(white(3, 2, 4))
        f = jax.jit(standardize)
        check_grads(f, (kernel,), order=1, modes=("fwd", "rev"))


@pytest.mark.slow
def test_a_constant_filter_gives_zero_and_its_limit_as_derivative():
    epsilon = 1e-4
    with jax.enable_x64(True):
        f = lambda w: standardize(w, epsilon=epsilon)  # noqa: E731
        constant = jnp.full((4, 1), 2.0)
        assert (f(constant) == 0).all()
        jacobian = jax.jacrev(f)(constant).reshape(4, 4)
    centring = np.eye(4) - 1 / 4
    np.testing.assert_allclose(jacobian, centring / epsilon, rtol=1e-9)


@pytest.mark.slow
def test_bfloat16_kernels_are_standardised_in_float32():
    kernel = jnp.asarray(white(3, 3, 8, 2), jnp.bfloat16)
    found = standardize(kernel)
    assert found.dtype == jnp.bfloat16
    wanted = by_hand(np.asarray(kernel, np.float64), 1e-5)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-6)  # one rounding, at the end


# --- the layer ----------------------------------------------------------------------------------------------------


GEOMETRIES = {
    "plain": ((3, 3), {}, (2, 6, 7, 3)),
    "strided, padded": ((3, 2), {"strides": (1, 2), "padding": [(1, 0), (2, 1)], "use_bias": True}, (2, 6, 7, 3)),
    "valid": ((2, 2), {"padding": "VALID"}, (1, 6, 7, 3)),
    "one axis": (3, {"strides": 2, "use_bias": True}, (2, 9, 3)),
    "1x1": ((1, 1), {}, (2, 4, 4, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_layer_is_flax_conv_of_the_standardised_kernel_and_folds_to_it(geometry):
    kernel_size, options, shape = GEOMETRIES[geometry]
    layer = WSConv(3, 5, kernel_size, rngs=nnx.Rngs(0), **options)
    x = jnp.asarray(white(*shape, dtype=np.float32))
    plain = nnx.Conv(3, 5, kernel_size, rngs=nnx.Rngs(1), **({"use_bias": False} | options))
    plain.kernel[...] = jnp.asarray(by_hand(np.asarray(layer.kernel[...], np.float64), 1e-5), jnp.float32)
    if layer.bias is not None:
        layer.bias[...] = jnp.arange(5.0)
        plain.bias[...] = jnp.arange(5.0)
    found = layer(x)
    np.testing.assert_allclose(found, plain(x), atol=1e-4)
    np.testing.assert_allclose(jax.jit(layer)(x), found, atol=1e-4)
    folded = layer.fold()
    assert type(folded) is nnx.Conv
    np.testing.assert_allclose(folded(x), found, atol=1e-4)


@pytest.mark.slow
def test_folding_leaves_the_layer_and_shares_nothing():
    layer = WSConv(2, 3, (3, 3), use_bias=True, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(layer))
    folded = layer.fold()
    folded.kernel[...] += 1
    folded.bias[...] += 1
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), before)


@pytest.mark.slow
def test_input_plus_a_constant_changes_nothing_away_from_the_border():
    layer = WSConv(3, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
    x = jnp.asarray(white(2, 5, 5, 3, dtype=np.float32))
    np.testing.assert_allclose(layer(x + 10), layer(x), atol=2e-4)


@pytest.mark.slow
def test_gradients_are_finite_and_centred():
    layer = WSConv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    x = jnp.asarray(white(2, 5, 5, 3, dtype=np.float32))
    gradient = nnx.grad(lambda layer: (layer(x) ** 2).mean())(layer)["kernel"][...]
    assert jnp.isfinite(gradient).all()
    assert float(jnp.abs(gradient).max()) > 1e-3
    w = standardize(layer.kernel[...])
    unit = gradient / jnp.linalg.norm(gradient.reshape(-1, 4), axis=0)
    np.testing.assert_allclose(unit.sum((0, 1, 2)), 0, atol=1e-4)  # neither the mean of a filter ...
    np.testing.assert_allclose((unit * w).sum((0, 1, 2)), 0, atol=1e-3)  # ... nor its length counts, but for epsilon


@pytest.mark.slow
def test_bfloat16_computation():
    layer = WSConv(3, 4, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    exact = WSConv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    x = jnp.asarray(white(1, 5, 5, 3), jnp.bfloat16)
    z = layer(x)
    assert z.dtype == jnp.bfloat16
    assert layer.kernel.dtype == jnp.float32
    assert layer.fold()(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(z.astype(jnp.float32), exact(x.astype(jnp.float32)), atol=0.2)


def test_bad_inputs_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"two weights at least .* shape \(1, 1, 1, 4\)"):
        WSConv(1, 4, (1, 1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"two weights at least .* shape \(1, 5\)"):
        standardize(jnp.ones((1, 5)))
    for bad in ({"in_features": 0}, {"out_features": 0}, {"kernel_size": (3, 0)}, {"strides": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is at least 1"):
            WSConv(**({"in_features": 2, "out_features": 2, "kernel_size": (3, 3)} | bad), rngs=nnx.Rngs(0))
