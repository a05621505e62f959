"""A computed kernel is Flax' own layer with that kernel: every argument of Flax, every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.remedies.kernels import ComputedKernel
from linked_jax.remedies.lcw import LCWConv, LCWLinear
from linked_jax.remedies.moment_calculus import Moments
from linked_jax.remedies.normprop import NormPropConv, NormPropLinear
from linked_jax.remedies.variance_propagation import VPConv, VPLinear
from linked_jax.remedies.weight_standardization import WSConv
from tests.cases import first_fast

MOMENTS = Moments(jnp.array([0.5, -1.0, 2.0, 0.1]), jnp.array([1.0, 0.2, 3.0, 2.0]))
CONVS = {WSConv: (), LCWConv: (), NormPropConv: (), VPConv: (MOMENTS,)}
DENSE = {LCWLinear: (), NormPropLinear: (), VPLinear: (MOMENTS,)}
over_convs = pytest.mark.parametrize(
    ("make", "given"), first_fast(CONVS.items()), ids=[make.__name__ for make in CONVS]
)
over_dense = pytest.mark.parametrize(
    ("make", "given"), first_fast(DENSE.items()), ids=[make.__name__ for make in DENSE]
)

MASK = jnp.asarray(np.random.default_rng(1).integers(0, 2, (3, 2, 4, 6)), jnp.float32)
GEOMETRIES = {  # kernel_size, Flax' arguments, the shape of x
    "plain": ((3, 2), {}, (2, 6, 7, 4)),
    "circular": ((3, 2), {"padding": "CIRCULAR"}, (2, 6, 7, 4)),
    "reflect": ((3, 3), {"padding": "REFLECT"}, (2, 6, 7, 4)),
    "causal": (3, {"padding": "CAUSAL", "kernel_dilation": 2}, (2, 9, 4)),
    "a list of pairs": ((3, 2), {"padding": [(1, 0), (2, 1)], "strides": [1, 2]}, (2, 6, 7, 4)),
    "one number": ((3, 2), {"padding": 2, "use_bias": True}, (2, 6, 7, 4)),
    "groups": ((3, 2), {"feature_group_count": 2}, (2, 6, 7, 4)),
    "depthwise": ((3, 2), {"feature_group_count": 4, "out_features": 8}, (2, 6, 7, 4)),
    "dilated": ((3, 2), {"kernel_dilation": (2, 1), "input_dilation": 2, "padding": 1}, (2, 6, 7, 4)),
    "masked": ((3, 2), {"mask": MASK}, (2, 6, 7, 4)),
    "no batch": ((3, 2), {"padding": "VALID"}, (6, 7, 4)),
    "two batches": ((3, 2), {"use_bias": True}, (2, 3, 6, 7, 4)),
    "precision": ((3, 2), {"precision": "highest", "preferred_element_type": jnp.float32}, (2, 6, 7, 4)),
    "bias": ((3, 2), {"use_bias": True, "bias_init": nnx.initializers.normal(1.0)}, (2, 6, 7, 4)),
}
over_geometries = pytest.mark.parametrize(
    ("kernel_size", "options", "shape"), first_fast(GEOMETRIES.values()), ids=GEOMETRIES
)


def white(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(0.3, 1.0, shape), dtype)


def of(layer, x, given):
    y = layer(x, *given)
    return y[0] if given else y


def flax_own(plain, layer, options, given, *sizes):
    """Flax' layer with the same arguments, and the computed weights as its parameters."""
    kernel, bias = layer.weights(*given)
    own = plain(*sizes, rngs=nnx.Rngs(1), **options | {"use_bias": bias is not None})
    assert own.kernel.shape == kernel.shape
    own.kernel[...] = kernel
    if bias is not None:
        own.bias[...] = bias
    return own


@pytest.mark.slow
@over_geometries
@over_convs
def test_conv_takes_what_flax_takes_and_folds_to_it(make, given, kernel_size, options, shape):
    options = dict(options)
    sizes = (4, options.pop("out_features", 6), kernel_size)
    layer = make(*sizes, rngs=nnx.Rngs(0), **options)
    own, folded, x = flax_own(nnx.Conv, layer, options, given, *sizes), layer.fold(*given), white(*shape)
    assert type(folded) is nnx.Conv
    for found in (of(layer, x, given), folded(x)):
        np.testing.assert_allclose(found, own(x), atol=2e-5)


@pytest.mark.slow
@over_dense
def test_dense_takes_what_flax_takes_and_folds_to_it(make, given):
    options = {"dot_general": functools.partial(jax.lax.dot_general), "precision": "highest"}
    layer = make(4, 6, rngs=nnx.Rngs(0), **options)
    own, folded, x = flax_own(nnx.Linear, layer, options, given, 4, 6), layer.fold(*given), white(2, 3, 4)
    assert (type(folded), folded.dot_general) == (nnx.Linear, options["dot_general"])
    for found in (of(layer, x, given), folded(x)):
        np.testing.assert_allclose(found, own(x), atol=1e-5)


@over_convs
def test_flax_own_convolution_function_is_called(make, given):
    called = []

    def conv_general_dilated(*args, **options):
        called.append(options["precision"])
        return jax.lax.conv_general_dilated(*args, **options)

    layer = make(4, 6, 3, conv_general_dilated=conv_general_dilated, precision="highest", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(of(layer, white(2, 9, 4), given), layer.fold(*given)(white(2, 9, 4)), atol=1e-5)
    assert called == ["highest"] * 2


@pytest.mark.slow
@over_convs
def test_a_masked_weight_neither_counts_nor_learns(make, given):
    if make is LCWConv:
        return  # its parameters are no weights: a mask comes after them
    layer = make(4, 6, (3, 2), mask=MASK, rngs=nnx.Rngs(0))
    gradient = nnx.grad(lambda layer: jnp.square(of(layer, white(2, 6, 7, 4), given)).sum())(layer)["kernel"][...]
    assert (gradient[MASK == 0] == 0).all()
    assert (gradient[MASK == 1] != 0).any()


@pytest.mark.slow
@over_convs
def test_split_merge_vmap_checkpoint_and_scan_are_the_layer_itself(make, given):
    layers = [make(4, 4, (3, 3), padding=[(1, 1), (1, 1)], rngs=nnx.Rngs(seed)) for seed in range(2)]
    graph, x = nnx.graphdef(layers[0]), white(3, 5, 5, 4)
    hash(graph)  # a static argument of jit
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, layers))
    wanted = of(layers[1], of(layers[0], x, given), given)
    scanned, _ = jax.lax.scan(lambda x, state: (of(nnx.merge(graph, state), x, given), None), x, stacked)
    np.testing.assert_allclose(scanned, wanted, atol=1e-4)
    remembered = jax.jit(jax.checkpoint(lambda layer, x: of(layer, x, given)))
    np.testing.assert_allclose(remembered(layers[1], remembered(layers[0], x)), wanted, atol=1e-4)
    mapped = jax.vmap(lambda state: of(nnx.merge(graph, state), x, given))(stacked)
    np.testing.assert_allclose(mapped[1], of(layers[1], x, given), atol=1e-4)


@pytest.mark.slow
@over_convs
def test_bfloat16_parameters_and_computation(make, given):
    x, exact = white(2, 5, 5, 4), make(4, 6, (3, 3), rngs=nnx.Rngs(0))
    wanted = of(exact, x, given)
    size = float(jnp.abs(wanted).max())
    for options in ({"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}):
        layer = make(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)
        nnx.update(layer, jax.tree.map(lambda a, b: a.astype(b.dtype), nnx.state(exact), nnx.state(layer)))
        for found in (of(layer, x.astype(jnp.bfloat16), given), layer.fold(*given)(x.astype(jnp.bfloat16))):
            assert found.dtype == jnp.bfloat16
            np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.05 * size)
    assert wanted.dtype == jnp.float32


@pytest.mark.slow
def test_folding_leaves_the_layer_and_shares_nothing():
    layer = NormPropConv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(layer))
    folded = layer.fold()
    folded.kernel[...] += 1
    folded.bias[...] += 1
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), before)


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    with pytest.raises(ValueError, match=r"WSConv takes x .*\*space, c_in\) with c_in = 4 .* got \(2, 6, 7, 3\)"):
        WSConv(4, 6, (3, 2), rngs=nnx.Rngs(0))(jnp.ones((2, 6, 7, 3)))
    with pytest.raises(ValueError, match=r"c_in = 4 and 2 spatial axes, got \(7, 4\)"):
        WSConv(4, 6, (3, 2), rngs=nnx.Rngs(0))(jnp.ones((7, 4)))
    with pytest.raises(ValueError, match="strides is at least 1"):
        LCWConv(4, 6, 3, strides=(0,), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="no_such"):
        LCWLinear(4, 6, no_such=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="got use_bias=False"):
        VPLinear(4, 6, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"times 2 groups, got moments of shape \(2,\)"):
        VPConv(4, 6, 3, feature_group_count=2, rngs=nnx.Rngs(0))(
            jnp.ones((1, 5, 4)), Moments(jnp.zeros(2), jnp.ones(2))
        )
    with pytest.raises(NotImplementedError):
        type("Nothing", (ComputedKernel, nnx.Linear), {})(2, 3, rngs=nnx.Rngs(0))(jnp.ones((1, 2)))
