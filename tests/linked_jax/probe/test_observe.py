import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from linked_jax.activations import lk_relu, lk_swish, relu
from linked_jax.layers import LinkedConv, LinkedLinear
from linked_jax.learned import ChannelPReLU
from linked_jax.linking import Link, linked
from linked_jax.probe import observe, probe, together, unstack
from linked_jax.signal_statistics import mean_square
from tests.arrays import white
from tests.cases import first_fast
from tests.linked_jax.probe.common import WEIGHTS, agrees, mean_of_squares, mlp

MIRRORED = [jax.nn.relu, lambda z: jax.nn.relu(-z)]


def scanned(weights, x):
    return jax.lax.scan(lambda z, w: (lk_relu(z)[:, :4] @ w, None), x, weights)[0]


STACKED = jnp.stack(WEIGHTS)


@pytest.mark.slow
def test_outputs_are_those_of_the_function_and_taps_are_in_order():
    x = white(8, 4)
    outputs, taps = jax.jit(functools.partial(observe, mlp))(WEIGHTS, x)
    np.testing.assert_array_equal(outputs, jax.jit(mlp)(WEIGHTS, x))
    z = x @ WEIGHTS[0]
    assert [tap.activation for tap in taps] == ["relu"] * 3
    np.testing.assert_allclose(taps[0].stats.mean, z.mean(0), rtol=1e-5)
    np.testing.assert_allclose(mean_square(taps[1].stats), jnp.square(jax.nn.relu(z) @ WEIGHTS[1]).mean(), rtol=1e-5)
    assert taps[0].gradient_square_sum is None


def test_only_what_depends_on_the_inputs_is_a_layer():
    _, taps = observe(lambda w, x: x * jax.nn.softplus(w), jnp.ones(4), white(8, 4))
    assert taps == []


@pytest.mark.slow
def test_a_scan_over_layers_has_one_tap_with_an_axis_of_layers():
    x = white(8, 4)
    (tap,) = jax.jit(lambda w, x: observe(scanned, w, x)[1])(STACKED, x)
    layers = unstack([tap])
    assert tap.stats.live.shape == (3, 4)
    assert [layer.name[-3:] for layer in layers] == ["[0]", "[1]", "[2]"]
    z = x
    for layer, w in zip(layers, STACKED, strict=True):
        np.testing.assert_allclose(layer.stats.mean, z.mean(0), atol=1e-5)
        centred = lk_relu(z) - lk_relu(z).mean(0)
        np.testing.assert_allclose(layer.features.scatter, centred.T @ centred, rtol=1e-4, atol=1e-4)
        z = jax.nn.relu(z) @ w


@pytest.mark.slow
def test_halves_together_are_the_whole():
    x = white(8, 4)
    tap, *halves = (observe(scanned, STACKED, x)[1][0] for x in (x, x[:3], x[3:]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), together(*halves), tap)
    none_yet = jax.tree.map(jnp.zeros_like, tap)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), together(none_yet, tap), tap)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", first_fast([False, True]))
def test_it_may_stand_in_vmap_and_shard_map(check_vma):
    seeds, x = jnp.stack([STACKED, STACKED[::-1]]), white(5, 4)  # as many samples as no axis of parameters
    mesh = jax.make_mesh((2,), ("seeds",), axis_types=(jax.sharding.AxisType.Auto,))

    def statistics(weights, x):
        taps = observe(lambda weights, x: mlp(list(weights), x), weights, x)[1]
        return [(tap.stats.live, mean_square(tap.stats), tap.stats.count) for tap in taps]

    mapped = jax.vmap(statistics, (0, None))
    spread = jax.shard_map(mapped, mesh=mesh, in_specs=(P("seeds"), P()), out_specs=P("seeds"), check_vma=check_vma)
    for found in (jax.jit(mapped)(seeds, x), jax.jit(spread)(seeds, x)):
        for seed, weights in enumerate(seeds):
            wanted = statistics(weights, x)
            jax.tree.map(lambda a, b, seed=seed: np.testing.assert_allclose(a[seed], b, rtol=1e-5), found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("f", first_fast([lambda w, x: jax.nn.gelu(x @ w), lambda w, x: scanned(w[None], x)]))
def test_statistics_that_are_not_used_are_not_computed(f):
    def flops(use):
        x, w = jnp.ones((64, 4)), jnp.ones((4, 4))
        cost = jax.jit(lambda w, x: use(observe(f, w, x)[1][0])).lower(w, x).compile().cost_analysis()
        return cost["flops"] + cost.get("transcendentals", 0)

    uses = (lambda t: t.stats.live, lambda t: t.stats.steepest, lambda t: t.features.scatter)
    live, slopes, scatter = map(flops, uses)
    assert live < slopes
    assert live < scatter


@pytest.mark.slow
def test_the_taps_of_an_nnx_module_have_its_paths_for_names():
    net = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)), relu)
    before = net.layers[1].mean[...]
    outputs, (tap,) = jax.jit(lambda x: observe(lambda net, x: net(x), net, x))(white(8, 4))
    assert tap.name == "layers.2"
    np.testing.assert_array_equal(net.layers[1].mean[...], before)
    np.testing.assert_allclose(outputs, net(white(8, 4)), rtol=1e-5, atol=1e-6)


# --- a unit is one channel of the operation that made z -----------------------------------------------------------

CONV = nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0))
IMAGES = white(6, 4, 5, 2)
FLAT = 4 * 5 * 3
INTERLEAVED = Link(lk_swish.members, layout="interleaved")
SWISH = [jax.nn.silu, lambda z: jax.nn.silu(-z)]


def read_out(link):
    return LinkedLinear(FLAT, 2, link=link, rngs=nnx.Rngs(1))


def flat(z):
    return z.reshape(len(z), -1)


FLATTENED = {
    "a link in a remat": (lambda z: read_out(lk_relu)(flat(z)), MIRRORED),
    "interleaved": (lambda z: read_out(INTERLEAVED)(flat(z)), SWISH),
    "a slope for each feature": (lambda z: ChannelPReLU(FLAT)(flat(z)), [lambda z: jnp.where(z > 0, z, z / 4)]),
    "relu": (lambda z: jax.nn.relu(flat(z)), [jax.nn.relu]),
    "relu, then flatten": (lambda z: flat(jax.nn.relu(z)), [jax.nn.relu]),
    "ravel in vmap": (jax.vmap(lambda z: lk_relu(jnp.ravel(z))), MIRRORED),
    "flatten in jit": (lambda z: jax.jit(lk_relu)(jax.jit(flat)(z)), MIRRORED),
    "channels first": (lambda z: lk_relu(flat(z.transpose(0, 3, 1, 2))), MIRRORED),
    "transposed": (lambda z: jax.nn.relu(z.transpose(0, 3, 1, 2)), [jax.nn.relu]),
    "and back": (lambda z: lk_relu(flat(z).reshape(z.shape)[:, None].squeeze(1)), MIRRORED),
    "a copy": (lambda z: relu(flat(jnp.copy(z))), [jax.nn.relu]),
    "a link over merged samples": (lambda z: lk_relu(z.reshape(-1, 3)), MIRRORED),
    "a link inside a scan": (
        lambda z: jax.lax.scan(lambda z, _: (z, lk_relu(flat(z))), z, length=1)[1], MIRRORED,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("tail", "members"), first_fast(FLATTENED.values()), ids=FLATTENED)
def test_a_flatten_keeps_the_channels_as_units(tail, members):
    (layer,) = probe(lambda x: tail(CONV(x)), [IMAGES[:4], IMAGES[4:]]).layers
    layout = "interleaved" if members is SWISH else "blocked"
    agrees(layer, CONV(IMAGES), members, layout)


@pytest.mark.slow
def test_a_cast_keeps_the_channels_as_units():
    (layer,) = probe(lambda x: lk_relu(flat(CONV(x)).astype(jnp.bfloat16)), [IMAGES]).layers
    assert (layer.units, layer.samples) == (3, 6 * 4 * 5)


@pytest.mark.slow
def test_tokens_are_positions():
    x, dense = white(6, 5, 4), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    (layer,) = probe(lambda x: jnp.tanh(dense(x)), [x]).layers
    agrees(layer, dense(x), [jnp.tanh])


@pytest.mark.slow
def test_one_channel_is_one_unit_wherever_it_was_squeezed():
    conv = nnx.Conv(2, 1, (3, 3), rngs=nnx.Rngs(0))
    for squeeze in (lambda z: z[..., 0], flat):
        (layer,) = probe(lambda x, squeeze=squeeze: relu(squeeze(conv(x))), [IMAGES]).layers
        agrees(layer, conv(IMAGES), rank=False)


# --- one activation of one z is one layer -------------------------------------------------------------------------


@pytest.mark.slow
def test_two_layers_that_share_their_link_and_z_are_one_with_the_whole_gradient():
    rngs = nnx.Rngs(0)
    one, other = (LinkedConv(2, 3, (1, 1), rngs=rngs) for _ in range(2))

    def loss_of(nudge):
        z = IMAGES + nudge
        return len(z) * mean_of_squares(one(z) + other(z) + z.sum(-1, keepdims=True), None)

    (layer,) = probe(
        lambda x: one(z := x + 0.0) + other(z) + z.sum(-1, keepdims=True), [(IMAGES, None)], loss_fn=mean_of_squares
    ).layers
    gradient = jax.grad(loss_of)(jnp.zeros_like(IMAGES))
    np.testing.assert_allclose(layer.gradient_mean_square, jnp.square(gradient).mean(), rtol=1e-4)
    agrees(layer, IMAGES, MIRRORED)


@pytest.mark.slow
def test_a_call_that_returns_its_argument_does_not_count_its_gradient_twice():
    batches = [(white(8, 4), None)]
    activate = jax.jit(lambda z: (jax.nn.relu(z), z))

    def through(x):
        h, z = activate(x @ WEIGHTS[0])
        return h + jax.nn.relu(z)

    def plain(x):
        return 2 * jax.nn.relu(x @ WEIGHTS[0])

    (found,), (wanted,) = (probe(f, batches, loss_fn=mean_of_squares).layers for f in (through, plain))
    np.testing.assert_allclose(found.gradient_mean_square, wanted.gradient_mean_square, rtol=1e-5)


@pytest.mark.slow
def test_other_activations_of_one_z_are_other_layers():
    slopes = [lambda z: jnp.where(z > 0, z, 0.1 * z), lambda z: jnp.where(z > 0, z, 0.2 * z)]
    first, second = (Link((g,)) for g in slopes)
    report = probe(lambda x: relu(x) + jax.checkpoint(lk_relu)(x)[:, :4] + first(x) + jax.jit(second)(x), [white(8, 4)])
    assert [layer.arity for layer in report.layers] == [1, 2, 1, 1]


@pytest.mark.slow
def test_one_function_called_on_two_z_is_two_layers():
    activate = jax.jit(jax.nn.relu)  # one jaxpr for both calls
    twice = jax.checkpoint(lambda x: activate(x))
    assert len(probe(lambda x: twice(x @ WEIGHTS[0]) + twice(x @ WEIGHTS[1]), [white(8, 4)]).layers) == 2
    assert len(probe(lambda x: twice(x + 1) + twice(x - 1), [white(8, 4)]).layers) == 1  # one function of one z


@pytest.mark.slow
@pytest.mark.parametrize(
    "g", first_fast([lambda z: z, lambda z: 2 * z - 1, lambda z: -z / 3, functools.partial(jnp.multiply, 2.0)])
)
def test_a_link_of_one_affine_member_is_no_activation(g):
    report = probe(lambda x: relu(Link((g,))(x)), [white(8, 4)])
    assert [layer.activation for layer in report.layers] == ["relu"]


@pytest.mark.slow
def test_other_links_of_one_member_are_activations():
    for link in (Link((jnp.square,)), Link((lambda z: z * z,)), Link((lambda z: 1 / z,))):
        assert len(probe(lambda x, link=link: link(x), [white(8, 4)]).layers) == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["blocked", "interleaved"])
def test_an_affine_member_belongs_to_its_link(layout):
    z, members = white(8, 4), (jax.nn.relu, lambda z: z)
    (layer,) = probe(lambda x: Link(members, layout=layout)(x), [z]).layers
    agrees(layer, z, members, layout)
    affine = probe(lambda x: relu(linked(lambda z: z)(x) @ jnp.ones((8, 3))), [z])  # (z, -z) is linear
    assert [layer.activation for layer in affine.layers] == ["relu"]
