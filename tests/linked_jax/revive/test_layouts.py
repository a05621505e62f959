"""`link_params` in libraries that name and lay out weights in other ways: Haiku, Equinox, and plain arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from linked_jax.activations import lk_relu, relu
from linked_jax.linking import Link
from linked_jax.revive import Pair, link_params, link_params_opt_state
from tests.arrays import white
from tests.cases import first_fast

layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))
ADAM = optax.adam(1e-2)


def close(actual, desired):
    np.testing.assert_allclose(actual, desired, atol=1e-5 * max(1, float(jnp.abs(desired).max())))


def check_training(loss, params, new_params, pairs, link):
    """An update of the plain net, then one of the linked net: its kept weights move as they would have."""
    updates, state = ADAM.update(jax.grad(loss(relu))(params), ADAM.init(params))
    new_state = link_params_opt_state(state, params, pairs, link, tx=ADAM)
    would, _ = ADAM.update(jax.grad(loss(relu))(params), state)
    updates, _ = ADAM.update(jax.grad(loss(link))(new_params), new_state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, new_params)
    for old, new in zip(jax.tree.leaves(would), jax.tree.leaves(updates), strict=True):
        if old.shape == new.shape:
            np.testing.assert_allclose(new, old, atol=1e-5)
        else:
            assert not np.isin(np.abs(new), 0).all()


@pytest.mark.slow
@layouts
def test_haiku(layout):
    import haiku as hk

    link = Link(lk_relu.members, layout=layout)

    def net(act):
        def forward(x):
            x = act(hk.Conv2D(4, 3)(x))
            x = act(hk.Conv2D(5, 3, stride=2)(x))
            return hk.nets.MLP([6, 3], activation=act)(hk.Flatten()(x))

        return hk.without_apply_rng(hk.transform(forward))

    x = white(2, 4, 6, 1)
    params = net(relu).init(jax.random.key(0), x)
    pairs = [
        Pair("conv2_d", "conv2_d_1"),
        Pair("conv2_d_1", ("mlp/~/linear_0",), positions=6),
        Pair(6, "mlp/~/linear_1"),
    ]
    linked = link_params(params, pairs, link)
    assert jax.tree.map(jnp.shape, linked) == jax.tree.map(jnp.shape, net(link).init(jax.random.key(0), x))
    close(net(link).apply(linked, x), net(relu).apply(params, x))
    check_training(lambda act: lambda p: jnp.square(net(act).apply(p, x)).mean(), params, linked, pairs, link)


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("flatten_first", first_fast([False, True]))
def test_equinox(layout, flatten_first):
    import equinox as eqx

    class Net(eqx.Module):
        """Channels are first: so is the link's axis, and positions are last in a flatten."""

        convs: list
        linears: list
        acts: tuple

        def __init__(self):
            keys = jax.random.split(jax.random.key(0), 4)
            self.convs = [eqx.nn.Conv2d(1, 4, 3, key=keys[0]), eqx.nn.Conv2d(4, 5, 3, key=keys[1])]
            self.linears = [eqx.nn.Linear(5 * 8, 6, key=keys[2]), eqx.nn.Linear(6, 3, key=keys[3])]
            self.acts = (relu, relu, relu)

        def __call__(self, x):
            x = self.convs[1](self.acts[0](self.convs[0](x)))
            x = self.acts[1](x.ravel()) if flatten_first else self.acts[1](x).ravel()
            return self.linears[1](self.acts[2](self.linears[0](x)))

    first, last = Link(lk_relu.members, axis=0, layout=layout), Link(lk_relu.members, layout=layout)
    net, x = Net(), white(2, 1, 6, 8)
    inner = Pair("convs/1", "linears/0", positions=1 if flatten_first else 8)
    linked = link_params(net, [Pair("convs/0", "convs/1")] + [inner] * (not flatten_first), first)
    linked = link_params(linked, [inner] * flatten_first + [Pair("linears/0", "linears/1")], last)
    linked = eqx.tree_at(lambda m: m.acts, linked, (first, last if flatten_first else first, last))
    assert linked.convs[1].weight.shape == (5, 8, 3, 3)
    assert linked.linears[0].weight.shape == (6, 80)
    close(jax.vmap(linked)(x), jax.vmap(net)(x))


@pytest.mark.slow
@layouts
def test_an_equinox_optimiser_follows(layout):
    import equinox as eqx

    link, pairs = Link(lk_relu.members, layout=layout), [Pair("layers/0", "layers/1")]

    class Net(eqx.Module):
        layers: list

        def __call__(self, x, act):
            return self.layers[1](act(self.layers[0](x)))

    keys = jax.random.split(jax.random.key(0))
    net, x = Net([eqx.nn.Linear(4, 6, key=keys[0]), eqx.nn.Linear(6, 3, key=keys[1])]), white(5, 4)
    linked = link_params(net, pairs, link)
    close(jax.vmap(lambda x: linked(x, link))(x), jax.vmap(lambda x: net(x, relu))(x))
    check_training(lambda act: lambda m: jnp.square(jax.vmap(lambda x: m(x, act))(x)).mean(), net, linked, pairs, link)


@layouts
@pytest.mark.parametrize(("leaf", "rows"), first_fast([("theta", -2), ("theta", 0), ("w", 1), ("kernel", -1)]))
def test_the_leaf_and_the_axis_of_rows_are_said(leaf, rows, layout):
    link = Link(lk_relu.members, layout=layout)
    turned = rows in (1, -1)

    def apply(params, x, act):
        first, second = (params[name][leaf].T if turned else params[name][leaf] for name in ("a", "b"))
        return act(x @ first) @ second

    shapes = {"a": (5, 4), "b": (4, 3)}
    params = {name: {leaf: white(*(shape[::-1] if turned else shape))} for name, shape in shapes.items()}
    linked = link_params(params, [Pair("a", "b", leaf=leaf, rows=rows)], link)
    close(apply(linked, white(7, 5), link), apply(params, white(7, 5), relu))


def test_a_channels_first_link_is_refused_where_channels_are_last():
    params = {"a": {"kernel": white(5, 4)}, "b": {"kernel": white(4, 3)}}
    with pytest.raises(ValueError, match="Flax layers have channels last"):
        link_params(params, [Pair("a", "b")], Link(lk_relu.members, axis=0))
