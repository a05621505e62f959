"""Sweeps: which commands run, what is skipped, resumed and named as failed; one with a real process."""

import functools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from experiments import depth, sweep
from experiments.engine.settings import recorded
from tests.commands import in_this_process

ROOT = Path(__file__).parents[2]
TINY = ["--dataset", "digits", "--depth", "2", "--epochs", "1", "--batch-size", "479"]


@pytest.fixture
def command(tmp_path):
    """The exit code, standard output and standard error of a sweep, run in tmp_path."""
    return functools.partial(in_this_process, sweep.main, folder=tmp_path)


class Process:
    """What Popen gives, for a command that has ended."""

    def __init__(self, code):
        self.returncode, self.ended = code, []

    def poll(self):
        return self.returncode

    def terminate(self):
        self.ended.append("asked")

    def wait(self):
        self.ended.append("waited for")


@pytest.fixture
def ran(monkeypatch):
    """Sweeps in a moment: each command leaves its record and is listed here; `codes` says how others end.

    A code other than 0 and 3 leaves half a record.
    """
    commands, codes = [], {}

    def start(job):
        commands.append(str(job))
        code = codes.get(job.folder.name, 0)
        job.log.write_text(f"$ {job}\nit works\nerror: no luck\n\n")
        options = job.command[3:]
        if "--resume" in options:
            settings = json.loads((job.folder / "config.json").read_text())["settings"]
            settings = depth.Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        else:
            job.folder.mkdir()
            settings = depth.TABLE.check(depth.TABLE.parse(options))
        write_record(job.folder, settings, whole=code in (0, 3), diverged=code == 3)
        return Process(code)

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(sweep, "_POLL_EVERY", 0)
    start.commands, start.codes = commands, codes
    return start


def write_record(folder, settings, *, whole, diverged=False):
    (net,) = depth.TABLE.cells(settings)
    config = {
        "experiment": "depth", "command": "python", "settings": recorded(settings), "axes": list(depth.TABLE.all_axes),
        "protocol": {}, "data": {"name": "digits", "fingerprint": "feed", "description": "digits"},
        "nets": [{**net, "parameters": 1}], "versions": {}, "hardware": {}, "commit": "a" * 40, "time": "2026",
    }  # fmt: skip
    result = {
        "train_loss": 1.0, "test_accuracy": 0.5, "units": 8, "dead_units": 0, "dead_by_layer": [0, 0],
        "signal_by_layer": [1.0, 1.0], "seconds": 1.0,
    }  # fmt: skip
    seeds = range(settings.seeds if whole else settings.seeds - 1)
    lines = [{**net, "seed": seed, "epoch": 1, **({"diverged": "nan"} if diverged else result)} for seed in seeds]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def tiny(acts, *options, seeds=2, out="out"):
    return ["depth", "--seeds", seeds, "--out", out, *options, "--", *TINY, "--act", *acts]


# --- the commands


def test_dry_run_prints_a_command_for_each_net_and_does_nothing(command, tmp_path):
    options = ["--preset", "paper", "--act", "relu", "lk_relu", "--init", "auto", "glorot", "--norm", "batch"]
    code, said, error = command("depth", "--dry-run", "--seeds", 3, "--", *options, "--epochs", "7", "--shuffle")
    assert (code, error) == (0, "")
    commands = said.splitlines()
    assert commands[1] == (
        "python -m experiments.depth --preset paper --act relu_bn --init glorot --lr 0.001 --epochs 7 --shuffle "
        "--seeds 3 --depth 50 --out runs/sweep-depth/relu_bn-50-glorot-0.001"
    )
    assert len(commands) == 4
    assert list(tmp_path.iterdir()) == []
    asked = depth.TABLE.check(depth.TABLE.parse([*options, "--epochs", "7", "--shuffle", "--seeds", "3"]))
    cells = []
    for text in commands:
        settings = depth.TABLE.check(depth.TABLE.parse(text.split()[3:]))
        cells += depth.TABLE.cells(settings)
        assert settings.epochs == 7
        assert settings.shuffle
        assert settings.seed == 100
    assert cells == depth.TABLE.cells(asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "commands"),
    [("depth", 13), ("width", 16), ("resnet50", 16), ("covariate_shift", 72), ("parameters", 12), ("allcnn", 8)],
)
def test_every_table_can_be_swept(command, name, commands):
    code, said, _ = command(name, "--dry-run")
    assert code == 0
    folders = re.findall(rf"^python -m experiments\.{name} .*--seeds 5 .*--out (\S+)$", said, re.MULTILINE)
    assert len(set(folders)) == commands


def test_learning_rates(command):
    _, said, _ = command("learning_rates", "--dry-run", "--", "--init", "auto")
    assert len(said.splitlines()) == 5 * 4
    assert "--act swish --init auto --lr 1e-05" in said
    assert "runs/sweep-learning_rates/swish-50-auto-1e-05" in said
    assert "glorot" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["dpeth"], "no table dpeth; take one of width, depth, .*learning_rates"),
        (["revive"], "run python -m experiments.revive"),
        (["report"], "no table report"),
        (["remedies"], "remedies runs all its nets by one command.*; run python -m experiments.remedies"),
        (["depth", "--jobs", "0"], "--jobs is at least 1, got 0"),
        (["depth", "--seeds", "0"], "--seeds is at least 1, got 0"),
        (["depth", "--", "--act", "lk_rleu"], "lk_rleu"),
        (["depth", "--", "--epochs", "0"], "--epochs is at least 1"),
        (["depth", "--", "--seeds", "3"], "--seeds after -- is for the sweep to say"),
        (["depth", "--", "--out=x"], "--out after -- is for the sweep to say"),
        (["depth", "--", "--resume", "x"], "--resume after -- is for the sweep to say"),
        (["depth", "--", "--distributed"], "--distributed needs it in every process; run the table"),
        (["depth", "--out", "file"], "file is no folder"),
        (["depth", "--out", "file/sub"], "cannot write file/sub"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_runs(command, ran, tmp_path, arguments, why):
    (tmp_path / "file").write_text("mine")
    code, said, error = command(*arguments)
    assert (code, said) == (2, "")
    assert re.fullmatch(rf"error: .*{why}.*\n", error)
    assert ran.commands == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_options_that_the_table_does_not_have(command, ran):
    code, _, error = command("depth", "--", "--dpeth", "3")
    assert code == 2
    assert "--dpeth" in error
    assert ran.commands == []


# --- skip, resume, fail


@pytest.mark.slow
def test_a_second_call_finishes_what_the_first_left(command, ran):
    ran.codes["lk_relu-2-auto"] = 1
    code, said, error = command(*tiny(["relu", "lk_relu", "selu"]))
    assert code == 1
    assert re.fullmatch(
        r"failed: out/lk_relu-2-auto: exit code 1: error: no luck \(log: out/lk_relu-2-auto\.log\)\n", error
    )
    assert len(ran.commands) == 3  # it goes on after the failure
    assert "2 of 3 records are finished" in said
    for command_ in ran.commands:
        assert f"run      {command_}\n" in said

    ran.codes.clear()
    ran.commands.clear()
    _, said, _ = command(*tiny(["relu", "lk_relu", "selu"], "--dry-run"))
    again = "python -m experiments.depth --resume out/lk_relu-2-auto"
    assert said.splitlines() == ["# finished: out/relu-2-auto", again, "# finished: out/selu-2-auto"]
    code, said, error = command(*tiny(["relu", "lk_relu", "selu"]))
    assert (code, error) == (0, "")
    assert ran.commands == [again]
    assert "finished out/relu-2-auto" in said
    assert "3 of 3 records are finished" in said

    ran.commands.clear()
    assert command(*tiny(["relu", "lk_relu", "selu", "elu"], "--jobs", "3"))[0] == 0  # more nets in the same sweep
    assert [text.split()[-1] for text in ran.commands] == ["out/elu-2-auto"]


def test_a_run_that_diverges_is_a_result(command, ran):
    ran.codes["relu-2-auto"] = 3
    code, said, error = command(*tiny(["relu"]))
    assert (code, error) == (0, "")
    assert "diverged out/relu-2-auto" in said
    ran.commands.clear()
    assert command(*tiny(["relu"]))[0] == 0
    assert ran.commands == []


@pytest.mark.parametrize(
    ("code", "said"), [(-9, "signal SIGKILL"), (2, "exit code 2"), (143, "exit code 143"), (1, "exit code 1")]
)
def test_how_a_command_failed_is_said(command, ran, code, said):
    ran.codes["relu-2-auto"] = code
    found, _, error = command(*tiny(["relu"]))
    assert found == 1
    assert f"out/relu-2-auto: {said}: error: no luck (log: " in error


def test_a_command_that_ends_well_without_its_record_failed(command, monkeypatch):
    monkeypatch.setattr(sweep, "start", lambda _: Process(0))
    code, _, error = command(*tiny(["relu"]))
    assert code == 1
    assert "out/relu-2-auto: exit code 0: it said nothing" in error


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (["--epochs", "2"], "epochs 1, and this sweep has 2"),
        (["--decay", "0.5"], "decay 0.0, and this sweep has 0.5"),
        (["--train-size", "500"], "train_size None, and this sweep has 500"),
    ],
)
def test_records_with_other_settings_are_not_taken_for_finished(command, ran, changed, why):
    assert command(*tiny(["relu"]))[0] == 0
    ran.commands.clear()
    code, _, error = command(*tiny(["relu"]), *changed)
    assert code == 2
    assert re.fullmatch(rf"error: out/relu-2-auto is a record with {why}; pass another --out\n", error)
    code, _, error = command(*tiny(["relu"], seeds=3))
    assert code == 2
    assert "with seeds 2, and this sweep has 3" in error
    assert ran.commands == []


def test_what_the_data_decide_is_no_difference(command, ran, tmp_path):
    assert command(*tiny(["relu"]))[0] == 0
    path = tmp_path / "out" / "relu-2-auto" / "config.json"
    config = json.loads(path.read_text())
    config["settings"] |= {"batch_size": 32}  # as a run settles it
    options = ["depth", "--seeds", 2, "--out", "out", "--", "--act", "relu", "--depth", "2", "--epochs", "1"]
    for asked, code in [({"batch_size": None}, 0), ({"batch_size": 32}, 2), ({}, 2)]:
        path.write_text(json.dumps(config | {"asked": asked}))
        assert command(*options)[0] == code
        assert command(*options, "--batch-size", "32")[0] == 0
    assert len(ran.commands) == 1


@pytest.mark.parametrize("prepared", [False, True])
def test_a_set_that_was_prepared_since_is_another(command, ran, tmp_path, monkeypatch, prepared):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    assert command(*tiny(["relu"]))[0] == 0
    if prepared:
        info = tmp_path / "tfds" / "cifar10" / "3.0.2" / "dataset_info.json"
        info.parent.mkdir(parents=True)
        info.write_text("{}")
    options = [
        "depth",
        "--seeds",
        2,
        "--out",
        "out",
        "--",
        "--act",
        "relu",
        "--depth",
        "2",
        "--epochs",
        "1",
        "--batch-size",
        "479",
    ]
    code, _, error = command(*options)
    assert code == (2 if prepared else 0)
    assert ("dataset digits, and this sweep has cifar10" in error) == prepared


def test_a_damaged_record_goes_to_its_command(command, ran, tmp_path):
    folder = tmp_path / "out" / "relu-2-auto"
    folder.mkdir(parents=True)
    assert command(*tiny(["relu"], "--dry-run"))[1].endswith("--out out/relu-2-auto\n")  # it is empty
    (folder / "config.json").write_text("{")
    assert command(*tiny(["relu"], "--dry-run"))[1] == "python -m experiments.depth --resume out/relu-2-auto\n"


def test_two_sweeps_in_a_folder(command, ran, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".sweep.lock"):
        code, _, error = command(*tiny(["relu"]))
    assert (code, error) == (2, "error: another sweep runs in out; wait for it, or pass another --out\n")
    assert ran.commands == []
    assert command(*tiny(["relu"]))[0] == 0


@pytest.mark.slow
def test_so_many_processes_at_a_time(command, monkeypatch, ran):
    running = []

    class Slow(Process):
        looks = 3

        def poll(self):
            self.looks -= 1
            return None if self.looks else running.remove(self) or self.returncode

    def start(job):
        ran(job)
        running.append(Slow(0))
        most.append(len(running))
        return running[-1]

    most = []
    monkeypatch.setattr(sweep, "start", start)
    assert command(*tiny(["relu", "selu", "elu", "swish", "tanh"], "--jobs", 2))[0] == 0
    assert max(most) == 2
    assert len(most) == 5


# --- real processes


@pytest.mark.slow
def test_a_sweep(command, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    arguments = tiny(["relu"], seeds=1)
    code, said, error = command(*arguments)
    record = tmp_path / "out" / "relu-2-auto"
    log = record.with_suffix(".log").read_text()
    assert (code, error) == (0, ""), log
    assert [net["act"] for net in json.loads((record / "config.json").read_text())["nets"]] == ["relu"]
    assert sweep.is_finished(record)
    assert log.startswith("$ python -m experiments.depth --act relu --init auto ")
    assert "epoch   1/1" in log
    assert "done     out/relu-2-auto\n" in said
    assert command(*arguments)[1].splitlines()[0] == "finished out/relu-2-auto"


SLEEPER = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[2]).write_text("ready")
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_children_save(command, monkeypatch, tmp_path, signum):
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    real_start = sweep.start

    def start(job):
        job = sweep.Job(job.folder, [sys.executable, "-c", SLEEPER, str(saved), str(ready)])
        process = real_start(job)
        assert os.getpgid(process.pid) != os.getpgid(0)  # Ctrl-C at the terminal does not reach it
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signum)
        return process

    monkeypatch.setattr(sweep, "start", start)
    code, _, error = command(*tiny(["relu", "lk_relu"]))
    assert code == 128 + signum
    assert error == (
        f"interrupted by {signal.Signals(signum).name}. 2 nets are not finished; the same command resumes them\n"
    )
    assert saved.read_text() == "saved"


def test_the_last_line_of_the_log_is_what_was_said_last(tmp_path):
    code = "import sys; print('out'); print('error: why', file=sys.stderr); sys.exit(2)"
    job = sweep.Job(tmp_path / "net", [sys.executable, "-c", code])
    process = sweep.start(job)
    assert process.wait() == 2
    assert sweep._failure(job, 2) == f"{tmp_path / 'net'}: exit code 2: error: why (log: {tmp_path / 'net'}.log)"
