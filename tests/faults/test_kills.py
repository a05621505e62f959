"""SIGKILL at random moments, in the middle of a write too, and signals: what is resumed ends as if nothing had been."""

import json
import random
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from experiments.engine.checkpoints import Checkpoints
from tests.children import ROOT, finish, start, wait_for
from tests.experiments.engine.test_distributed import TINY, Program

pytestmark = pytest.mark.slow
KILLER = Path(__file__).parent / "killer"
TIMES = ("seconds", "training_seconds", "step_seconds")
# Small, but with all that must be kept: dropout, flips and shifts, batch norm, momentum, a step schedule, two nets.
COMMANDS = {
    "allcnn": "--preset quick --act lk_relu_bn --lr 0.01 0.02 --width 3 --epochs 3 --batch-size 360 --train-size 1100 "
    "--augment",
    "depth": "--dataset digits --depth 1 --width 2 --act lk_relu_bn relu --epochs 4 --batch-size 480 --seeds 2 "
    "--seeds-mode vmap --devices 2",
    "depth, seeds spread": "--dataset digits --depth 2 --width 2 --act lk_relu relu_bn --epochs 2 --batch-size 300 "
    "--augment --seeds 2 --seeds-mode spread --devices 2",
    "depth, one by one": "--dataset digits --depth 2 --width 2 --act lk_relu relu_bn --epochs 2 --batch-size 300 "
    "--augment --seeds 2 --devices 2",
    "plasticity": "--streams random_labels --methods revived --widths equal_width --tasks 2 --seeds 2",
    "remedies": "--methods bcn --nets four_conv --no-stress --epochs 1 --seeds 1 --time-steps 0",
    "charlm": "--rows lk_relu --depths 1 --rates 1e-3 --seeds 2 --tenfold-seeds 0 --iterations 200 --time-steps 0",
}
TABLES = ("allcnn", "depth", "depth, seeds spread", "depth, one by one")
KILLS = {
    "allcnn": 12, "depth": 16, "depth, seeds spread": 6, "depth, one by one": 6, "plasticity": 4, "remedies": 3,
    "charlm": 3,
}  # fmt: skip
assert sum(KILLS.values()) >= 50


def first_words(name, folder):
    options = shlex.split(COMMANDS[name])
    if name == "charlm":
        options += ["--text", str(ROOT / "README.md")]
    return [*options, *["--checkpoint-every", "0"] * (name in TABLES), "--out", str(folder)]


def module(name):
    return name.split(",")[0]


def command(name, folder, **more):
    """A process that begins the work, or goes on with it."""
    again = name in TABLES and (folder / "config.json").exists()
    options = ["--resume", folder, "--checkpoint-every", "0"] if again else first_words(name, folder)
    return start("-m", f"experiments.{module(name)}", *options, PYTHONPATH=f"{ROOT}:{KILLER}", **more)


def left(folder):
    """The metrics without their times, and the arrays of the last checkpoint as bytes."""
    texts = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [{key: value for key, value in json.loads(text).items() if key not in TIMES} for text in texts]
    saved = Checkpoints(folder / "checkpoint", 0).load()
    return lines, [leaf.tobytes() for leaf in saved.leaves] if saved else []


def case(*values, kind, in_ci):
    """A case of a fault; CI has not the time for all of them, `python -m tests.faults` has."""
    return pytest.param(*values, marks=[pytest.mark.fault(*kind)] + [pytest.mark.exhaustive] * (not in_ci))


@pytest.mark.parametrize(
    "name",
    [case(name, kind=("kills", f"SIGKILL: {name}"), in_ci=name in ("depth", "plasticity")) for name in COMMANDS],
)
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path, record_property, pytestconfig):
    wanted = KILLS[name] if pytestconfig.option.markexpr == "fault" else 2  # all of them for `python -m tests.faults`
    finish(command(name, tmp_path / "warm"))  # compiles for all
    began = time.monotonic()
    assert finish(command(name, tmp_path / "whole"))[::2] == (0, "")
    whole, longest = left(tmp_path / "whole"), time.monotonic() - began
    assert bool(whole[1]) == (name in TABLES)
    chance, kills, at_writes, number = random.Random(name), 0, 0, 0
    while kills < wanted:
        number += 1
        folder = tmp_path / f"run {number}"
        for _ in range(min(7, wanted - kills)):
            at_write = chance.random() < 0.5
            process = command(name, folder, KILL_AT_WRITE=chance.randint(1, 12) if at_write else 0)
            if not at_write:
                wait_until = time.monotonic() + chance.uniform(0.3 * longest, longest)
                while process.poll() is None and time.monotonic() < wait_until:
                    time.sleep(0.01)
                process.kill()
            code, _, error = finish(process)
            assert code in (0, -signal.SIGKILL), error
            kills += code != 0
            at_writes += at_write and code != 0
            if (folder / "metrics.jsonl").exists() and code:
                with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write('{"act": "lk_r')  # as if it had been killed while it wrote a line
        assert finish(command(name, folder))[::2] == (0, "")
        assert left(folder) == whole
    assert at_writes > 0 or wanted == 2
    record_property("tried", kills)


@pytest.mark.exhaustive
@pytest.mark.fault("kills", "SIGKILL: one of two processes of --distributed")
def test_one_of_two_processes_is_killed_and_both_resume(tmp_path, record_property):
    options = [*TINY, "--act", "lk_relu", "relu_bn", "--checkpoint-every", "0"]
    assert [code for code, _, _ in Program(*options, "--out", tmp_path / "whole").finish()] == [0, 0]
    for victim in (0, 1):
        folder = tmp_path / f"run {victim}"
        program = Program(*options, "--out", folder)
        wait_for(lambda folder=folder: any(folder.glob("checkpoint/*.ckpt")), program.processes[0])
        program.processes[victim].kill()
        time.sleep(0.5)
        program.processes[1 - victim].kill()  # as `srun --kill-on-bad-exit` does
        program.finish()
        assert [code for code, _, _ in Program("--resume", folder).finish()] == [0, 0]
        assert left(folder) == left(tmp_path / "whole")
    record_property("tried", 2)


SIGNALS = [
    (name, signum, code)
    for name in COMMANDS
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130))
    if name == module(name) and (signum == signal.SIGTERM or name in ("depth", "charlm"))
]


@pytest.mark.parametrize(
    ("name", "signum", "code"),
    [
        case(*each, kind=("signals", f"{each[1].name}: {each[0]}"), in_ci=each[0] in ("depth", "remedies"))
        for each in SIGNALS
    ],
)
def test_a_signal_ends_a_run_with_the_command_that_goes_on(name, signum, code, tmp_path):
    folder = tmp_path / "run"
    process = command(name, folder)
    wait_for(lambda: (folder / "metrics.jsonl").exists(), process)
    time.sleep(0.5)
    process.send_signal(signum)
    found, _, error = finish(process)
    assert found == code, error
    said = re.fullmatch(rf"interrupted by {signum.name}\. .*: python (-m experiments\.{name} .*)\n", error)
    assert said, error
    assert finish(start(*shlex.split(said[1])))[::2] == (0, "")
