"""The first activation that is not finite is explained by who made it, not by who passed it on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.activations import lk_relu
from linked_jax.probe import Monitor, Origin, probe
from linked_jax.probe.origin import OUTPUTS
from tests.arrays import white
from tests.cases import first_fast
from tests.linked_jax.probe.common import custom

X = white(8, 4)
W = jnp.eye(4)


def log_of_nothing(w, x):
    h = jax.nn.relu(x @ w)
    z = jnp.log(h - h) @ w
    return jax.nn.relu(jax.nn.relu(z) @ w)


def too_large(w, x):
    return jnp.tanh(jax.nn.relu(jax.nn.relu(x @ (1e30 * w)) @ (1e30 * w)) @ w)


def inside_an_activation(w, x):
    return jnp.tanh((jnp.exp(1000 * (x @ w)) - 1) @ w)


def masked(w, x):
    scores = jnp.where(jnp.arange(4) < 2, x @ w, -jnp.inf) + jnp.log(jnp.array([1.0, 1.0, 0.0, 0.0]))
    h = jax.nn.relu(jax.nn.softmax(scores) @ w)
    return jax.nn.relu(jnp.sqrt(h - 9) @ w)


def chosen_away(w, x):
    z = x @ w
    safe = jnp.where(z > 0, jnp.log(z), 0)
    return jax.nn.relu(jax.nn.relu(safe @ w) / jnp.zeros(4) @ w)


def scanned(w, x):
    def layer(x, scale):
        return jax.nn.relu(x @ w / scale), None

    return jax.lax.scan(layer, jnp.abs(x), jnp.array([1.0, 1.0, 0.0, 1.0]))[0]


def through_time(w, x):
    def step(h, x):
        h = jnp.tanh(x @ w + jnp.arccos(h * 3))
        return h, h

    return jax.lax.scan(step, jnp.zeros(4), x)[1]


def branched(w, x):
    return jax.lax.cond(x.shape[0] > 3, lambda x: jax.nn.relu(jnp.arcsin(x + 9) @ w), jnp.tanh, x @ w)


def looped(w, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jax.nn.relu((x @ w) / (2.0 - i) - 1 / (2.0 - i)), jnp.abs(x))


@custom
def with_own_rule(w, x):
    return jax.nn.relu(jnp.log(-jnp.abs(x) - 1) @ w)


@jax.checkpoint
def recomputed(w, x):
    return lk_relu(jnp.sqrt(-jnp.abs(x) - 1) @ w)


def behind_the_last_activation(w, x):
    return {"logits": jnp.where(jnp.arange(4) < 2, jax.nn.relu(x @ w) @ (3e38 * w) @ (3e38 * w), -jnp.inf)}


MADE = {
    "behind the last activation": (behind_the_last_activation, "dot_general", "inf", 1),
    "log of nothing": (log_of_nothing, "log", "-inf", 2),
    "too large": (too_large, "dot_general", "inf", 1),
    "inside an activation": (inside_an_activation, "exp", "inf", 1),
    "after a mask of -inf": (masked, "sqrt", "NaN", 3),
    "after what was chosen away": (chosen_away, "div", "NaN", 3),
    "in a scan over layers": (scanned, "div", "inf", 2),
    "in a scan over time": (through_time, "acos", "NaN", 2),
    "in a branch": (branched, "asin", "NaN", 1),
    "in a loop": (looped, "div", "NaN", 1),
    "in a custom rule": (with_own_rule, "log", "NaN", 2),
    "in a remat": (recomputed, "sqrt", "NaN", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(MADE))
def test_the_operation_that_made_it_is_named_with_its_line(name):
    f, operation, value, line = MADE[name]
    report = probe(W, [X], call=f)
    origin = report.not_finite_first
    code = getattr(f, "__wrapped__", f).__code__
    assert (origin.kind, origin.name, origin.value) == ("operation", operation, value)
    assert origin.source == f"test_origin.py:{code.co_firstlineno + line}"
    assert f"{operation} in" in str(report)
    assert (origin.seen_by == OUTPUTS) == (f is behind_the_last_activation)


@pytest.mark.slow
def test_what_only_the_outputs_have_is_seen_by_them_with_and_without_a_loss():
    batches = [(X, jnp.zeros(8)), (X.at[5, 1].set(jnp.nan), jnp.zeros(8))]

    def call(w, x):
        return jax.nn.relu(jnp.nan_to_num(x) @ w) @ w + x

    plain = probe(W, [x for x, _ in batches], call=call).not_finite_first
    assert plain == probe(W, batches, call=call, loss_fn=lambda y, _: y.mean()).not_finite_first
    assert str(plain) == "the input of batch 1 has NaN, first seen by the outputs of the model"


@pytest.mark.slow
def test_masked_logits_and_outputs_under_a_mask_are_no_fault():
    def logits(w, x):
        return jnp.where(jnp.arange(4) < 2, jax.nn.relu(x @ w), -jnp.inf)

    assert probe(W, [X], call=logits).not_finite_first is None
    padded = probe(W, [X], call=lambda w, x: jax.nn.relu(x @ w) @ w / 0, mask=lambda x: x[:, 0] > 0)
    assert padded.not_finite_first is None


@pytest.mark.slow
def test_the_layer_of_a_scan_is_numbered():
    def layer(x, scale):
        with jax.named_scope("block"):
            return jax.nn.relu(x @ W / scale), None

    (origin,) = {
        probe(jnp.array([1.0, 0.0, 1.0]), [X], call=lambda s, x: jax.lax.scan(layer, x, s)[0]).not_finite_first
    }
    assert origin.layer == "block[1]"
    assert origin.seen_by.startswith("relu in block[1] at test_origin.py")


def net():
    return nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(4, 4, rngs=nnx.Rngs(1)), jnp.tanh)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 2])
def test_a_parameter_is_named_instead(place):
    model = net()
    model.layers[place].kernel[...] = model.layers[place].kernel.at[1, 2].set(jnp.inf)
    origin = probe(model, [jnp.abs(X)]).not_finite_first
    assert (origin.kind, origin.name) == ("parameter", f"layers.{place}.kernel")
    assert str(origin).startswith(f"the parameter layers.{place}.kernel has inf, first seen by ")
    assert origin.seen_by.split()[2] == f"layers.{place + 1}"


@pytest.mark.slow
def test_an_input_is_named_instead_with_its_batch():
    origin = probe(net(), [X, X.at[3, 0].set(jnp.nan)]).not_finite_first
    assert (origin.kind, origin.name, origin.value) == ("input", "of batch 1", "NaN")
    by_name = probe(W, [{"a": X, "b": X - jnp.inf}], call=lambda w, x: jax.nn.relu(x["b"] @ w)).not_finite_first
    assert (by_name.name, by_name.value) == ("b of batch 0", "-inf")


@pytest.mark.slow
def test_a_constant_is_named_instead():
    bias = jnp.array([0.0, jnp.nan, 0.0, 0.0])
    origin = probe(W, [X], call=lambda w, x: jax.nn.relu(x @ w + bias)).not_finite_first
    assert (origin.kind, origin.name) == ("constant", "of shape (4,)")


@pytest.mark.slow
def test_a_function_with_a_rule_of_its_own_has_its_name():
    @jax.custom_jvp
    def unsafe_root(z):
        return jnp.sqrt(z)

    unsafe_root.defjvp(lambda primals, tangents: (unsafe_root(*primals), tangents[0]))
    origin = probe(W, [-jnp.abs(X) - 1], call=lambda w, x: jax.nn.relu(unsafe_root(x @ w) @ w)).not_finite_first
    assert (origin.kind, origin.name, origin.value) == ("operation", "unsafe_root", "NaN")


@pytest.mark.slow
def test_a_sum_of_the_statistics_is_no_operation_of_the_model():
    report = probe(W, [jnp.full((1000, 4), 1e36)], call=lambda w, x: jax.nn.relu(x @ w))
    assert report.layers[0].not_finite.all()
    assert report.not_finite_first.kind == "unknown"
    assert "sums over the data overflow" in str(report)


@pytest.mark.slow
def test_a_run_goes_on_where_the_origin_is_not_found(monkeypatch):
    def fail(*_args):
        raise NotImplementedError("no rule\nby itself")

    monkeypatch.setattr("linked_jax.probe.run.origin_of", fail)
    report = probe(W, [X / 0], call=lambda w, x: jax.nn.relu(x @ w))
    assert str(report.not_finite_first).startswith(
        "not found (NotImplementedError: no rule), first seen by test_origin"
    )


@pytest.mark.slow
def test_what_is_masked_is_no_origin():
    mask = jnp.arange(5) < jnp.array([5, 3, 1, 4, 2, 5])[:, None]
    x = jnp.where(mask[..., None], white(6, 5, 4), jnp.nan)
    for call in (
        lambda w, x: jax.nn.relu(jnp.log(jnp.abs(x @ w)) / 0.0 @ w),
        lambda w, x: jax.lax.scan(lambda h, x: (h, jnp.tanh(x @ w / 0.0)), x[:, 0], x.swapaxes(0, 1))[1],
    ):
        origin = probe(W, [x], call=call, mask=lambda _: mask).not_finite_first
        assert (origin.kind, origin.name) == ("operation", "div")
    assert probe(W, [x], call=lambda w, x: jax.nn.relu(x @ w), mask=lambda _: mask).not_finite_first is None


@pytest.mark.slow
def test_the_monitor_explains_the_first_time_alone():
    traces = []

    def call(w, x):
        traces.append(x.shape)
        return jax.nn.relu(jnp.sqrt(x @ w) @ w)

    monitor = Monitor([jnp.abs(X)], every=1, call=call)
    for step, sign in enumerate([1.0, -1.0, -1.0]):
        monitor(step, sign * W)
    step, origin = monitor.not_finite_first
    assert (step, origin.name, origin.layer) == (1, "sqrt", "")
    told = [entry["not_finite_first"] for entry in monitor.history]
    assert told == [None, str(origin), None]
    assert len(traces) == 2 + 2  # compiled once, and traced once more to explain
    assert monitor.report.layers[-1].not_finite.all()


@pytest.mark.slow
def test_batches_that_are_read_once_are_not_explained():
    report = probe(W, iter([X / 0]), call=lambda w, x: jax.nn.relu(x @ w))
    assert report.layers[0].not_finite.all()
    assert report.not_finite_first is None


@pytest.mark.slow
def test_a_report_keeps_it_on_disk(tmp_path):
    report = probe(W, [X / 0], call=lambda w, x: jax.nn.relu(x @ w))
    report.save(tmp_path / "report.json")
    loaded = type(report).load(tmp_path / "report.json")
    assert isinstance(loaded.not_finite_first, Origin)
    assert loaded.not_finite_first == report.not_finite_first
    assert dataclasses.asdict(loaded.not_finite_first)["kind"] == "input"
    assert np.isnan(loaded.layers[0].mean).all()
