"""The comparison of remedies and the claims: every row builds, records resume, tables come from lines alone."""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import study
from experiments.engine.errors import UsageError
from experiments.engine.records import Record
from experiments.headlines import __main__ as headlines
from experiments.headlines import apr, batch_one, bcn, bkn, ic, riemannian
from experiments.headlines.__main__ import CLAIMS
from experiments.headlines.claim import Claim, table
from experiments.headlines.net import WIDTHS
from experiments.remedies import __main__ as remedies
from experiments.remedies import runs
from experiments.remedies import table as remedies_table
from experiments.remedies.methods import METHODS
from experiments.remedies.net import NETS, Place, Stage
from experiments.remedies.steps import VarianceStep
from linked_jax.probe import observe
from tests.cases import first_fast
from tests.commands import command

ROOT = Path(__file__).parents[2]


def line(row, rate, seed, *, loss=1.0, accuracy=0.9, stress="none", net="depth", **more):
    found = {"test_accuracy": accuracy, "train_loss": loss, "units": 8, "dead_units": 2, "shift": 0.5} | more
    return {"net": net, "row": row, "stress": stress, "rate": rate, "seed": seed, **found}


def costs(row, size=10, *, batch_one=True):
    counted = {"parameters": 5, "flops": 1, "activation_bytes": size}
    return {"net": "depth", "row": row, "says": row, "batch_one": batch_one, **counted}


def units_of(build):
    """The net, its parameters as shapes, and the units of each layer; no number is computed."""
    model = nnx.eval_shape(build)
    graph, state = nnx.split(model)

    def forward(state, images):
        trained = nnx.merge(graph, state, copy=True)(images, train=True)
        return trained, observe(lambda state, x: nnx.merge(graph, state, copy=True)(x), state, images)

    trained, (logits, taps) = jax.eval_shape(forward, state, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32))
    assert trained.shape == logits.shape == (2, 10)
    return model, [tap.stats.live.shape[-1] for tap in taps]


@pytest.mark.slow
@pytest.mark.parametrize("net", first_fast(NETS))
@pytest.mark.parametrize("name", first_fast(METHODS))
def test_every_method_makes_every_network(name, net):
    model, units = units_of(lambda: METHODS[name].build(net, (8, 8, 1), 10, 0))
    stages = NETS[net](10)
    layers = [before.features for before, stage in itertools.pairwise(stages) if stage.active]
    members = 2 if name == "drelu" else 1  # both of its pre-activations are layers to the probe
    assert units == [width for width in layers for _ in range(members)]
    optimizer, _ = METHODS[name].rule(net, METHODS[name].rates[0])
    jax.eval_shape(optimizer.init, nnx.split(model, nnx.Param, ...)[1])  # masks and chains find their layers


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_a_linked_net_starts_as_an_odd_function(net):
    model = METHODS["lk_relu"].build(net, (8, 8, 1), 10, 0)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    logits = jax.jit(lambda x: model(x))(jnp.concatenate([x, -x]))
    assert jnp.allclose(logits[:3], -logits[3:], atol=1e-5)
    assert jnp.abs(logits).mean() > 0.1


@pytest.mark.parametrize("act", ["relu", "lk_relu"])
def test_propagated_moments_are_in_the_order_of_flattened_features(act):
    method = dataclasses.replace(METHODS["variance_propagation"], act=act)
    step = VarianceStep(method, Place(Stage(5), (2, 3, 4), normed=False), nnx.Rngs(0))
    of_channels = jnp.arange(step.link.arity * 4.0)
    image = jnp.broadcast_to(of_channels, (1, 2, 3, of_channels.size))  # each channel is its moment
    assert step.of_all_pixels(of_channels).tolist() == step.flat(image)[0].tolist()


def test_the_rate_is_chosen_by_the_training_loss_alone():
    lines = [line("a", 0.1, 0, loss=0.5, accuracy=0.2), line("a", 0.2, 0, loss=0.9, accuracy=0.99)]
    lines += [line("a", 0.1, 1, accuracy=0.4), {**line("a", 0.3, 0), "stress": "raw", "train_loss": 0.0}]
    assert [run["test_accuracy"] for run in remedies_table.chosen("depth", "a", lines)] == [0.2, 0.4]


def test_a_diverged_rate_is_not_chosen_and_a_diverged_run_is_chance():
    diverged = {"net": "depth", "row": "a", "stress": "none", "rate": 0.3, "seed": 0, "diverged": "nan"}
    lines = [diverged, line("a", 0.1, 0), {**diverged, "rate": 0.1, "seed": 1}]
    (row,) = remedies_table.table("depth", lines, [costs("a")], None)
    assert (row["accuracy"], row["diverged"], row["dead"]) == ("0.5000 ± 0.5657", "1", "2/8")
    assert remedies_table.learners("depth", [diverged]) == []
    assert remedies_table.learners("depth", lines) == ["a"]


def test_costs_are_relative_to_relu():
    times = {"medians": [{"net": "depth", "row": row, "step_seconds": s} for row, s in (("relu", 2.0), ("b", 3.0))]}
    lines = [line("relu", 0.1, 0, accuracy=0.3), line("b", 0.1, 0), line("b", 1.0, 0, stress="rate x10", accuracy=0.25)]
    b, relu = remedies_table.table("depth", lines, [costs("relu"), costs("b", 25, batch_one=False)], times)
    assert (b["method"], b["time"], b["memory"], b["batch 1"], b["rate x10"]) == ("b", "1.50", "2.50", "no", "0.2500")
    assert (relu["time"], relu["memory"], relu["batch 1"], relu["rate x10"]) == ("1.00", "1.00", "yes", "-")
    assert "raw" not in relu


def test_the_shift_is_the_spread_of_means_relative_to_the_deviation():
    class Net(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.array([1.0, -3.0]))

        def __call__(self, x, train=False):
            return nnx.relu(x * self.scale + jnp.array([4.0, 0.0]))

    x = jax.random.normal(jax.random.key(0), (500, 2))
    z = x * jnp.array([1.0, -3.0]) + jnp.array([4.0, 0.0])
    wanted = z.mean(0).std() / jnp.sqrt(z.var(0).mean())
    assert runs.relative_shift(Net(), x) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("stress", [True, False])
def test_as_many_runs_are_done_as_are_planned(stress, learns, tmp_path):
    made = []

    def make(**key):
        made.append(key)
        return {"test_accuracy": 0.9 if learns else 0.1, "train_loss": key["rate"]}

    methods, options = ("relu", "sgd_g"), {"seeds": 3, "stress": stress, "make": make}
    with Record.create(tmp_path / "record", {}) as record:
        for _ in range(2):  # the second time everything is there
            done = [sum(runs.of_method(record, "depth", method, **options)) for method in methods]
            assert sum(done) == runs.planned(methods, ("depth",), 3, stress)
    assert len(made) == len(record.lines) == 2 * (5 + (9 if stress and learns else 0))
    rates = {key["stress"]: key["rate"] for key in made if key["row"] == "sgd_g" and key["seed"] == 2}
    assert rates == {"none": 0.06} | ({"batch 2": 0.06, "raw": 0.06, "rate x10": 0.6} if stress and learns else {})


@pytest.mark.slow
def test_the_command_leaves_a_record_that_is_resumed(tmp_path):
    words = ["--methods", "relu", "--nets", "four_conv", "--seeds", 1, "--epochs", 1, "--time-steps", 2]
    run = functools.partial(command, "experiments.remedies", *words, "--out", tmp_path / "run")
    assert run()[0] == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text(encoding="utf-8").splitlines()
    assert {json.loads(each)["stress"] for each in whole} == {"none", *remedies_table.STRESSES}
    page = (tmp_path / "run" / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "remedies.png").stat().st_size > 10_000
    metrics.write_text("\n".join(whole[:-1]) + "\n", encoding="utf-8")
    assert run()[0] == 0
    again = metrics.read_text(encoding="utf-8").splitlines()
    assert len(again) == len(whole)
    assert json.loads(again[-1]) | {"seconds": 0} == json.loads(whole[-1]) | {"seconds": 0}
    assert (tmp_path / "run" / "table.md").read_text(encoding="utf-8") == page
    code, _, error = run("--epochs", 2)
    assert (code, "another protocol" in error) == (2, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ("rleu",)}, "there is no 'rleu'"),
        ({"nets": ("resnet",)}, "there is no 'resnet'"),
        ({"methods": ()}, "at least one of relu"),
        ({"seeds": 0}, "--seeds is at least 1, got 0"),
        ({"epochs": 0}, "--epochs is at least 1"),
        ({"time_steps": -1}, "--time-steps is at least 0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        remedies.check(remedies.Settings(**options))


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_says_what_it_compares(name):
    claim = CLAIMS[name]
    assert (claim.name, len(set(claim.rows))) == (name, len(claim.rows))
    assert (claim.rate in claim.measures) == bool(claim.rates)
    assert len(claim.rows) >= 2
    assert "20" in claim.says  # the paper's year
    assert "Adam" in claim.protocol or "SGD" in claim.protocol


CLAIMS_NETS = {
    **{f"bcn {row}": lambda row=row: bcn.net(row, 0) for row in bcn.CLAIM.rows},
    **{f"ic {row}": lambda row=row: ic.net(row, 0) for row in ic.CLAIM.rows},
    **{f"batch_one {row}": lambda row=row: batch_one.net(row, 0) for row in batch_one.CLAIM.rows},
    "bkn": lambda: bkn.Net(0.9, False, nnx.Rngs(0)),
    "riemannian": lambda: riemannian.net(0),
}


@pytest.mark.parametrize("name", first_fast(CLAIMS_NETS))
def test_the_nets_of_claims_give_logits_and_their_units_are_channels(name):
    widths = batch_one.WIDTHS if "batch_one" in name else WIDTHS
    assert units_of(CLAIMS_NETS[name])[1] == list(widths)


@pytest.mark.slow
def test_a_claim_is_recorded_resumed_and_tabled(tmp_path, monkeypatch, capsys):
    ran = []

    def run(row, seed, _data, epochs):
        ran.append((row, seed))
        return {"x": float(seed + epochs)} if row == "a" else {}

    claim = Claim("toy", "Toy", "It is so.", "Any.", ("a", "b"), {"x": "measure"}, 2, run)
    settings = headlines.Settings(("toy",), seeds=1, out=str(tmp_path))
    data = data_lib.load("digits", None)
    headlines._test(claim, settings, data)
    headlines._test(claim, headlines.Settings(("toy",), seeds=2, out=str(tmp_path)), data)
    assert ran == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert "2.5000 ± 0.7071" in capsys.readouterr().out
    with pytest.raises(UsageError, match="another protocol"):
        headlines._test(claim, headlines.Settings(("toy",), epochs=3, out=str(tmp_path)), data)


def test_a_claim_keeps_the_rate_that_has_the_least_loss_with_seed_0(tmp_path):
    ran = []

    def run(row, seed, _data, _epochs, rate):
        ran.append((row, seed, rate))
        diverged = rate == 0.1
        return {} if diverged else {"loss": {0.2: 2.0, 0.3: 1.0}[rate] * (-1 if row == "b" else 1), "accuracy": rate}

    measures = {"accuracy": "accuracy", "factor": "factor"}
    options = {"rates": (0.1, 0.2, 0.3), "rate": "factor"}
    claim = Claim("toy", "Toy", "It is so.", "Any.", ("a", "b"), measures, 2, run, **options)
    data = data_lib.load("digits", None)
    headlines._test(claim, headlines.Settings(("toy",), seeds=1, out=str(tmp_path)), data)
    assert ran == [(row, 0, rate) for row in ("a", "b") for rate in claim.rates]
    headlines._test(claim, headlines.Settings(("toy",), seeds=2, out=str(tmp_path)), data)
    assert ran[6:] == [("a", 1, 0.3), ("b", 1, 0.2)]
    lines = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["row"], line["seed"], line["factor"]) for line in lines] == [
        ("a", 0, 0.3), ("b", 0, 0.2), ("a", 1, 0.3), ("b", 1, 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["nope"], [], ["lcw", "--seeds", "0"], ["lcw", "--epochs", "1"]])
def test_bad_claims_are_refused(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["headlines", *arguments])
    with pytest.raises(UsageError, match=r"no claim 'nope'|no claim was named|at least 1|at least 2"):
        headlines.main()


def test_a_claim_that_was_interrupted_goes_on_by_the_command_of_all_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["headlines", "apr", "--out", str(tmp_path)])
    said = []
    monkeypatch.setattr(study, "Ended", lambda text: said.append(text) or contextlib.nullcontext())
    with study.open_record("headlines.apr", tmp_path / "apr", protocol={}, data=data_lib.load("digits")):
        pass
    assert said[0].endswith(f"go on with the same command: python -m experiments.headlines apr --out {tmp_path}")


def test_a_claims_time_is_the_median_of_its_runs():
    claim = Claim("toy", "Toy", "It is so.", "Any.", ("a",), {"loss": "loss"}, 2, lambda *_: {})
    lines = [{"row": "a", "seed": seed, "loss": 1.0, "seconds": s} for seed, s in enumerate((30.0, 2.0, 3.0))]
    assert table(claim, lines)[0]["time"] == "3.0 s"


def test_shifted_images_are_shifted_by_one_pixel_in_each_direction():
    images = np.random.default_rng(0).random((40, 8, 8, 1)).astype(np.float32)
    shifted, seen = apr.corruptions(images)["shift"], set()
    for image, moved in zip(images, shifted, strict=True):
        (move,) = [m for m in ((0, 1), (0, -1), (1, 0), (-1, 0)) if (np.roll(image, m, (0, 1)) == moved).all()]
        seen.add(move)
    assert len(seen) == 4
