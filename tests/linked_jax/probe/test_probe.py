import dataclasses
import json
import sys

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.activations import lk_relu, lk_swish, relu
from linked_jax.diagnostics import unit_statistics
from linked_jax.layers import ChannelPReLU, LinkedConv, LinkedPReLU
from linked_jax.linking import Link, linked
from linked_jax.probe import Monitor, Report, probe
from linked_jax.probe.plot import STATES, unit_states
from linked_jax.signal_statistics import covariate_drift

KILL = -1e3


def white(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mean_of_squares(outputs, _labels):
    return (outputs**2).mean()


def agrees(layer, z, members=(jax.nn.relu,), layout="blocked", tolerance=2e-5, rank=True):
    """The layer's report is what NumPy makes of the pre-activations z and the members."""
    z = jnp.asarray(z).reshape(-1, z.shape[-1])
    h = np.stack([np.asarray(jax.vmap(jax.vmap(g))(z), np.float64) for g in members])
    slopes = np.stack([np.asarray(jax.vmap(jax.vmap(jax.grad(g)))(z), np.float64) for g in members])
    z = np.asarray(z, np.float64)
    assert (layer.arity, layer.units, layer.samples) == (len(members), z.shape[1], z.shape[0])
    np.testing.assert_array_equal(layer.dead, (h == 0).all((0, 1)))
    np.testing.assert_array_equal(layer.dead_link, (slopes == 0).all((0, 1)))
    np.testing.assert_array_equal(layer.saturated, (np.abs(slopes) <= 0.01).all((0, 1)))
    changes = (z > 0).any(0) & (z < 0).any(0)
    np.testing.assert_array_equal(layer.linearised, ~changes & ~layer.dead)
    score = np.abs(h).mean((0, 1))
    np.testing.assert_allclose(layer.dormancy, score / score.mean(), rtol=1e-4, atol=1e-6)
    scale = np.abs(z).max()
    np.testing.assert_allclose(layer.mean, z.mean(0), atol=tolerance * scale)
    np.testing.assert_allclose(layer.std, z.std(0), atol=tolerance * scale)
    np.testing.assert_allclose(layer.activation_shift, z.mean(), atol=tolerance * scale)
    np.testing.assert_allclose(layer.mean_square, (z**2).mean(), rtol=100 * tolerance)
    if rank:
        h = np.concatenate(h, -1) if layout == "blocked" else np.stack(h, -1).reshape(len(z), -1)
        p = np.linalg.svd(h, compute_uv=False)
        p = p / p.sum()
        np.testing.assert_allclose(layer.effective_rank, np.exp(-(p * np.log(p + 1e-30)).sum()), rtol=1e-2)


def same(a, b, tolerance=1e-5):
    """Two reports hold the same numbers."""
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers, strict=True):
        for field in dataclasses.fields(x):
            one, other = getattr(x, field.name), getattr(y, field.name)
            if field.name in ("name", "source", "activation") or one is None or other is None:
                assert (one is None) == (other is None)
            elif field.name == "effective_rank":
                np.testing.assert_allclose(one, other, rtol=1e-3)
            else:
                np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


# --- it sees the pre-activations of any model ---------------------------------------------------------------------

ONE_MEMBER = {
    "relu": jax.nn.relu, "gelu": jax.nn.gelu, "exact gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "silu": jax.nn.silu, "written silu": lambda z: z * jax.nn.sigmoid(z), "leaky_relu": jax.nn.leaky_relu,
    "leaky_relu 0.2": lambda z: jax.nn.leaky_relu(z, 0.2), "elu": jax.nn.elu, "celu": jax.nn.celu,
    "selu": jax.nn.selu, "relu6": jax.nn.relu6, "softplus": jax.nn.softplus, "sigmoid": jax.nn.sigmoid,
    "log_sigmoid": jax.nn.log_sigmoid, "hard_tanh": jax.nn.hard_tanh, "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_silu": jax.nn.hard_silu, "mish": jax.nn.mish, "squareplus": jax.nn.squareplus,
    "soft_sign": jax.nn.soft_sign, "tanh": jnp.tanh, "maximum": lambda z: jnp.maximum(z, 0),
    "maximum of zero": lambda z: jnp.maximum(0.0, z),
    "where": lambda z: jnp.where(z > 0, z, 0), "Flax' PReLU": nnx.PReLU(), "linen": flax.linen.swish,
    "a link of one": Link((jax.nn.relu,)), "a tap": Link((lambda z: jnp.where(z > 1, z - 1, z / 8),)),
    "Flax' GELU": nnx.gelu, "clip": lambda z: jnp.clip(z, 0, 1), "clip below": lambda z: z.clip(min=0),
    "clip by name": lambda z: jnp.clip(z, min=0, max=1), "minimum": lambda z: jnp.minimum(jnp.maximum(z, 0), 1),
    "minimum of relu": lambda z: jnp.minimum(jax.nn.relu(z), 1), "where >=": lambda z: jnp.where(z >= 0, z, 0),
    "where <": lambda z: jnp.where(z < 0, 0, z), "where <=": lambda z: jnp.where(z <= 0, 0, z),
    "written leaky": lambda z: jnp.where(z > 0, z, 0.1 * z), "maximum of a z": lambda z: jnp.maximum(z, 0.1 * z),
    "quick gelu": lambda z: z * jax.nn.sigmoid(1.702 * z), "quick gelu 2": lambda z: jax.nn.sigmoid(z * 1.7) * z,
    "GPT-2": lambda z: 0.5 * z * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (z + 0.044715 * jnp.power(z, 3)))),
    "written gelu": lambda z: 0.5 * z * (1.0 + jnp.tanh(0.79788456 * (z + 0.044715 * z**3))),
    "Horner's gelu": lambda z: 0.5 * z * (1 + jnp.tanh(z * 0.79788456 * (1 + 0.044715 * z * z))),
    "erf": lambda z: 0.5 * z * (1 + jax.lax.erf(z / jnp.sqrt(2.0))),
    "written mish": lambda z: z * jnp.tanh(jax.nn.softplus(z)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True], ids=["plain", "vmapped"])
@pytest.mark.parametrize("g", ONE_MEMBER.values(), ids=ONE_MEMBER)
def test_every_activation_is_seen_once_with_its_pre_activation(g, batched):
    x, w = white(32, 4), white(4, 3, seed=1).at[:, 2].multiply(10.0)

    def forward(w, x):
        return jax.vmap(lambda x: g(x @ w))(x) if batched else g(x @ w)

    (layer,) = probe(w, [x], call=forward).layers
    member = g.members[0] if isinstance(g, Link) else g
    agrees(layer, x @ w, [lambda z: member(z[None])[0]], rank=not batched)


@pytest.mark.slow
@pytest.mark.parametrize("g", [lambda z: jnp.maximum(z, jnp.zeros_like(z)), lambda z: jnp.where(z > 0, z, z * 0.0)])
def test_zeros_of_the_shape_of_z(g):
    x = white(32, 4)
    (layer,) = probe(lambda x: g(x + 1), [x]).layers
    agrees(layer, x + 1)


@pytest.mark.slow
def test_a_gate_is_its_own_activation():
    (layer,) = probe(lambda x: x * jax.nn.sigmoid(1.7 * x[:, ::-1]), [white(8, 4)]).layers
    assert layer.activation == "sigmoid"


def test_a_residual_sum_is_the_pre_activation():
    conv = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))
    x = white(5, 6, 6, 4)
    (layer,) = probe(conv, [x], call=lambda conv, h: jax.nn.relu(conv(h) + h)).layers
    agrees(layer, conv(x) + x)


@pytest.mark.slow
def test_an_nnx_net_has_its_paths_for_names():
    rngs = nnx.Rngs(0)

    class Block(nnx.Module):
        def __init__(self):
            self.linear, self.act = nnx.Linear(6, 6, rngs=rngs), LinkedPReLU(6)
            self.out = nnx.Linear(12, 6, rngs=rngs)

        def __call__(self, h):
            return jax.nn.gelu(self.out(self.act(self.linear(h))) + h)

    net = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), jnp.tanh, Block(), relu, nnx.Linear(6, 3, rngs=rngs), lk_relu)
    x = white(24, 4)
    report = probe(net, [x])
    names = [(layer.name, layer.activation) for layer in report.layers]
    assert names == [
        ("layers.1", "tanh"), ("layers.2.act", "LinkedPReLU(z)"), ("layers.2", "gelu"), ("layers.3", "relu"),
        ("layers.5", "relu(z), relu(-z)"),
    ]  # fmt: skip
    assert report.layers[2].source.startswith("test_probe.py:")
    first, block, last = (net.layers[i] for i in (0, 2, 4))
    z = first(x)
    agrees(report.layers[0], z, [jnp.tanh])
    leaky = [lambda z: jnp.where(z > 0, z, z / 4), lambda z: jnp.where(z < 0, -z, -z / 4)]
    agrees(report.layers[1], block.linear(jnp.tanh(z)), leaky)
    z = block.out(block.act(block.linear(jnp.tanh(z)))) + jnp.tanh(z)
    agrees(report.layers[2], z, [jax.nn.gelu])
    agrees(report.layers[4], last(jax.nn.relu(jax.nn.gelu(z))), [jax.nn.relu, lambda z: jax.nn.relu(-z)])
    assert type(net.layers[2]).__call__(block, x @ white(4, 6)).shape == (24, 6)  # the classes are as they were
    assert type(net.layers[2]).__call__.__qualname__.endswith("Block.__call__")
    assert not hasattr(type(net.layers[2]).__call__, "__wrapped__")


@pytest.mark.slow
def test_a_linen_net_has_its_scopes_for_names():
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            h = flax.linen.relu(flax.linen.Conv(4, (3, 3), name="first")(x))
            return Head(name="head")(flax.linen.LayerNorm()(h))

    class Head(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, h):
            return flax.linen.tanh(flax.linen.Dense(3)(h.mean((1, 2))))

    net, x = Net(), white(16, 5, 5, 2)
    variables = net.init(jax.random.key(0), x)
    report = probe(variables, [x], call=net.apply)
    assert [(layer.name, layer.activation) for layer in report.layers] == [("Net", "relu"), ("Net/head", "tanh")]
    agrees(report.layers[0], flax.linen.Conv(4, (3, 3)).apply({"params": variables["params"]["first"]}, x))
    _, state = net.apply(variables, x, capture_intermediates=True)
    agrees(report.layers[1], state["intermediates"]["head"]["Dense_0"]["__call__"][0], [jnp.tanh])


@pytest.mark.parametrize("layout", ["blocked", "interleaved"])
@pytest.mark.slow
def test_linked_convolutions(layout):
    link = Link(lk_swish.members, layout=layout)
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Conv(2, 4, (3, 3), rngs=rngs), LinkedConv(4, 3, (3, 3), link=link, strides=2, rngs=rngs))
    x = white(6, 6, 6, 2)
    (layer,) = probe(net, [x]).layers
    assert layer.name == "layers.1"
    agrees(layer, net.layers[0](x), [jax.nn.silu, lambda z: jax.nn.silu(-z)], layout)


@pytest.mark.slow
def test_the_channels_of_a_link_may_be_elsewhere_and_vmapped():
    link = linked(jax.nn.relu, axis=0)
    x = white(8, 3, 5)
    (layer,) = probe(lambda x: jax.vmap(link)(x), [x]).layers
    agrees(layer, x.swapaxes(1, 2), [jax.nn.relu, lambda z: jax.nn.relu(-z)])


# --- which axis is that of the units ------------------------------------------------------------------------------

MATRIX = white(6, 6, seed=3).at[1].multiply(1e-3)
ROWS = [white(n, 6, seed=n) for n in (32, 32, 5)]
"""The last batch is short."""
ONE_LAYER = {
    "plain": (lambda w, x: jax.nn.relu(x @ w.T), [jax.nn.relu]),
    "vmapped": (lambda w, x: jax.vmap(lambda x: w @ jax.nn.relu(w @ x))(x), [jax.nn.relu]),
    "vmapped link": (lambda w, x: jax.vmap(lambda x: lk_relu(w @ x))(x), [jax.nn.relu, lambda z: jax.nn.relu(-z)]),
    "map": (lambda w, x: jax.lax.map(lambda x: jax.nn.relu(w @ x), x), [jax.nn.relu]),
    "transposed": (lambda w, x: jax.nn.relu(w @ x.T).T, [jax.nn.relu]),
    "vmapped link of one": (lambda w, x: jax.vmap(lambda x: relu(w @ x))(x), [jax.nn.relu]),
}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ROWS, ROWS[:2], [white(6, 6)]], ids=["short", "equal", "square"])
@pytest.mark.parametrize(("forward", "members"), ONE_LAYER.values(), ids=ONE_LAYER)
def test_samples_are_never_units(forward, members, rows):
    (layer,) = probe(MATRIX, rows, call=forward).layers
    agrees(layer, jnp.concatenate(rows) @ MATRIX.T, members)
    assert layer.name.startswith("test_probe.py:")  # and not vmap()


ONE_UNIT = {
    "squeezed": lambda x: jax.nn.sigmoid(x.sum(-1)),
    "vmapped": lambda x: jax.vmap(lambda x: jax.nn.sigmoid(x.sum()))(x),
    "vmapped link": lambda x: jax.vmap(lambda x: Link((jax.nn.sigmoid,))(x.sum()))(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_UNIT)
def test_a_number_for_each_sample_is_one_unit(name):
    (layer,) = probe(ONE_UNIT[name], ROWS).layers
    agrees(layer, jnp.concatenate(ROWS).sum(-1)[:, None], [jax.nn.sigmoid])


@pytest.mark.slow
def test_a_link_of_a_number_for_each_sample():
    mirrored = [jax.nn.relu, lambda z: jax.nn.relu(-z)]
    (layer,) = probe(lambda x: jax.vmap(lambda x: lk_relu(x.sum()))(x), ROWS).layers
    agrees(layer, jnp.concatenate(ROWS).sum(-1)[:, None], mirrored)


@pytest.mark.slow
def test_all_pairs_of_samples_are_one_unit():
    (layer,) = probe(lambda x: jax.nn.sigmoid(x @ x.T), ROWS).layers
    assert (layer.units, layer.samples) == (1, 32**2 + 32**2 + 5**2)


@pytest.mark.slow
def test_a_model_of_one_batch_size_is_looked_at_still():
    (layer,) = probe(MATRIX, ROWS[:2], call=lambda w, x: jax.nn.relu(x.reshape(32, 6) @ w.T)).layers
    agrees(layer, jnp.concatenate(ROWS[:2]) @ MATRIX.T)


@pytest.mark.slow
def test_slopes_of_each_channel():
    prelu = ChannelPReLU(3)
    prelu.negative_slope[...] = jnp.array([0.0, 0.001, 2.0])
    (layer,) = probe(prelu, [-jnp.abs(white(9, 3))]).layers
    assert layer.dead_link.tolist() == layer.dead.tolist() == [True, False, False]
    assert layer.saturated.tolist() == [True, True, False]


@pytest.mark.slow
def test_a_straight_through_tap_has_a_slope():
    @jax.custom_vjp
    def sign(z):
        return jnp.sign(z)

    sign.defvjp(lambda z: (sign(z), None), lambda _, g: (g,))
    for link in (Link((sign,)), Link((sign, lambda z: 0.005 * sign(-z)), layout="interleaved")):
        (layer,) = probe(lambda x, link=link: link(x), [white(9, 3)]).layers
        assert not layer.saturated.any()


# --- through transformations --------------------------------------------------------------------------------------


def mlp(weights, x):
    for w in weights:
        x = jax.nn.relu(x @ w)
    return x


def custom(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: (f(*args), args), lambda args, g: jax.vjp(f, *args)[1](g))
    return g


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


TRANSFORMED = {
    "jit": jax.jit(mlp),
    "remat": jax.checkpoint(mlp),
    "both": jax.jit(jax.checkpoint(jax.jit(mlp))),
    "vmap": jax.vmap(mlp, (None, 0)),
    "custom_vjp": custom(mlp),
    "custom_jvp": custom_jvp(mlp),
    "nnx.jit": nnx.jit(mlp),
    "scan": lambda ws, x: jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, jnp.stack(ws))[0],
    "reverse scan of remat": lambda ws, x: jax.lax.scan(
        jax.checkpoint(lambda x, w: (jax.nn.relu(x @ w), x)), x, jnp.stack(ws), reverse=True
    )[0],
    "scan of a bare activation": lambda ws, x: jax.lax.scan(
        lambda x, _: (jax.nn.relu(x), None), mlp(ws[:2], x) @ ws[2], length=1
    )[0],
    "nested scans": lambda ws, x: jax.lax.scan(
        lambda x, ws: jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, ws), x, jnp.stack(ws)[:, None]
    )[0],
}
WEIGHTS = [white(4, 4, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.slow
def test_transformed_models_are_seen_as_the_plain_one(name):
    batches = [(white(8, 4), None)]
    model, with_gradient = TRANSFORMED[name], not name.startswith("custom")
    plain_weights = WEIGHTS[::-1] if "reverse" in name else WEIGHTS
    plain = probe(plain_weights, batches, call=mlp, loss_fn=mean_of_squares)
    found = probe(WEIGHTS, batches, call=model, loss_fn=mean_of_squares)
    if "reverse" in name:
        found = dataclasses.replace(found, layers=found.layers[::-1])
    if not with_gradient:
        assert [layer.gradient_mean_square for layer in found.layers] == [None] * 3
        plain, found = probe(WEIGHTS, [batches[0][0]], call=mlp), probe(WEIGHTS, [batches[0][0]], call=model)
    same(plain, found)


@pytest.mark.slow
def test_a_scan_over_layers_numbers_them_and_one_over_the_data_is_one_layer():
    x, w = white(6, 5, 4), white(4, 4)

    def recurrent(w, x):
        def step(h, x):
            h = jnp.tanh(h @ w + x)
            return h, h

        return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[1]

    (layer,) = probe(w, [(x, None)], call=recurrent, loss_fn=mean_of_squares).layers
    h, zs = jnp.zeros((6, 4)), []
    for t in range(5):
        zs.append(h @ w + x[:, t])
        h = jnp.tanh(zs[-1])
    agrees(layer, jnp.concatenate(zs), [jnp.tanh])

    def unrolled(nudges):
        h, outputs = jnp.zeros((6, 4)), []
        for t in range(5):
            h = jnp.tanh(h @ w + x[:, t] + nudges[t])
            outputs.append(h)
        return mean_of_squares(jnp.stack(outputs), None)

    gradient = 6 * np.asarray(jax.grad(unrolled)(jnp.zeros((5, 6, 4))))
    np.testing.assert_allclose(layer.gradient_mean_square, (gradient**2).mean(), rtol=1e-4)
    scanned = probe(WEIGHTS, [white(8, 4)], call=TRANSFORMED["scan"])
    assert [layer.name[-3:] for layer in scanned.layers] == ["[0]", "[1]", "[2]"]


@pytest.mark.slow
def test_the_gradient_is_that_of_one_sample():
    x, y = white(8, 4), white(8, 4, seed=9)

    def loss_fn(outputs, labels):
        return jnp.square(outputs - labels).sum(-1).mean()

    def one_sample(nudges, x, y):
        for w, nudge in zip(WEIGHTS, nudges, strict=True):
            x = jax.nn.relu(x @ w + nudge)
        return jnp.square(x - y).sum()

    gradients = jax.vmap(jax.grad(one_sample), (None, 0, 0))(jnp.zeros((3, 4)), x, y)
    for batches in ([(x, y)], [(x[:5], y[:5]), (x[5:], y[5:])]):
        report = probe(WEIGHTS, batches, call=mlp, loss_fn=loss_fn)
        found = [layer.gradient_mean_square for layer in report.layers]
        np.testing.assert_allclose(found, np.square(gradients).mean((0, 2)), rtol=1e-4)


@pytest.mark.slow
def test_what_is_not_seen_is_named():
    def forward(w, x):
        h = jax.nn.relu(x @ w)
        h = jax.lax.cond(x.sum() > 0, jax.nn.silu, jnp.tanh, h)
        with jax.named_scope("loop"):
            return jax.lax.while_loop(lambda h: h.sum() > 1e9, jax.nn.relu, jax.lax.cond(True, jnp.sin, jnp.cos, h))

    report = probe(WEIGHTS[0], [white(8, 4)], call=forward)
    assert [layer.activation for layer in report.layers] == ["relu"]
    assert len(report.not_seen) == 2
    assert report.not_seen[0].startswith("cond in test_probe.py:")
    assert report.not_seen[1] == "while in loop"
    assert str(report).endswith("not seen: while in loop")


@pytest.mark.slow
def test_what_is_no_activation_is_not_taken_for_one():
    rngs = nnx.Rngs(0)
    norms = [nnx.LayerNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.GroupNorm(4, num_groups=2, rngs=rngs)]
    net = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), *norms, nnx.Dropout(0.5, rngs=rngs), relu, jax.nn.softmax)

    def forward(net, x):
        scale = jax.nn.softplus(net.layers[0].bias[...])
        noise = jax.random.uniform(net.layers[4].rngs(), x.shape)
        return net(jnp.clip(jnp.sin(x), -1, 1) * scale + noise).max(axis=-1)

    report = probe(net, [white(8, 5, 4)], call=forward)
    assert [layer.name for layer in report.layers] == ["layers.5"]


@pytest.mark.slow
def test_bfloat16_is_measured_in_float32():
    x, w = white(64, 4).astype(jnp.bfloat16), white(4, 3, seed=1).astype(jnp.bfloat16)
    (layer,) = probe(w, [x[:32], x[32:]], call=lambda w, x: lk_relu(x @ w + 3)).layers
    assert layer.mean.dtype == np.float32
    # XLA may keep float32 between two operations of bfloat16 in one jit
    agrees(layer, (x @ w + 3).astype(jnp.float32), [jax.nn.relu, lambda z: jax.nn.relu(-z)], tolerance=2e-3)


# --- the units it was built to find -------------------------------------------------------------------------------


def test_killed_units_are_named_exactly():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), relu, nnx.Linear(6, 5, rngs=rngs), lk_relu)
    net.layers[0].bias[...] = jnp.zeros(6).at[jnp.array([1, 4])].set(KILL)
    net.layers[2].bias[...] = jnp.zeros(5).at[3].set(KILL)
    first, second = probe(net, [white(64, 4)]).layers
    killed = [False, True, False, False, True, False]
    assert first.dead.tolist() == first.dead_link.tolist() == first.dormant.tolist() == killed
    assert not second.dead.any() | second.dead_link.any()
    assert second.linearised[3]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_unit_that_is_not_finite_is_shown(bad, monkeypatch):
    x = white(32, 4)
    report = probe(lambda x: jax.nn.relu(x), [x.at[3, 1].set(bad)])
    (layer,) = report.layers
    (clean,) = probe(lambda x: jax.nn.relu(x), [x[:, jnp.array([0, 2, 3])]]).layers
    assert layer.not_finite.tolist() == [False, True, False, False]
    np.testing.assert_allclose(layer.dormancy[[0, 2, 3]], clean.dormancy, rtol=1e-5)
    head, row = str(report).splitlines()
    assert row[: head.index("NaN/inf") + 7].endswith(" 1")
    assert STATES[unit_states(report.layers)[0, 1]][0] == "not finite"
    console, styles = pytest.importorskip("rich.console").Console, []
    monkeypatch.setattr(console, "print", lambda _, table: styles.extend(row.style for row in table.rows))
    report.print()
    assert styles == ["red"]


@pytest.mark.slow
def test_tau_is_the_threshold_of_dormancy():
    x = jnp.array([[1.0, 0.1, 0.0]])
    dormant = [probe(lambda x: relu(x), [x], tau=tau).layers[0].dormant.tolist() for tau in (0.0, 0.5)]
    assert dormant == [[False, False, True], [False, True, True]]


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (4, 4, 4), (1, 8, 3)], ids=str)
@pytest.mark.slow
def test_batches_split_any_way_give_the_same_report(sizes):
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Conv(2, 4, (3, 3), rngs=rngs), relu, LinkedConv(4, 3, (3, 3), rngs=rngs))
    x = white(12, 4, 4, 2) + 3
    batches = np.split(x, np.cumsum(sizes)[:-1])
    same(probe(net, [x]), probe(net, iter(batches)))


@pytest.mark.slow
def test_the_model_is_not_changed():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), relu)
    before = jax.tree.map(jnp.copy, nnx.split(net)[1])
    probe(net, [white(8, 4), white(3, 4)])
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(s) for s in _numbers(before, nnx.split(net)[1])))
    assert net.layers[3] is relu


def _numbers(*states):
    for state in states:
        leaves = jax.tree.leaves(state)
        yield [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]


# --- the report ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    """Three layers: one with every state, one with values that are not finite, one with a gradient hidden."""
    weights = [white(4, 6), white(6, 3), white(3, 2)]

    def forward(weights, x):
        h = jax.nn.relu(x @ weights[0] + jnp.array([0.0, KILL, 10.0, 0.0, 0.0, 0.0]))
        return lk_relu(jnp.log(jax.nn.relu(h @ weights[1]) - 1e3)) @ jnp.ones((6, 1)) + custom(mlp)(
            weights[2:], h[:, :3]
        )

    x = white(32, 4)
    return probe(weights, [(x, None)], call=forward, loss_fn=lambda out, _: out.sum())


@pytest.mark.slow
def test_json_keeps_every_bit(report, tmp_path):
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    loaded = Report.load(tmp_path / "report.json")
    assert np.isnan(report.layers[2].mean).all()  # or this test shows less
    assert (loaded.tau, loaded.not_seen) == (report.tau, report.not_seen)
    for a, b in zip(loaded.layers, report.layers, strict=True):
        for field in dataclasses.fields(a):
            one, other = getattr(a, field.name), getattr(b, field.name)
            np.testing.assert_array_equal(one, other)
            assert type(one) is type(other)
            assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_the_table_has_a_line_for_each_layer(report, capsys):
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.layers)
    assert lines[0].split()[:4] == ["name", "activation", "units", "dead"]
    assert lines[1].split()[1:4] == ["relu", "6", "1"]
    pytest.importorskip("rich")
    report.print()
    printed = capsys.readouterr().out
    assert all(layer.name in printed and layer.activation in printed for layer in report.layers)


@pytest.mark.slow
def test_the_plot_is_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    states = unit_states(report.layers)
    names = [STATES[k][0] for k in states[0]]
    assert names[1:3] == ["dead or no gradient", "linearised"]
    assert states.mask.sum(axis=1).tolist() == [6 - layer.units for layer in report.layers]


@pytest.mark.parametrize(("package", "method"), [("rich.console", "print"), ("matplotlib.figure", "plot")])
@pytest.mark.slow
def test_a_missing_extra_says_what_to_install(report, package, method, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install linked_jax\[report\]"):
        report.print() if method == "print" else report.plot(tmp_path / "x.png")


@pytest.mark.slow
def test_drift_is_that_of_the_diagnostics():
    x = white(16, 4)
    reports = [probe([w * scale + scale for w in WEIGHTS[:1]], [x], call=mlp) for scale in (1.0, 2.0)]
    zs = [x @ (WEIGHTS[0] * scale + scale) for scale in (1.0, 2.0)]
    wanted = covariate_drift(*(unit_statistics(z, z, z) for z in zs))
    np.testing.assert_allclose(reports[0].drift(reports[1])[0], wanted, rtol=1e-4)
    with pytest.raises(ValueError, match="compares a model with itself"):
        reports[0].drift(probe(WEIGHTS, [x], call=mlp))


# --- compiles, and the monitor ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_trace_for_each_shape_and_none_for_a_later_look():
    traces = []

    def forward(w, x):
        traces.append(x.shape)
        return jax.nn.relu(x @ w)

    batches = [white(8, 4), white(8, 4, seed=1), white(3, 4), white(3, 4, seed=2)]
    monitor = Monitor(batches, every=2, call=forward)
    for step in range(5):
        assert (monitor(step, WEIGHTS[step % 3]) is None) == bool(step % 2)
    assert traces == [(8, 4), (16, 4), (3, 4), (6, 4)]  # and one of twice the batch, to find its axis


@pytest.mark.slow
def test_the_monitor_keeps_a_history():
    net = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), relu)
    monitor = Monitor([(white(8, 4), 0)], every=10, loss_fn=mean_of_squares)
    traced = []
    for step in range(21):
        if monitor(step, net) is not None:
            traced.append(step)
        net.layers[0].bias[...] -= jnp.array([0.0, 0.0, 0.5, 2.0])
    assert traced == [entry["step"] for entry in monitor.history] == [0, 10, 20]
    layers = [entry["layers"][0] for entry in monitor.history]
    assert [layer["dead"] for layer in layers] == [0.0, 0.5, 0.5]
    assert layers[0]["drift"] is None
    np.testing.assert_allclose([layer["drift"] for layer in layers[1:]], 10 * (0.5 + 2.0) / 4, rtol=1e-5)
    assert json.loads(json.dumps(monitor.history, allow_nan=False)) == monitor.history


@pytest.mark.slow
def test_a_monitor_of_infinite_values_stays_ready_for_json():
    monitor = Monitor([white(8, 4)], every=1, call=lambda w, x: jax.nn.relu(x / w))
    monitor(0, 0.0)
    assert monitor.history[0]["layers"][0]["mean_square"] is None


# --- bad input ----------------------------------------------------------------------------------------------------

X = white(8, 4)
BAD = {
    "no activation": (lambda: probe(WEIGHTS[0], [X], call=lambda w, x: jnp.sin(x @ w)), "no activation was found"),
    "hidden activation": (
        lambda: probe(lambda x: jax.lax.cond(True, jnp.tanh, jnp.sin, x), [X]), "not looked into.*cond",
    ),
    "no batch": (lambda: probe(WEIGHTS, [], call=mlp), "no batch"),
    "no sample": (lambda: probe(WEIGHTS, [X[:0]], call=mlp), "N at least 1"),
    "one array": (lambda: probe(WEIGHTS, X, call=mlp), "pass a list"),
    "no iterable": (lambda: probe(WEIGHTS, 3, call=mlp), "pass a list"),
    "words": (lambda: probe(WEIGHTS, ["x"], call=mlp), "arrays"),
    "pair without loss": (lambda: probe(WEIGHTS, [(X, 0)], call=mlp), "without loss_fn"),
    "loss without pair": (lambda: probe(WEIGHTS, [X], call=mlp, loss_fn=mean_of_squares), "pair"),
    "no scalar": (lambda: probe(mlp, WEIGHTS, [(X, 0)], loss_fn=lambda out, _: out), "scalar"),
    "no batches": (lambda: probe(mlp, WEIGHTS), r"the model is called as model\(inputs\), got \(weights, x\)"),
    "tau": (lambda: probe(WEIGHTS, [X], call=mlp, tau=-1.0), "tau is at least 0"),
    "tau of words": (lambda: probe(WEIGHTS, [X], call=mlp, tau="small"), "tau is a number"),
    "sizes": (lambda: probe(WEIGHTS, [{"a": X, "b": X[:3]}], call=mlp), r"one leading axis.*\[3, 8\]"),
    "labels": (lambda: probe(WEIGHTS, [(X, X[:3])], call=mlp, loss_fn=mean_of_squares), r"one leading axis.*\[3, 8\]"),
    "pair of losses": (
        lambda: probe(mlp, WEIGHTS, [(X, 0)], loss_fn=lambda out, _: (out.sum(), 1)), "scalar.*a tuple of 2",
    ),
    "Linen alone": (lambda: probe(flax.linen.Dense(3), [X]), r"pass functools.partial\(module.apply, variables\)"),
    "NNX for batches": (lambda: probe(*[nnx.Linear(4, 4, rngs=nnx.Rngs(0))] * 2), "batches is an iterable"),
    "no function": (lambda: probe("a", [X]), "without call the model is called as"),
    "call is no function": (lambda: probe(WEIGHTS, [X], call="a"), "call is a function"),
    "call of one argument": (lambda: probe(WEIGHTS, [X], call=jnp.tanh), r"call is called as call\(model, inputs\)"),
    "class": (lambda: probe(nnx.Linear, [X]), "the model is called as"),
    "link along the samples": (lambda: probe(lambda x: lk_relu(x[:, 0]), [X]), "along the axis of the samples"),
    "other units": (
        lambda: probe(lambda x: jax.nn.relu(x.T + (1 / 0 if len(x) > 8 else 0)), [X, X[:4]]),
        "other numbers of units",
    ),
    "every of a half": (lambda: Monitor([X], every=0.5), "every is an integer"),
    "every": (lambda: Monitor([X], every=0), "every is at least 1"),
    "iterator": (lambda: Monitor(iter([X]), every=1), "pass a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name, unchecked):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
