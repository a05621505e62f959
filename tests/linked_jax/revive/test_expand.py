import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from linked_jax.activations import lk_relu, relu
from linked_jax.learned import LinkedPReLU
from linked_jax.linking import Link
from linked_jax.revive import Pair, link_params, link_params_opt_state
from tests.arrays import white
from tests.cases import first_fast

layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))


class LinenNet(nn.Module):
    act: object = relu

    @nn.compact
    def __call__(self, x, train=False):
        x = self.act(nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x)))
        x = nn.BatchNorm(not train, name="after")(self.act(nn.Conv(5, (3, 3), strides=2)(x)))
        x = nn.Dense(6, name="hidden")(nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))
        return nn.Dense(3, name="out")(self.act(x))


LINEN_PAIRS = [
    Pair(before="Conv_0", after="Conv_1"),
    Pair(before=("params", "Conv_1"), norm="batch_stats/after", after="hidden", positions=2),
    Pair(before="hidden", after="out"),
]
X = white(2, 4, 8, 1)


class NNXNet(nnx.Module):
    """relu(conv(x) + x): no Sequential shows it."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv, self.norm = nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4 * 24, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])
        self.act = relu

    def __call__(self, x):
        x = self.norm(self.act(self.conv(x) + x))
        return self.blocks[1](self.act(self.blocks[0](x.reshape(len(x), -1))))


NNX_PAIRS = [Pair("conv", "blocks/0", norm="norm", positions=24), Pair("blocks/0", ("blocks", 1))]


def noisy(tree):
    return jax.tree.map(lambda a: a + jnp.abs(white(*a.shape)) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@pytest.mark.slow
@layouts
def test_linen_variables(layout):
    link = Link(lk_relu.members, layout=layout)
    variables = noisy(LinenNet().init(jax.random.key(0), X))
    revived = link_params(variables, LINEN_PAIRS, link)
    shapes = jax.eval_shape(LinenNet(link).init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, revived) == jax.tree.map(jnp.shape, shapes)
    scale = max(1, jnp.abs(LinenNet().apply(variables, X)).max())
    np.testing.assert_allclose(LinenNet(link).apply(revived, X), LinenNet().apply(variables, X), atol=1e-5 * scale)


@pytest.mark.slow
@layouts
def test_nnx_state(layout):
    link, model = Link(lk_relu.members, layout=layout), NNXNet()
    nnx.update(model, noisy(nnx.state(model)))
    model.eval()
    x = white(2, 4, 6, 4)
    before = model(x)
    state = link_params(nnx.state(model), NNX_PAIRS, link)
    nnx.update(model, state)
    model.act = link
    scale = max(1, float(jnp.abs(before).max()))
    np.testing.assert_allclose(model(x), before, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("boxed", [True, False], ids=["linen", "nnx"])
def test_the_optimiser_follows_and_masks_and_labels_do_not_matter(boxed):
    if boxed:
        variables = LinenNet().init(jax.random.key(0), X)
        params, pairs = variables["params"], LINEN_PAIRS
        after = link_params(variables, pairs, lk_relu)["params"]
    else:
        model, pairs = NNXNet(), NNX_PAIRS
        params = nnx.state(model, nnx.Param)
        after = nnx.filter_state(link_params(nnx.state(model), pairs, lk_relu), nnx.Param)
    label = lambda params: jax.tree.map(lambda a: "matrix" if a.ndim > 1 else "vector", params)  # noqa: E731
    tx = optax.partition({"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2, momentum=0.9)}, label)
    opt_state = link_params_opt_state(noisy(tx.init(params)), params, pairs, lk_relu, tx=tx)
    assert jax.tree.map(jnp.shape, opt_state) == jax.tree.map(jnp.shape, tx.init(after))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, after), opt_state, after)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, after)


def test_a_name_inside_another_path_is_not_touched():
    params = {"out": {"kernel": white(2, 3)}, "block": {"out": {"kernel": white(2, 3)}}}
    params["in"] = {"kernel": white(5, 2)}
    tx = optax.adam(1e-2)
    opt_state = tx.init(params)
    for path, shapes in (("out", ((4, 3), (2, 3))), ("block/out", ((2, 3), (4, 3)))):
        pairs = [Pair("in", path)]
        for tree in (
            link_params(params, pairs, lk_relu),
            link_params_opt_state(opt_state, params, pairs, lk_relu, tx=tx)[0].nu,
        ):
            assert (tree["out"]["kernel"].shape, tree["block"]["out"]["kernel"].shape) == shapes


def test_bad_input(unchecked):
    params = {"a": {"kernel": white(2, 3), "bias": white(3)}, "b": {"kernel": white(12, 4)}, "n": {"scale": white(3)}}
    with pytest.raises(ValueError, match="no layer with a kernel, a w, a weight at 'c/d'; there are: a, b"):
        link_params(params, [Pair("a", "c/d")], lk_relu)
    with pytest.raises(ValueError, match="no layer with a kernel, a w, a weight at 'n'"):
        link_params(params, [Pair("n", "b")], lk_relu)
    with pytest.raises(ValueError, match="there are: none"):
        link_params({}, [Pair("a", "b")], lk_relu)
    with pytest.raises(ValueError, match="pass positions=4 if a flatten stands after the activation"):
        link_params(params, [Pair("a", "b")], lk_relu)
    for pair in (Pair("a", "b", positions=3), Pair("b", "b"), Pair("a", "b", positions=12)):
        with pytest.raises(ValueError, match=r"b has a kernel of shape \(12, 4\)(,| after)"):
            link_params(params, [pair], lk_relu)
    for units, positions in ((2, 3), (2, 1), (2, None), (12, None), (6, 2)):  # 12: a grouped convolution
        tree = {"conv": {"kernel": white(3, 3, 6, 4)}, "a": {"kernel": white(2, units)}}
        with pytest.raises(ValueError, match="does not take"):
            link_params(tree, [Pair("a", "conv", positions=positions)], lk_relu)
    with pytest.raises(ValueError, match="no running mean and var at 'n'"):
        link_params(params, [Pair("a", "b", norm="n", positions=4)], lk_relu)
    params["n"] |= {"mean": white(5), "var": white(5)}
    with pytest.raises(
        ValueError, match=r"at 'n' has a mean of shape \(5,\), which is not one channel for each of 3 units"
    ):
        link_params(params, [Pair("a", "b", norm="n", positions=4)], lk_relu)
    params["n"] |= {"mean": white(2, 3), "var": white(2, 3)}
    with pytest.raises(ValueError, match=r"mean of shape \(2, 3\).*stacked by a scan"):
        link_params(params, [Pair("a", "b", norm="n", positions=4)], lk_relu)
    good = Pair("a", "b", positions=4)
    with pytest.raises(ValueError, match="b/kernel is in two pairs"):
        link_params(params, [good, good], lk_relu)
    with pytest.raises(ValueError, match="axis=1"):
        link_params(params, [good], Link(lk_relu.members, axis=1))
    for link in (jax.nn.relu, relu, LinkedPReLU(3, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match=r"two or more members, got .*; pass linked\(jax.nn.relu\)"):
            link_params(params, [good], link)
    for pairs in ([], good, ["b"], None):
        with pytest.raises(ValueError, match="pairs is a list of one or more Pair, got"):
            link_params(params, pairs, lk_relu)
    for leaf, rows, message in (
        ("w", None, "a w at 'b'"),
        (None, 2, "a weight that has an axis 2 at 'b'"),
        (None, -3, "-3"),
    ):
        with pytest.raises(ValueError, match=f"no layer with .*{message}.*; there are: "):
            link_params(params, [Pair("a", "b", positions=4, leaf=leaf, rows=rows)], lk_relu)
    deep = {"a": {"kernel": white(3, 3, 4)}, "b": {"kernel": white(3, 3, 4)}}
    with pytest.raises(ValueError, match="with rows=-3 the axis of units is not known; let before be their number"):
        link_params(deep, [Pair("a", "b", rows=-3)], lk_relu)


@pytest.mark.parametrize(
    "pair",
    first_fast(
        [
            *({"after": a} for a in ("", "a//b", None, 3, "params")),
            {"norm": ()},
            {"norm": 1.5},
            {"before": None},
            {"before": 0},
        ]
    ),
    ids=str,
)
def test_bad_paths(unchecked, pair):
    with pytest.raises(ValueError, match="is a path such as"):
        Pair(**{"after": "a", "before": "b"} | pair)


@pytest.mark.parametrize("positions", first_fast([0, 2.0, "4"]))
def test_bad_positions(unchecked, positions):
    with pytest.raises(ValueError, match="positions is an integer of at least 1"):
        Pair("a", "b", positions=positions)


def test_bad_leaf_and_rows(unchecked):
    for leaf in ("", 3):
        with pytest.raises(ValueError, match="leaf is the name of a layer's weights, such as 'kernel', got"):
            Pair("a", "b", leaf=leaf)
    for rows in (1.0, True):
        with pytest.raises(ValueError, match="rows is the axis of a layer's inputs, such as -2, got"):
            Pair("a", "b", rows=rows)


class Flattened(nn.Module):
    """A flatten before or after the activation: only the caller knows."""

    act: object = relu
    first: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        flat = lambda a: a.reshape(len(a), -1)  # noqa: E731
        return nn.Dense(3)(self.act(flat(x)) if self.first else flat(self.act(x)))


@pytest.mark.slow
@layouts
@pytest.mark.parametrize(("first", "positions"), [(True, 1), (False, 32)])
def test_where_the_flatten_stands_is_said_by_positions(first, positions, layout):
    link = Link(lk_relu.members, layout=layout)
    variables = Flattened().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"pass positions=32 .* positions=1 if it stands before"):
        link_params(variables, [Pair("Conv_0", "Dense_0")], link)
    pair = Pair("Conv_0", "Dense_0", positions=positions)
    revived = Flattened(link, first=first).apply(link_params(variables, [pair], link), X)
    np.testing.assert_allclose(revived, Flattened(first=first).apply(variables, X), atol=1e-5)


def test_a_state_of_other_parameters_is_refused_and_one_without_arrays_needs_no_tx(unchecked):
    params = {"in": {"kernel": white(5, 2)}, "out": {"kernel": white(2, 3)}}
    pairs, tx = [Pair("in", "out")], optax.adam(1e-2)
    for other in ({"another": {"kernel": white(2, 3)}}, jax.tree.map(lambda a: a.T, params)):
        with pytest.raises(ValueError, match=r"no state of tx.init\(params\).* pass the tx that made it"):
            link_params_opt_state(tx.init(other), params, pairs, lk_relu, tx=tx)
    with pytest.raises(ValueError, match=r"has arrays, e.g. 0/mu/in/kernel, .* pass tx="):
        link_params_opt_state(tx.init(params), params, pairs, lk_relu)
    for wrong in (1e-2, optax.adam, nnx.Optimizer):
        with pytest.raises(ValueError, match="tx is an Optax transformation"):
            link_params_opt_state(tx.init(params), params, pairs, lk_relu, tx=wrong)
    with pytest.raises(ValueError, match=r"params are arrays, got a .* at act"):
        link_params_opt_state(tx.init(params), params | {"act": relu.members[0]}, pairs, lk_relu, tx=tx)
    for tx in (optax.sgd(1e-2), optax.inject_hyperparams(optax.sgd)(1e-2)):
        assert link_params_opt_state(tx.init(params), params, pairs, lk_relu) == tx.init(params)
