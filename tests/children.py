"""Real processes of this project's commands, for tests: they compile quickly, and share what they compiled."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 300  # seconds of a process


def environment(**more):
    """This process's, without its virtual devices and without a cluster's variables."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and "SLURM" not in name}
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "TERM": "dumb",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **shared_cache(),
        **more,
    }


def shared_cache():
    """A cache of compiled programs that all children of a test run have, see tests/conftest.py."""
    if "LINKED_JAX_TESTS" not in os.environ:
        return {}
    return {
        "JAX_COMPILATION_CACHE_DIR": f"{os.environ['LINKED_JAX_TESTS']}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(*arguments, cwd=ROOT, stdout=subprocess.PIPE, **more):
    """A Python process with these arguments, which are made strings; `more` goes into its environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment(**{name: str(value) for name, value in more.items()}),
        stdout=stdout, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip


def finish(process, timeout=LONGEST):
    """Its exit code, standard output and standard error; it is killed where it takes longer."""
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, out, error


def wait_for(condition, process, timeout=LONGEST):
    """Until the condition holds; fails where the process ends before."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end
        time.sleep(0.02)
