"""The toy's command and its claims: dead ReLUs stay dead, linked units learn, and the numbers are what they say."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.dynamics import __main__ as dynamics
from experiments.dynamics import links, toy, training
from experiments.dynamics import plots as dynamics_plots
from linked_jax import (
    ACTIVATION_NAMES,
    Certificate,
    activation_arity,
    get_activation,
    live_units,
    lk_relu,
    lk_tanh,
)
from tests.children import ROOT
from tests.commands import command, in_this_process, metrics

MODULE = "experiments.dynamics"
TINY = ["--act", "relu", "lk_prelu", "--steps", "9", "--units", "3"]


@pytest.fixture(scope="module")
def in_process():
    """The exit code, standard output and standard error of a command; figure 1 has two links instead of twelve."""

    def run(folder, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(links, "named_links", lambda: {"lk_relu": lk_relu, "lk_tanh": lk_tanh})
            return in_this_process(dynamics.main, *arguments, folder=folder)

    return run


def trained(act, *, seed=0, **changes):
    return training.train(toy.Toy(**changes), toy.moons(), act=act, seed=seed)


def restored(act, line, *, seed=0, **changes):
    return toy.Toy(**changes).restore({"act": act, "seed": seed, **line})


# --- a whole run


@pytest.fixture(scope="module")
def a_run(in_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return in_process(folder, *TINY, "--seeds", 2, "--seed", 7, "--out", "record"), folder / "record"


@pytest.mark.slow
def test_a_run_says_what_it_does(a_run):
    (code, out, error), folder = a_run
    assert (code, error) == (0, "")
    config = json.loads((folder / "config.json").read_text())
    assert f"200 points, coordinates within ±8.7 (fingerprint {config['data']['fingerprint']})" in out
    said = re.findall(r"^(\S+) seed (\d+)  step +(\d+)  loss (\S+)  accuracy (\S+)  dead (\d)/3 ", out, re.MULTILINE)
    assert said == [
        (line["act"], str(line["seed"]), str(line["step"]), f"{line['loss']:.4f}", f"{line['accuracy']:.4f}",
         str(line["dead_units"]))
        for line in metrics(folder)
        if line["step"] in (0, 9)
    ]  # fmt: skip


@pytest.mark.slow
def test_the_closing_table_is_the_mean_and_the_deviation_over_seeds(a_run):
    (_, out, _), folder = a_run
    for act in ("relu", "lk_prelu"):
        first, last = ([line for line in metrics(folder) if line["act"] == act and line["step"] == s] for s in (0, 9))
        row = re.search(rf"^ {act} .*", out[out.index("From step 0") :], re.MULTILINE)
        assert row
        one, other = (line["accuracy"] for line in last)
        # the sample deviation of two values is |a - b| / sqrt(2)
        assert f"{(one + other) / 2:.4f} ± {abs(one - other) / 2**0.5:.4f}" in row[0]
        assert " to ".join(f"{sum(line['loss'] for line in end) / 2:.3f}" for end in (first, last)) in row[0]
        assert ("3 to 3 of 3" if act == "relu" else "0 to 0 of 3") in row[0]


@pytest.mark.slow
def test_a_run_leaves_its_record(a_run):
    _, folder = a_run
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "dynamics.png", "links.png", "metrics.jsonl",
    ]  # fmt: skip
    lines = metrics(folder)
    assert [(line["act"], line["seed"], line["step"]) for line in lines] == [
        (act, seed, step) for act in ("relu", "lk_prelu") for seed in (7, 8) for step in range(10)
    ]
    for line in lines:
        assert line["accuracy"] * 200 == pytest.approx(round(line["accuracy"] * 200), abs=1e-3)
        assert len(line["gradient_norms"]) == 3
        assert ("parameters" in line) == (line["step"] in (0, 9))
    config = json.loads((folder / "config.json").read_text())
    assert config["protocol"] == {"bias": -10, "units": 3, "steps": 9, "lr": 0.1, "optimizer": "sgd"}
    assert config["command"] == f"python -m experiments.dynamics {' '.join(TINY)} --seeds 2 --seed 7"
    assert {"versions", "hardware", "commit", "time", "data"} <= set(config)
    assert str(folder.parent) not in (folder / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "height", "width"), [("dynamics.png", 500, 900), ("links.png", 500, 1500)])
def test_the_pictures_are_pictures(a_run, name, height, width):
    from matplotlib.image import imread

    path = a_run[1] / name
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    assert pixels.shape[0] > height
    assert pixels.shape[1] > width
    assert pixels.std() > 0.05


@pytest.mark.slow
def test_the_command_as_the_page_has_it(tmp_path):
    code, _, error = command(MODULE, "--out", tmp_path / "record", JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert (code, error) == (0, "")
    last = {line["act"]: line for line in metrics(tmp_path / "record") if line["step"] == 10_000}
    assert last["relu"]["dead_units"] == 8
    assert last["lk_relu"]["accuracy"] >= 0.97
    assert last["lk_selu"]["accuracy"] >= 0.97
    assert {path.suffix for path in (tmp_path / "record").iterdir()} == {".json", ".jsonl", ".png"}


# --- bad input


BAD = {
    "unknown act": ("--act relu lk_rleu", "'lk_relu'"),
    "no act": ("--act", "--act"),
    "no paper preset": ("--preset paper", "paper", "quick"),
    "unknown optimizer": ("--optimizer adamw", "adamw", "sgd"),
    "unknown option": ("--lrr 3", "--lrr"),
    "no number": ("--steps many", "many"),
    "steps 0": ("--steps 0", "--steps is from 1 to 1,000,000,000, got 0"),
    "too many steps": ("--steps 3000000000", "--steps is from 1 to 1,000,000,000, got 3,000,000,000"),
    "units 0": ("--units 0", "--units is from 1 to 10,000, got 0"),
    "seeds 0": ("--seeds 0", "--seeds is from 1 to 10,000, got 0"),
    "negative seed": ("--seed -1", "--seed", "-1"),
    "lr 0": ("--lr 0", "--lr is a positive number, got 0"),
    "lr nan": ("--lr nan", "--lr is a positive number, got nan"),
    "bias inf": ("--bias -inf", "--bias is a number up to 1e+06 in size, got -inf"),
    "bias nan": ("--bias nan", "--bias is a number up to 1e+06 in size, got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_short_message_and_leaves_nothing(case, in_process, tmp_path):
    arguments, *parts = BAD[case]
    code, _, error = in_process(tmp_path, "--out", "record", *arguments.split())
    assert code == 2
    for part in parts:
        assert part in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 15  # tyro draws a box around its own
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_bad_input_in_a_process_of_its_own(tmp_path):
    code, out, error = command(MODULE, "--act", "lk_rleu", "--out", tmp_path / "record")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .*lk_rleu.*did you mean 'lk_relu'.*\n", error)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_record_is_refused_and_kept(in_process, tmp_path):
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "metrics.jsonl").write_text("mine")
    code, _, error = in_process(tmp_path, *TINY, "--out", "record")
    assert code == 2
    assert "is there and is no record; pass --out with a new folder" in error
    assert [path.read_text() for path in (tmp_path / "record").iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(in_process, tmp_path):
    code, out, error = in_process(tmp_path, *TINY, "--out", "x" * 300)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: cannot write the record x+ .*; pass --out with a folder that you can write\n", error)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_3_and_keeps_the_runs_before_it(in_process, tmp_path):
    command = "--act", "relu", "lk_relu", "--steps", 9, "--lr", 1e30, "--out", "record"
    for _ in range(2):  # nor does the second one take the run for done
        code, _, error = in_process(tmp_path, *command)
        assert code == 3
        assert re.fullmatch(r"stopped: the loss or its gradient is not finite at step \d; .*--lr.*\n", error)
        found = metrics(tmp_path / "record")
        assert [(line["act"], line["step"]) for line in found] == [("relu", step) for step in range(10)]


# --- a run that resumes


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_to_the_same_record(a_run, in_process, tmp_path):
    (_, out, _), whole = a_run
    folder, lines = tmp_path / "record", metrics(whole)
    shutil.copytree(whole, folder)
    texts = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    of_first = [text for text, line in zip(texts, lines, strict=True) if (line["act"], line["seed"]) == ("relu", 7)]
    (folder / "metrics.jsonl").write_text("".join(of_first), encoding="utf-8")
    code, again, error = in_process(tmp_path, *TINY, "--seeds", 2, "--seed", 7, "--out", "record")
    assert (code, error) == (0, "")
    assert "\nrelu seed 7" not in again
    assert [text for text in again.splitlines() if "  step " in text] == [
        text for text in out.splitlines() if "  step " in text and not text.startswith("relu seed 7")
    ]
    assert metrics(folder) == lines
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (
        again[again.index("From step 0") : again.index("record ")]
        == out[out.index("From step 0") : out.index("record ")]
    )


@pytest.mark.slow
def test_a_record_takes_more_runs_and_none_of_another_protocol(a_run, in_process, tmp_path):
    shutil.copytree(a_run[1], tmp_path / "record")
    code, out, _ = in_process(tmp_path, *TINY, "--seeds", 1, "--seed", 9, "--out", "record")
    assert code == 0
    assert len(metrics(tmp_path / "record")) == 60
    assert "seed 7" not in out  # the table and the picture are of what was asked for
    code, _, error = in_process(tmp_path, *TINY, "--lr", 0.2, "--out", "record")
    assert (code, error.count("\n"), "is a record with another protocol" in error) == (2, 1, True)


@pytest.mark.slow
def test_nets_whose_gradients_are_all_zero_are_drawn_without_a_warning(in_process, tmp_path):
    code, _, error = in_process(tmp_path, "--act", "relu", "--steps", "9", "--units", "3", "--out", "run")
    assert (code, error) == (0, "")


@pytest.mark.slow
def test_the_committed_record_can_be_read():
    folder = ROOT / "results" / "records" / "dynamics"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
    made = toy.Toy(**{field.name: settings[field.name] for field in dataclasses.fields(toy.Toy)})
    lines, data = metrics(folder), toy.moons()
    shown = [line for line in lines if "parameters" in line and line["seed"] == 0]
    assert len(shown) == 25
    (last,) = (line for line in shown if (line["act"], line["step"]) == ("lk_selu", 10_000))
    accuracy = (made.restore(last)(data.points).argmax(axis=1) == data.labels).mean()
    assert float(accuracy) == pytest.approx(last["accuracy"], abs=1e-6)
    page = " ".join((dynamics.__doc__ or "").split())
    accuracies = [row["accuracy"].split()[0] for row in dynamics_plots.table(made, lines)]
    assert " ".join(f"{float(accuracy):.3f}" for accuracy in accuracies) in page


# --- what the numbers are


def test_the_data_are_fixed_balanced_and_shorter_than_the_bias():
    points, labels = toy.moons()
    assert points.shape == (200, 2)
    assert np.bincount(labels).tolist() == [100, 100]
    # so |w.x| <= |x| < 10 for columns of length 1: at bias -10 every z is negative
    assert float(jnp.linalg.norm(points, axis=1).max()) < 10
    kernel = toy.unit_columns(jax.random.key(3), (2, 50))
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 999, 10_000, 12_345])
def test_blocks_are_all_the_steps_in_few_lengths(steps):
    assert sum(training.blocks(steps)) == steps
    assert set(training.blocks(steps)) <= {1, 10, 100, 1000}
    assert len(training.blocks(steps)) <= 27 + steps // 1000


@pytest.mark.parametrize("steps", [1, 7, 10_000])
def test_recorded_steps_hold_the_start_the_end_and_the_snapshots(steps):
    recorded, kept = training.recorded_steps(steps), training.snapshots(steps)
    assert (recorded[0], recorded[-1], kept[0], kept[-1]) == (0, steps, 0, steps)
    assert set(kept) <= set(recorded)
    assert len(recorded) <= 90


MEMBERS = {
    "relu": lambda z: [jnp.where(z > 0, z, 0)],
    "lk_selu": lambda z: [jax.nn.selu(z), jax.nn.selu(-z)],
}


@pytest.mark.slow
@pytest.mark.parametrize(("act", "bias"), [("relu", -2.0), ("lk_selu", -10.0)])
def test_one_step_is_gradient_descent_and_the_norms_are_of_its_gradient(act, bias):
    lines = trained(act, steps=1, bias=bias, seed=3)
    points, labels = toy.moons()
    net = restored(act, lines[0], bias=bias, seed=3)
    start = [
        jnp.asarray(leaf[...])
        for layer in (net.hidden, net.read_out.linear)
        for leaf in (layer.kernel, layer.bias)
    ]  # fmt: skip

    def loss(w, b, k, c):
        logits = jnp.concatenate(MEMBERS[act](points @ w + b), axis=1) @ k + c
        return -jax.nn.log_softmax(logits)[jnp.arange(200), labels].mean()

    value, by = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*start)
    norms = [float(np.hypot(np.linalg.norm(by[0][:, unit]), by[1][unit])) for unit in range(8)]
    np.testing.assert_allclose(lines[0]["gradient_norms"], norms, rtol=1e-4, atol=1e-7)
    assert max(norms) > 0
    assert lines[0]["loss"] == pytest.approx(float(value), rel=1e-5)
    moved = [leaf - 0.1 * gradient for leaf, gradient in zip(start, by, strict=True)]
    assert lines[1]["loss"] == pytest.approx(float(jax.jit(loss)(*moved)), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("act", "bias"), [("relu", -5.0), ("lk_relu", -5.0)])
def test_dead_and_one_sided_units_are_those_that_numpy_counts(act, bias):
    lines = trained(act, steps=1, bias=bias)
    net = restored(act, lines[0], bias=bias)
    z = np.asarray(toy.moons()[0]) @ np.asarray(net.hidden.kernel[...]) + np.asarray(net.hidden.bias[...])
    negative = int((z <= 0).all(axis=0).sum())
    assert 0 < negative < 8
    assert lines[0]["one_sided_units"] == negative
    assert lines[0]["dead_units"] == (negative if act == "relu" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTIVATION_NAMES)
def test_the_units_are_those_of_any_activation(act):
    made, data = toy.Toy(bias=-5.0), toy.moons()
    net = made.net(act, 0)
    z = net.hidden(data.points)
    found = training.measure(net, data)
    live = live_units(get_activation(act, 8)(z), arity=activation_arity(act))
    assert int(found["dead_units"]) == int((~live).sum())
    assert int(found["one_sided_units"]) == int(((z > 0).all(axis=0) | (z < 0).all(axis=0)).sum())


@pytest.mark.slow
def test_a_dead_relu_net_cannot_move_its_units():
    lines = trained("relu", steps=500)
    assert all(line["gradient_norms"] == [0.0] * 8 for line in lines)
    assert all(line["dead_units"] == 8 and line["accuracy"] == 0.5 for line in lines)
    first, last = (restored("relu", line) for line in (lines[0], lines[-1]))
    for before, after in zip(*(jax.tree.leaves(nnx.state(net.hidden)) for net in (first, last)), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["lk_relu", "lk_selu"])
def test_a_linked_net_learns_from_the_same_start(act):
    lines = trained(act)
    assert min(lines[0]["gradient_norms"]) > 1e-3
    assert all(line["dead_units"] == 0 for line in lines)
    assert lines[0]["one_sided_units"] == 8
    assert lines[-1]["one_sided_units"] < 8
    assert lines[-1]["accuracy"] >= 0.97


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers():
    once = trained("lk_relu", steps=20, seed=5)
    assert once == trained("lk_relu", steps=20, seed=5)
    assert once[0]["gradient_norms"] != trained("lk_relu", steps=20, seed=6)[0]["gradient_norms"]


# --- the pictures' words


def test_every_named_link_is_in_the_picture_once():
    named = links.named_links()
    assert len(named) == len(set(named.values())) == 12
    assert {"lk_relu", "lk_prelu", "min_max", "fourier"} <= set(named)


def test_the_verdicts_are_the_certificates():
    good = Certificate(
        linked=True, dtype="bfloat16", min_gradient=0.5, argmin=-2.25, dead_intervals=(), dead_interval_count=0,
        nonfinite_count=0, first_nonfinite=None, num_inputs=65280, seconds=0.1, platform="cpu", dead_band=0.0,
    )  # fmt: skip
    assert links.verdict(good) == "linked: least max|g'| = 0.5, at z = -2.2"
    broken = dataclasses.replace(good, linked=False, nonfinite_count=1234, first_nonfinite=7.0)
    assert links.verdict(broken) == "not linked: g' not finite at 1,234 values"
    dead = dataclasses.replace(good, linked=False, dead_intervals=((-3.39e38, -4.0), (1.0, 2.0)), dead_interval_count=2)
    assert links.verdict(dead) == "not linked: dead for z <= -4, [1, 2]"


def test_a_zero_line_runs_through_the_points_where_z_is_zero():
    w, b = np.array([3.0, -4.0]), 10.0
    for end in dynamics_plots._zero_line(w, b, reach=5.0).T:
        assert w @ end + b == pytest.approx(0, abs=1e-9)
        assert np.linalg.norm(end) >= 15
