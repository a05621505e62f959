"""Runs that are interrupted, taken up again, or fought over, in this process; tests/faults has real ones."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time

import numpy as np
import pytest

from experiments import allcnn, depth, width
from experiments.engine.checkpoints import Checkpoints
from experiments.engine.errors import InterruptedRunError
from experiments.engine.interrupts import Ended, Interrupts
from experiments.engine.records import Record
from experiments.engine.run import run as run_table
from tests import commands

SMALL = shlex.split(
    "--dataset digits --depth 1 --width 2 --act lk_relu_bn --lr 0.01 0.02 --epochs 4 --batch-size 479 --augment"
)
EVERY_STEP = ["--checkpoint-every", "0"]


def run(*arguments, table=depth.TABLE):
    """The exit code, standard output and standard error of a table's command."""
    return commands.in_this_process(lambda: run_table(table), *arguments)


def metrics(folder):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in commands.metrics(folder)]


def saved(folder):
    """The arrays of the last checkpoint, as bytes."""
    found = Checkpoints(folder / "checkpoint", 0).load()
    assert found
    return [leaf.tobytes() for leaf in found.leaves]


def same(folder, whole):
    assert metrics(folder) == metrics(whole)
    ours, theirs = saved(folder), saved(whole)
    assert len(ours) == len(theirs) > 10
    assert ours == theirs


def signalled_at(monkeypatch, number, signum):
    """From now on, so many checkpoints after this a signal arrives; the run ends with the next one."""
    saves, save = [], Checkpoints.save

    def signalling(*arguments):
        saves.append(save(*arguments))
        if len(saves) == number:
            signal.raise_signal(signum)

    monkeypatch.setattr(Checkpoints, "save", signalling)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that SIGTERM ended in the second epoch of its first net."""
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    with pytest.MonkeyPatch.context() as monkeypatch:
        signalled_at(monkeypatch, 4, signal.SIGTERM)
        assert run(*SMALL, *EVERY_STEP, "--out", folder)[0] == 143
    assert len(metrics(folder)) == 1
    return folder


@pytest.fixture(scope="module")
def whole_here(tmp_path_factory):
    """The same run in this process, beside runs that are interrupted in this process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*SMALL, "--out", folder)[0] == 0
    return folder


@pytest.fixture
def folder(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_is_interrupted_again_and_ends_as_if_nothing_had_been(
    folder, monkeypatch, whole_here
):
    with monkeypatch.context() as signalling:
        signalled_at(signalling, 9, signal.SIGINT)
        code, _, error = run("--resume", folder, *EVERY_STEP)
    assert code == 130
    again = shlex.join(["python", "-m", "experiments.depth", "--resume", str(folder), "--checkpoint-every", "0.0"])
    assert error == f"interrupted by SIGINT. The run is saved; resume it with: {again}\n"
    assert len(metrics(folder)) == 4  # after the last step of the second net's first epoch, before its line
    assert run(*shlex.split(again)[3:])[::2] == (0, "")
    same(folder, whole_here)

    before = saved(folder), metrics(folder), (folder / "config.json").read_bytes()
    code, out, error = run("--resume", folder)
    assert (code, error) == (0, "")
    assert f"the run {folder} is complete" in out
    assert (saved(folder), metrics(folder), (folder / "config.json").read_bytes()) == before

    shutil.rmtree(folder / "checkpoint")  # as in a record that was kept without it
    code, out, error = run("--resume", folder)
    assert (code, error) == (0, "")
    assert f"the run {folder} is complete" in out
    assert metrics(folder) == before[1]


@pytest.mark.slow
def test_without_a_checkpoint_a_run_that_is_not_whole_begins_again_and_says_so(folder, whole_here):
    shutil.rmtree(folder / "checkpoint")
    code, out, error = run("--resume", folder)
    assert (code, error) == (0, "")
    assert "no checkpoint is left: 0 of 2 runs are whole, the next begins anew" in out
    same(folder, whole_here)


@pytest.mark.slow
def test_without_a_checkpoint_whole_runs_stay(whole_here, tmp_path):
    folder = shutil.copytree(whole_here, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:6]), encoding="utf-8")  # of the second net two of four
    code, out, error = run("--resume", folder)
    assert (code, error) == (0, "")
    assert "no checkpoint is left: 1 of 2 runs are whole, the next begins anew" in out
    assert (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:4] == lines[:4]
    same(folder, whole_here)


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_data(folder):
    change(folder, data={**json.loads((folder / "config.json").read_text())["data"], "fingerprint": "0" * 16})


def damage_checkpoints(folder, damage):
    found = list((folder / "checkpoint").glob("*.ckpt"))
    assert len(found) == 2
    for path in found:
        path.write_bytes(damage(path.read_bytes()))


def another_net(folder):
    checkpoints = Checkpoints(folder / "checkpoint", 0)
    checkpoints.save([np.zeros(3)], checkpoints.load().facts)


def add_line(folder, text):
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(text)


REFUSED = {
    "another table's record": (lambda run: change(run, experiment="width"), "is a run of width, not of depth"),
    "another commit": (lambda run: change(run, commit="0" * 40), f"begun with commit {'0' * 40}"),
    "other versions": (lambda run: change(run, versions={"jax": "0.1"}), "begun with versions {'jax': '0.1'}"),
    "other data": (change_data, "with fingerprint 0000000000000000, this set has"),
    "no config": (lambda run: (run / "config.json").unlink(), "config.json cannot be read"),
    "garbled config": (lambda run: (run / "config.json").write_text('{"experiment": '), "config.json cannot be read"),
    "no settings": (lambda run: change(run, settings=None), "config.json are damaged"),
    "unknown settings": (lambda run: change(run, settings={"depht": 3}), "config.json are damaged"),
    "a damaged line": (lambda run: add_line(run, "{\n{}\n"), "metrics.jsonl, line 2 cannot be read"),
    "a lost line": (lambda run: (run / "metrics.jsonl").write_text(""), "a part of the record is lost"),
    "damaged checkpoints": (lambda run: damage_checkpoints(run, lambda all: all[:-1] + b"x"), "its SHA-256 is another"),
    "empty checkpoints": (lambda run: damage_checkpoints(run, lambda _all: b""), "its SHA-256 is another"),
    "another net's checkpoint": (another_net, "is of another net"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_refused_in_one_line(case, folder):
    damage, why = REFUSED[case]
    damage(folder)
    before = (folder / "metrics.jsonl").read_bytes()
    code, _, error = run("--resume", folder)
    assert code == 2
    assert re.fullmatch(r"error: .*\n", error)
    assert why in error
    assert str(folder) in error
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not (folder / ".lock").exists()


@pytest.mark.slow
def test_a_record_is_gone_on_with_by_its_own_table_and_as_it_is(folder, tmp_path):
    assert "is a run of depth, not of width" in run("--resume", folder, table=width.TABLE)[2]
    for options in (["--epochs", "9"], ["--out", tmp_path / "other"], ["--preset", "quick"], ["--seeds", "2"]):
        code, _, error = run("--resume", folder, *options)
        assert code == 2
        assert re.fullmatch(
            rf"error: --resume takes the settings .*, got {options[0]} too; leave {options[0]} out\n", error
        )
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for other in ("nowhere", "file", "empty"):
        code, _, error = run("--resume", tmp_path / other)
        assert code == 2
        assert re.fullmatch(r"error: .*\n", error)
    assert sorted(path.name for path in tmp_path.rglob("*") if folder not in (path, *path.parents)) == ["empty", "file"]


def test_a_run_that_is_held_is_let_alone(folder):
    holder = Record.reopen(folder)
    try:
        for option in ("--resume", "--out"):
            code, _, error = run(option, folder)
            assert code == 2
            assert f"is being written by process {os.getpid()} on " in error
        holder.add({"epoch": 2})
    finally:
        holder.close()
    assert len(metrics(folder)) == 2
    code, _, error = run("--out", folder, "--dataset", "digits")
    assert (code, "resume it with --resume" in error) == (2, True)


def test_a_schedule_that_does_not_fit_leaves_nothing(tmp_path):
    options = ["--preset", "quick", "--width", "2", "--epochs", "2", "--batch-size", "1437"]
    code, _, error = run(*options, "--out", tmp_path / "run", table=allcnn.TABLE)
    assert code == 2
    assert re.fullmatch(r"error: --schedule step: .*\n", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_signal_that_comes_within_a_finalizer_ends_the_work_too():
    class Signalling:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    hook, end = sys.unraisablehook, time.monotonic() + 30

    def work():
        with Ended("go on so"):
            Signalling()
            while time.monotonic() < end:
                time.sleep(0.01)

    with pytest.raises(InterruptedRunError, match="go on so") as caught:
        work()
    assert caught.value.signum == signal.SIGTERM
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before
    assert sys.unraisablehook == hook


def test_the_first_signal_is_noted_and_the_second_one_acts(request):
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts() as interrupts:
        assert interrupts.signum is None
        signal.raise_signal(signal.SIGINT)
        assert interrupts.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
