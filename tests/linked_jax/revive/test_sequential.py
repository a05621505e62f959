import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from linked_jax.activations import ACTIVATIONS, lk_relu, lk_swish, relu
from linked_jax.layers import LinkedLinear
from linked_jax.learned import ChannelPReLU, LinkedPReLU
from linked_jax.linking import Link
from linked_jax.remedies import LCWConv, LCWLinear, NormPropConv, VPLinear, WSConv
from linked_jax.revive import link_sequential, link_sequential_opt_state, redo, unlink, warm_up_new
from tests.cases import first_fast
from tests.linked_jax.test_switches import SWITCHES

LINKS = {name: a for name, a in ACTIVATIONS.items() if isinstance(a, Link) and a.arity > 1 and name != "crelu"}
layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))


def flatten(x):
    return x.reshape(len(x), -1)


def linear(a, b):
    return nnx.Linear(a, b, rngs=nnx.Rngs(0))


def white(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


max_pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
ARCHITECTURES = {  # (layers, input shape); the activation stands as "g"
    "dense": ([("linear", 5, 7), "g", ("linear", 7, 3)], (4, 5)),
    "deep": ([("linear", 5, 7), "g", ("linear", 7, 6), "g", ("linear", 6, 3), jax.nn.softmax], (4, 5)),
    "conv": ([("conv", 3, 4), "g", ("conv", 4, 2)], (2, 6, 6, 3)),
    "strides": ([("conv", 3, 4, 2), "g", ("conv", 4, 5, 2), "g", ("conv", 5, 2)], (2, 6, 8, 3)),
    "flatten": ([("conv", 1, 4), "g", flatten, ("linear", 4 * 20, 3)], (2, 4, 5, 1)),
    "flatten before": ([("conv", 1, 4), flatten, "g", ("linear", 4 * 20, 3)], (2, 4, 5, 1)),
    "flatten one position": ([("conv", 1, 4), "g", flatten, ("linear", 4, 3)], (2, 1, 1, 1)),
    "max pool": ([("conv", 1, 4), "g", max_pool, flatten, ("linear", 4 * 6, 3)], (2, 4, 6, 1)),
    "pool before": ([("conv", 1, 4), max_pool, "g", avg_pool, ("conv", 4, 3)], (2, 8, 8, 1)),
    "mean over space": ([("conv", 1, 4), "g", lambda x: x.mean((1, 2)), ("linear", 4, 3)], (2, 4, 6, 1)),
    "mean over time": ([("linear", 5, 4), "g", lambda x: x.mean(1), ("linear", 4, 3)], (2, 6, 5)),
    "flatten of dense": ([("linear", 5, 4), "g", flatten, ("linear", 24, 3)], (2, 6, 5)),
    "norm before": ([("conv", 1, 4), ("norm", 4), "g", flatten, ("linear", 80, 3)], (2, 4, 5, 1)),
    "layer norm before": ([("linear", 5, 7), ("layer norm", 7), "g", ("linear", 7, 3)], (4, 5)),
    "norm after": ([("conv", 1, 4), "g", ("norm", 4), avg_pool, flatten, ("linear", 24, 3)], (2, 4, 6, 1)),
    "norm after flatten": ([("conv", 1, 4), "g", flatten, ("norm", 80), ("linear", 80, 3)], (2, 4, 5, 1)),
    "dropout": ([("linear", 5, 7), "g", ("dropout",), ("linear", 7, 3)], (4, 5)),
    "scaled": ([lambda x: x / 255, ("linear", 5, 7), "g", lambda x: 2 * x, ("linear", 7, 3), jnp.tanh], (4, 5)),
}  # fmt: skip
over_architectures = pytest.mark.parametrize(("layers", "shape"), first_fast(ARCHITECTURES.values()), ids=ARCHITECTURES)


def build(layers, g, *, seed=0, evaluate=True):
    rngs, dtype = nnx.Rngs(seed), jnp.result_type(float)
    make = {
        "linear": lambda a, b: nnx.Linear(a, b, param_dtype=dtype, rngs=rngs),
        "conv": lambda a, b, s=1: nnx.Conv(a, b, (3, 2), strides=s, param_dtype=dtype, rngs=rngs),
        "norm": lambda c: nnx.BatchNorm(c, param_dtype=dtype, rngs=rngs),
        "layer norm": lambda c: nnx.LayerNorm(c, param_dtype=dtype, rngs=rngs),
        "dropout": lambda: nnx.Dropout(0.5, rngs=rngs),
    }
    model = nnx.Sequential(*(g if a == "g" else make[a[0]](*a[1:]) if isinstance(a, tuple) else a for a in layers))
    for layer in model.layers:  # trained, and not as at the start
        for j, name in enumerate(("bias", "scale", "mean", "var")):
            variable = getattr(layer, name, None)
            if isinstance(variable, nnx.Variable):
                variable[...] = (jnp.abs(white(*variable.shape, seed=j)) + 0.1).astype(variable.dtype)
    if evaluate:
        model.eval()
    return model


def close(actual, desired, tolerance=1e-6):
    np.testing.assert_allclose(actual, desired, atol=tolerance * max(1, float(np.abs(desired).max())), rtol=0)


# --- the same outputs ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 64])
@layouts
@over_architectures
def test_the_linked_model_computes_the_same(layers, shape, layout, bits):
    with jax.enable_x64(bits == 64):
        model, x = build(layers, jax.nn.relu), white(*shape)
        link = Link(lk_relu.members, layout=layout)
        revived = link_sequential(model, link)
        assert [a for a in revived.layers if isinstance(a, Link)] == [link] * layers.count("g")
        close(revived(x), model(x), 1e-6 if bits == 32 else 1e-12)


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("name", first_fast(LINKS))
def test_every_named_link_revives_its_first_member(name, layout):
    link = Link(LINKS[name].members, layout=layout)
    layers, shape = ARCHITECTURES["max pool"]
    for g in (link.members[0], Link(link.members[:1])):
        model, x = build(layers, g), white(*shape)
        close(link_sequential(model, link)(x), model(x))


@pytest.mark.slow
def test_equal_functions_count_and_not_equal_objects():
    layers, shape = ARCHITECTURES["dense"]
    for g in (jax.nn.silu, nnx.swish, lambda z: z / (1 + jnp.exp(-z))):
        model, x = build(layers, g), white(*shape)
        close(link_sequential(model, lk_swish)(x), model(x))


@pytest.mark.slow
@given(data=st.data())
def test_any_stack_of_stages_computes_the_same(data):
    size, channels, layers = 8, data.draw(st.integers(1, 3)), []
    shape = (2, size, size, channels)
    for _ in range(data.draw(st.integers(1, 2))):
        stride, out = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
        norm = [("norm", out)]
        before, after = data.draw(st.booleans()), data.draw(st.booleans())
        pool = size // stride > 1 and data.draw(st.booleans())
        layers += [("conv", channels, out, stride), *norm * before, "g", *norm * after, *[max_pool] * pool]
        size, channels = size // stride // (2 if pool else 1), out
    layers += [flatten, ("linear", size * size * channels, 3)]
    if data.draw(st.booleans()):
        layers += ["g", ("linear", 3, 2)]
    link = data.draw(st.sampled_from(list(LINKS.values())))
    link = Link(link.members, layout=data.draw(st.sampled_from(["blocked", "interleaved"])))
    model, x = build(layers, link.members[0], seed=data.draw(st.integers(0, 99))), white(*shape)
    close(link_sequential(model, link)(x), model(x), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norm before", "norm after", "norm after flatten"])
def test_in_training_too_and_so_do_the_running_statistics(name):
    layers, shape = ARCHITECTURES[name]
    model, x = build(layers, jax.nn.relu, evaluate=False), white(*shape)
    revived = link_sequential(model, lk_relu)
    close(revived(x), model(x), 1e-5)
    model.eval()
    revived.eval()
    close(revived(x), model(x), 1e-5)


@layouts
def test_rows_after_a_flatten_are_where_the_formula_says(layout):
    d, c, positions = 2, 4, 20
    layers, _ = ARCHITECTURES["flatten"]
    model = build(layers, jax.nn.relu)
    old, new = (
        np.asarray(m.layers[3].kernel[...])
        for m in (model, link_sequential(model, Link(lk_relu.members, layout=layout)))
    )
    expected = np.zeros((positions * d * c, 3))
    for position in range(positions):
        for unit in range(c):
            row = position * d * c + (unit if layout == "blocked" else unit * d)
            expected[row] = old[position * c + unit]
    np.testing.assert_array_equal(new, expected)


@pytest.mark.slow
def test_the_model_stays_as_it_was_and_shares_nothing():
    model = build(ARCHITECTURES["norm after"][0], jax.nn.relu)
    before = jax.tree.map(np.asarray, nnx.state(model))
    revived = link_sequential(model, lk_relu)
    for variable in jax.tree.leaves(nnx.state(revived, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        variable[...] = variable[...] + 1
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    assert model.layers[1] is jax.nn.relu


@pytest.mark.slow
@over_architectures
def test_the_new_model_knows_its_sizes_splits_merges_and_compiles(layers, shape):
    revived, x = link_sequential(build(layers, jax.nn.relu), lk_relu), white(*shape)
    graph, state = nnx.split(revived)
    close(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x), revived(x))
    for layer in revived.layers:
        if isinstance(layer, (nnx.Linear, nnx.Conv)):
            assert layer.in_features == layer.kernel.shape[-2]
        if isinstance(layer, nnx.Conv):
            assert layer.kernel_shape == layer.kernel.shape
        if isinstance(layer, nnx.BatchNorm):
            assert layer.num_features == layer.mean.shape[0] == layer.var.shape[0] == layer.scale.shape[0]


@pytest.mark.slow
def test_links_of_two_members_stay():
    layers = [("linear", 5, 7), lk_swish, ("linear", 14, 6), "g", ("linear", 6, 3)]
    model, x = build(layers, jax.nn.relu), white(4, 5)
    revived = link_sequential(model, lk_relu)
    assert (revived.layers[1], revived.layers[3]) == (lk_swish, lk_relu)
    close(revived(x), model(x))


def general(inputs, outputs, **options):
    return nnx.LinearGeneral(inputs, outputs, rngs=nnx.Rngs(0), **options)


GENERAL = {
    "plain": lambda: [general(5, 7), jax.nn.relu, general(7, (3, 2))],
    "heads": lambda: [general(5, (3, 4)), jax.nn.relu, general((3, 4), 2, axis=(-2, -1))],
    "heads the other way": lambda: [general(5, (3, 4)), jax.nn.relu, general((3, 4), 2, axis=(-1, -2))],
    "channels only": lambda: [general(5, (3, 4)), jax.nn.relu, general(4, (2, 3))],
    "of each example": lambda: [general(5, (3, 4)), jax.nn.relu, general(4, 2, batch_axis={0: 6})],
    "flattened": lambda: [general(5, (3, 4)), jax.nn.relu, flatten, general(12, (2, 2))],
    "flattened first": lambda: [general(5, (3, 4)), flatten, jax.nn.relu, linear(12, 2)],
}


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("name", first_fast(GENERAL))
def test_general_layers(name, layout):
    model, x = nnx.Sequential(*GENERAL[name]()), white(6, 5)
    link = Link(lk_relu.members, layout=layout)
    revived = link_sequential(model, link)
    close(revived(x), model(x))
    last = revived.layers[-1]
    assert last.kernel.size == 2 * model.layers[-1].kernel.size
    assert np.prod(last.in_features) == 2 * np.prod(model.layers[-1].in_features)
    close(unlink(revived)(x), model(x))


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("slopes", first_fast(["layer", "channel", "element"]))
def test_prelus_become_linked_prelus_with_their_slopes(slopes, layout):
    features = {"layer": 4, "channel": 4, "element": (5, 6, 4)}[slopes]
    prelu = nnx.PReLU(0.3) if slopes == "layer" else ChannelPReLU(features, share=slopes)
    prelu.negative_slope[...] = (0.3 + 0.1 * white(*prelu.negative_slope.shape)).astype(jnp.float32)
    model = nnx.Sequential(nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0)), prelu, flatten, linear(4 * 30, 3))
    model, x = nnx.Sequential(model, jax.nn.relu, linear(3, 2)), white(2, 5, 6, 2)
    revived = link_sequential(model, Link(lk_relu.members, layout=layout))
    close(revived(x), model(x))
    linked = revived.layers[0].layers[1]
    assert type(linked) is LinkedPReLU
    z, slope = jnp.ones((5, 6, 4)), jnp.broadcast_to(prelu.negative_slope[...], (5, 6, 4))
    by_unit = linked(-z).reshape((5, 6, 2, 4) if layout == "blocked" else (5, 6, 4, 2))
    close(by_unit.take(0, 2 if layout == "blocked" else 3), -slope)
    close(by_unit.take(1, 2 if layout == "blocked" else 3), z)
    close(unlink(revived)(x), model(x))
    with pytest.raises(ValueError, match=r"layers\[0\].layers\[1\], a \w*PReLU, is linked and has other parameters"):
        link_sequential_opt_state((), model, lk_relu)
    with pytest.raises(ValueError, match="no plain activation"):
        link_sequential(revived, lk_relu)


@pytest.mark.slow
def test_a_nested_model_stays_nested_and_its_optimiser_follows():
    inner = nnx.Sequential(linear(4, 6), nnx.Sequential(nnx.BatchNorm(6, rngs=nnx.Rngs(0)), jax.nn.relu))
    model = nnx.Sequential(nnx.Sequential(linear(3, 4), jax.nn.relu), inner, linear(6, 2))
    model.eval()
    revived, x, tx = link_sequential(model, lk_relu), white(5, 3), optax.adam(1e-2)
    close(revived(x), model(x))
    assert revived.layers[1].layers[0].kernel.shape == (8, 6)
    assert [revived.layers[0].layers[1], revived.layers[1].layers[1].layers[1]] == [lk_relu] * 2
    assert [inner.layers[0].kernel.shape, model.layers[2].kernel.shape] == [(4, 6), (6, 2)]
    state = link_sequential_opt_state(tx.init(nnx.state(model, nnx.Param)), model, lk_relu, tx=tx)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(nnx.state(revived, nnx.Param)))
    close(unlink(revived)(x), model(x))
    with pytest.raises(ValueError, match=r"layers\[0\].layers\[1\] is already linked"):
        link_sequential(revived, lk_relu)


# --- the optimiser follows ----------------------------------------------------------------------------------------

OPTIMISERS = {
    "adam": optax.adam(1e-2),
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(1e-2, centered=True, momentum=0.9),
    "schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, 100)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-2)),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "masked": optax.chain(
        optax.masked(optax.scale_by_adam(), lambda p: jax.tree.map(lambda a: a.ndim > 1, p)), optax.scale(-1e-3)
    ),
}


def train(model, tx, opt_state, x, steps):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: jnp.square(nnx.merge(graph, p, rest)(x) - 1).mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, grads

    grads = None
    for _ in range(steps):
        params, opt_state, grads = step(params, opt_state)
    return nnx.merge(graph, params, rest), opt_state, grads


@pytest.mark.slow
@pytest.mark.parametrize("tx", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("name", ["norm after", "flatten"])
def test_moments_of_kept_weights_are_kept_and_new_ones_zero(tx, name):
    layers, shape = ARCHITECTURES[name]
    model, x = build(layers, jax.nn.relu), white(*shape)
    model, opt_state, _ = train(model, tx, tx.init(nnx.state(model, nnx.Param)), x, 3)
    link = Link(lk_relu.members, layout="interleaved")
    revived, revived_state = link_sequential(model, link), link_sequential_opt_state(opt_state, model, link, tx=tx)
    fresh = tx.init(nnx.state(revived, nnx.Param))
    assert jax.tree.map(jnp.shape, revived_state) == jax.tree.map(jnp.shape, fresh)

    def check(old, new):
        if old.shape == new.shape:  # counts too
            np.testing.assert_array_equal(old, new)
        else:  # interleaved: each second row, or entry, is new
            axis = -2 if old.ndim > 1 else 0
            np.testing.assert_array_equal(new.take(np.arange(0, new.shape[axis], 2), axis), old)
            assert not new.take(np.arange(1, new.shape[axis], 2), axis).any()

    jax.tree.map(check, opt_state, revived_state)
    _, after, _ = train(revived, tx, revived_state, x, 2)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHES)
def test_under_strict_switches(name):
    x, tx = np.asarray(white(8, 5), np.float32), optax.sgd(1e-2, momentum=0.9)
    with SWITCHES[name]():
        model = nnx.Sequential(linear(5, 7), nnx.Sequential(jax.nn.relu, linear(7, 3)))
        state = tx.init(nnx.state(model, nnx.Param))
        revived, warm = link_sequential(model, lk_relu), warm_up_new(3)
        close(revived(x), model(x))
        state = link_sequential_opt_state(state, model, lk_relu, tx=tx)
        revived, state, count = redo(revived, state, jnp.asarray(x), key=jax.random.key(1), tx=tx)
        state = state, warm.init(nnx.state(revived, nnx.Param))
        _, state, grads = train(revived, optax.chain(tx, warm), state, jnp.asarray(x), 2)
    assert int(count) == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state, grads)))


# --- dead units come back -----------------------------------------------------------------------------------------


def with_dead_units(dead=5):
    model = build(ARCHITECTURES["dense"][0], jax.nn.relu)
    model.layers[0].bias[...] = jnp.where(jnp.arange(7) < dead, -100.0, model.layers[0].bias[...])
    return model


@pytest.mark.slow
@layouts
def test_added_weights_learn_in_the_first_update_and_dead_units_in_the_second(layout):
    dead, link = 5, Link(lk_relu.members, layout=layout)
    model, x = with_dead_units(dead), white(64, 5)
    tx = optax.sgd(1e-3)
    assert not train(model, tx, tx.init(nnx.state(model, nnx.Param)), x, 9)[2]["layers"][0]["kernel"][:, :dead].any()
    revived = link_sequential(model, link)
    close(revived(x), model(x))
    opt_state = tx.init(nnx.state(revived, nnx.Param))
    revived, opt_state, grads = train(revived, tx, opt_state, x, 1)
    added = np.arange(7, 12) if layout == "blocked" else np.arange(1, 10, 2)
    assert np.abs(grads["layers"][2]["kernel"][added]).min() > 0
    assert not grads["layers"][0]["kernel"][:, :dead].any()
    _, _, grads = train(revived, tx, opt_state, x, 1)
    assert np.abs(grads["layers"][0]["kernel"][:, :dead]).max(axis=0).min() > 0


# --- bad input ----------------------------------------------------------------------------------------------------


def after_relu(*layers):
    return [linear(3, 4), jax.nn.relu, *layers]


class Residual(nnx.Module):
    def __init__(self):
        self.inner = linear(4, 4)

    def __call__(self, x):
        return jax.nn.relu(self.inner(x) + x)


class Dropped(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, deterministic=True)

    def __call__(self, x):
        return self.dropout(jax.nn.relu(x))


BAD = {
    "no activation": lambda: ([linear(3, 4), linear(4, 2)], "no plain activation"),
    "linked already": lambda: (
        [linear(3, 4), lk_relu, linear(8, 2)],
        r"no plain activation.*layers\[1\] is already linked",
    ),
    "linked layer": lambda: (
        [linear(3, 4), LinkedLinear(4, 2, rngs=nnx.Rngs(0))],
        r"no plain.*layers\[1\] is already linked",
    ),
    "linked layer next": lambda: (
        after_relu(LinkedLinear(4, 2, rngs=nnx.Rngs(0))),
        r"after it, only layers\[2\], a LinkedL",
    ),
    "a layer over another axis next": lambda: (
        after_relu(nnx.LinearGeneral(4, 2, axis=1, rngs=nnx.Rngs(0))),
        r"layers\[2\], an nnx.LinearGeneral over axes \(1,\), is not over the channels",
    ),
    "an own Sequential inside": lambda: (
        [type("Doubled", (nnx.Sequential,), {})(linear(3, 4), jax.nn.relu, linear(4, 4)), *after_relu(linear(4, 2))],
        r"layers\[0\], a Doubled, has variables",
    ),
    "nested": lambda: (
        [nnx.Sequential(linear(3, 4), nnx.Sequential(jnp.tanh, linear(4, 4))), *after_relu(linear(4, 2))],
        r"first member.* for layers\[0\].layers\[1\].layers\[0\]",
    ),
    "a module of several layers": lambda: (
        after_relu(linear(4, 4), Residual(), linear(4, 2)),
        r"layers\[3\], a Residual, has",
    ),
    "relu and dropout": lambda: (
        [linear(3, 4), Dropped(), linear(4, 2)],
        r"layers\[1\], a Dropped, has variables or modules",
    ),
    "relu and flatten": lambda: (
        [nnx.Conv(3, 4, (8, 8), padding="VALID", rngs=nnx.Rngs(0)), lambda x: jax.nn.relu(flatten(x)), linear(4, 3)],
        r"layers\[1\] is an activation for arrays of some shapes only",
    ),
    "relu and squeeze": lambda: (
        [nnx.Conv(3, 4, (8, 8), padding="VALID", rngs=nnx.Rngs(0)), lambda x: jax.nn.relu(x.squeeze()), linear(4, 3)],
        r"layers\[1\] is an activation for arrays of some shapes only",
    ),
    "activation last": lambda: (
        after_relu(linear(4, 2), jax.nn.relu),
        r"layers\[3\].*no nnx.Linear or nnx.Conv after it",
    ),
    "only one layer": lambda: ([linear(3, 4), jax.nn.relu], r"layers\[1\].*no nnx.Linear or nnx.Conv after it"),
    "another activation": lambda: ([linear(3, 4), jnp.tanh, linear(4, 2)], r"first member.*layers\[1\]"),
    "one that is clipped far out": lambda: (
        [linear(3, 4), lambda z: jnp.minimum(jax.nn.relu(z), 500.0), linear(4, 2)],
        r"first member.*layers\[1\]",
    ),
    "one of two": lambda: (after_relu(linear(4, 4), jax.nn.silu, linear(4, 2)), r"first member.*layers\[3\]"),
    "two in a row": lambda: (after_relu(relu, linear(4, 2)), r"layers\[1\] and layers\[2\] are activations in a row"),
    "layer norm": lambda: (after_relu(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), linear(4, 2)), r"layers\[2\], a LayerNorm"),
    "group norm": lambda: (
        after_relu(nnx.GroupNorm(4, 2, rngs=nnx.Rngs(0)), linear(4, 2)),
        r"layers\[2\], a GroupNorm",
    ),
    "two norms": lambda: (
        after_relu(*(nnx.BatchNorm(4, rngs=nnx.Rngs(0)) for _ in range(2)), linear(4, 2)),
        r"layers\[3\]: one",
    ),
    "norm on another axis": lambda: (
        after_relu(nnx.BatchNorm(4, axis=1, rngs=nnx.Rngs(0)), linear(4, 2)),
        r"layers\[2\].*axis=-1",
    ),
    "weight norm": lambda: (
        after_relu(nnx.WeightNorm(linear(4, 4), rngs=nnx.Rngs(0)), linear(4, 2)),
        r"layers\[2\], a WeightNorm",
    ),
    "grouped": lambda: (
        [
            nnx.Conv(3, 4, (3,), rngs=nnx.Rngs(0)),
            jax.nn.relu,
            nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=nnx.Rngs(0)),
        ],
        r"layers\[2\], a grouped",
    ),
    "a subclass": lambda: (
        after_relu(type("Scaled", (nnx.Linear,), {})(4, 2, rngs=nnx.Rngs(0))),
        r"layers\[2\] is a Scaled",
    ),
    "mixed channels": lambda: (after_relu(jax.nn.softmax, linear(4, 2)), r"between layers\[0\] and layers\[3\]"),
    "reversed channels": lambda: (after_relu(lambda x: x[..., ::-1], linear(4, 2)), "does not treat channels alike"),
    "channels mixed only in long vectors": lambda: (
        after_relu(lambda x: x * jnp.minimum(1, 50 / jnp.linalg.norm(x + 1e-6, axis=-1, keepdims=True)), linear(4, 2)),
        "does not treat channels alike",
    ),
    "fixed shape": lambda: (after_relu(lambda x: x.reshape(-1, 4), linear(4, 2)), "fixed shape"),
    "channels first": lambda: (
        [
            nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0)),
            jax.nn.relu,
            lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1),
            linear(4 * 20, 3),
        ],
        "does not treat channels alike",
    ),
    "shapes do not pair": lambda: (
        after_relu(linear(5, 2)),
        r"layers\[2\] has 5 input features.*4 units of layers\[0\]",
    ),
    "a multiple without flatten": lambda: (after_relu(linear(8, 2)), r"layers\[2\] has 8 input features"),
}


@pytest.mark.parametrize("case", first_fast(BAD.values()), ids=BAD)
def test_what_cannot_be_linked_is_refused_by_name(case):
    layers, message = case()
    model = nnx.Sequential(*layers)
    with pytest.raises(ValueError, match=message):
        link_sequential(model, lk_relu)
    with pytest.raises(ValueError, match=message):
        link_sequential_opt_state((), model, lk_relu)


def test_other_refusals(unchecked):
    shared = linear(4, 4)
    with pytest.raises(ValueError, match="stands in the model twice, and shared weights are not"):
        link_sequential(nnx.Sequential(shared, jax.nn.relu, shared), lk_relu)
    with pytest.raises(ValueError, match=r"nnx\.Sequential, got a Linear"):
        link_sequential(shared, lk_relu)
    for link in (jax.nn.relu, relu):
        with pytest.raises(ValueError, match=r"two or more members, got .*pass linked\(jax.nn.relu\)"):
            link_sequential(nnx.Sequential(*after_relu(linear(4, 2))), link)
    with pytest.raises(ValueError, match="axis=1"):
        link_sequential(nnx.Sequential(*after_relu(linear(4, 2))), Link(lk_relu.members, axis=1))


# --- layers that compute their kernel -----------------------------------------------------------------------------


def computed(kind):
    """A stem, then twice an activation and a layer of the kind: the first is before an activation, both are after."""
    rngs = nnx.Rngs(0)
    layers = [kind(4, 4, (3, 3), rngs=rngs), kind(4, 3, (3, 3), padding="CIRCULAR", rngs=rngs)]
    return nnx.Sequential(nnx.Conv(2, 4, (3, 3), rngs=rngs), jax.nn.relu, layers[0], jax.nn.relu, layers[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", first_fast([WSConv, LCWConv, NormPropConv]))
def test_a_next_layer_that_computes_its_kernel_is_folded(kind):
    model, x = computed(kind), white(2, 5, 6, 2)
    revived = link_sequential(model, lk_relu)
    close(revived(x), model(x))
    assert [type(revived.layers[i]) for i in (2, 4)] == [nnx.Conv] * 2
    assert [layer.in_features for layer in (revived.layers[2], model.layers[2])] == [8, 4]
    close(unlink(revived)(x), model(x))


@pytest.mark.slow
def test_a_layer_before_an_activation_stays_what_it_is():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(LCWLinear(3, 4, rngs=rngs), jax.nn.relu, nnx.Linear(4, 2, rngs=rngs))
    revived = link_sequential(model, lk_relu)
    assert type(revived.layers[0]) is LCWLinear
    close(revived(white(5, 3)), model(white(5, 3)))
    tx = optax.adam(1e-3)
    linked_state = link_sequential_opt_state(tx.init(nnx.state(model, nnx.Param)), model, lk_relu, tx=tx)
    jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(f"{a.shape} {b.shape}"), linked_state[0].mu,
                 nnx.state(revived, nnx.Param))  # fmt: skip


def test_a_layer_that_folds_needs_no_place_in_a_list():
    class Doubled(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.inner(2 * x)

        def fold(self):
            plain = nnx.clone(self.inner)
            plain.kernel[...] *= 2
            return plain

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(2, 4, rngs=rngs), jax.nn.relu, Doubled(rngs))
    close(link_sequential(model, lk_relu)(white(5, 2)), model(white(5, 2)))


def test_an_optimiser_does_not_know_the_parameters_of_a_folded_layer():
    model = computed(NormPropConv)
    opt_state = optax.adam(1e-3).init(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match=r"layers\[2\], a NormPropConv, is folded .* start the optimiser anew"):
        link_sequential_opt_state(opt_state, model, lk_relu)
    with pytest.raises(ValueError, match=r"layers\[2\], a NormPropConv, computes its kernel.* fold it first"):
        redo(model, opt_state, white(2, 5, 6, 2), key=jax.random.key(0))
    vp = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), jax.nn.relu, VPLinear(4, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"layers\[2\], a VPLinear, does not fold by itself"):
        link_sequential(vp, lk_relu)


def test_a_pool_that_overflows_in_half_precision_is_a_pool():
    def mean(x):
        return x.astype(jnp.float16).mean((1, 2)).astype(jnp.float32)

    net = nnx.Sequential(nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0)), jax.nn.relu, mean, linear(4, 2))
    z = white(2, 5, 5, 1)
    np.testing.assert_allclose(link_sequential(net, lk_relu)(z), net(z), rtol=1e-6)
