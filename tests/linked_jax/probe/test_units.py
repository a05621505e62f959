import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.activations import lk_relu, relu
from linked_jax.layers import LinkedConv
from linked_jax.learned import ChannelPReLU
from linked_jax.linking import Link
from linked_jax.probe import probe
from linked_jax.probe.plot import STATES, unit_states
from tests.arrays import white
from tests.linked_jax.probe.common import KILL, agrees, same

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
    assert layer.name.startswith("test_units.py:")  # and not vmap()


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
def test_a_link_laid_along_the_samples_has_their_one_unit():
    (layer,) = probe(lambda x: lk_relu(x[:, 0]), ROWS).layers
    agrees(layer, jnp.concatenate(ROWS)[:, :1], [jax.nn.relu, lambda z: jax.nn.relu(-z)])


@pytest.mark.slow
def test_all_pairs_of_samples_are_one_unit():
    (layer,) = probe(lambda x: jax.nn.sigmoid(x @ x.T), ROWS).layers
    assert (layer.units, layer.samples) == (1, 32**2 + 32**2 + 5**2)


@pytest.mark.slow
def test_a_model_of_one_batch_size_is_looked_at_still():
    (layer,) = probe(MATRIX, ROWS[:2], call=lambda w, x: jax.nn.relu(x.reshape(32, 6) @ w.T)).layers
    agrees(layer, jnp.concatenate(ROWS[:2]) @ MATRIX.T)


@pytest.mark.slow
def test_units_on_the_first_axis_of_a_model_of_one_batch_size():
    def forward(w, x):
        return jax.nn.relu(jnp.einsum("nd,kd->kn", x.reshape(32, 6), w) + jnp.zeros((len(w), 1)))

    (layer,) = probe(MATRIX, ROWS[:2], call=forward).layers
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


@pytest.mark.slow
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
    head, row, legend, _, remark = str(report).splitlines()
    assert row[: head.index("NaN/inf") + 7].endswith(" 1")
    assert legend.startswith("units that are dead, ")
    assert remark.startswith("not finite: the input of batch 0 has ")
    assert STATES[unit_states(report.layers)[0, 1]][0] == "not finite"
    console, styles = pytest.importorskip("rich.console").Console, []

    def look(_console, shown, **_options):
        styles.extend(row.style for row in getattr(shown, "rows", []))

    monkeypatch.setattr(console, "print", look)
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
