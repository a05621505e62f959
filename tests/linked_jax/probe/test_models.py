import dataclasses
import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from linked_jax.activations import lk_relu, lk_swish, relu
from linked_jax.layers import LinkedConv
from linked_jax.learned import LinkedPReLU
from linked_jax.linking import Link, linked
from linked_jax.probe import probe
from tests.arrays import white
from tests.linked_jax.probe.common import WEIGHTS, agrees, custom, custom_jvp, mean_of_squares, mlp, same

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


@pytest.mark.slow
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

    layers = [nnx.Linear(4, 6, rngs=rngs), jnp.tanh, Block(), nnx.Linear(6, 6, rngs=rngs), relu]
    net = nnx.Sequential(*layers, nnx.Linear(6, 3, rngs=rngs), lk_relu)
    x = white(24, 4)
    report = probe(net, [x])
    names = [(layer.name, layer.activation) for layer in report.layers]
    assert names == [
        ("layers.1", "tanh"), ("layers.2.act", "LinkedPReLU(z)"), ("layers.2", "gelu"), ("layers.4", "relu"),
        ("layers.6", "relu(z), relu(-z)"),
    ]  # fmt: skip
    assert report.layers[2].source.startswith("test_models.py:")
    first, block, after, last = (net.layers[i] for i in (0, 2, 3, 5))
    z = first(x)
    agrees(report.layers[0], z, [jnp.tanh])
    leaky = [lambda z: jnp.where(z > 0, z, z / 4), lambda z: jnp.where(z < 0, -z, -z / 4)]
    agrees(report.layers[1], block.linear(jnp.tanh(z)), leaky)
    z = block.out(block.act(block.linear(jnp.tanh(z)))) + jnp.tanh(z)
    agrees(report.layers[2], z, [jax.nn.gelu])
    agrees(report.layers[4], last(jax.nn.relu(after(jax.nn.gelu(z)))), [jax.nn.relu, lambda z: jax.nn.relu(-z)])
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
    same(report, probe(functools.partial(net.apply, variables), [x]))
    same(report, probe(net.bind(variables), [x]))
    same(report, probe(net.bind(variables), [x], call=lambda net, x: net(x)))
    assert [(layer.name, layer.activation) for layer in report.layers] == [("Net", "relu"), ("Net/head", "tanh")]
    agrees(report.layers[0], flax.linen.Conv(4, (3, 3)).apply({"params": variables["params"]["first"]}, x))
    _, state = net.apply(variables, x, capture_intermediates=True)
    agrees(report.layers[1], state["intermediates"]["head"]["Dense_0"]["__call__"][0], [jnp.tanh])


@pytest.mark.slow
def test_a_bound_linen_net_keeps_its_random_streams_and_what_it_may_change():
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            z = flax.linen.BatchNorm(use_running_average=False)(flax.linen.Dense(4)(x))
            return flax.linen.relu(flax.linen.Dropout(0.5, deterministic=False)(z))

    x, keys = white(8, 5), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    net = Net().bind(Net().init(keys, x), rngs={"dropout": jax.random.key(2)}, mutable=["batch_stats"])
    before = jax.tree.map(np.asarray, net.variables)
    dropped = probe(net, [x]).layers[0].mean
    np.testing.assert_array_equal(dropped, probe(net, [x]).layers[0].mean)  # the streams are copies
    assert (dropped != 0).any()
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, net.variables))


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
    x, w = white(8, 3, 5), white(3, 3)
    (layer,) = probe(lambda x: jax.vmap(lambda x: link(w @ x))(x), [x]).layers
    agrees(layer, (w @ x).swapaxes(1, 2), [jax.nn.relu, lambda z: jax.nn.relu(-z)])


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
def test_a_custom_derivative_hides_the_gradients_inside_and_not_that_for_its_argument():
    batches, hidden = [(white(8, 4), None)], custom(lambda z, w: jax.nn.relu(jax.nn.relu(z) @ w))
    report = probe(lambda x: hidden(x @ WEIGHTS[0], WEIGHTS[1]), batches, loss_fn=mean_of_squares)
    wanted = probe(lambda x: mlp(WEIGHTS[:2], x), batches, loss_fn=mean_of_squares).layers[0].gradient_mean_square
    assert report.layers[1].gradient_mean_square is None
    np.testing.assert_allclose(report.layers[0].gradient_mean_square, wanted, rtol=1e-5)


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


LEAST = 1e-2


@pytest.mark.slow
def test_branches_and_loops_are_entered():
    def forward(w, x):
        h = jax.nn.relu(x @ w)
        h = jax.lax.cond(h.sum() > 0, lambda h: jax.nn.silu(h @ w), lambda h: jnp.tanh(h @ w), h)
        return jax.lax.while_loop(lambda h: (h**2).sum() > LEAST, lambda h: jax.nn.relu(h @ w), h)

    w = 0.3 * WEIGHTS[0]
    x = white(8, 4)
    report = probe(w, [x, 2 * x], call=forward)
    assert not report.not_seen
    assert [(layer.activation, layer.samples) for layer in report.layers[:3]] == [
        ("relu", 16),
        ("tanh", 0),
        ("silu", 16),
    ]
    agrees(report.layers[2], jax.nn.relu(jnp.concatenate([x, 2 * x]) @ w) @ w, [jax.nn.silu])
    zs = []
    for h in (jax.nn.silu(jax.nn.relu(x @ w) @ w) for x in (x, 2 * x)):
        while (h**2).sum() > LEAST:
            zs.append(h @ w)
            h = jax.nn.relu(zs[-1])
    agrees(report.layers[3], jnp.concatenate(zs))


@pytest.mark.slow
def test_what_is_not_seen_is_named():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    hidden = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=P("x"), out_specs=P("x"))

    def forward(w, x):
        with jax.named_scope("spread"):
            return hidden(jax.nn.relu(x @ w) @ w)

    report = probe(WEIGHTS[0], [white(8, 4)], call=forward)
    assert [layer.activation for layer in report.layers] == ["relu"]
    assert report.not_seen == ("shard_map in spread",)
    assert str(report).endswith("not seen: shard_map in spread")


@pytest.mark.slow
def test_what_is_no_activation_is_not_taken_for_one():
    rngs = nnx.Rngs(0)
    norms = [nnx.LayerNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.GroupNorm(4, num_groups=2, rngs=rngs)]
    net = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), *norms, nnx.Dropout(0.5, rngs=rngs), relu, jax.nn.softmax)

    def forward(net, x):
        scale = jax.nn.softplus(net.layers[0].bias[...])
        noise = jax.random.uniform(net.layers[4].rngs(), x.shape)
        return net(x * scale + noise).max(axis=-1)

    report = probe(net, [white(8, 5, 4)], call=forward)
    assert [layer.name for layer in report.layers] == ["layers.5"]


@pytest.mark.slow
def test_bfloat16_is_measured_in_float32():
    x, w = white(64, 4).astype(jnp.bfloat16), white(4, 3, seed=1).astype(jnp.bfloat16)
    (layer,) = probe(w, [x[:32], x[32:]], call=lambda w, x: lk_relu(x @ w + 3)).layers
    assert layer.mean.dtype == np.float32
    # XLA may keep float32 between two operations of bfloat16 in one jit
    agrees(layer, (x @ w + 3).astype(jnp.float32), [jax.nn.relu, lambda z: jax.nn.relu(-z)], tolerance=2e-3)
