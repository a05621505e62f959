"""The revival of a dead net: what is compared is what is said, and the tables come from lines alone."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.engine import data as data_lib
from experiments.engine.errors import UsageError
from experiments.revive import __main__ as revive
from experiments.revive import plots as revive_plots
from experiments.revive import ways
from tests.commands import command

ROOT = Path(__file__).parents[2]
TASK = ways.shifted(data_lib.load("digits"))
FEW = TASK._replace(images=TASK.images[:64], labels=TASK.labels[:64])


def harmed():
    """A net with dead units in its first layer."""
    model, opt_state = ways.fresh("relu", TASK, 0)
    model.layers[0].bias[...] = jnp.where(jnp.arange(64) < 20, -1000.0, 0.0)
    return model, jax.tree.map(jnp.ones_like, opt_state)


def line(way, seed, accuracy, dead, *, harm="partly", difference=0.0):
    return {
        "harm": harm, "seed": seed, "way": way, "accuracy": accuracy, "dead": dead, "difference": difference,
        "largest_logit": 2.0,
    }  # fmt: skip


def test_inputs_are_standardised_and_shifted():
    images = np.asarray(TASK.images)
    np.testing.assert_allclose([images.mean(), images.std()], [ways.OFFSET, 1], atol=1e-4)
    assert TASK.images.shape == (1437, 64)


@pytest.mark.slow
def test_dead_units_are_those_that_numpy_finds():
    model, _ = harmed()
    x, dead = np.asarray(TASK.images), []
    for layer in (0, 2, 4):
        x = np.maximum(x @ model.layers[layer].kernel[...] + model.layers[layer].bias[...], 0)
        dead.append(int((x == 0).all(axis=0).sum()))
    found = ways.measure(model, TASK)
    assert dead[0] >= 20
    assert found["dead"] == dead
    right = np.asarray(model(TASK.test_images)).argmax(axis=1) == np.asarray(TASK.test_labels)
    np.testing.assert_allclose(found["accuracy"], right.mean(), atol=1e-5)


@pytest.mark.slow
def test_at_its_revival_a_net_computes_the_same_and_no_unit_is_dead():
    net = harmed()
    model, opt_state = ways.WAYS["revived"](net, FEW, 0)
    logits = net[0](TASK.test_images)
    np.testing.assert_allclose(model(TASK.test_images), logits, rtol=0, atol=1e-6 * float(jnp.abs(logits).max()))
    assert ways.measure(model, TASK)["dead"][0] == 0
    assert {float(opt_state[0].mu["layers"][2]["kernel"][...].sum())} == {64.0 * 64}  # kept ones; new ones are 0


@pytest.mark.slow
def test_only_a_continued_net_stays_and_fresh_ones_do_not_know_it():
    net = harmed()
    assert ways.WAYS["continued"](net, FEW, 0) is net
    redone = ways.measure(ways.WAYS["redo"](net, TASK, 0)[0], TASK)
    assert redone["dead"][0] < ways.measure(net[0], TASK)["dead"][0]
    arities = {way: ways.WAYS[way](net, FEW, 0)[0].layers[1].arity for way in ways.WAYS}
    assert arities == {"continued": 1, "redo": 1, "revived": 2, "fresh": 1, "fresh_linked": 2}
    for way in ("fresh", "fresh_linked"):
        assert ways.WAYS[way](net, FEW, 0)[0].layers[0].bias[...].min() == 0


@pytest.mark.slow
def test_dead_units_of_a_revived_net_learn_again():
    model, opt_state = ways.WAYS["revived"](harmed(), FEW, 0)
    before = np.asarray(model.layers[0].kernel[...])
    (after, _), found = ways.fit((model, opt_state), FEW, jax.random.key(0), 2, 1e-3)
    assert len(found["accuracy"]) == len(found["dead"]) == 3
    assert (np.abs(after.layers[0].kernel[...] - before)[:, :20].max(axis=0) > 0).all()


@pytest.mark.slow
def test_a_net_goes_on_from_the_same_moment_as_often_as_asked():
    net, key = harmed(), jax.random.key(0)
    before = jax.tree.map(np.array, (net[0], net[1]))
    (one, _), found = ways.fit(net, FEW, key, 1, 1e-3)
    (other, _), again = ways.fit(net, FEW, key, 1, 1e-3)
    assert found == again
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one), jax.tree.leaves(other))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(before), jax.tree.leaves((net[0], net[1])))


def test_the_table_is_what_numpy_finds_in_the_lines():
    before = [line("harmed", seed, [0.1, 0.5 + seed], [[0, 0], [10, 4 + seed]]) for seed in (0, 1)]
    ways = [
        line("revived", seed, [0.2, 0.3, 0.4 + seed], [[0, 0], [0, 0], [0, seed]], difference=0.1 * seed)
        for seed in (0, 1)
    ]
    other = line("revived", 0, [1.0, 1.0], [[9, 9], [9, 9]], harm="wholly")
    (row,) = revive_plots.table("partly", [*before, *ways, other])
    deviation = np.std([0.5, 1.5], ddof=1)
    assert row["before"] == f"1.0000 ± {deviation:.4f}"
    assert (row["at"], row["after 1 epoch"]) == ("0.2000 ± 0.0000", "0.3000 ± 0.0000")
    assert row["after"] == f"0.9000 ± {deviation:.4f}"
    assert (row["logits differ by"], row["of"]) == ("0.1", "2")
    assert (row["dead before"], row["dead at"], row["dead after"]) == ("10 / 4.5", "0 / 0", "0 / 0.5")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": 0}, "--seeds is from 1 to 100, got 0"),
        ({"epochs": 0}, "--epochs is from 1 to 1,000, got 0"),
        ({"harmful_epochs": 10_000}, "--harmful-epochs is from 1 to 1,000, got 10,000"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        revive.check(revive.Settings(**options))


run = functools.partial(command, "experiments.revive")


def without_seconds(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line.pop("seconds") >= 0 for line in lines)
    return lines


@pytest.mark.slow
def test_the_command_leaves_a_record_that_resumes(tmp_path):
    folder = tmp_path / "run"
    arguments = ["--seeds", "1", "--harmful-epochs", "2", "--epochs", "1", "--out", str(folder)]
    code, _, error = run(*arguments)
    assert code == 0, error
    whole = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = without_seconds(folder)
    assert len(lines) == len(ways.HARMS) * (1 + len(ways.WAYS))
    for each in lines:
        if each["way"] in ("continued", "revived"):
            assert each["difference"] <= 1e-6 * max(1, each["largest_logit"])
    page = (folder / "table.md").read_text(encoding="utf-8")
    assert page == revive_plots.markdown(json.loads((folder / "config.json").read_text(encoding="utf-8")), lines)
    assert (folder / "revive.png").stat().st_size > 10_000
    (folder / "metrics.jsonl").write_text("".join(text + "\n" for text in whole.splitlines()[:-2]), encoding="utf-8")
    assert run(*arguments)[0] == 0
    assert without_seconds(folder) == lines
    code, _, error = run(*arguments, "--epochs", "2")
    assert (code, "another protocol" in error, error.count("\n")) == (2, True, 1)
