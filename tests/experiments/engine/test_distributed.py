"""Several processes over loopback: they meet, compute what one does, save and resume together, and end together."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.engine import processes
from experiments.engine.errors import UsageError
from experiments.engine.parallel import _of_all_processes, on_devices, placement
from experiments.engine.settings import Settings, check_processes, settle
from tests.children import ROOT, environment, start

TINY = ["--preset", "quick", "--depth", "3", "--epochs", "2", "--batch-size", "300", "--augment"]
LONGEST = 240  # seconds of a test's processes


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# --- the meeting, in threads: no JAX


PLAN = {"commit": "a", "--epochs": 2, "--lr": (0.1,)}


def meet(*visitors, count=2, seconds=5):
    """What process 0, and each visitor that tells such a thing, are refused with; None where they go on."""
    port = free_port()

    def refused(action, *arguments):
        try:
            action(*arguments)
        except UsageError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(refused, processes._receive, port, count, PLAN, seconds)
        others = [pool.submit(refused, processes._visit, "127.0.0.1", port, told, seconds) for told in visitors]
        return [future.result() for future in (first, *others)]


def told(number, **options):
    return {"process": number, "plan": {**PLAN, **options}}


def test_those_that_agree_go_on():
    assert meet(told(1), told(2), count=3) == [None] * 3
    assert meet(count=1) == [None]


def test_a_difference_is_named_to_all_of_them():
    line = "process 2 has --epochs 3, process 0 has 2; start all with the same"
    assert meet(told(1), told(2, **{"--epochs": 3}), count=3) == [line] * 3
    assert "has commit b, process 0 has a" in meet({"process": 1, "plan": {**PLAN, "commit": "b"}})[1]
    assert "has --lr None, process 0 has [0.1]" in meet({"process": 1, "plan": {"commit": "a", "--epochs": 2}})[1]


def test_a_process_that_does_not_come_is_named():
    began = time.monotonic()
    line = "process 2 of 3 did not come within 0.3 s; start all of them"
    assert meet(told(1), count=3, seconds=0.3) == [line] * 2
    assert time.monotonic() - began < 5


def test_an_id_is_given_once():
    found = meet(told(1), told(1), count=3)
    assert set(found) == {"two processes have --process-id 1; give each its own"}


def test_a_coordinator_that_cannot_be_reached():
    with pytest.raises(UsageError, match=r"process 0 cannot be reached at 127.0.0.1:\d+ within 0.2 s \(.*refused\); "):
        processes._visit("127.0.0.1", free_port(), told(1), 0.2)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x00\x12\x04\n", b"[1\n"])
def test_another_server_at_the_port(answer):
    with socket.create_server(("127.0.0.1", 0)) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        visit = pool.submit(processes._visit, "127.0.0.1", server.getsockname()[1], told(1), 1)
        connection, _ = server.accept()
        with connection:
            connection.recv(10_000)
            connection.sendall(answer)
        with pytest.raises(UsageError, match="is not process 0"):
            visit.result()


def test_a_stranger_at_the_port_is_no_process():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(processes._receive, port, 2, PLAN, 10)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": "x", "plan": {}}\n', b"null\n", b""):
            for _ in range(100):
                try:
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(words)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)
        processes._visit("127.0.0.1", port, told(1), 5)
        assert first.result() is None


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server, pytest.raises(UsageError, match="cannot listen at port"):
        processes._receive(server.getsockname()[1], 2, PLAN, 1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"coordinator": "a:1"}, "--coordinator goes with --distributed"),
        ({"process_id": 0}, "--process-id goes with --distributed"),
        ({"distributed": True, "process_count": 0}, "--process-count is at least 1, got 0"),
        ({"distributed": True, "start_timeout": 0}, "--start-timeout is at least 1, got 0"),
        ({"distributed": True, "process_count": 2, "devices": 3}, "got 3 devices for 2 processes"),
    ],
)
def test_options_that_do_not_go_together(options, line):
    with pytest.raises(UsageError, match=line):
        check_processes(Settings(**options))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "--distributed needs --coordinator, and no cluster's environment has it"),
        ({"coordinator": "a:1"}, "--distributed needs --process-count"),
        ({"coordinator": "here", "process_count": 2, "process_id": 1}, "--coordinator is HOST:PORT, got here"),
        ({"coordinator": "a:x", "process_count": 2, "process_id": 1}, "--coordinator is HOST:PORT, got a:x"),
        ({"coordinator": "a:1", "process_count": 2, "process_id": 2}, "--process-id is from 0 to .*, got 2 of 2"),
    ],
)
def test_where_the_processes_are(options, line, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_COORD", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(UsageError, match=line):
        processes.join(Settings(distributed=True, **options), PLAN)


def test_a_cluster_whose_variables_are_damaged(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "?")
    with pytest.raises(UsageError, match="the cluster's environment does not say where the processes are"):
        processes.join(Settings(distributed=True), PLAN)


def test_a_batch_is_an_equal_part_for_each_device():
    data = type("Data", (), {"train_labels": np.zeros(100), "name": "x"})
    with pytest.raises(UsageError, match="got --batch-size 9 for 2 devices; make it a multiple"):
        settle(Settings(devices=2, batch_size=9), data)
    assert settle(Settings(devices=2, seeds=2, seeds_mode="spread", batch_size=9), data).batch_size == 9


def test_the_devices_are_those_of_all_processes():
    assert on_devices(Settings(distributed=True)).devices == jax.device_count() == 2
    assert on_devices(Settings()).devices == 1
    with pytest.raises(UsageError, match="--devices 64 needs 64 devices, got 2"):
        on_devices(Settings(distributed=True, devices=64))
    with pytest.raises(UsageError, match="3 seeds for 2 devices"):
        on_devices(Settings(distributed=True, seeds=3, seeds_mode="spread"))


def test_one_process_is_all_of_them():
    assert processes.is_first()
    assert processes.texts("a") == ["a"]
    assert processes.greatest([3, 0]) == [3, 0]
    assert processes.everywhere(lambda: 5) == 5
    assert processes.from_first(lambda: "é") == "é"
    with pytest.raises(UsageError, match="no"):
        processes.everywhere(lambda: (_ for _ in ()).throw(UsageError("no")))


# --- real processes


class Program:
    """So many processes of a table's command; none is left behind."""

    def __init__(self, *options, count=2, port=None, own=((), ()), wanted=True):
        address = f"127.0.0.1:{port or free_port()}"
        together = ["--distributed", "--coordinator", address, "--process-count", str(count)]
        self.processes = [
            start("-m", "experiments.depth", *options, *together, "--process-id", i, *own[i]) for i in range(wanted * 2)
        ]

    def finish(self):
        """(exit code, standard output, standard error) of each."""
        return finish(self.processes)


def finish(started):
    """Wait for all; after LONGEST each is killed by its id, since JAX' runtime catches SIGTERM."""
    until = time.monotonic() + LONGEST
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            outs = list(pool.map(lambda p: p.communicate(timeout=max(until - time.monotonic(), 0.1)), started))
        return [(process.returncode, *out) for process, out in zip(started, outs, strict=True)]
    finally:
        for process in started:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()


def lines(folder):
    """Without the times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def no_gloo(out):
    return re.sub(r"\[Gloo\].*\n", "", out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Two nets, one of them with batch norm; one process with two virtual devices."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    command = ["-m", "experiments.depth", *TINY, "--act", "lk_relu", "relu_bn", "--devices", "2", "--out", folder]
    assert finish([start(*command)])[0][::2] == (0, "")
    return folder


@pytest.mark.slow
def test_two_processes_compute_what_one_does(alone, tmp_path):
    program = Program(*TINY, "--act", "lk_relu", "relu_bn", "--time-steps", "2", "--out", tmp_path / "run")
    first, second = program.finish()
    assert (first[0], first[2], second[0], second[2]) == (0, "", 0, "")
    assert "device   2 x cpu of 2 processes" in first[1]
    assert "Median time of a training step" in first[1]
    assert no_gloo(second[1]) == ""
    assert lines(tmp_path / "run") == lines(alone)  # the same two devices' work, to the bit
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["hardware"]["processes"], config["settings"]["devices"]) == (2, 2)
    assert "127.0.0.1" not in json.dumps(config)
    one = tmp_path / "one"
    command = ["-m", "experiments.depth", *TINY, "--act", "lk_relu", "relu_bn", "--out", one]
    assert finish([start(*command)])[0][::2] == (0, "")
    for line, reference in zip(lines(tmp_path / "run"), lines(one), strict=True):
        assert line["train_loss"] == pytest.approx(reference["train_loss"], abs=1e-5)
        images = [round(360 * it["test_accuracy"]) for it in (line, reference)]
        assert abs(images[0] - images[1]) <= 1


@pytest.mark.slow
def test_seeds_are_spread_over_processes(tmp_path):
    options = [*TINY, "--act", "lk_relu", "--seeds", "2", "--seeds-mode", "spread"]
    found = Program(*options, "--out", tmp_path / "run").finish()
    assert [code for code, _, _ in found] == [0, 0], found
    assert (
        finish([start("-m", "experiments.depth", *options, "--devices", "2", "--out", tmp_path / "alone")])[0][0] == 0
    )
    assert lines(tmp_path / "run") == lines(tmp_path / "alone")


@pytest.mark.slow
def test_a_signal_to_one_of_them_saves_all_and_they_resume_to_the_same_bits(alone, tmp_path):
    folder = tmp_path / "run"
    program = Program(*TINY, "--act", "lk_relu", "relu_bn", "--checkpoint-every", "0", "--out", folder)
    until = time.monotonic() + LONGEST
    while not any(folder.glob("checkpoint/*.ckpt")) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(program.processes[1].pid, signal.SIGTERM)
    (code, _, error), (other_code, other_out, other_error) = program.finish()
    assert (code, other_code, no_gloo(other_out), other_error) == (143, 143, "", "")
    assert re.fullmatch(r"interrupted by SIGTERM\. .* resume it with: .* --resume .* --distributed .*\n", error)
    assert len(lines(folder)) < 4
    found = Program("--resume", folder).finish()
    assert [code for code, _, _ in found] == [0, 0], found
    assert lines(folder) == lines(alone)


REFUSED = {
    "settings that differ": (["--depth", "3"], ((), ["--epochs", "3"]), "process 1 has --epochs 3, process 0 has None"),
    "a batch that does not divide": (["--batch-size", "9"], (), "got --batch-size 9 for 2 devices"),
    "a record that is there": (["--out", "."], (), "the record . exists"),
    "no data": (["--data-dir", "nowhere", "--dataset", "mnist"], (), "the data folder nowhere does not exist"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_in_one_line_by_all(case):
    options, own, why = REFUSED[case]
    program = Program("--preset", "quick", "--train-size", "64", *options, "--start-timeout", "60", own=own or ((), ()))
    for code, _, error in program.finish():
        assert code == 2, error
        assert re.fullmatch(r"error: .*\n", error)
        assert why in error


@pytest.mark.slow
def test_the_scripts_tasks_train_together_and_resume(alone, tmp_path):
    """An `srun` that starts two tasks here, with the variables that SLURM sets."""
    srun = tmp_path / "srun"
    srun.write_text("""#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
export SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
trap 'kill -KILL $first $second' TERM
wait $first && wait $second
""")
    srun.chmod(0o755)
    port = 61440 + os.getpid() % 4096  # that JAX makes of the job's number
    more = {"SLURM_JOB_ID": str(port - 61440), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    command = ["bash", "scripts/table.slurm", tmp_path / "run", "depth", *TINY, "--act", "lk_relu", "relu_bn"]
    said = []
    for _ in range(2):
        done = subprocess.Popen(
            command, cwd=ROOT, env={**environment(), **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, error = done.communicate(timeout=LONGEST)
        finally:
            done.terminate()
        assert (done.returncode, error) == (0, "")
        said.append(out)
    assert "2 x cpu of 2 processes" in said[0]
    assert "is complete" in said[1]
    assert lines(tmp_path / "run") == lines(alone)


def test_global_arrays_hold_the_values_and_the_keys():
    """The way of several processes, on the devices of one."""
    place = placement(Settings(devices=2))
    sharding = place.batch(np.arange(4)).sharding
    assert _of_all_processes(np.arange(4), sharding).tolist() == [0, 1, 2, 3]
    keys = jax.random.split(jax.random.key(0), 4)
    assert (jax.random.key_data(_of_all_processes(keys, sharding)) == jax.random.key_data(keys)).all()
