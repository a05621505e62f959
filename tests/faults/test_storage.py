"""Disks that are full or read-only, checkpoints that are damaged, folders that are held: one line, and nothing lost."""

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.children import ROOT, environment, finish, start, wait_for
from tests.faults.test_kills import command, first_words, left

pytestmark = pytest.mark.slow
fault = pytest.mark.fault


def one_line(error):
    return re.fullmatch(r"error: .*\n", error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert finish(command("depth", folder))[::2] == (0, "")
    return folder


@pytest.fixture
def begun(whole, tmp_path):
    """A run that was killed half-way."""
    folder = tmp_path / "run"
    process = command("depth", folder)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and left(folder)[0], process)
    process.kill()
    finish(process)
    return folder


@fault("storage", "a file system that is full, at any file")
def test_a_full_file_system(whole, tmp_path, record_property):
    """A limit on the size of a file ends writes as a full disk does: config, metrics, checkpoints, table, picture."""
    tried = 0
    for kilobytes in (1, 2, 4, 8, 16, 32):
        folder = tmp_path / f"run {kilobytes}"

        words = [sys.executable, "-m", "experiments.depth", *first_words("depth", folder)]
        child = {**environment(), "JAX_ENABLE_COMPILATION_CACHE": "0"}
        limited = ["bash", "-c", f"ulimit -f {kilobytes}; exec {shlex.join(words)}"]
        found = subprocess.run(limited, cwd=ROOT, env=child, capture_output=True, text=True, timeout=300)
        assert found.returncode == 2, (kilobytes, found.stderr)
        assert one_line(found.stderr), found.stderr
        assert "cannot write" in found.stderr
        assert finish(command("depth", folder))[::2] == (0, "")
        assert left(folder) == left(whole)
        tried += 1
    record_property("tried", tried)


@fault("storage", "a full tmpfs")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_full_tmpfs(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        code, _, error = finish(start("-m", "experiments.depth", *first_words("depth", disk / "run")))
        assert code == 2, error
        assert one_line(error)
        assert "No space left on device" in error
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert finish(command("depth", tmp_path / "run"))[::2] == (0, "")
    assert left(tmp_path / "run") == left(whole)


@fault("storage", "a folder that cannot be written")
@pytest.mark.parametrize("name", ["depth", "plasticity", "charlm"])
def test_a_folder_that_cannot_be_written(name):
    code, out, error = finish(command(name, Path("/proc/run")))
    assert (code, bool(one_line(error))) == (2, True), error
    assert "/proc/run" in error
    assert "Traceback" not in out


def truncated(content, chance):
    return content[: chance.randrange(1, len(content))]


def emptied(_content, _chance):
    return b""


def flipped(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


@fault("storage", "the last checkpoint is truncated, empty or has a flipped bit")
@pytest.mark.parametrize("damage", [truncated, emptied, flipped])
def test_a_damaged_checkpoint_is_passed_over(damage, begun, whole):
    newest = max((begun / "checkpoint").glob("*.ckpt"))
    newest.write_bytes(damage(newest.read_bytes(), random.Random(0)))
    code, _, error = finish(command("depth", begun))
    assert code == 0
    assert re.fullmatch(rf"the checkpoint {newest} is damaged \(.*\); going on from the one before it\n", error)
    assert left(begun) == left(whole)


@fault("storage", "no checkpoint is whole")
def test_checkpoints_that_are_all_damaged_are_refused(begun):
    before = (begun / "metrics.jsonl").read_bytes()
    for path in (begun / "checkpoint").glob("*.ckpt"):
        path.write_bytes(flipped(path.read_bytes(), random.Random(1)))
    code, _, error = finish(command("depth", begun))
    assert (code, bool(one_line(error))) == (2, True), error
    assert "none before it is whole" in error
    assert (begun / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(begun / "checkpoint")  # as the line says
    assert finish(command("depth", begun))[::2] == (0, "")


@fault("storage", "a metrics line that is half-written")
def test_a_half_written_line(begun, whole):
    with (begun / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"act": "relu", "seed": 1, "test_acc')
    assert finish(command("depth", begun))[::2] == (0, "")
    assert left(begun) == left(whole)


@fault("storage", "two processes, one folder")
@pytest.mark.parametrize("name", ["depth", "charlm"])
def test_the_second_one_says_who_holds_a_folder(name, tmp_path):
    folder = tmp_path / "run"
    first = command(name, folder)
    wait_for(lambda: (folder / "config.json").exists(), first)
    code, _, error = finish(command(name, folder))
    assert (code, bool(one_line(error))) == (2, True), error
    assert f"is being written by process {first.pid} on " in error
    time.sleep(0.1)
    assert finish(first)[::2] == (0, "")
