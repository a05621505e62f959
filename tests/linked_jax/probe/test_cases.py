"""Reports of models that were once wrong: the truth is computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.jet import jet
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from linked_jax.activations import lk_relu, lk_swish
from linked_jax.linking import Link
from linked_jax.probe import Monitor, observe, probe
from tests.arrays import white
from tests.linked_jax.probe.common import KILL, WEIGHTS, agrees, mean_of_squares, mlp, same
from tests.linked_jax.probe.test_forms import surrogate_jvp, surrogate_vjp

X = white(64, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "f",
    [
        lambda z: jnp.maximum(z, 0) + 0.2 * jnp.minimum(z, 0),
        lambda z: jax.nn.relu(z) - 0.2 * jax.nn.relu(-z),
        lambda z: jax.nn.relu(z) + jnp.minimum(jnp.exp(z) - 1, 0.0),
        lambda z: jnp.where(z < 0, 0.2 * z, z),
    ],
)
def test_a_part_that_is_dead_is_not_the_whole(f):
    bias = jnp.array([0.0, -50.0, 0.0])
    (layer,) = probe(bias, [X], call=lambda b, x: f(x[:, :3] + b)).layers
    assert not layer.dead.any()
    slope = jax.vmap(jax.vmap(jax.grad(f)))(X[:, :3] + bias)
    np.testing.assert_array_equal(layer.dead_link, (slope == 0).all(0))


RULES = [surrogate_jvp, surrogate_vjp]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wrap", [lambda g: g, lambda g: Link((g,))], ids=["bare", "link"])
def test_a_surrogate_gradient_is_the_gradient(rule, wrap):
    act = wrap(rule(lambda z: jnp.maximum(z, 0), jax.nn.sigmoid))
    (layer,) = probe(jnp.full(5, 8.0), [X], call=lambda b, x: act(x - b)).layers
    assert layer.dead.all()
    assert not layer.dead_link.any()
    (layer,) = probe(lambda x: act(x), [(X, None)], loss_fn=lambda h, _: h.sum(-1).mean()).layers
    np.testing.assert_allclose(layer.gradient_mean_square, jnp.square(jax.nn.sigmoid(X)).mean(), rtol=1e-4)


@pytest.mark.slow
def test_two_rules_of_one_function_are_two_activations():
    flat = surrogate_jvp(lambda z: jnp.maximum(z, 0), jnp.zeros_like)
    steep = surrogate_vjp(lambda z: jnp.maximum(z, 0), jnp.ones_like)
    report = probe(lambda x: (flat(x) @ white(5, 2), steep(x) @ white(5, 2)), [X])
    assert [layer.dead_link.all() for layer in report.layers] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("use_mesh", [False, True])
@pytest.mark.parametrize("link", [jax.nn.relu, lk_relu, lk_swish, jax.nn.elu])
def test_a_batch_on_an_explicit_mesh(use_mesh, link):
    mesh = jax.make_mesh((2,), ("data",))
    x, w = white(16, 6), white(6, 4, seed=1)
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    wanted = probe(w, [x], call=lambda w, x: link(x @ w))
    if use_mesh:
        with jax.set_mesh(mesh):
            found = probe(w, [split, split], call=lambda w, x: link(x @ w))
    else:
        found = probe(w, [split, split], call=lambda w, x: link(x @ w))
    np.testing.assert_allclose(found.layers[0].mean, wanted.layers[0].mean, atol=1e-6)
    np.testing.assert_allclose(found.layers[0].effective_rank, wanted.layers[0].effective_rank, rtol=1e-4)


@pytest.mark.slow
def test_gradients_on_an_explicit_mesh():
    mesh, batch = jax.make_mesh((2,), ("data",)), (white(8, 4), white(8, 4, seed=1))
    split = tuple(jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batch)

    def loss_fn(outputs, labels):
        return jnp.square(outputs - labels).mean()

    with jax.set_mesh(mesh):
        found = probe(WEIGHTS, [split], call=mlp, loss_fn=loss_fn)
    same(found, probe(WEIGHTS, [batch], call=mlp, loss_fn=loss_fn))


@pytest.mark.slow
def test_links_have_taylor_series():
    z, series = jnp.array([-1.0, 2.0]), ((jnp.ones(2), jnp.zeros(2)),)
    found = jet(lambda z: lk_swish(z), (z,), series)
    wanted = jet(lambda z: jnp.concatenate([jax.nn.silu(z), jax.nn.silu(-z)]), (z,), series)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("f", [jax.nn.sigmoid, jax.nn.softplus])
def test_the_rank_of_a_wide_layer(f):
    x, w = white(1024, 512), white(512, 512, seed=1) / np.sqrt(512)
    (layer,) = probe(w, [x[:300], x[300:]], call=lambda w, x: f(x @ w + 2)).layers
    p = np.linalg.svd(np.asarray(f(x @ w + 2), np.float64), compute_uv=False)
    p /= p.sum()
    np.testing.assert_allclose(layer.effective_rank, np.exp(-(p * np.log(p)).sum()), rtol=1e-2)


@pytest.mark.slow
def test_keys_and_none_may_be_in_a_batch():
    def noisy(w, batch):
        noise = jax.random.normal(batch["key"], batch["x"].shape)
        return jax.nn.relu(batch["x"] @ w) @ w.T + noise

    batches = [{"x": X, "key": jax.random.key(i), "mask": None} for i in range(2)]
    for has_loss in (False, True):
        some = [(batch, None) for batch in batches] if has_loss else batches
        report = probe(white(5, 3), some, call=noisy, loss_fn=mean_of_squares if has_loss else None)
        (layer,) = report.layers
        agrees(layer, jnp.concatenate([X, X]) @ white(5, 3))
    keys = jax.random.split(jax.random.key(0), 64)
    one = Monitor([(X, None, keys)], every=1, call=lambda w, batch: jnp.tanh(batch[0] @ w))
    with pytest.raises(ValueError, match="without loss_fn a batch is its inputs alone"):
        one(0, white(5, 3))
    (layer,) = probe(
        lambda b: jax.vmap(lambda k, x: jnp.tanh(x + jax.random.normal(k, x.shape)))(b["key"], b["x"]),
        [{"x": X, "key": keys}],
    ).layers
    assert (layer.units, layer.samples) == (5, 64)


@pytest.mark.slow
def test_dropout_is_no_part_of_an_activation():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Linear(5, 4, rngs=rngs), jax.nn.relu, nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
    )
    net.layers[0].bias[...] = jnp.array([0, 0, KILL, 0])
    (layer,) = probe(net, [X]).layers
    agrees(layer, net.layers[0](X))
    assert layer.activation == "relu"


WEIGHT, READ_OUT = white(5, 4), white(4, 3, seed=1)
DEAD = jnp.zeros(4).at[2].set(KILL)


def hidden(x):
    return jax.nn.relu(x @ WEIGHT + DEAD)


def quantised(x):
    codes = jnp.clip(jnp.round(hidden(x) * 20), -127, 127).astype(jnp.int8)
    return jnp.einsum("nc,ck->nk", codes, jnp.ones((4, 3), jnp.int8), preferred_element_type=jnp.int32)


def modulus_relu(x):
    c = jax.lax.complex(x @ WEIGHT, x[:, ::-1] @ WEIGHT)
    return (jax.nn.relu(jnp.abs(c) + DEAD) * c / jnp.abs(c)).real @ READ_OUT


READ_BY = {
    "a pool over points": (lambda x: hidden(x).max(0) @ READ_OUT, ["relu"]),
    "a mean over nodes": (lambda x: (x @ x.T @ hidden(x)).mean(0) @ READ_OUT, ["relu"]),
    "a scaled pool": (lambda x: jnp.tanh((2 * hidden(x).sum(0)[None] + 1) @ READ_OUT), ["relu", "tanh"]),
    "a cast to integers": (quantised, ["unknown"]),
    "a Fourier transform": (lambda x: jnp.fft.fft(hidden(x)).real @ READ_OUT, ["relu"]),
    "complex numbers": (modulus_relu, ["relu"]),
}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", READ_BY)
def test_what_reads_an_activation_does_not_hide_it(name):
    forward, names = READ_BY[name]
    layers = probe(forward, [X]).layers
    assert [layer.activation for layer in layers] == names
    assert layers[0].dead.tolist() == [False, False, True, False]


@pytest.mark.slow
def test_a_loss_and_a_norm_over_the_batch_are_no_activations_still():
    def net(x):
        h = x @ WEIGHT
        h = jax.nn.relu((h - h.mean(0)) / jnp.sqrt(jnp.square(h - h.mean(0)).mean(0) + 1e-5)) @ READ_OUT
        return h, jnp.abs(h).mean(), jnp.logaddexp(0.0, -h).mean(0) * 2

    assert [layer.activation for layer in probe(net, [X]).layers] == ["relu"]


def conditioned(params, x):
    """A scan over layers, each of which gets a scale of its own that is made of the data."""
    scales = jnp.moveaxis((x @ params["scales"]).reshape(len(x), 3, 5), 1, 0)

    def layer(h, each):
        kernel, bias, scale = each
        return jax.nn.relu(h @ kernel * (1 + 0.01 * scale) + bias), None

    return jax.lax.scan(layer, x, (params["kernel"], params["bias"], scales))[0]


@pytest.mark.slow
def test_a_scan_over_kernels_is_one_over_layers_whatever_data_they_get():
    bias = jnp.zeros((3, 5)).at[1, 2].set(KILL)
    params = {"scales": white(5, 15), "kernel": white(3, 5, 5, seed=2), "bias": bias}
    layers = probe(params, [X], call=conditioned).layers
    assert [(layer.samples, layer.dead[2]) for layer in layers] == [(64, False), (64, True), (64, False)]


def until_large(r):
    def on(state):
        return (state[0] < 3) & (state[1].sum() < 6)

    return jax.lax.while_loop(on, lambda state: (state[0] + 1, jax.nn.relu(state[1] @ jnp.eye(5) + 0.5)), (0, r))


@pytest.mark.slow
def test_a_loop_that_ends_at_other_times_for_each_sample():
    rows = jnp.zeros((4, 5)).at[:, 0].set(jnp.array([-10.0, 1.0, 5.0, 7.0]))
    steps, outputs = jax.vmap(until_large)(rows)
    assert steps.tolist() == [3, 2, 1, 0]
    report = probe(lambda x: jax.vmap(until_large)(x), [rows])
    assert [(layer.activation, layer.samples) for layer in report.layers] == [("relu", 6)]
    (again, _), taps = observe(lambda _, x: (jax.vmap(until_large)(x)[1], 0), None, rows)
    np.testing.assert_array_equal(again, outputs)
    assert taps[0].stats.count == 6
    monitor = Monitor([rows], every=1, call=lambda w, x: jax.vmap(until_large)(x / w))
    monitor(0, 0.0)
    assert monitor.not_finite_first[1].name == "div"


@pytest.mark.slow
def test_a_scan_over_no_data_counts_none():
    def forward(x):
        return jax.lax.scan(lambda h, x: (jnp.tanh(h + x), None), x @ WEIGHT, jnp.zeros((0, 64, 4)) * x[0, 0])[0]

    (layer,) = probe(lambda x: jax.nn.relu(forward(x)), [X]).layers[1:]
    assert layer.samples == 64
