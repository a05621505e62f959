"""Programs for platforms that this machine need not have: jax.export lowers them, the CPU's are run as well."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from linked_jax.activations import lk_gelu, lk_relu, lk_swish
from linked_jax.layers import LinkedConv, LinkedLinear
from linked_jax.learned import LinkedPReLU
from linked_jax.linking import Link, fourier, min_max
from tests.arrays import white
from tests.cases import first_fast

LINKS = {"lk_relu": lk_relu, "lk_swish": lk_swish, "lk_gelu": lk_gelu, "min_max": min_max, "fourier": fourier}
over_links = pytest.mark.parametrize("link", first_fast(LINKS.values()), ids=LINKS)
platforms = pytest.mark.parametrize("platform", first_fast(["cuda", "tpu"]))
OPTIMIZER = optax.adam(1e-2)
X, Y = np.random.default_rng(0).normal(size=(4, 6, 6, 2)).astype(np.float32), np.arange(4, dtype=np.int32) % 3


class Net(nnx.Module):
    def __init__(self, link, *, rngs):
        self.conv = LinkedConv(2, 4, (3, 3), link=link, strides=2, rngs=rngs)
        self.head = LinkedLinear(4, 3, link=link, rngs=rngs)

    def __call__(self, z):
        return self.head(self.conv(z).mean((1, 2)))


def forward_of(net):
    graph, params = nnx.split(net)
    return jax.jit(lambda params, x: nnx.merge(graph, params)(x)), params


def training_step_of(net):
    forward, params = forward_of(net)

    def step(params, opt_state, x, y):
        def loss_of(params):
            return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step, params, OPTIMIZER.init(params)


@pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))
@platforms
@over_links
def test_link_lowers_for_the_platform(link, platform, layout):
    link = Link(link.members, layout=layout)
    exported = jax.export.export(jax.jit(link), platforms=[platform])(jax.ShapeDtypeStruct((4, 3), jnp.bfloat16))
    assert exported.platforms == (platform,)
    assert [(out.shape, out.dtype) for out in exported.out_avals] == [((4, 3 * link.arity), jnp.bfloat16)]


@pytest.mark.slow
@platforms
@over_links
def test_forward_pass_lowers_for_the_platform(link, platform):
    forward, params = forward_of(Net(link, rngs=nnx.Rngs(0)))
    exported = jax.export.export(forward, platforms=[platform])(params, X)
    assert exported.platforms == (platform,)
    assert [out.shape for out in exported.out_avals] == [(4, 3)]


@pytest.mark.slow
@platforms
@over_links
def test_training_step_lowers_for_the_platform(link, platform):
    step, *state = training_step_of(Net(link, rngs=nnx.Rngs(0)))
    exported = jax.export.export(jax.jit(step), platforms=[platform])(*state, X, Y)
    assert exported.platforms == (platform,)
    assert [out.shape for out in exported.out_avals[:-1]] == [leaf.shape for leaf in jax.tree.leaves(state)]


@pytest.mark.slow
@over_links
def test_training_step_exported_for_cpu_is_the_eager_step(link):
    step, *state = training_step_of(Net(link, rngs=nnx.Rngs(0)))
    exported = jax.export.export(jax.jit(step), platforms=["cpu"])(*state, X, Y)
    assert exported.platforms == ("cpu",)
    found, wanted = exported.call(*state, X, Y), step(*state, X, Y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), found[0], state[0])
    assert all(jax.tree.leaves(moved))


@platforms
def test_learned_slopes_lower_for_the_platform(platform):
    net = nnx.Sequential(LinkedLinear(2, 4, link=LinkedPReLU(2), rngs=nnx.Rngs(0)), LinkedPReLU(4))
    forward, params = forward_of(net)
    assert jax.export.export(forward, platforms=[platform])(params, X).platforms == (platform,)


@over_links
def test_one_program_for_three_platforms_runs_on_this_one(link):
    exported = jax.export.export(jax.jit(link), platforms=["cpu", "cuda", "tpu"])(X)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_array_equal(exported.call(X), jax.jit(link)(X))


CONVS = {"narrow": (2, 3, 1), "wide": (32, 32, 1), "strided": (48, 48, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVS)
def test_a_batch_may_be_left_open(name):
    c, c_out, strides = CONVS[name]
    layer = LinkedConv(c, c_out, (3, 3), strides=strides, rngs=nnx.Rngs(0))
    (batch,) = jax.export.symbolic_shape("b")
    open_batch = jax.ShapeDtypeStruct((batch, 6, 6, c), jnp.float32)
    exported = jax.export.export(jax.jit(lambda z: layer(z)))(open_batch)
    z = white(5, 6, 6, c)
    np.testing.assert_allclose(exported.call(z), layer(z), rtol=1e-4, atol=1e-4)
