import functools
import json

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from linked_jax.activations import relu
from linked_jax.probe import Monitor, probe
from tests.arrays import white
from tests.cases import first_fast
from tests.linked_jax.probe.common import WEIGHTS, mean_of_squares, mlp


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
@pytest.mark.parametrize("by_keyword", first_fast([False, True]))
def test_other_arrays_in_a_partial_are_no_new_trace(by_keyword):
    traces = []

    def forward(w, x):
        traces.append(x.shape)
        return jax.nn.relu(x @ w)

    def with_keyword(x, *, weights):
        return forward(weights["w"], x)

    monitor = Monitor([white(8, 4)], every=1)
    for w in WEIGHTS:
        model = functools.partial(with_keyword, weights={"w": w}) if by_keyword else functools.partial(forward, w)
        report = monitor(0, model)
        np.testing.assert_allclose(report.layers[0].mean, (white(8, 4) @ w).mean(0), rtol=1e-4, atol=1e-6)
    assert traces == [(8, 4), (16, 4)]


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


def test_a_branch_that_was_not_taken_changes_nothing():
    def forward(sign, x):
        return jax.lax.cond(sign > 0, lambda z: jax.nn.relu(z - 10), jnp.tanh, x @ jnp.eye(3))

    monitor = Monitor([jnp.ones((4, 3))], every=1, call=forward)
    for step, sign in enumerate((1.0, -1.0, -1.0, 1.0)):
        monitor(step, jnp.float32(sign))
    relus = [entry["layers"][1] for entry in monitor.history]  # the branch for False comes first
    assert [layer["dead"] for layer in relus] == [1.0, None, None, 1.0]
    assert [layer["dead_checks"] for layer in relus] == [1.0, 1.0, 1.0, 2.0]
    assert [layer["dead_share"] for layer in relus] == [1.0, 1.0, 1.0, 1.0]


def test_a_model_that_grows_begins_anew():
    monitor = Monitor([jnp.ones((4, 3))], every=1, call=lambda w, x: jax.nn.relu(x @ w))
    for step, (units, sign) in enumerate([(2, -1.0), (2, -1.0), (5, -1.0), (5, 1.0)]):
        monitor(step, jnp.full((3, units), sign))
    found = [entry["layers"][0] for entry in monitor.history]
    assert [layer["drift"] for layer in found] == [None, 0.0, None, 6.0]
    assert [layer["dead_checks"] for layer in found] == [1.0, 2.0, 1.0, 0.0]
    assert [layer["dead_share"] for layer in found] == [1.0, 1.0, 1.0, 0.5]


@pytest.mark.slow
def test_a_monitor_of_infinite_values_stays_ready_for_json():
    monitor = Monitor([white(8, 4)], every=1, call=lambda w, x: jax.nn.relu(x / w))
    monitor(0, 0.0)
    assert monitor.history[0]["layers"][0]["mean_square"] is None


X = white(8, 4)
MESH = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
HIDDEN = jax.shard_map(jnp.tanh, mesh=MESH, in_specs=P("x"), out_specs=P("x"))
BAD = {
    "no activation": (lambda: probe(WEIGHTS[0], [X], call=lambda w, x: x @ w), "no activation was found"),
    "hidden activation": (lambda: probe(HIDDEN, [X]), "not entered.*shard_map"),
    "no batch": (lambda: probe(WEIGHTS, [], call=mlp), "no batch"),
    "no sample": (lambda: probe(WEIGHTS, [X[:0]], call=mlp), "N at least 1"),
    "one array": (lambda: probe(WEIGHTS, X, call=mlp), "pass a list"),
    "no iterable": (lambda: probe(WEIGHTS, 3, call=mlp), "pass a list"),
    "words": (lambda: probe(WEIGHTS, ["x"], call=mlp), "arrays"),
    "pair without loss": (lambda: probe(WEIGHTS, [(X, 0)], call=mlp), "without loss_fn"),
    "loss without pair": (lambda: probe(WEIGHTS, [X], call=mlp, loss_fn=mean_of_squares), "pair"),
    "no scalar": (lambda: probe(WEIGHTS, [(X, 0)], call=mlp, loss_fn=lambda out, _: out), "scalar"),
    "no batches": (lambda: probe(mlp, WEIGHTS), r"the model is called as model\(inputs\), got \(weights, x\)"),
    "tau": (lambda: probe(WEIGHTS, [X], call=mlp, tau=-1.0), "tau is at least 0"),
    "tau of words": (lambda: probe(WEIGHTS, [X], call=mlp, tau="small"), "tau is a number"),
    "sizes": (lambda: probe(WEIGHTS, [{"a": X, "b": X[:3]}], call=mlp), r"one leading axis.*\[3, 8\]"),
    "labels": (lambda: probe(WEIGHTS, [(X, X[:3])], call=mlp, loss_fn=mean_of_squares), r"one leading axis.*\[3, 8\]"),
    "pair of losses": (
        lambda: probe(WEIGHTS, [(X, 0)], call=mlp, loss_fn=lambda out, _: (out.sum(), 1)), "scalar.*a tuple of 2",
    ),
    "Linen alone": (lambda: probe(flax.linen.Dense(3), [X]), r"pass functools.partial\(module.apply, variables\)"),
    "NNX for batches": (lambda: probe(*[nnx.Linear(4, 4, rngs=nnx.Rngs(0))] * 2), "batches is an iterable"),
    "no function": (lambda: probe("a", [X]), "without call the model is called as"),
    "call is no function": (lambda: probe(WEIGHTS, [X], call="a"), "call is a function"),
    "call of one argument": (lambda: probe(WEIGHTS, [X], call=jnp.tanh), r"call is called as call\(model, inputs\)"),
    "not hashable": (lambda: probe(functools.partial(lambda s, x: jnp.tanh(x), {1}), [X]), "unhashable type: 'set'"),
    "class": (lambda: probe(nnx.Linear, [X]), "the model is an instance"),
    "other units": (
        lambda: probe(lambda x: jax.nn.relu(x.T + (1 / 0 if len(x) > 8 else 0)), [X, X[:4]]),
        "other numbers of units",
    ),
    "every of a half": (lambda: Monitor([X], every=0.5), "every is an integer"),
    "every": (lambda: Monitor([X], every=0), "every is at least 1"),
    "iterator": (lambda: Monitor(iter([X]), every=1), "pass a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", first_fast(BAD))
def test_bad_input_is_one_clear_error(name, unchecked):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
