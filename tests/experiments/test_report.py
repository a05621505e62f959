"""Reports, from hand-made records: what is averaged, what never is, what is left out, and what is written."""

import base64
import copy
import csv
import functools
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.engine import plots, tables
from experiments.report import __main__ as report
from tests.commands import in_this_process

LAYERS = 3
CONFIG = {
    "experiment": "depth",
    "command": "python -m experiments.depth --seeds 3",
    "settings": {"seed": 0, "seeds": 3, "epochs": 2, "devices": 1},
    "axes": ["act", "depth", "init", "lr"],
    "protocol": {"dataset": "digits", "epochs": 2, "batch_size": 32, "width": 4},
    "data": {"name": "digits", "fingerprint": "feed", "description": "digits: 1,437 train and 360 test images"},
    "nets": [{"act": act, "depth": 50, "init": "auto", "lr": 0.001, "parameters": 1590} for act in ("lk_relu", "relu")],
    "versions": {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "optax": "0.2.8",
                 "numpy": "2.4.6", "linked_jax": "0.1.0"},
    "hardware": {"platform": "cpu", "device": "cpu", "devices": 1, "cpu_cores": 2, "machine": "x86_64",
                 "system": "Linux"},
    "commit": "a" * 40,
    "time": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


def config(**changes):
    """A config.json; settings, protocol, data and versions are merged, the rest is replaced."""
    made = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) else value
    return made


def accuracy(net, seed, epoch):
    return round(0.1 + 0.2 * (net["act"] == "lk_relu") + 0.05 * (3 * seed % 5) + 0.03 * (-1) ** epoch, 4)


def line(net, axes, seed, epoch):
    dead = [0] * LAYERS if net["act"].startswith("lk") else [seed, 0, 1]
    return {
        **{axis: net[axis] for axis in axes}, "seed": seed, "epoch": epoch, "train_loss": 2.0,
        "test_accuracy": accuracy(net, seed, epoch), "units": 4 * LAYERS, "dead_units": sum(dead),
        "dead_by_layer": dead, "signal_by_layer": [1.0, 0.5, 0.25 * (seed + 1)], "seconds": 1.5,
    }  # fmt: skip


def write_record(folder, change=lambda lines: lines, **changes):
    """A whole record, whose lines are changed before they are written."""
    made = config(**changes)
    settings = made["settings"]
    lines = [
        line(net, made["axes"], seed, epoch)
        for net in made["nets"]
        for seed in range(settings["seed"], settings["seed"] + settings["seeds"])
        for epoch in range(1, settings["epochs"] + 1)
    ]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    return folder


def the_groups(*folders):
    records, problems = report.read_records(folders)
    assert problems == []
    return report.groups(records)


@pytest.fixture
def command(tmp_path):
    """The exit code, standard output and standard error of the command, run in tmp_path."""
    return functools.partial(in_this_process, report.main, folder=tmp_path)


# --- what is averaged


def test_means_and_deviations_are_those_of_the_lines(tmp_path):
    (group,) = the_groups(write_record(tmp_path / "runs"))
    rows = report.table_of(group)
    assert [row["act"] for row in rows] == ["relu", "lk_relu"]  # the paper's order
    for row, net in zip(rows, reversed(CONFIG["nets"]), strict=True):
        by_seed = np.array([[accuracy(net, seed, epoch) for epoch in (1, 2)] for seed in range(3)])
        assert row["last epoch"] == f"{by_seed[:, 1].mean():.4f} ± {by_seed[:, 1].std(ddof=1):.4f}"
        best = by_seed.max(axis=1)
        assert row["best"] == f"{best.mean():.4f} ± {best.std(ddof=1):.4f}"
    assert list(rows[0])[:5] == ["act", "init", "last epoch", "best", "seeds"]
    shown = [{key: row[key] for key in ("parameters", "dead", "from")} for row in rows]
    assert shown == [
        {"parameters": "1,590", "dead": "2/12", "from": "layer 1"},
        {"parameters": "1,590", "dead": "0/12", "from": "none"},
    ]
    assert rows[0]["signal"] == "1 to 0.5"
    assert rows[0]["time"] == "3 s"
    assert rows[0]["seeds"] == "3"


def test_what_the_paper_printed_stands_beside_its_own_data_only(tmp_path):
    write_record(tmp_path / "digits")
    write_record(tmp_path / "cifar", data={"name": "cifar10", "fingerprint": "beef"})
    cifar, digits = (report.table_of(group) for group in the_groups(tmp_path))
    assert [(row["paper (best)"], row["later (best)"]) for row in cifar] == [("0.1", "0.1"), ("0.2014", "0.5667")]
    assert not any("paper" in column or "later" in column for column in digits[0])


def test_nets_of_several_records_stand_in_one_table(tmp_path):
    for act in ("selu", "lk_selu"):
        write_record(tmp_path / "sweep" / act, nets=[{**CONFIG["nets"][0], "act": act}], time=f"2026-{act}")
    write_record(tmp_path / "sweep" / "b", settings={"seed": 3, "seeds": 1}, commit=CONFIG["commit"])
    write_record(tmp_path / "sweep" / "c", nets=[{**net, "lr": 1e-4} for net in CONFIG["nets"]])
    write_record(tmp_path / "sweep" / "d")
    (group,) = the_groups(tmp_path)
    rows = report.table_of(group)
    assert [(row["act"], row["learning rate"], row["seeds"]) for row in rows] == [
        ("relu", "0.0001", "3"), ("relu", "0.001", "4"), ("lk_relu", "0.0001", "3"), ("lk_relu", "0.001", "4"),
        ("selu", "0.001", "3"), ("lk_selu", "0.001", "3"),
    ]  # fmt: skip
    assert group.notes == []
    assert group.name == "depth-digits"


def test_few_seeds_are_marked_and_explained(tmp_path):
    (group,) = the_groups(write_record(tmp_path / "run", settings={"seeds": 2}))
    assert [row["seeds"] for row in report.table_of(group)] == ["2*", "2*"]
    assert "* fewer than 3 seeds" in report.markdown_of(group)
    (group,) = the_groups(write_record(tmp_path / "more"))
    assert "*" not in tables.markdown(report.table_of(group))
    assert "fewer" not in report.markdown_of(group)


def test_a_run_that_diverged_counts_as_chance_and_is_counted(tmp_path):
    def diverge(lines):
        gone = [line for line in lines if not (line["act"] == "relu" and line["seed"] == 1 and line["epoch"] == 2)]
        net = {axis: CONFIG["nets"][1][axis] for axis in CONFIG["axes"]}
        return [*gone, {**net, "seed": 1, "epoch": 2, "diverged": "the loss is nan in epoch 2, step 3"}]

    (group,) = the_groups(write_record(tmp_path / "run", diverge))
    relu, lk_relu = report.table_of(group)
    assert (relu["diverged"], lk_relu["diverged"], relu["seeds"]) == ("1", "0", "3")
    net = CONFIG["nets"][1]
    assert relu["last epoch"].startswith(f"{np.mean([accuracy(net, 0, 2), tables.CHANCE, accuracy(net, 2, 2)]):.4f} ")
    assert group.notes == []  # it is finished
    assert "runs that diverged are not drawn" in plots.caption(group.by_net)


@pytest.mark.slow
def test_a_net_whose_runs_all_diverge_in_the_first_epoch(tmp_path):
    def diverge(lines):
        first = [line for line in lines if line["epoch"] == 1]
        keep = ("act", "depth", "init", "lr", "seed", "epoch")
        return [{**{key: line[key] for key in keep}, "diverged": "the loss is nan in epoch 1"} for line in first]

    (group,) = the_groups(write_record(tmp_path / "run", diverge))
    assert [(row["last epoch"], row["dead"]) for row in report.table_of(group)] == [("0.1000 ± 0.0000", "-")] * 2
    report.write(tmp_path / "out", [group])
    assert (tmp_path / "out" / "depth-digits.png").exists()


# --- what is never averaged


@pytest.mark.parametrize(
    ("changes", "heading"),
    [
        ({"data": {"fingerprint": "beef"}}, "data fingerprint beef"),
        ({"commit": "b" * 40}, "commit bbbbbbb"),
        ({"commit": "a" * 40 + "+changes"}, "commit aaaaaaa+changes"),
        ({"versions": {"jax": "0.12.0"}}, "jax 0.12.0"),
        ({"versions": {"jaxlib": "0.12.0"}}, "jaxlib 0.12.0"),
        ({"versions": {"flax": "1.0"}}, "flax 1.0"),
        ({"versions": {"optax": "1.0"}}, "optax 1.0"),
        ({"versions": {"linked_jax": "1.0"}}, "linked_jax 1.0"),
        ({"protocol": {"batch_size": 64}}, "batch size 64"),
        ({"protocol": {"augment": True}}, "augment True"),
        ({"axes": ["act", "depth", "lr"]}, "axes act depth lr"),
    ],
)
def test_what_differs_stands_in_tables_of_its_own_that_say_so(tmp_path, changes, heading):
    write_record(tmp_path / "one")
    write_record(tmp_path / "two", settings={"seed": 3}, **changes)
    one, two = the_groups(tmp_path)
    assert [row["seeds"] for group in (one, two) for row in report.table_of(group)] == ["3"] * 4
    assert (one.name, two.name) == ("one", "two")
    assert heading in two.heading
    assert f"# {two.heading}\n" in report.markdown_of(two)


def test_a_heading_names_settings_before_code_and_before_what_an_older_record_lacks(tmp_path):
    write_record(tmp_path / "one")
    write_record(tmp_path / "two", commit="b" * 40, protocol={"batch_size": 64, "held_out": None})
    write_record(tmp_path / "three", commit="c" * 40, protocol={"batch_size": 64, "held_out": None, "epochs": 9})
    assert [group.differs for group in the_groups(tmp_path)] == [
        {"epochs": "2", "batch size": "32"}, {"epochs": "9", "batch size": "64"}, {"epochs": "2", "batch size": "64"},
    ]  # fmt: skip


def test_accuracies_on_held_out_images_are_called_so(tmp_path):
    data = {"name": "cifar10", "description": "cifar10: 9 train and 9 held-out images of 8x8x1, 10 classes"}
    (group,) = the_groups(write_record(tmp_path / "run", data=data))
    text = report.markdown_of(group)
    assert "Held-out accuracy" in text
    assert "zero on all held-out images" in text
    assert "est accuracy" not in text
    assert "paper" not in report.table_of(group)[0]
    assert next(iter(plots.panel_pictures(group.by_net, data=group.config["data"]))) == "Held-out accuracy by epoch"


def test_chance_is_that_of_the_sets_classes(tmp_path):
    def diverge(lines):
        first = [line for line in lines if line["epoch"] == 1]
        keep = ("act", "depth", "init", "lr", "seed", "epoch")
        return [{**{key: line[key] for key in keep}, "diverged": "the loss is nan in epoch 1"} for line in first]

    (group,) = the_groups(write_record(tmp_path / "run", diverge, data={"classes": 100}))
    assert report.table_of(group)[0]["last epoch"] == "0.0100 ± 0.0000"
    assert "counts as chance, 0.01." in report.markdown_of(group)


def test_updates_that_were_skipped_are_counted(tmp_path):
    def skip(lines):
        return [line | {"skipped": 2 * (line["act"] == "relu")} for line in lines]

    (group,) = the_groups(write_record(tmp_path / "run", skip))
    assert [row["skipped"] for row in report.table_of(group)] == ["12", "0"]
    assert "skipped: updates that were left out" in report.markdown_of(group)


def test_a_caption_tells_unequal_numbers_of_seeds():
    nets = [({"act": act}, [[{"seed": seed}] for seed in range(count)]) for act, count in (("relu", 3), ("selu", 1))]
    assert plots.caption(nets) == "lines are means over 1 to 3 seeds, bands span them"
    assert plots.caption(nets[:1]) == "lines are means over 3 seeds, bands span them"
    assert plots.caption(nets[1:]) == ""


def test_a_heading_says_that_a_part_of_the_training_set_was_learnt(tmp_path):
    write_record(tmp_path / "run", protocol={"train_size": 128})
    (group,) = the_groups(tmp_path)
    assert group.heading == "Table 2: many narrow layers. digits (train size 128)"


def test_time_hardware_numpy_and_command_may_differ_and_are_all_named(tmp_path):
    write_record(tmp_path / "one")
    changes = {"command": "python -m experiments.depth --seed 3", "hardware": {"device": "H200"}}
    write_record(tmp_path / "two", settings={"seed": 3}, versions={"numpy": "3.0"}, **changes)
    (group,) = the_groups(tmp_path)
    text = report.markdown_of(group)
    for said in ("numpy 2.4.6 and 3.0", "1 x cpu (", "1 x H200 (", *(["--seed 3", "--seeds 3"])):
        assert said in text
    for said in ("feed", "a" * 40, "jax 0.10.2", "batch size 32", "one (2026-01-01", "1,437 train"):
        assert said in text
    assert [row["seeds"] for row in report.table_of(group)] == ["6", "6"]


def test_groups_have_names_of_their_own(tmp_path):
    write_record(tmp_path / "sweep" / "a")
    write_record(tmp_path / "sweep" / "b", settings={"seed": 3})
    write_record(tmp_path / "c c", protocol={"epochs": 9})
    write_record(tmp_path / "other" / "c c", commit="b" * 40)
    write_record(tmp_path / "cifar", data={"name": "cifar10", "fingerprint": "beef"})
    assert sorted(group.name for group in the_groups(tmp_path)) == ["c-c", "c-c-2", "depth-cifar10", "sweep"]


def test_uncommitted_changes_are_noted(tmp_path):
    (group,) = the_groups(write_record(tmp_path / "run", commit="a" * 40 + "+changes"))
    assert "cannot be checked" in group.notes[0]
    assert group.notes[0] in report.markdown_of(group)


# --- what is left out


@pytest.mark.parametrize("same", [True, False])
def test_of_a_run_that_is_there_twice_the_first_counts(tmp_path, same):
    def worse(lines):
        return lines if same else [{**line, "test_accuracy": 0.0} for line in lines]

    write_record(tmp_path / "a")
    (group,) = the_groups(tmp_path)
    alone = report.table_of(group)
    write_record(tmp_path / "b", worse, settings={"seed": 2})  # seeds 2, 3 and 4
    (group,) = the_groups(tmp_path)
    (note,) = group.notes
    assert re.fullmatch(r"b: runs that a has too, .*: lk_relu 50 auto 0.001 seed 2; relu 50 auto 0.001 seed 2\.", note)
    assert ("the same numbers" if same else "OTHER numbers") in note
    (row, _) = group.numbers
    assert row["seeds"] == [0, 1, 2, 3, 4]
    assert row["last"][2] == accuracy({"act": "relu"}, 2, 2)
    assert alone[0]["seeds"] == "3"
    # the same folder twice is one record
    assert len(report.read_records([tmp_path, tmp_path / "a"])[0]) == 2


def test_unfinished_runs_are_left_out_and_named(tmp_path):
    (group,) = the_groups(write_record(tmp_path / "run", lambda lines: lines[:-3]))  # relu: seed 0, half of seed 1
    (note,) = group.notes
    assert note == (
        "run: runs that are not finished, and are left out: relu 50 auto 0.001 seed 1 (epoch 1 of 2); "
        "relu 50 auto 0.001 seed 2 (epoch 0 of 2)."
    )
    assert [row["seeds"] for row in report.table_of(group)] == ["1*", "3"]


def test_a_record_without_a_finished_run_has_no_table_and_says_so(tmp_path):
    (group,) = the_groups(write_record(tmp_path / "run", lambda lines: lines[:1]))
    assert report.table_of(group) == []
    report.write(tmp_path / "out", [group])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No run is finished." in page
    assert "seed 2 (epoch 0 of 2)" in page


def garble_line(number, change):
    def garble(folder):
        path = folder / "metrics.jsonl"
        texts = path.read_text().splitlines(keepends=True)
        texts[number] = change(texts[number])
        path.write_text("".join(texts))

    return garble


def without(key):
    return lambda text: json.dumps({name: value for name, value in json.loads(text).items() if name != key}) + "\n"


def replaced(**values):
    return lambda text: json.dumps({**json.loads(text), **values}) + "\n"


def change_config(change):
    def garble(folder):
        (folder / "config.json").write_text(change((folder / "config.json").read_text()))

    return garble


def write_times(text):
    return lambda folder: (folder / "times.json").write_text(text)


@pytest.mark.parametrize(
    ("garble", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (change_config(lambda text: text[: len(text) // 2]), "config.json cannot be read"),
        (change_config(lambda _: "[]"), "config.json cannot be read"),
        (change_config(lambda _: "[" * 100_000), "config.json"),
        (change_config(without("protocol")), "config.json has no protocol"),
        (change_config(replaced(data={"name": "digits"})), "config.json has no fingerprint"),
        (change_config(replaced(nets=[])), "config.json is garbled"),
        (change_config(replaced(nets=[1])), "config.json is garbled"),
        (change_config(replaced(axes=[1])), "config.json"),
        (change_config(replaced(axes=["act"], nets=[{"act": "relu", "parameters": 1}])), "config.json has no depth"),
        (change_config(replaced(axes=["depth", "init", "lr"])), "config.json has no act"),
        (change_config(replaced(axes=["act", "init", "lr"])), "config.json has no depth"),
        (change_config(replaced(settings={"seed": True, "seeds": 3, "epochs": 2})), "garbled (seed is True)"),
        (change_config(without("axes")), "no table is made of it: it is of depth"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl, line 0 cannot be read"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), "no epoch is finished"),
        (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe"), "metrics.jsonl"),
        (garble_line(4, lambda _: "garbage\n"), "metrics.jsonl, line 5 cannot be read"),
        (garble_line(-1, lambda text: text[:50]), "metrics.jsonl, line 12 cannot be read"),
        (garble_line(4, lambda _: "3\n"), "line 5"),
        (garble_line(4, lambda _: ""), "line 5 is garbled (epoch 2 follows 0 of 2)"),
        (garble_line(4, lambda text: text * 2), "line 6 is garbled (epoch 1 follows 1 of 2)"),
        (garble_line(4, without("test_accuracy")), "line 5 has no test_accuracy"),
        (garble_line(4, without("act")), "line 5 has no act"),
        (garble_line(4, replaced(act="selu")), "line 5 is garbled (config.json knows no selu 50 auto 0.001 with seed"),
        (garble_line(4, replaced(seed=7)), "with seed 7"),
        (garble_line(4, replaced(test_accuracy=1.5)), "line 5 is garbled (test_accuracy is 1.5)"),
        (garble_line(4, replaced(test_accuracy="0.5")), "line 5 is garbled (test_accuracy is '0.5')"),
        (garble_line(4, replaced(signal_by_layer=[float("nan")] * LAYERS)), "(signal_by_layer is nan)"),
        (garble_line(4, replaced(dead_by_layer=[1])), "line 5 is garbled (dead_by_layer and signal_by_layer"),
        (garble_line(4, replaced(diverged="nan")), "line 6 is garbled (the run has diverged before it)"),
        (write_times("{"), "times.json cannot be read"),
        (write_times('{"steps": 3, "medians": []}'), "times.json is garbled (medians is [])"),
        (write_times('{"steps": 3, "medians": [{"act": "relu", "step_seconds": 0}]}'), "(a step took no time)"),
    ],
)
def test_a_damaged_record_is_named_with_the_reason_and_skipped(tmp_path, garble, reason):
    write_record(tmp_path / "good")
    garble(write_record(tmp_path / "sub" / "bad"))
    records, (problem,) = report.read_records([tmp_path])
    assert [record.place for record in records] == ["good"]
    assert problem.startswith("sub/bad: ")
    assert reason in problem
    assert str(tmp_path) not in problem  # it goes onto the page
    assert "\n" not in problem


@pytest.mark.slow
def test_the_command_goes_on_after_a_damaged_record(command, tmp_path):
    write_record(tmp_path / "runs" / "good")
    (write_record(tmp_path / "runs" / "bad") / "config.json").unlink()
    code, said, error = command()
    assert code == 0
    assert re.fullmatch(r"left out: bad: bad/config.json cannot be read.*\n", error)
    assert "depth-digits " in said
    assert "1 record, 2 nets" in said
    assert "<li>bad: bad/config.json" in (tmp_path / "report" / "report.html").read_text()


def test_no_records_is_one_clear_line(command, tmp_path):
    (tmp_path / "runs").mkdir()
    assert command() == (2, "", "error: there is no record to report in runs; make one, or pass its folder\n")
    assert command("elsewhere") == (
        2, "", "error: there is no folder elsewhere; pass folders with records, such as runs\n",
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# --- other tables


def test_costs_are_columns_where_they_are_known(tmp_path):
    nets = [{"act": "relu", "init": "auto", "lr": 1e-4, "parameters": 5, "flops": 2_500_000, "activation_bytes": 2048}]
    (group,) = the_groups(
        write_record(tmp_path / "run", experiment="parameters", axes=["act", "init", "lr"], nets=nets)
    )
    (row,) = report.table_of(group)
    assert (row["MFLOP"], row["activation KiB"], row["parameters"]) == ("2.5", "2", "5")
    assert group.heading.startswith("Table 3")


def test_step_times_stand_beside_the_published_ones(tmp_path):
    nets = [
        {"act": act, "link": "inside", "init": "auto", "lr": 1e-3, "parameters": 5} for act in ("lk_relu", "lk_relu_bn")
    ]
    axes = ["act", "link", "init", "lr"]
    folder = write_record(tmp_path / "run", experiment="resnet50", axes=axes, nets=nets)
    medians = [{"act": act, "link": "inside", "step_seconds": s} for act, s in (("lk_relu", 0.1), ("lk_relu_bn", 0.25))]
    (folder / "times.json").write_text(json.dumps({"steps": 7, "medians": medians}))
    (group,) = the_groups(folder)
    text = report.markdown_of(group)
    assert "7 steps of each net in turns" in text
    assert "| act | link | ms a step | time / lk_relu | paper | later |" in text
    assert "| lk_relu_bn | inside | 250 | 2.50 | 2.30288 | 2.09 |" in text
    assert list(tables.time_table("resnet50", medians[1:])[0]) == ["act", "link", "ms a step", "time / lk_relu_bn"]
    assert "paper" not in tables.time_table("depth", medians)[0]
    assert "paper" not in tables.time_table("resnet50", [net | {"link": "everywhere"} for net in medians])[0]


# --- files


def test_csv_has_ten_digits(tmp_path):
    (group,) = the_groups(write_record(tmp_path / "run"))
    relu, lk_relu = csv.DictReader(io.StringIO(report.csv_of(group)))
    values = [accuracy({"act": "relu"}, seed, 2) for seed in range(3)]
    assert float(relu["last_mean"]) == pytest.approx(np.mean(values), rel=1e-9)
    assert float(relu["last_deviation"]) == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert [float(value) for value in relu["last_by_seed"].split()] == pytest.approx(values, rel=1e-9)
    assert (relu["seeds"], relu["seed_numbers"], relu["depth"], relu["fingerprint"]) == ("3", "0 1 2", "50", "feed")
    assert (lk_relu["dead"], lk_relu["dead_from"], lk_relu["later"]) == ("0", "", "")


class _Page(HTMLParser):
    """All addresses and cells of a page."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.cells, self._cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object")
        self._cell = tag in ("td", "th")

    def handle_endtag(self, _):
        self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.cells.append(data)


@pytest.fixture(scope="module")
def a_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_record(folder / "runs" / "one")
    write_record(folder / "runs" / "two", protocol={"epochs": 2, "note": "<b>&"}, commit="b" * 40)
    found = the_groups(folder / "runs")
    report.write(folder / "out", found, ["bad: <i>why</i>"])
    return folder / "out", found


@pytest.mark.slow
def test_each_table_has_its_files(a_report):
    folder, found = a_report
    tables_ = [f"{name}{end}" for name in ("one", "two") for end in (".csv", ".md", ".png", "-curves.png")]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*tables_, "contents.json", "report.html"])
    for group in found:
        assert (folder / f"{group.name}.md").read_text(encoding="utf-8") == report.markdown_of(group)
        assert tables.markdown(report.table_of(group)) in report.markdown_of(group)
    for picture in folder.glob("*.png"):
        with Image.open(picture) as image:
            image.verify()
            assert min(image.size) > 200


def test_the_page_has_every_table_and_needs_nothing_else(a_report):
    folder, found = a_report
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    pictures = [address for address in page.addresses if not address.startswith("#")]
    assert len(pictures) == 5 * len(found)
    for picture in pictures:
        kind, _, code = picture.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(code))) as image:
            image.verify()
    assert not re.search(r"https?:|url\(|@import", text)
    for group in found:
        assert f'id="{group.name}"' in text
        assert f'href="#{group.name}"' in text
        cells = [cell for row in report.table_of(group) for cell in row.values()]
        assert any(page.cells[i : i + len(cells)] == cells for i in range(len(page.cells)))
        assert group.config["commit"] in text
    assert "&lt;b&gt;&amp;" in text
    assert "bad: &lt;i&gt;why" in text
    for said in ("prefers-color-scheme: dark", "width=device-width", "python -m experiments.depth --seeds 3"):
        assert said in text


@pytest.mark.slow
def test_the_same_records_make_the_same_bytes(a_report, tmp_path):
    folder, found = a_report
    report.write(tmp_path / "again", found, ["bad: <i>why</i>"])
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_report_is_replaced_and_nothing_else_is(command, tmp_path, monkeypatch):
    monkeypatch.setattr(
        report, "_write_table", lambda folder, group: (folder / f"{group.name}.md").write_text("") or {}
    )
    write_record(tmp_path / "runs" / "one")
    (tmp_path / "empty").mkdir()
    assert command("--out", "empty")[0] == 0
    assert command("--out", "deep/out")[0] == 0
    (tmp_path / "runs" / "one").rename(tmp_path / "runs" / "two")
    write_record(tmp_path / "runs" / "other", protocol={"batch_size": 64})
    assert command("--out", "deep/out")[0] == 0
    names = ["contents.json", "other.md", "report.html", "two.md"]
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == names
    (tmp_path / "deep" / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, why in (("deep/out", "has mine.txt, which no report made"), ("runs", "no report"), ("file", "no report")):
        code, _, error = command("--out", out)
        assert code == 2
        assert re.fullmatch(rf"error: .*{why}.*\n", error)
    assert (tmp_path / "deep" / "out" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    code, _, error = command("--out", "file/out")
    assert code == 2
    assert error.startswith("error: cannot write file/out")


def test_a_report_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    (group,) = the_groups(write_record(tmp_path / "run"))
    monkeypatch.setattr(report, "_write_table", lambda *_: {})
    report.write(tmp_path / "out", [group])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_):
        raise KeyboardInterrupt

    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: fail() if self.name == "new" else rename(self, to))
        with pytest.raises(KeyboardInterrupt):
            report.write(tmp_path / "out", [group])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    monkeypatch.setattr(report, "page", fail)
    with pytest.raises(KeyboardInterrupt):
        report.write(tmp_path / "out", [group, group])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        report.write(tmp_path / "new", [group])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


# --- pictures


def many(acts, **axes):
    """The lines of a grid of nets, one seed, one epoch."""
    nets = [{"act": act} for act in acts]
    for axis, values in axes.items():
        nets = [{**net, axis: value} for net in nets for value in values]
    names = ("act", *axes)
    return [line(net, names, 0, 1) for net in nets], names


@pytest.mark.parametrize(
    ("acts", "axes", "rows"),
    [
        (["relu", "lk_relu"], {"init": ["auto", "glorot"]}, 1),
        (["a", "b", "c", "d", "e"], {"init": ["auto", "glorot"], "lr": [1e-2, 1e-3, 1e-4, 1e-5]}, 8),
        (["a", "lk_a", "b", "lk_b", "c", "lk_c", "a_bn", "b_bn", "c_bn"], {"inputs": list("xyz"), "depth": [10]}, 9),
        (
            [f"{p}{a}{s}" for a in "abcd" for p in ("", "lk_") for s in ("", "_bn")],
            {"link": [1, 2], "init": [3, 4]},
            16,
        ),
        ([f"{a}" for a in range(13)], {}, 3),
        (["a", "lk_a", "b", "lk_b", "c", "lk_c", "d", "lk_d", "a_bn"], {}, 2),
    ],
)
def test_many_nets_are_drawn_in_rows_of_five_that_tell_them_apart(acts, axes, rows):
    lines, names = many(acts, **axes)
    facets = plots._facets(tables.by_net(lines, names))
    assert len(facets) == rows
    assert len({(title, curve.label) for title, curves in facets for curve in curves}) == len(lines)
    for _, curves in facets:
        assert len({curve.colour for curve in curves}) == len(curves) <= 5


def test_dead_units_of_a_later_net_are_not_cut_off():
    lines = [{**line, "dead_by_layer": [0, 0, 3 * number]} for number, line in enumerate(many(["relu", "selu"])[0])]
    ((_, curves),) = plots._facets(tables.by_net(lines, ["act"]))
    panel = plots.figure(4, 3).subplots()
    plots._draw(panel, curves, plots._PANELS["Dead units by layer, after training"], CONFIG["data"])
    assert panel.get_ylim()[1] >= 3
