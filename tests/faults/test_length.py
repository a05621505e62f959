"""Runs that are long: memory, open files and compiled programs do not grow; a long record is read."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from experiments.engine import loop
from experiments.engine.records import read_lines
from tests.children import finish, start
from tests.experiments.engine.test_resume import run as run_here

pytestmark = pytest.mark.slow
fault = pytest.mark.fault
EPOCHS = 2000
TINY = ["--dataset", "digits", "--depth", "1", "--width", "2", "--act", "lk_relu", "--train-size", "64", "--batch-size"]


def resident(pid):
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@fault("length", f"{EPOCHS:,} epochs: memory and open files stay as they are")
def test_memory_and_open_files_do_not_grow(tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    words = [*TINY, "64", "--epochs", EPOCHS, "--out", tmp_path / "run"]
    process = start("-m", "experiments.depth", *words, stdout=subprocess.DEVNULL)  # it says more than a pipe holds
    seen = []
    for epochs in (100, EPOCHS - 50):
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= epochs):
            assert process.poll() is None, finish(process)
            time.sleep(0.05)
        seen.append((resident(process.pid), len(os.listdir(f"/proc/{process.pid}/fd"))))  # noqa: PTH208
    assert finish(process)[::2] == (0, "")
    (early, files_early), (late, files_late) = seen
    assert files_late <= files_early
    assert late <= 1.05 * early, (early, late)


@fault("length", "nothing is compiled again after the first epoch")
def test_nothing_is_compiled_again(tmp_path):
    def programs(epochs):
        loop.step.clear_cache()
        code, _, _ = run_here(*TINY, "30", "--epochs", epochs, "--out", tmp_path / str(epochs))
        assert code == 0
        return loop.step._cache_size()

    assert programs(1) == programs(30) == 2  # one for whole batches, one for the last of an epoch


@fault("length", "a record of 200,000 lines is read and reported")
def test_a_long_record(tmp_path):
    run, count = tmp_path / "runs" / "long", 200_000
    code, _, _ = run_here(*TINY, "64", "--epochs", "1", "--out", run)
    assert code == 0
    config = json.loads((run / "config.json").read_text())
    for part in ("settings", "protocol"):
        config[part]["epochs"] = count
    (run / "config.json").write_text(json.dumps(config))
    (line,) = read_lines(run)
    (run / "metrics.jsonl").write_text("".join(json.dumps({**line, "epoch": n}) + "\n" for n in range(1, count + 1)))
    code, said, error = finish(start("-m", "experiments.report", tmp_path / "runs", "--out", tmp_path / "report"))
    assert (code, error) == (0, "")
    assert "1 record, 1 net" in said
