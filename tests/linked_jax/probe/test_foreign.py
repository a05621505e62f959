"""Models as others write them, with Flax alone: every activation is found, no norm, softmax or loss is taken for one.

Each case counts by hand: the activations in order of execution, and the units of each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.probe import probe
from tests.arrays import white
from tests.cases import first_fast

KEY = jax.random.key(0)


class Case(NamedTuple):
    """A model, its inputs, and what is to be found in it."""

    model: Any
    inputs: Any
    found: list[tuple[str, int]]
    call: Callable[..., Any] | None = None


def bound(module, *inputs, **kwargs):
    """A Linen module with its variables."""
    return module.bind(module.init(KEY, *inputs, **kwargs))


def mlp():
    x = white(8, 5)
    return Case(bound(Mlp(), x), x, [("relu", 7), ("tanh", 6)])


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(6)(nn.relu(nn.Dense(7)(x)))))


class LinenBlock(nn.Module):
    """Of a ResNet, as in Flax' example of ImageNet."""

    filters: int
    train: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.filters, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not self.train)(y))
        y = nn.BatchNorm(use_running_average=not self.train)(nn.Conv(self.filters, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.BatchNorm(use_running_average=not self.train)(nn.Conv(self.filters, (1, 1), use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(nn.Conv(4, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        for filters in (4, 6):
            x = LinenBlock(filters, self.train)(x)
        return nn.log_softmax(nn.Dense(3)(x.mean((1, 2))))


def resnet(train):
    x = white(4, 6, 6, 3)
    net = ResNet(train)
    variables = net.init(KEY, x)
    found = [("relu", 4)] * 3 + [("relu", 6)] * 2
    return Case(variables, x, found, lambda v, x: net.apply(v, x, mutable=["batch_stats"])[0])


class Transformer(nn.Module):
    """Pre-norm, with learned positions, dropout, and a head on the mean."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens) + self.param("positions", nn.initializers.normal(), (6, 8))
        mask = nn.make_causal_mask(tokens)
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
            h = nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))
            x = x + nn.Dropout(0.1, deterministic=True)(nn.Dense(8)(h))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


def transformer():
    tokens = jax.random.randint(KEY, (4, 6), 0, 11)
    return Case(bound(Transformer(), tokens), tokens, [("gelu", 16)] * 2)


class NnxBlock(nnx.Module):
    """RMS norm and SwiGLU, as in Llama; sinusoidal positions that are constants."""

    def __init__(self, rngs):
        self.norms = nnx.List([nnx.RMSNorm(8, rngs=rngs) for _ in range(2)])
        self.attend = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.gate, self.up = (nnx.Linear(8, 12, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        angles = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(4) / 4)
        x = x + jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        x = x + self.attend(self.norms[0](x))
        h = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


def llama():
    return Case(NnxBlock(nnx.Rngs(0)), white(4, 6, 8), [("silu", 12)])


def gru():
    rnn = nnx.RNN(nnx.GRUCell(5, 7, rngs=nnx.Rngs(0)))
    return Case(rnn, white(4, 6, 5), [("sigmoid", 7), ("sigmoid", 7), ("tanh", 7)])


def lstm():
    rnn = nnx.RNN(nnx.LSTMCell(5, 7, rngs=nnx.Rngs(0)))
    return Case(rnn, white(4, 6, 5), [(gate, 7) for gate in ("sigmoid", "sigmoid", "tanh", "sigmoid", "tanh")])


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=(2, 2))(x).reshape(len(x), -1, 8)
        for _ in range(2):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(9)(nn.gelu(nn.Dense(5)(y)))
            x = x + y.swapaxes(1, 2)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(axis=1))


def mixer():
    x = white(4, 6, 6, 3)
    return Case(bound(Mixer(), x), x, [("gelu", 5), ("gelu", 10)] * 2)


class Dqn(nn.Module):
    """Of pixels, with a duelling head."""

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32) / 255.0
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(6, (3, 3))(x)).reshape(len(x), -1)
        x = nn.relu(nn.Dense(16)(x))
        value, advantage = nn.Dense(1)(x), nn.Dense(3)(x)
        return value + advantage - advantage.mean(-1, keepdims=True)


def dqn():
    x = jax.random.randint(KEY, (4, 8, 8, 2), 0, 255).astype(jnp.uint8)
    return Case(bound(Dqn(), x), x, [("relu", 4), ("relu", 6), ("relu", 16)])


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, x):
        actor, critic = x, x
        for _ in range(2):
            actor = nn.tanh(nn.Dense(6, kernel_init=nn.initializers.orthogonal())(actor))
            critic = nn.tanh(nn.Dense(7, kernel_init=nn.initializers.orthogonal())(critic))
        std = jnp.exp(self.param("log_std", nn.initializers.zeros, (2,)))
        mean, value = nn.Dense(2)(actor), nn.Dense(1)(critic)[..., 0]
        return mean, std, value, nn.softmax(nn.Dense(3)(actor))


def ppo():
    x = white(8, 5)
    return Case(bound(ActorCritic(), x), x, [("tanh", 6), ("tanh", 7)] * 2)


class Vae(nnx.Module):
    """Its loss is a part of the call: a cross-entropy and the divergence from a normal law."""

    def __init__(self, rngs):
        self.encode, self.mean, self.log_var = (nnx.Linear(*sizes, rngs=rngs) for sizes in ((9, 8), (8, 3), (8, 3)))
        self.decode, self.out = nnx.Linear(3, 7, rngs=rngs), nnx.Linear(7, 9, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.encode(x))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(KEY, mean.shape)
        logits = self.out(nnx.relu(self.decode(z)))
        target = (x > 0).astype(jnp.float32)
        loss = jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        divergence = -0.5 * (1 + log_var - mean**2 - jnp.exp(log_var)).sum(-1)
        return loss.sum(-1).mean() + divergence.mean(), nnx.sigmoid(logits)


def vae():
    return Case(Vae(nnx.Rngs(0)), white(8, 9), [("relu", 8), ("exp", 3), ("relu", 7), ("sigmoid", 9)])


class Moe(nn.Module):
    """Experts with a softmax for the gate; the units of different experts are different units."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.lecun_normal(), (3, 8, 5))
        down = self.param("down", nn.initializers.lecun_normal(), (3, 5, 8))
        gate = nn.softmax(nn.Dense(3)(x))
        h = nn.gelu(jnp.einsum("nd,edh->neh", x, up))
        return jnp.einsum("ne,neh,ehd->nd", gate, h, down)


def moe():
    x = white(6, 8)
    return Case(bound(Moe(), x), x, [("gelu", 15)])


class Dispatched(nn.Module):
    """Experts that each see their own tokens, (n, e, c)."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.lecun_normal(), (3, 8, 5))
        return nn.relu(jnp.einsum("nec,ech->neh", x, up)).sum(1)


def dispatched():
    x = white(6, 3, 8)
    return Case(bound(Dispatched(), x), x, [("relu", 15)])


def ensemble():
    weights = white(3, 5, 6), white(3, 6, 4, seed=1)

    def one(w, x):
        return jax.nn.relu(jnp.tanh(x @ w[0]) @ w[1])

    return Case(weights, white(8, 5), [("tanh", 18), ("relu", 12)], jax.vmap(one, (0, None)))


def scaled_ensemble():
    weights = white(3, 5), white(3, 5, seed=1)
    return Case(weights, white(8, 5), [("tanh", 15)], jax.vmap(lambda w, x: jnp.tanh(x * w[0] + w[1]), (0, None)))


def nnx_ensemble():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Sequential(
            nnx.Linear(5, 6, rngs=rngs), nnx.relu, nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        )

    call = nnx.vmap(lambda model, x: model(x), in_axes=(0, None), out_axes=0)
    return Case(make(nnx.Rngs(0)), white(8, 5), [("relu", 18)], call)


class Squeeze(nn.Module):
    """Squeeze and excitation, and a gate of one channel for each position: gates are activations."""

    @nn.compact
    def __call__(self, x):
        x = nn.swish(nn.GroupNorm(2)(nn.Conv(6, (3, 3))(x)))
        x = x * nn.sigmoid(nn.Dense(6)(nn.relu(nn.Dense(3)(x.mean((1, 2), keepdims=True)))))
        x = x * nn.sigmoid(nn.Conv(1, (3, 3))(x))
        return nn.Dense(2)(x.mean((1, 2)))


def squeeze():
    x = white(4, 5, 5, 3)
    return Case(bound(Squeeze(), x), x, [("silu", 6), ("relu", 3), ("sigmoid", 6), ("sigmoid", 1)])


class PostNorm(nn.Module):
    """Norms come right after activations; the read-out is a sum over the units, its weights are constants."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Dense(6)(x)))
        x = nn.BatchNorm(use_running_average=False)(nn.tanh(nn.Dense(5)(x)))
        x = nn.gelu(nn.Dense(4)(x))
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return (nn.sigmoid(nn.Dense(4)(x)) * jnp.array([1.0, -1.0, 1.0, -1.0])).sum(-1)


def post_norm():
    x, net = white(8, 5), PostNorm()
    call = lambda v, x: net.apply(v, x, mutable=["batch_stats"])[0]  # noqa: E731
    return Case(net.init(KEY, x), x, [("relu", 6), ("tanh", 5), ("gelu", 4), ("sigmoid", 4)], call)


class DenseNet(nn.Module):
    """Pre-activations in evaluation: two branches normalise one z in their own ways."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = jnp.concatenate([x, nn.Conv(3, (3, 3))(y)], -1)
        branches = [nn.Conv(2, (1, 1))(nn.relu(nn.BatchNorm(use_running_average=True)(x))) for _ in range(2)]
        return branches[0] + branches[1]


def densenet():
    x = white(2, 5, 5, 3)
    net = DenseNet()
    variables = jax.tree.map(lambda v: v + 0.1 * white(*v.shape), net.init(KEY, x))
    return Case(net.bind(variables), x, [("relu", 4), ("relu", 7), ("relu", 10), ("relu", 10)])


class Unet(nnx.Module):
    def __init__(self, rngs):
        self.time = nnx.Linear(4, 6, rngs=rngs)
        self.down, self.mid = nnx.Conv(3, 6, (3, 3), strides=2, rngs=rngs), nnx.Conv(6, 6, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(12, 3, (3, 3), strides=2, rngs=rngs)

    def __call__(self, batch):
        h = nnx.silu(self.down(batch["x"]))
        time = nnx.silu(self.time(batch["time"]))[:, None, None]
        middle = nnx.silu(self.mid(h) + time)
        return nnx.tanh(self.up(jnp.concatenate([h, middle], -1)))


def unet():
    found = [("silu", 6), ("silu", 6), ("silu", 6), ("tanh", 3)]
    return Case(Unet(nnx.Rngs(0)), {"x": white(4, 8, 8, 3), "time": white(4, 4)}, found)


def equinox_cnn():
    import equinox as eqx

    class Cnn(eqx.Module):
        conv: eqx.nn.Conv2d
        mlp: eqx.nn.MLP

        def __call__(self, x):
            return self.mlp(jax.nn.relu(self.conv(x)).mean((1, 2)))

    a, b = jax.random.split(KEY)
    net = Cnn(eqx.nn.Conv2d(3, 4, 3, key=a), eqx.nn.MLP(4, 2, 7, 2, activation=jax.nn.gelu, key=b))
    return Case(net, white(5, 3, 6, 6), [("relu", 4), ("gelu", 7), ("gelu", 7)], lambda net, x: jax.vmap(net)(x))


def haiku_mlp():
    import haiku as hk

    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, 5, 2], activation=jnp.tanh)(x)))
    x = white(4, 3)
    return Case(net.init(KEY, x), x, [("tanh", 6), ("tanh", 5)], net.apply)


MODELS = {
    "MLP": mlp, "ResNet, training": lambda: resnet(True), "ResNet, evaluation": lambda: resnet(False),
    "transformer": transformer, "Llama": llama, "GRU": gru, "LSTM": lstm, "Mixer": mixer, "DQN": dqn, "PPO": ppo,
    "VAE": vae, "experts": moe, "dispatched experts": dispatched, "ensemble": ensemble,
    "scaled ensemble": scaled_ensemble, "nnx.vmap": nnx_ensemble, "squeeze and excitation": squeeze,
    "norms after activations": post_norm, "DenseNet": densenet, "U-Net": unet,
    "CNN in Equinox": equinox_cnn, "MLP in Haiku": haiku_mlp,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(MODELS))
def test_every_activation_is_found_and_nothing_else(name):
    model, inputs, wanted, call = MODELS[name]()
    report = probe(model, [inputs], call=call)
    assert [(layer.activation, layer.units) for layer in report.layers] == wanted
    assert not report.not_seen


@pytest.mark.slow
def test_experts_are_scored_apart():
    x, up = white(16, 4), white(3, 4, 5)
    up = up.at[1, :, 2].set(0)
    report = probe(up, [x], call=lambda up, x: jax.nn.relu(jnp.einsum("nd,edh->neh", x, up)))
    wanted = np.zeros((3, 5), bool)
    wanted[1, 2] = True
    np.testing.assert_array_equal(report.layers[0].dead, wanted.ravel())
