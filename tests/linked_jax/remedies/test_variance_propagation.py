import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from linked_jax.activations import lk_relu, lk_swish, relu
from linked_jax.remedies.moment_calculus import Moments, through_link
from linked_jax.remedies.variance_propagation import VPConv, VPLinear
from tests.cases import first_fast

GEOMETRIES = {
    "same": {"strides": 1, "padding": "SAME"},
    "strided": {"strides": (1, 2), "padding": "VALID"},
    "pairs": {"strides": 2, "padding": ((1, 0), (2, 1))},
}
over_geometries = pytest.mark.parametrize("geometry", first_fast(GEOMETRIES.values()), ids=GEOMETRIES)
over_links = pytest.mark.parametrize("link", first_fast([lk_relu, relu, lk_swish]), ids=["lk_relu", "relu", "lk_swish"])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def white(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def unit(features, dtype=jnp.float64):
    return Moments(jnp.zeros(features, dtype), jnp.ones(features, dtype))


def some_moments(features, seed=5):
    rng = np.random.default_rng(seed)
    return Moments(jnp.asarray(rng.normal(size=features)), jnp.asarray(rng.uniform(0.2, 2, features)))


def linear(c_in=3, c_out=5, seed=0, **options):
    return disturbed(VPLinear(c_in, c_out, rngs=nnx.Rngs(seed), **{"param_dtype": jnp.float64} | options))


def conv(c_in=3, c_out=5, window=(3, 2), seed=0, **options):
    return disturbed(VPConv(c_in, c_out, window, rngs=nnx.Rngs(seed), **{"param_dtype": jnp.float64} | options))


def disturbed(layer):
    """With a scale and a bias as after some training; one scale is negative."""
    layer.scale[...] = jnp.linspace(-0.5, 2, len(layer.scale[...]), dtype=layer.param_dtype)
    layer.bias[...] = jnp.linspace(1, -1, len(layer.bias[...]), dtype=layer.param_dtype)
    return layer


def in_numpy(layer, x, moments):
    """s (W x - mu) / sigma + beta, in this order, for a dense layer."""
    kernel, scale, bias = (np.asarray(leaf[...]) for leaf in (layer.kernel, layer.scale, layer.bias))
    mu, sigma = kernel.T @ moments.mean, np.sqrt((kernel**2).T @ moments.variance + 1e-10)
    return scale * (np.asarray(x) @ kernel - mu) / sigma + bias


# --- the equation -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_linear_is_the_equation_and_passes_on_beta_and_s_squared():
    layer, moments, x = linear(), some_moments(3), white(4, 3)
    y, out = layer(x, moments)
    np.testing.assert_allclose(y, in_numpy(layer, x, moments), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(out.mean, layer.bias[...])
    np.testing.assert_array_equal(out.variance, layer.scale[...] ** 2)


@pytest.mark.slow
@over_geometries
def test_conv_is_the_linear_layer_on_every_patch(geometry):
    """Each output pixel: the dense layer whose inputs are the pixels under the window, zeros where it is outside."""
    layer, moments, x = conv(**geometry), some_moments(3), white(2, 5, 6, 3)
    y, _ = layer(x, moments)
    patches = jax.lax.conv_general_dilated_patches(
        x, (3, 2), (geometry["strides"],) * 2 if isinstance(geometry["strides"], int) else geometry["strides"],
        geometry["padding"], dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    dense = linear(18, 5)  # patches have channels first
    dense.kernel[...] = layer.kernel[...].transpose(2, 0, 1, 3).reshape(18, 5)
    spread = Moments(jnp.repeat(moments.mean, 6), jnp.repeat(moments.variance, 6))
    np.testing.assert_allclose(y, in_numpy(dense, patches, spread), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_new_layer_gives_mean_zero_and_variance_one_on_what_it_was_told():
    moments, rng = some_moments(6), np.random.default_rng(0)
    x = moments.mean + jnp.sqrt(moments.variance) * rng.normal(size=(100_000, 6))
    y, out = VPLinear(6, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))(x, moments)
    np.testing.assert_allclose(y.mean(0), 0, atol=5 / np.sqrt(100_000))
    np.testing.assert_allclose(y.var(0), 1, atol=5 * np.sqrt(2 / 100_000))
    np.testing.assert_array_equal(out.variance, 1)


@pytest.mark.slow
def test_the_size_of_the_kernel_does_not_matter():
    layer, x = linear(), white(2, 3)
    before, _ = layer(x, some_moments(3))
    layer.kernel[...] *= jnp.array([0.1, 1.0, 10.0, 100.0, 3.0])
    np.testing.assert_allclose(layer(x, some_moments(3))[0], before, rtol=1e-6, atol=1e-6)


# --- preserve and fold --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_preserve_computes_the_plain_layer_and_tells_its_moments():
    layer, moments, bias, x = linear(), some_moments(3), white(5, seed=2), white(4, 3)
    out = layer.preserve(moments, bias)
    kernel = np.asarray(layer.kernel[...])
    np.testing.assert_allclose(layer(x, moments)[0], np.asarray(x) @ kernel + bias, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out.mean, moments.mean @ kernel + bias, rtol=1e-12)
    np.testing.assert_allclose(out.variance, moments.variance @ kernel**2 + 1e-10, rtol=1e-12)


@pytest.mark.slow
@over_links
def test_preserve_starts_from_the_function_of_a_plain_network(link):
    options = {"param_dtype": jnp.float64, "bias_init": nnx.initializers.normal(), "rngs": nnx.Rngs(0)}
    plain = (nnx.Linear(4, 16, **options), nnx.Linear(16 * link.arity, 5, **options))
    layers, moments = (linear(4, 16), linear(16 * link.arity, 5)), unit(4)
    for layer, of_plain in zip(layers, plain, strict=True):
        layer.kernel[...] = of_plain.kernel[...]
        moments = through_link(layer.preserve(moments, of_plain.bias[...]), link)

    @nnx.jit
    def outputs(layers, plain, x):
        z, moments = layers[0](x, unit(4))
        return layers[1](link(z), through_link(moments, link))[0], plain[1](link(plain[0](x)))

    np.testing.assert_allclose(*outputs(layers, plain, white(8, 4)), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_preserve_of_a_conv_is_exact_at_padded_borders_too():
    layer, x = conv(window=(3, 3)), white(2, 5, 5, 3)
    plain = nnx.Conv(3, 5, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(1))
    layer.kernel[...] = plain.kernel[...]
    assert layer.preserve(some_moments(3)).mean.shape == (5,)
    np.testing.assert_allclose(layer(x, some_moments(3))[0], plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@over_geometries
def test_fold_of_a_conv_is_a_flax_conv_with_the_same_output(geometry):
    layer, x = conv(**geometry), white(2, 5, 6, 3)
    folded = layer.fold(some_moments(3))
    assert type(folded) is nnx.Conv
    np.testing.assert_allclose(folded(x), layer(x, some_moments(3))[0], rtol=1e-12, atol=1e-12)
    layer.kernel[...] = layer.kernel[...] + 1  # the folded layer has its own parameters
    assert not np.allclose(folded(x), layer(x, some_moments(3))[0])


def test_fold_of_a_linear_layer_is_a_flax_linear_with_the_same_output():
    layer, x = linear(), white(2, 3)
    folded = layer.fold(some_moments(3))
    assert type(folded) is nnx.Linear
    np.testing.assert_allclose(folded(x), layer(x, some_moments(3))[0], rtol=1e-12, atol=1e-12)


# --- batches, modes, transformations ------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_example_equals_its_row_of_a_batch_in_training_and_evaluation():
    layer, x = conv(), white(8, 5, 6, 3)
    layer.train()
    trained, _ = layer(x, some_moments(3))
    layer.eval()
    one, _ = layer(x[2:3], some_moments(3))
    np.testing.assert_allclose(one[0], trained[2], rtol=1e-12, atol=1e-12)
    assert {
        type(leaf) for leaf in jax.tree.leaves(nnx.state(layer), is_leaf=lambda x: isinstance(x, nnx.Variable))
    } <= {nnx.Param}


@pytest.mark.slow
@over_links
def test_equal_layers_run_in_a_scan(link):
    depth, width = 4, 6
    first = linear(3, width)
    layers = [linear(width * link.arity, width, seed=seed) for seed in range(depth)]
    graph = nnx.split(layers[0])[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(layer)[1] for layer in layers))

    @jax.jit
    def scanned(x):
        def body(carry, state):
            z, moments = carry
            return nnx.merge(graph, state)(link(z), through_link(moments, link)), None

        return jax.lax.scan(body, first(x, unit(3)), stacked)[0]

    z, moments = first(white(2, 3), unit(3))
    for layer in layers:
        z, moments = layer(link(z), through_link(moments, link))
    found = scanned(white(2, 3))
    np.testing.assert_allclose(found[0], z, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found[1].variance, moments.variance, rtol=1e-12)


@pytest.mark.slow
def test_a_vmap_over_examples_is_the_batch():
    layer, x = linear(), white(4, 3)
    mapped = jax.vmap(lambda x: layer(x, some_moments(3))[0])(x)
    np.testing.assert_allclose(mapped, layer(x, some_moments(3))[0], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape"), [(linear, (2, 3)), (conv, (1, 3, 3, 3))], ids=["linear", "conv"])
@over_links
def test_gradients_flow_through_the_moments_of_two_layers(make, shape, link):
    layers = [make(3, 4), make(4 * link.arity, 2, seed=1)]
    graphs, states = zip(*map(nnx.split, layers), strict=True)

    @jax.jit
    def outputs(states, x, moments):
        first, second = (nnx.merge(graph, state) for graph, state in zip(graphs, states, strict=True))
        z, moments = first(x, moments)
        return second(link(z), through_link(moments, link))

    check_grads(outputs, (states, white(*shape), some_moments(3)), order=1, modes=["rev"], eps=1e-6)


@pytest.mark.slow
def test_the_gradient_of_a_kernel_is_orthogonal_to_it_as_its_size_does_not_matter():
    layer, x = linear(), white(8, 3)
    graph, state = nnx.split(layer)
    gradient = jax.grad(lambda state: (nnx.merge(graph, state)(x, some_moments(3))[0] ** 3).sum())(state)
    kernel, slope = layer.kernel[...], gradient["kernel"][...]
    assert (jnp.abs((kernel * slope).sum(0)) < 1e-6 * jnp.abs(kernel * slope).sum(0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("dead", ["scale", "kernel"])
def test_zero_scales_and_kernels_have_finite_outputs_and_gradients(dead):
    layers = [linear(3, 4), linear(8, 2)]
    getattr(layers[0], dead)[...] *= 0
    graphs, states = zip(*map(nnx.split, layers), strict=True)

    def loss(states):
        first, second = (nnx.merge(graph, state) for graph, state in zip(graphs, states, strict=True))
        z, moments = first(white(2, 3), unit(3))
        return (second(lk_relu(z), through_link(moments, lk_relu))[0] ** 2).sum()

    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.value_and_grad(loss)(states)))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape"), [(linear, (2, 3)), (conv, (2, 5, 5, 3))], ids=["linear", "conv"])
def test_bfloat16_computes_in_it_and_keeps_moments_in_float32(make, shape):
    x = white(*shape, dtype=jnp.float32)
    exact, _ = make(param_dtype=jnp.float32)(x, unit(3, jnp.float32))
    mixed = make(param_dtype=jnp.float32, dtype=jnp.bfloat16)
    low = make(param_dtype=jnp.bfloat16)
    low.kernel[...] = mixed.kernel[...].astype(jnp.bfloat16)  # another dtype draws other numbers
    for layer, given in ((mixed, x), (low, x.astype(jnp.bfloat16))):
        y, moments = layer(given, unit(3, jnp.float32))
        assert y.dtype == jnp.bfloat16
        assert moments.mean.dtype == moments.variance.dtype == jnp.float32
        np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05)
    assert mixed.fold(unit(3, jnp.float32))(x).dtype == jnp.bfloat16


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_sizes_below_one_and_moments_of_other_features_are_refused():
    with pytest.raises(ValueError, match="out_features is at least 1, got 0"):
        VPLinear(3, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kernel_size is at least 1"):
        VPConv(3, 4, (3, 0), rngs=nnx.Rngs(0))
    for call in (lambda: linear()(white(2, 3), unit(4)), lambda: linear().preserve(unit(4))):
        with pytest.raises(ValueError, match=r"got moments of shape \(4,\)"):
            call()
    with pytest.raises(ValueError, match=r"takes x of shape .* got \(2, 4\)"):
        linear()(white(2, 4), unit(3))
