import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.activations import lk_relu, relu
from linked_jax.layers import LinkedLinear
from linked_jax.remedies import BatchChannelNorm, LCWConv, LCWLinear, NormPropConv, NormPropLinear, VPLinear, WSConv
from linked_jax.remedies.normprop import normalized
from linked_jax.revive import fold_batch_norm, fold_sequential
from tests.arrays import white
from tests.cases import first_fast

LAYERS = {
    "linear": (functools.partial(nnx.Linear, 3, 5), (4, 3)),
    "linear without bias": (functools.partial(nnx.Linear, 3, 5, use_bias=False), (2, 7, 3)),
    "conv": (functools.partial(nnx.Conv, 3, 5, (3, 3)), (2, 6, 7, 3)),
    "conv without bias": (functools.partial(nnx.Conv, 3, 5, (3, 2), strides=2, use_bias=False), (2, 6, 7, 3)),
    "groups": (functools.partial(nnx.Conv, 4, 6, (3,), feature_group_count=2, padding="CIRCULAR"), (2, 6, 4)),
}


def trained(module):
    for j, name in enumerate(("bias", "scale", "mean", "var")):
        variable = getattr(module, name, None)
        if isinstance(variable, nnx.Variable):
            drawn = np.random.default_rng(j + 1).uniform(0.2, 3, variable.shape)
            variable[...] = jnp.asarray(drawn, variable.dtype)
    return module


@pytest.mark.parametrize(("dtype", "tolerance"), first_fast([(jnp.float32, 1e-5), (jnp.float64, 1e-12)]))
@pytest.mark.parametrize(
    "options", first_fast([{}, {"use_scale": False}, {"use_bias": False, "epsilon": 0.1}]), ids=str
)
@pytest.mark.parametrize(("make", "shape"), first_fast(LAYERS.values()), ids=LAYERS)
def test_one_layer_gives_what_layer_and_norm_give(make, shape, options, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        layer = trained(make(param_dtype=dtype, rngs=nnx.Rngs(0)))
        norm = nnx.BatchNorm(layer.out_features, param_dtype=dtype, rngs=nnx.Rngs(0), **options)
        norm, x = trained(norm), white(*shape, dtype=dtype)
        kernel = np.asarray(layer.kernel[...])
        folded = fold_batch_norm(layer, norm)
        assert type(folded) is type(layer)
        np.testing.assert_allclose(folded(x), norm(layer(x), use_running_average=True), atol=10 * tolerance)
        np.testing.assert_array_equal(layer.kernel[...], kernel)
        assert (folded.use_bias, folded.kernel.dtype) == (True, dtype)
        graph, state = nnx.split(folded)
        np.testing.assert_allclose(jax.jit(lambda s: nnx.merge(graph, s)(x))(state), folded(x), atol=10 * tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("conv", [True, False])
def test_normprop_becomes_plain(conv):
    if conv:
        layer = NormPropConv(3, 5, (3, 2), strides=2, padding=[(1, 0), (2, 1)], rngs=nnx.Rngs(0))
    else:
        layer = NormPropLinear(3, 5, rngs=nnx.Rngs(0))
    layer, x = trained(layer), white(2, 6, 7, 3)
    folded = layer.fold()
    assert type(folded) is (nnx.Conv if conv else nnx.Linear)
    np.testing.assert_allclose(folded(x), layer(x), atol=1e-5)


@pytest.mark.slow
def test_a_whole_model():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), jax.nn.relu,
        WSConv(4, 4, (3, 3), padding="CIRCULAR", rngs=rngs), nnx.BatchNorm(4, rngs=rngs), lambda x: x * jnp.cos(x),
        LCWConv(4, 4, (3, 3), strides=2, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), normalized(relu),
        NormPropConv(4, 4, (2, 2), rngs=rngs), lambda x: x.reshape(len(x), -1),
        LCWLinear(24, 6, rngs=rngs), lk_relu, NormPropLinear(12, 5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs),
        LinkedLinear(5, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), jax.nn.sigmoid,
    )  # fmt: skip
    for layer in model.layers:
        trained(layer)
    model.eval()
    folded, x = fold_sequential(model), white(2, 4, 6, 2)
    kinds = [type(layer) for layer in folded.layers if isinstance(layer, nnx.Module)]
    assert kinds == [nnx.Conv, nnx.Conv, nnx.Conv, nnx.Conv, nnx.Linear, nnx.Linear, nnx.Dropout, nnx.Linear]
    np.testing.assert_allclose(folded(x), model(x), atol=1e-5)
    assert isinstance(model.layers[1], nnx.BatchNorm)


@pytest.mark.slow
def test_bad_input(unchecked):
    rngs = nnx.Rngs(0)
    layer, norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    with pytest.raises(ValueError, match="got NormPropLinear and BatchNorm"):
        fold_batch_norm(NormPropLinear(3, 4, rngs=rngs), norm)
    with pytest.raises(ValueError, match="got Linear and LayerNorm"):
        fold_batch_norm(layer, nnx.LayerNorm(4, rngs=rngs))
    with pytest.raises(ValueError, match=r"4 outputs.*got 5 on axis -1"):
        fold_batch_norm(layer, nnx.BatchNorm(5, rngs=rngs))
    with pytest.raises(ValueError, match="got 4 on axis 1"):
        fold_batch_norm(layer, nnx.BatchNorm(4, axis=1, rngs=rngs))
    with pytest.raises(ValueError, match=r"layers\[1\], a VPLinear, does not fold by itself"):
        fold_sequential(nnx.Sequential(layer, VPLinear(4, 3, rngs=rngs)))
    with pytest.raises(ValueError, match=r"layers\[0\], a Sequential, has a WSConv inside"):
        fold_sequential(nnx.Sequential(nnx.Sequential(WSConv(3, 4, (3, 3), rngs=rngs), jax.nn.relu)))
    for between in (jnp.tanh, jax.nn.relu, lk_relu):
        with pytest.raises(ValueError, match=r"layers\[2\] follows an activation, which its shift does not pass"):
            fold_sequential(nnx.Sequential(layer, between, norm))
    with pytest.raises(ValueError, match=r"layers\[2\] follows a Dropout; move"):
        fold_sequential(nnx.Sequential(LinkedLinear(3, 4, rngs=rngs), nnx.Dropout(0.5), norm))
    with pytest.raises(ValueError, match=r"layers\[1\], a Sequential, has a BatchNorm inside.*flatten the Sequential"):
        fold_sequential(nnx.Sequential(jax.nn.relu, nnx.Sequential(layer, norm)))
    with pytest.raises(ValueError, match=r"layers\[0\] follows nothing"):
        fold_sequential(nnx.Sequential(norm, layer))
    with pytest.raises(ValueError, match=r"nnx\.Sequential, got a Linear"):
        fold_sequential(layer)


@pytest.mark.slow
def test_a_norm_of_several_parts_stays_behind_a_folded_kernel():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(WSConv(3, 4, (3, 3), rngs=rngs), BatchChannelNorm(4, 2, rngs=rngs), jax.nn.relu)
    model.eval()
    folded, x = fold_sequential(model), jnp.asarray(white(2, 5, 5, 3, dtype=np.float32))
    assert [type(layer) for layer in folded.layers[:2]] == [nnx.Conv, BatchChannelNorm]
    np.testing.assert_allclose(folded(x), model(x), atol=1e-5)


def test_a_module_with_a_layer_and_its_norm_inside_is_refused():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.layer(x))

    with pytest.raises(ValueError, match=r"layers\[0\], a Block, has a BatchNorm inside"):
        fold_sequential(nnx.Sequential(Block(nnx.Rngs(0)), jax.nn.relu))
