"""Table 2's command, as a person runs it: real processes for what works, in-process for the many bad inputs."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import pytest

from experiments import depth
from experiments.engine import data as data_lib
from experiments.engine import settings as settings_lib
from experiments.engine.errors import UsageError, run_command
from experiments.engine.rows import Row
from experiments.engine.run import run as run_table
from tests.commands import command, in_this_process, metrics

ROOT = Path(__file__).parents[2]
# 479 * 3 = 1437: one shape to compile
MODULE = "experiments.depth"
OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # else they compile twice as fast
TINY = ["--dataset", "digits", "--depth", "3", "--epochs", "2", "--batch-size", "479"]


@pytest.fixture
def in_process(tmp_path):
    """The exit code, standard output and standard error of a command, run in tmp_path/here."""
    here = tmp_path / "here"
    here.mkdir()
    return functools.partial(in_this_process, lambda: run_table(depth.TABLE), folder=here)


# --- a whole run


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return command(MODULE, *TINY, "--act", "relu", "lk_relu", "--seeds", 2, "--seed", 7, "--out", folder), folder


@pytest.mark.slow
def test_a_run_says_what_it_does(a_run):
    (code, out, error), folder = a_run
    assert (code, error) == (0, "")
    config = json.loads((folder / "config.json").read_text())
    assert f"1,437 train and 360 test images of 8x8x1, 10 classes (fingerprint {config['data']['fingerprint']})" in out
    assert re.search(r"^device +1 x \S+, jax " + re.escape(jax.__version__), out, re.MULTILINE)
    # stem 49*4+4, first and others 9*4*4+4 (linked: 9*8*4+4), read-out 4*4*4*10+10 (linked: twice the inputs)
    assert re.search(r"network +relu, layers 3, 1,294 parameters, init auto, learning rate 0.001", out)
    assert re.search(r"network +lk_relu, layers 3, 2,222 parameters", out)
    epochs = re.findall(r"^(\S+) seed (\d+)  epoch +(\d)/2  loss \d.*test (\d.\d{4})  dead (\d+)", out, re.M)
    assert epochs == [
        (line["act"], str(line["seed"]), str(line["epoch"]), f"{line['test_accuracy']:.4f}", str(line["dead_units"]))
        for line in metrics(folder)
    ]
    assert str(folder) in out


@pytest.mark.slow
def test_the_closing_table_is_the_mean_and_the_deviation_over_seeds(a_run):
    (_, out, _), folder = a_run
    table = out[out.index("Table 2") :]
    for act in ("relu", "lk_relu"):
        lines = [line for line in metrics(folder) if line["act"] == act]
        one, other = (line["test_accuracy"] for line in lines if line["epoch"] == 2)
        row = re.search(rf"^ +{act} .*", table, re.MULTILINE)
        assert row
        # the sample deviation of two values is |a - b| / sqrt(2)
        assert f"{(one + other) / 2:.4f} ± {abs(one - other) / 2**0.5:.4f}" in row[0]
        dead = sum(line["dead_units"] for line in lines if line["epoch"] == 2) / 2
        assert re.search(rf" {dead:g}(/| of )12 ", row[0])


@pytest.mark.slow
def test_a_run_leaves_its_record(a_run):
    _, folder = a_run
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "config.json", "depth.png", "metrics.jsonl"]
    lines = metrics(folder)
    assert [(line["act"], line["depth"], line["seed"], line["epoch"]) for line in lines] == [
        (act, 3, seed, epoch) for act in ("relu", "lk_relu") for seed in (7, 8) for epoch in (1, 2)
    ]
    for line in lines:
        assert {"train_loss", "test_accuracy", "dead_units", "seconds"} <= set(line)
        assert 0 <= line["test_accuracy"] <= 1
        assert line["test_accuracy"] * 360 == pytest.approx(round(line["test_accuracy"] * 360))
        assert sum(line["dead_by_layer"]) == line["dead_units"]
        assert len(line["signal_by_layer"]) == 3
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["act"] == ["relu", "lk_relu"]
    assert (config["settings"]["batch_size"], config["settings"]["epochs"], config["settings"]["seed"]) == (479, 2, 7)
    assert [(net["act"], net["depth"], net["init"], net["lr"], net["parameters"]) for net in config["nets"]] == [
        ("relu", 3, "auto", 1e-3, 1294), ("lk_relu", 3, "auto", 1e-3, 2222)
    ]  # fmt: skip
    assert config["axes"] == ["act", "depth", "init", "lr"]
    assert config["protocol"]["epochs"] == 2
    assert not {"seed", "devices", "act", "depth", "init", "lr"} & set(config["protocol"])
    assert config["command"].startswith("python -m experiments.depth --dataset digits --depth 3")
    assert {"versions", "hardware", "commit", "time", "data"} <= set(config)
    assert str(folder.parent) not in (folder / "config.json").read_text()


@pytest.mark.slow
def test_the_picture_is_a_picture(a_run):
    from matplotlib.image import imread

    _, folder = a_run
    assert (folder / "depth.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(folder / "depth.png")
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 800
    assert pixels.std() > 0.01


# --- bad input


BAD = {
    "unknown act": ("--act relu lk_rleu", "'lk_relu'"),
    "no act": ("--act", "--act"),
    "unknown dataset": ("--dataset nosuchset --data-dir .", "nosuchset", "--dataset digits"),
    "unknown init": ("--init xavier", "xavier", "glorot"),
    "unknown optimizer": ("--optimizer adamw", "adamw", "rmsprop"),
    "unknown norm": ("--norm layer", "layer", "batch"),
    "unknown preset": ("--preset fast", "fast", "paper"),
    "unknown option": ("--lrr 3", "--lrr"),
    "no number": ("--epochs many", "many"),
    "depth 0": ("--depth 3 0", "--depth is at least 1, got 0"),
    "width 0": ("--width 0", "--width is at least 1, got 0"),
    "epochs 0": ("--epochs 0", "--epochs is at least 1, got 0"),
    "seeds 0": ("--seeds 0", "--seeds is at least 1, got 0"),
    "batch 0": ("--batch-size 0", "--batch-size is at least 1, got 0"),
    "negative batch": ("--batch-size -4", "--batch-size", "-4"),
    "batch larger than the set": ("--batch-size 1438", "1,437", "1,438"),
    "negative seed": ("--seed -1", "--seed", "-1"),
    "lr 0": ("--lr 0", "--lr is a positive number, got 0"),
    "lr nan": ("--lr nan", "--lr is a positive number, got nan"),
    "lr inf": ("--lr inf", "--lr is a positive number, got inf"),
    "negative decay": ("--decay -1", "--decay", "-1"),
    "nan decay": ("--decay nan", "--decay is 0 or more, got nan"),
    "devices 0": ("--devices 0", "--devices is at least 1, got 0"),
    "too many devices": ("--devices 3", "--devices 3 needs 3 devices, got 2"),
    "seeds do not spread": ("--seeds 3 --devices 2 --seeds-mode spread", "3 seeds for 2 devices"),
    "sqrt2 twice": ("--act relu_sqrt2 --match-params", "--act relu_sqrt2 says what --match-params"),
    "batch norm twice": ("--act bn --norm batch", "--act bn says what"),
    "train size 0": ("--train-size 0", "--train-size is at least 1, got 0"),
    "train size too large": ("--train-size 1438", "1,437", "1,438"),
    "negative checkpoints": ("--checkpoint-every -1", "--checkpoint-every is 0 or more, got -1"),
    "negative time steps": ("--time-steps -1", "--time-steps is 0 or more, got -1"),
    "nothing to resume": ("--resume nowhere", "--resume takes the settings of its record"),
    "looks_linear for selu": ("--init looks_linear --act lk_relu selu", "selu"),
    "empty folder": ("--dataset cifar10 --data-dir .", "cifar10 is not prepared", "experiments.prepare cifar10"),
    "missing folder": ("--dataset cifar10 --data-dir nowhere", "nowhere does not exist", "--data-dir"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_short_message_and_leaves_nothing(case, in_process, tmp_path):
    arguments, *parts = BAD[case]
    code, _, error = in_process("--dataset", "digits", "--out", "record", *arguments.split())
    assert code == 2
    for part in parts:
        assert part in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 15  # tyro draws a box around its own
    assert len(" ".join(error.split())) < 1200
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


@pytest.mark.slow
def test_bad_input_in_a_process_of_its_own(tmp_path):
    code, out, error = command(MODULE, "--act", "lk_rleu", "--out", tmp_path / "record")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .*lk_rleu.*did you mean 'lk_relu'.*\n", error)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_record_is_refused_and_kept(in_process, tmp_path):
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "metrics.jsonl").write_text("mine")
    code, _, error = in_process(*TINY, "--out", tmp_path / "record")
    assert code == 2
    assert "exists; pass another --out" in error
    assert [path.read_text() for path in (tmp_path / "record").iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_3_and_keeps_the_record(in_process, tmp_path):
    folder = tmp_path / "record"
    options = "--width 2 --optimizer sgd --lr 1e30"
    code, _, error = in_process(*TINY, *options.split(), "--out", folder)
    assert code == 3
    said = r"stopped: epoch 1, step 2: the loss is (nan|inf); .* makes .* of finite values, first seen by .*--lr.*\n"
    assert re.fullmatch(said, error)
    assert json.loads((folder / "config.json").read_text())["settings"]["lr"] == [1e30]
    (line,) = metrics(folder)
    assert line["diverged"].startswith("epoch 1, step 2: the loss is")


@pytest.mark.slow
def test_a_net_that_diverges_leaves_the_others_to_run(in_process, tmp_path):
    options = ["--width", "2", "--optimizer", "sgd", "--lr", "1e30", "1e-3", "--seeds", "2"]
    code, said, error = in_process(*TINY, *options, "--out", tmp_path / "record")
    assert code == 3
    assert re.fullmatch(r"stopped: 2 runs diverged; the first: epoch 1, step 2: the loss is (nan|inf); .*\n", error)
    assert [("diverged" in line, line["lr"], line["seed"]) for line in metrics(tmp_path / "record")] == [
        (True, 1e30, 0), (True, 1e30, 1), *[(False, 1e-3, seed) for seed in (0, 1) for _ in range(2)]
    ]  # fmt: skip
    assert re.search(r"relu +auto +1e\+30 +0\.1000 ± 0\.0000", said)  # chance


def test_ctrl_c_ends_with_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_command(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- settings


def test_the_papers_protocol():
    settings = depth.TABLE.check(depth.TABLE.parse(["--preset", "paper"]))
    expected = {
        "preset": "paper", "dataset": "cifar10", "init": ("glorot",), "epochs": 200, "batch_size": 32, "lr": (1e-3,),
        "decay": 1e-6, "shuffle": False, "seed": 100, "seeds": 1, "depth": (50,), "width": 4, "optimizer": "adam",
        "norm": "none", "match_params": False,
    }  # fmt: skip
    assert {key: value for key, value in dataclasses.asdict(settings).items() if key in expected} == expected


def test_an_option_wins_over_the_preset():
    settings = depth.TABLE.parse(
        ["--preset=paper", "--epochs", "3", "--dataset", "digits", "--shuffle", "--act", "relu", "lk_elu"]
    )
    paper = depth.TABLE.parse(["--preset", "paper"])
    changes = {"epochs": 3, "dataset": "digits", "shuffle": True, "act": ("relu", "lk_elu")}
    assert settings == dataclasses.replace(paper, **changes)
    assert depth.TABLE.parse(["--epochs", "3", "--preset", "paper"]).epochs == 3
    assert depth.TABLE.parse([]) == depth.Settings()
    assert depth.TABLE.parse(["--preset", "quick"]) == depth.Settings(preset="quick", dataset="digits")


@pytest.mark.parametrize(("layers", "rate"), [(1, 1e-3), (50, 1e-3), (100, 5e-4), (1000, 5e-5)])
def test_the_rule_for_the_learning_rate(layers, rate):
    (cell,) = depth.TABLE.cells(depth.Settings(depth=(layers,)))
    assert cell["lr"] == pytest.approx(rate)
    assert [cell["lr"] for cell in depth.TABLE.cells(depth.Settings(depth=(layers,), lr=(0.3, 0.1)))] == [0.3, 0.1]


def test_units_to_match_the_parameters_of_a_linked_net():
    assert [Row("relu", sqrt2=True).units(width) for width in (1, 4, 10)] == [1, 5, 14]
    assert Row("relu").units(4) == 4
    assert depth.TABLE.check(depth.Settings(match_params=True, norm="batch")).act == ("lk_relu_sqrt2_bn",)


def test_the_defaults_that_depend_on_the_data():
    digits = data_lib.load("digits")
    assert dataclasses.asdict(settings_lib.settle(depth.Settings(), digits)) == dataclasses.asdict(
        dataclasses.replace(depth.Settings(), dataset="digits", batch_size=32, epochs=30)
    )
    large = dataclasses.replace(digits, train_labels=digits.train_labels.repeat(7)[:10_001])
    settled = settings_lib.settle(depth.Settings(), large)
    assert (settled.batch_size, settled.epochs) == (128, 6)
    with pytest.raises(UsageError, match="1,437"):
        settings_lib.settle(depth.Settings(batch_size=1438), digits)
    assert settings_lib.settle(depth.Settings(batch_size=1437), digits).batch_size == 1437


# --- minutes


@pytest.mark.slow
def test_fifty_layers_live_linked_and_die_plain(tmp_path):
    options = ["--dataset", "digits", "--depth", "50", "--epochs", "30", "--act", "relu", "lk_relu"]
    code, _, error = command(MODULE, *options, "--out", tmp_path / "record", timeout=1800, **OPTIMISED)
    assert code == 0, error
    last = {line["act"]: line for line in metrics(tmp_path / "record") if line["epoch"] == 30}
    assert last["lk_relu"]["test_accuracy"] >= 0.93
    assert last["lk_relu"]["dead_units"] == 0
    assert last["relu"]["test_accuracy"] < 0.2
    assert last["relu"]["dead_units"] > 0


@pytest.mark.slow
def test_a_thousand_layers_train(tmp_path):
    options = ["--dataset", "digits", "--depth", "1000", "--epochs", "1"]
    code, _, error = command(MODULE, *options, "--out", tmp_path / "record", timeout=1800, **OPTIMISED)
    assert code == 0, error
    (line,) = metrics(tmp_path / "record")
    assert line["train_loss"] < 2.25  # ln 10 is 2.303
    assert line["dead_units"] == 0
