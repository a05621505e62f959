"""Runs that are killed, interrupted, taken up again, or fought over: real processes."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[1]
# Dropout, flips and shifts, batch norm, Nesterov momentum and a step schedule: all that a checkpoint must hold.
TABLE = "allcnn"
OPTIONS = shlex.split(
    "--preset quick --act lk_relu relu_bn --width 3 --epochs 3 --batch-size 360 --train-size 1100 --seeds 2 --augment"
)
EVERY_STEP = ["--checkpoint-every", "0"]


def start(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TERM": "dumb", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{TABLE}", *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip


def finish(process, timeout=300):
    out, error = process.communicate(timeout=timeout)
    return process.returncode, out, error


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def saved(folder):
    """The arrays of the last checkpoint, as bytes."""
    step = max(int(path.name) for path in (folder / "checkpoint").iterdir() if path.name.isdigit())
    arrays = (folder / "checkpoint" / str(step) / "arrays").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(arrays).item_metadata.tree
        found = checkpointer.restore(
            arrays, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        )

    def raw(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(found)]


def wait_for(condition, process, timeout=200):
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end
        time.sleep(0.02)


def checkpoints(folder):
    return {path.name for path in (folder / "checkpoint").glob("*")} if (folder / "checkpoint").is_dir() else set()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, _, error = finish(start(*OPTIONS, "--out", folder))
    assert (code, error) == (0, "")
    assert len(metrics(folder)) == 2 * 2 * 3
    return folder


def kill_and_resume(folder, kills, seed):
    """Start, kill at random moments after the first checkpoint, and resume until it is done."""
    chance = random.Random(seed)
    process = start(*OPTIONS, *EVERY_STEP, "--out", folder)
    for _ in range(kills):
        before = checkpoints(folder)
        wait_for(lambda before=before: checkpoints(folder) - before, process)
        time.sleep(chance.uniform(0, 3))
        process.kill()
        finish(process)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"act": "lk_r')  # as if it had been killed while it wrote
        process = start("--resume", folder, *EVERY_STEP)
    return finish(process)


def same(folder, whole):
    assert metrics(folder) == metrics(whole)
    ours, theirs = saved(folder), saved(whole)
    assert len(ours) == len(theirs) > 10
    assert ours == theirs


def test_a_killed_run_goes_on_to_the_same_bits(uninterrupted, tmp_path):
    code, _, error = kill_and_resume(tmp_path / "run", kills=1, seed=0)
    assert (code, error) == (0, "")
    same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_several_random_kills(seed, uninterrupted, tmp_path):
    code, _, error = kill_and_resume(tmp_path / "run", kills=4, seed=seed)
    assert (code, error) == (0, "")
    same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(*OPTIONS, *EVERY_STEP, "--out", folder)
    wait_for(lambda: any("tmp" in name for name in checkpoints(folder)) and len(checkpoints(folder)) > 1, process)
    process.kill()
    finish(process)
    assert any("tmp" in name for name in checkpoints(folder))
    assert finish(start("--resume", folder))[::2] == (0, "")
    same(folder, uninterrupted)


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(*OPTIONS, "--out", folder)
    wait_for(lambda: (folder / "metrics.jsonl").exists(), process)
    process.kill()
    finish(process)
    assert finish(start("--resume", folder))[::2] == (0, "")
    same(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_prints_the_command_that_resumes(signum, code, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(*OPTIONS, *EVERY_STEP, "--out", folder)
    wait_for(lambda: checkpoints(folder), process)
    time.sleep(1)
    second = start("--resume", folder)  # while the first one holds it
    other_code, _, other_error = finish(second)
    assert other_code == 2
    assert re.fullmatch(rf"error: the run .* is being written by process {process.pid} on .* since .*\n", other_error)
    if process.poll() is None:
        process.send_signal(signum)
    found, _, error = finish(process)
    assert found == code, error
    said = re.fullmatch(rf"interrupted by {signum.name}\. The run is saved; go on with: (.*)\n", error)
    assert said
    words = shlex.split(said[1])
    assert words[:3] == ["python", "-m", f"experiments.{TABLE}"]
    assert finish(start(*words[3:]))[::2] == (0, "")
    same(folder, uninterrupted)


@pytest.mark.slow
def test_a_complete_run_says_so(uninterrupted):
    before = metrics(uninterrupted)
    code, out, error = finish(start("--resume", uninterrupted))
    assert (code, error) == (0, "")
    assert f"the run {uninterrupted} is complete" in out
    assert metrics(uninterrupted) == before
