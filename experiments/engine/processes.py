"""Several processes as one program: they agree at the start, before JAX runs, and whenever one of them could differ.

JAX' own start ends a process by SIGABRT where another one does not come, and takes processes that differ. So they meet
first, at the coordinator's port: each tells process 0 what it is about to do, and all go on, or all end with one line.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.clusters import ClusterEnv  # no public name finds the address before JAX starts
from jax.experimental import multihost_utils

from experiments.engine.errors import UsageError, first_line
from experiments.engine.settings import Settings

_LONGEST = 2**20  # bytes of a message
_TEXT = 4096  # bytes of a text that all processes share
T = TypeVar("T")


def join(settings: Settings, plan: Mapping[str, Any]) -> int:
    """Meet the other processes of --distributed, and start JAX' runtime for all; nothing without --distributed.

    Gives how many processes there are.

    Args:
      settings: coordinator, process_id and process_count, each by default that of the cluster (SLURM, Cloud TPU, Open
        MPI, Kubernetes); start_timeout.
      plan: what must be equal in all processes, as JSON values.

    Raises:
      UsageError: if a process does not come within start_timeout, or has another plan; in every process.
    """
    if not settings.distributed:
        return 1
    address, count, number = _cluster(settings)
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 2**16):
        raise UsageError(f"--coordinator is HOST:PORT, got {address}; pass e.g. 10.0.0.1:1234")
    if not 0 <= number < count:
        raise UsageError(f"--process-id is from 0 to --process-count - 1, got {number} of {count}")
    plan = {**plan, "--process-count": count}
    if number == 0:
        _receive(int(port), count, plan, settings.start_timeout)
    else:
        _visit(host.strip("[]"), int(port), {"process": number, "plan": plan}, settings.start_timeout)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is for `Interrupts`
    jax.distributed.initialize(
        address, count, number,
        initialization_timeout=settings.start_timeout, shutdown_timeout_seconds=settings.start_timeout,
    )  # fmt: skip
    return count


def _cluster(settings: Settings) -> tuple[str, int, int]:
    """The coordinator's address, the number of processes, and this one's."""
    found = settings.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = found, settings.process_count, settings.process_id
    if None in found:
        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(*found, None, None, settings.start_timeout)[:3]
        except Exception as error:  # a cluster's own: a variable that is missing, a server that does not answer
            raise UsageError(
                f"the cluster's environment does not say where the processes are ({first_line(error)}); pass "
                "--coordinator, --process-id and --process-count"
            ) from error
    for option, value in zip(("--coordinator", "--process-count", "--process-id"), found, strict=True):
        if value is None:
            raise UsageError(f"--distributed needs {option}, and no cluster's environment has it; pass {option}")
    return found  # pyright: ignore[reportReturnType]


# --- the meeting ------------------------------------------------------------------------------------------------------


def _receive(port: int, count: int, plan: Mapping[str, Any], seconds: float) -> None:
    """Process 0: wait for all others, and tell all of them the same: nothing, or why none goes on."""
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=max(count, 64)
        )
    except OSError as error:
        raise UsageError(
            f"process 0 cannot listen at port {port} of this machine ({error.strerror}); pass a free one in "
            "--coordinator, and give one process alone --process-id 0"
        ) from error
    until, refused = time.monotonic() + seconds, ""
    visitors: dict[socket.socket, int] = {}
    with server:
        while len(visitors) < count - 1:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                visitor, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in visitors.values())
                refused = refused or f"process {missing} of {count} did not come within {seconds} s; start all of them"
                break
            try:
                visitor.settimeout(5)
                said = _hear(visitor)
                number, theirs = int(said["process"]), said["plan"]
            except (OSError, ValueError, KeyError, TypeError):  # no process of ours
                visitor.close()
                continue
            if number in visitors.values():
                refused = refused or f"two processes have --process-id {number}; give each its own"
            refused = refused or _difference(number, plan, theirs)
            visitors[visitor] = number
    for visitor in visitors:
        with visitor:
            _say(visitor, refused)
    if refused:
        raise UsageError(refused)


def _visit(host: str, port: int, told: Mapping[str, Any], seconds: float) -> None:
    """Every other process: tell process 0 of itself, and hear whether all go on."""
    until = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(until - time.monotonic(), 0.1)) as connection:
                connection.settimeout(seconds + 10)  # process 0 has begun to wait already
                _say(connection, told)
                refused = _hear(connection)
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UsageError(
                    f"process 0 cannot be reached at {host}:{port} within {seconds} s ({first_line(error)}); start it "
                    "there, or pass its --coordinator"
                ) from error
            time.sleep(0.1)
        except ValueError as error:
            raise UsageError(f"who answers at {host}:{port} is not process 0; pass its --coordinator") from error
    if refused:
        raise UsageError(refused)


def _say(connection: socket.socket, what: Any) -> None:
    connection.sendall(json.dumps(what).encode() + b"\n")


def _hear(connection: socket.socket) -> Any:
    with connection.makefile("rb") as stream:
        line = stream.readline(_LONGEST)
    if not line:
        raise ConnectionResetError("it closed the connection")
    return json.loads(line)


def _difference(number: int, ours: Mapping[str, Any], theirs: Any) -> str:
    """The first entry in which the plan of a process is not that of process 0; "" if it has none."""
    theirs = json.loads(json.dumps(theirs))
    for name, value in json.loads(json.dumps(ours)).items():
        if (found := theirs.get(name)) != value:
            return f"process {number} has {name} {found}, process 0 has {value}; start all with the same"
    return ""


# --- what they share --------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process writes and prints: process 0, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def everywhere(action: Callable[[], T]) -> T:
    """What it gives, if it is refused in no process; the UsageError of the first that raises one is that of all."""
    try:
        result, refused = action(), ""
    except UsageError as error:
        if jax.process_count() == 1:
            raise
        result, refused = None, str(error)
    for text in texts(refused):
        if text:
            raise UsageError(text)
    return result  # pyright: ignore[reportReturnType]


def from_first(make: Callable[[], str]) -> str:
    """The text that process 0 makes, in every process; so is its UsageError."""
    return texts(everywhere(lambda: make() if is_first() else ""))[0]


def texts(text: str) -> list[str]:
    """The text of each process, shortened."""
    if jax.process_count() == 1:
        return [text]
    padded = text.encode()[:_TEXT].ljust(_TEXT, b"\0")
    found = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in found]


def greatest(values: Sequence[int]) -> list[int]:
    """Of each value the greatest of all processes."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.asarray(values, np.int32)).max(axis=0).tolist()


def fetch(tree: Any) -> Any:
    """The arrays of a tree as NumPy's, whole, in every process."""
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True) if _elsewhere(x) else x, tree)


def _elsewhere(x: Any) -> bool:
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
