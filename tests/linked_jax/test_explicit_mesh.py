"""Links, layers and remedies on an Explicit mesh, the default of `jax.make_mesh`: one device's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from linked_jax import initializers, layers, linen
from linked_jax.activations import ACTIVATIONS, lk_relu
from linked_jax.diagnostics import dead_units, unit_statistics
from linked_jax.learned import ChannelPReLU, LinkedPReLU
from linked_jax.linking import linked
from tests.cases import first_fast

MESH = jax.make_mesh((2,), ("x",))
INTERLEAVED = linked(jax.nn.relu, layout="interleaved")
BATCH, CHANNELS = PartitionSpec("x"), PartitionSpec(None, "x")


def rows(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def linen_layer(layer):
    return functools.partial(layer.apply, layer.init(jax.random.key(0), rows(4, 4)))


def every_link(z):
    return jnp.concatenate([link(z) for link in (*ACTIVATIONS.values(), INTERLEAVED)], axis=-1)


FUNCTIONS = {
    "links": lambda: every_link,
    "link along axis 0": lambda: linked(jax.nn.relu, axis=0),
    "LinkedLinear": lambda: layers.LinkedLinear(4, 6, rngs=nnx.Rngs(0)),
    "LinkedLinear, interleaved": lambda: layers.LinkedLinear(4, 6, link=INTERLEAVED, rngs=nnx.Rngs(0)),
    "LinkedLinear, slopes": lambda: layers.LinkedLinear(4, 6, link=LinkedPReLU(4), rngs=nnx.Rngs(0)),
    "LinkedDense": lambda: linen_layer(linen.LinkedDense(3)),
    **{make.__name__: functools.partial(make, 4) for make in (ChannelPReLU, LinkedPReLU)},
    "ChannelPReLU of Linen": lambda: linen_layer(linen.ChannelPReLU()),
    "LinkedPReLU of Linen": lambda: linen_layer(linen.LinkedPReLU()),
}
CASES = [(name, split) for name in FUNCTIONS for split in (BATCH, CHANNELS)]


def check_on_mesh(f, x, split):
    """The value and the gradient, eagerly and compiled, are those of one device."""

    def loss(x):
        return jnp.sum(jnp.square(f(x)))

    assert MESH.axis_types == (AxisType.Explicit,)
    value, gradient = f(x), jax.grad(loss)(x)
    with jax.set_mesh(MESH):
        x = jax.device_put(x, NamedSharding(MESH, split))
        assert jax.typeof(x).sharding.spec[: len(split)] == tuple(split)
        for how in (lambda f: f, jax.jit):
            np.testing.assert_allclose(how(f)(x), value, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(how(jax.grad(loss))(x), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "split"), first_fast(CASES), ids=[f"{name}, {split}" for name, split in CASES])
def test_functions_of_rows(name, split):
    check_on_mesh(FUNCTIONS[name](), rows(4, 4), split)


@pytest.mark.slow
@pytest.mark.parametrize("split", [BATCH, PartitionSpec(None, None, None, "x")], ids=["batch", "channels"])
@pytest.mark.parametrize(
    "conv",
    [
        lambda: layers.LinkedConv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0)),
        lambda: layers.LinkedConv(4, 6, (3, 3), padding="CIRCULAR", rngs=nnx.Rngs(0)),
        lambda: layers.LinkedConv(4, 4, (3, 3), link=INTERLEAVED, feature_group_count=4, rngs=nnx.Rngs(0)),
    ],
    ids=["strided", "circular", "depthwise"],
)
def test_convolutions(conv, split):
    """Split channels are summed over: as Flax' own layer, it is told where the outputs go."""
    conv = conv()

    def f(x):
        on_mesh = split != BATCH and not jax.sharding.get_abstract_mesh().empty
        return conv(x, out_sharding=PartitionSpec() if on_mesh else None)

    check_on_mesh(f, rows(4, 6, 6, 4), split)


@pytest.mark.slow
def test_a_linen_convolution_with_a_split_batch():
    conv = linen.LinkedConv(3, (3, 3))
    check_on_mesh(
        functools.partial(conv.apply, conv.init(jax.random.key(0), rows(4, 6, 6, 4))), rows(4, 6, 6, 4), BATCH
    )


@pytest.mark.slow
def test_a_transposed_convolution_with_a_split_batch():
    check_on_mesh(layers.LinkedConvTranspose(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0)), rows(4, 6, 6, 4), BATCH)


@pytest.mark.slow
@pytest.mark.parametrize("split", [BATCH, CHANNELS])
def test_statistics(split):
    z = rows(6, 4).at[:, 1].set(-1)

    def statistics(z):
        h, slopes = jax.jvp(jax.nn.relu, (z,), (jnp.ones_like(z),))
        return unit_statistics(z, h, slopes)

    whole = statistics(z)
    with jax.set_mesh(MESH):
        found = jax.jit(statistics)(jax.device_put(z, NamedSharding(MESH, split)))
        assert dead_units(found).tolist() == [False, True, False, False]
        for a, b in zip(found, whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_kernels_are_made_on_it():
    with jax.set_mesh(MESH):
        kernel = jax.jit(initializers.looks_linear(lk_relu), static_argnums=1)(jax.random.key(0), (8, 4))
    np.testing.assert_array_equal(kernel, initializers.looks_linear(lk_relu)(jax.random.key(0), (8, 4)))
