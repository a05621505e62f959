"""Many runs at once, and the odd places where people run things: real processes."""

import datetime
import itertools
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import time
import types

import pytest

from experiments.engine import environment as environment_of_runs
from experiments.engine import folders
from experiments.report.stored import read_records
from tests.children import ROOT, environment, finish, start
from tests.experiments.engine.test_resume import run as run_here
from tests.faults.test_kills import left

pytestmark = pytest.mark.slow
fault = pytest.mark.fault
TINY = shlex.split("--dataset digits --depth 1 --width 2 --act lk_relu --seeds 2 --epochs 1 --batch-size 479")


def depth(*more, cwd=ROOT, **variables):
    return start("-m", "experiments.depth", *TINY, *more, cwd=cwd, PYTHONPATH=ROOT, **variables)


@fault("company", "ten runs at once into one folder, and reports while they write")
def test_ten_runs_at_once_and_reports_meanwhile(tmp_path, record_property):
    assert finish(depth("--out", tmp_path / "whole"))[::2] == (0, "")
    runs, reports = [depth(cwd=tmp_path) for _ in range(10)], 0
    while any(run.poll() is None for run in runs):
        code, _, error = finish(start("-m", "experiments.report", "runs", cwd=tmp_path, PYTHONPATH=ROOT))
        assert code in (0, 2), error
        assert "Traceback" not in error
        assert code == 0 or "there is no" in error, error
        reports += 1
    for run in runs:
        assert finish(run)[::2] == (0, "")
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 10
    assert all(left(folder) == left(tmp_path / "whole") for folder in folders)
    code, said, error = finish(start("-m", "experiments.report", "runs", cwd=tmp_path, PYTHONPATH=ROOT))
    assert (code, error) == (0, "")
    assert "10 records" in said
    stored, problems = read_records([tmp_path / "runs"])
    assert (len(stored), problems) == (10, [])
    assert reports > 0
    record_property("tried", len(runs) + reports)


PLACES = {
    "a locale without UTF-8": ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "a home that cannot be written": ([], {"HOME": "/proc/none"}),
    "spaces and other letters in paths": (["--out", "a földer/ünd 日本"], {}),
    "no terminal, TERM unknown": ([], {"TERM": "unknown"}),
    "NO_COLOR": ([], {"NO_COLOR": "1"}),
}


@pytest.mark.parametrize("place", [pytest.param(p, marks=fault("places", p)) for p in PLACES])
def test_odd_places(place, tmp_path):
    options, variables = PLACES[place]
    if "--out" not in options:
        options = ["--out", "run"]
    process = start(
        "-m", "experiments.depth", *TINY, *options, "--checkpoint-every", "0",
        cwd=tmp_path, **{"PYTHONPATH": ROOT, "XDG_CACHE_HOME": tmp_path / "cache", **variables},
    )  # fmt: skip
    code, said, error = finish(process)
    assert (code, error) == (0, "")
    assert "Table 2" in said
    assert (tmp_path / options[1] / "depth.png").stat().st_size > 10_000
    assert len(left(tmp_path / options[1])[0]) == 2


@fault("places", "a clock that jumps back")
def test_a_clock_that_jumps_back(tmp_path, monkeypatch):
    """Each look at the time is two hours before the last one."""
    started, looks = datetime.datetime.now(datetime.UTC), itertools.count(1)

    class Back(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) - datetime.timedelta(hours=2 * next(looks))

    for module in (folders, environment_of_runs):
        monkeypatch.setattr(module, "datetime", types.SimpleNamespace(datetime=Back, UTC=datetime.UTC))
    monkeypatch.setattr(time, "time", lambda: started.timestamp() - 7200 * next(looks))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second one's folder is named after an earlier time
        code, _, _ = run_here(*TINY, "--checkpoint-every", "0")
        assert code == 0
    second, first = sorted((tmp_path / "runs").iterdir())
    assert left(first) == left(second)
    told = json.loads((first / "config.json").read_text(encoding="utf-8"))["time"]
    assert datetime.datetime.fromisoformat(told) < started


@fault("places", "| head -1")
@pytest.mark.parametrize("words", ["--help", "--out run"])
def test_a_reader_that_has_gone(words, tmp_path):
    child = {**environment(), "PYTHONPATH": str(ROOT)}
    line = f"{sys.executable} -m experiments.depth {shlex.join(TINY)} {words} | head -1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=child, capture_output=True, text=True, timeout=300)
    assert found.stderr == ""
    assert found.returncode in (0, 141) if words == "--help" else found.returncode == 141  # help may fit into the pipe
    assert found.stdout.count("\n") == 1
    if "run" in words:
        begun = (tmp_path / "run" / "config.json").exists()  # or the reader had gone before
        again = ["--resume", tmp_path / "run"] if begun else [*TINY, "--out", tmp_path / "run"]
        assert finish(start("-m", "experiments.depth", *again))[::2] == (0, "")


@fault("places", "a terminal of 20 columns")
def test_a_narrow_terminal(tmp_path):
    ours, theirs = pty.openpty()
    child = {**environment(), "COLUMNS": "20", "LINES": "10", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.depth", *TINY, "--out", str(tmp_path / "run")],
        cwd=ROOT, env=child, stdout=theirs, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(theirs)
    said, end = b"", time.monotonic() + 300
    while time.monotonic() < end:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        said += piece
    os.close(ours)
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())
    assert "lk_relu" in plain
    assert "Traceback" not in plain
