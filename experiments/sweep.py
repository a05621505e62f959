"""Many runs: each net of a table in a process of its own. Finished nets are skipped, the others resumed.

    python -m experiments.sweep depth --seeds 5 -- --preset quick
    python -m experiments.sweep learning_rates --jobs 2 -- --dataset digits
    python -m experiments.sweep depth --dry-run -- --preset paper --init auto glorot

Options after -- are the table's. The same command again finishes what the first one left. Then:
python -m experiments.report runs/sweep-depth
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from filelock import FileLock, Timeout

from experiments.engine import data as data_lib
from experiments.engine import folders, records
from experiments.engine.checks import command_line, option
from experiments.engine.console import Console
from experiments.engine.errors import InterruptedRunError, UsageError, run_command
from experiments.engine.experiment import Experiment
from experiments.engine.interrupts import Interrupts
from experiments.engine.settings import Cell, recorded
from experiments.report.groups import TABLES
from experiments.report.stored import read_record

_RATES = "--act swish lk_swish selu lk_selu lk_relu --lr 1e-2 1e-3 1e-4 1e-5 --init glorot auto"
SWEEPS = {**{name: (table, "--act all") for name, table in TABLES.items()}, "learning_rates": (TABLES["depth"], _RATES)}
"""Name -> its table, and the options that come before those of the command line."""
_STUDIES = {path.parent.name for path in Path(__file__).parent.glob("*/__main__.py")} - {"report"}
_DIVERGED = 3  # the exit code of a run that diverged: a result
_LOCK = ".sweep.lock"
_POLL_EVERY = 0.1  # seconds


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Run each net of a table in a process of its own; options after -- are the table's."""

    name: Annotated[str, tyro.conf.Positional]
    """width, depth, parameters, allcnn, resnet50, covariate_shift; or learning_rates, which is depth at many rates."""
    seeds: int = 5
    """How many consecutive seeds each net has."""
    jobs: int = 1
    """How many processes run at a time."""
    dry_run: bool = False
    """Print the commands, and do nothing."""
    out: str | None = None
    """The folder for the records; by default runs/sweep-NAME."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One net."""

    folder: Path  # of its record
    command: list[str]  # that trains it, or resumes it
    finished: bool = False  # its record was, before the sweep

    @property
    def log(self) -> Path:
        """The file with all that the command prints."""
        return self.folder.with_name(self.folder.name + ".log")

    def __str__(self) -> str:
        return shlex.join(["python", *self.command[1:]])


def main() -> None:
    """Read the command line and run the sweep; exit code 1 if a command failed."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sweep, passed_on = command_line(Sweep, "python -m experiments.sweep", sys.argv[1:end]), sys.argv[end + 1 :]
    out = Path(sweep.out or f"runs/sweep-{sweep.name}")
    jobs, console = plan(sweep, passed_on, out), Console()
    if sweep.dry_run:
        for job in jobs:
            console.say(f"# finished: {job.folder}" if job.finished else str(job))
        return
    with _locked(out):
        jobs = plan(sweep, passed_on, out)  # another sweep may have ended since
        failed = run_all(jobs, sweep.jobs, console)
    done = f"{len(jobs) - len(failed)} of {len(jobs)} records are finished"
    console.say(f"{done}; python -m experiments.report {out} makes their tables")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


def plan(sweep: Sweep, passed_on: Sequence[str], out: Path) -> list[Job]:
    """A job for each net, in the table's order; a folder that has records with other settings is refused."""
    if sweep.name in _STUDIES:
        raise UsageError(
            f"{sweep.name} runs all its nets by one command, which given again resumes what is there; "
            f"run python -m experiments.{sweep.name}"
        )
    if sweep.name not in SWEEPS:
        raise UsageError(f"there is no table {sweep.name}; take one of {', '.join(SWEEPS)}")
    for name in ("seeds", "jobs"):
        if getattr(sweep, name) < 1:
            raise UsageError(f"--{name} is at least 1, got {getattr(sweep, name)}")
    table, before = SWEEPS[sweep.name]
    asked = table.parse(passed_on, before.split())
    for own in ("--out", "--resume", "--seeds"):
        if any(argument.split("=")[0] == own for argument in passed_on):
            raise UsageError(f"{own} after -- is for the sweep to say; put it before --, or leave it out")
    if asked.distributed:
        raise UsageError("a sweep starts each command once, and --distributed needs it in every process; run the table")
    settings = table.check(dataclasses.replace(asked, seeds=sweep.seeds))
    jobs = [_job(table, settings, cell, out) for cell in table.cells(settings)]
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is no folder; pass another --out")
    return jobs


def _job(table: Experiment, settings: Any, cell: Cell, out: Path) -> Job:
    own = {axis: (cell[axis],) for axis in table.all_axes if axis != "lr" or settings.lr}
    settings = dataclasses.replace(settings, **own)
    folder = out / "-".join(str(values[0]) for values in own.values())
    start = [sys.executable, "-m", f"experiments.{table.name}"]
    if not folders.is_taken(folder):
        return Job(folder, [*start, *_options(settings, table.presets[settings.preset], own), "--out", str(folder)])
    _refuse_others(folder, table, settings)
    data = ["--data-dir", settings.data_dir] if settings.data_dir else []
    return Job(folder, [*start, "--resume", str(folder), *data], is_finished(folder))


def _options(settings: Any, preset: Any, always: Container[str]) -> list[str]:
    """The options that lead from the preset to these settings; and those that are always given."""
    options = [] if settings.preset == "auto" else ["--preset", settings.preset]
    for name, value in vars(settings).items():
        if name == "preset" or (value == getattr(preset, name) and name not in always):
            continue
        if isinstance(value, bool):
            options.append(option(name if value else f"no_{name}"))
        else:
            options += [option(name), *map(str, value if isinstance(value, tuple) else (value,))]
    return options


def _refuse_others(folder: Path, table: Experiment, settings: Any) -> None:
    """A folder with a record of other settings is neither skipped nor resumed."""
    try:
        config = records.read_config(folder)
        found = {"experiment": config["experiment"], **config["settings"]}
        left_to_the_data = [name for name, value in config.get("asked", {}).items() if value is None]
    except (UsageError, AttributeError, KeyError, TypeError):
        return  # a damaged record: its command says so
    if settings.dataset == "auto":
        settings = dataclasses.replace(settings, dataset=data_lib.of_auto(settings.data_dir))
    for name, value in {"experiment": table.name, **recorded(settings)}.items():
        has = None if value is None and name in left_to_the_data else found.get(name)
        if has != value:
            raise UsageError(f"{folder} is a record with {name} {has}, and this sweep has {value}; pass another --out")


def is_finished(folder: Path) -> bool:
    """Whether each run of a record has its last epoch, or diverged."""
    try:
        return not read_record(folder, folder.name).unfinished
    except UsageError:
        return False


def run_all(jobs: Sequence[Job], at_once: int, console: Console) -> list[str]:
    """Run what is not finished, so many at a time; go on after a failure. Gives a line for each job that failed.

    After Ctrl-C or SIGTERM it raises InterruptedRunError, when all children have saved and ended.
    """
    for job in jobs:
        if job.finished:
            console.say(f"finished {job.folder}")
    waiting = [job for job in jobs if not job.finished]
    running: list[tuple[Job, Any]] = []
    failed: list[str] = []
    with console.progress("nets", len(jobs)) as advance, Interrupts() as interrupts:
        advance(len(jobs) - len(waiting))
        try:
            while (waiting or running) and interrupts.signum is None:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    console.say(f"run      {job}")
                    running.append((job, start(job)))
                time.sleep(_POLL_EVERY)
                ended = [(job, process) for job, process in running if process.poll() is not None]
                running = [pair for pair in running if pair not in ended]
                for job, process in ended:
                    advance(1)
                    why = _failure(job, process.returncode)
                    failed += [why] if why else []
                    how = "FAILED" if why else "diverged" if process.returncode == _DIVERGED else "done"
                    console.say(f"{how:<8} {job.folder}")
        finally:
            _end([process for _, process in running])
    if interrupts.signum is not None:
        left = sum(not is_finished(job.folder) for job in jobs)
        raise InterruptedRunError(interrupts.signum, f"{left} nets are not finished; the same command resumes them")
    return failed


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start a job in a process group of its own, which a Ctrl-C at the terminal does not reach: the sweep ends it."""
    with job.log.open("ab") as log:
        log.write(f"$ {job}\n".encode())
        log.flush()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # the log ends with the last line that was printed
        return subprocess.Popen(job.command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _failure(job: Job, code: int) -> str | None:
    if code in (0, _DIVERGED) and is_finished(job.folder):
        return None
    said = job.log.read_text(encoding="utf-8", errors="replace").splitlines() if job.log.exists() else []
    last = next((line for line in reversed(said) if line.strip()), "it said nothing")
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{job.folder}: {how}: {last.strip()} (log: {job.log})"


def _end(processes: Sequence[Any]) -> None:
    """Ask the children to save and end, and wait; a second signal kills them."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        raise


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FileLock(out / _LOCK, timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(f"another sweep runs in {out}; wait for it, or pass another --out") from None
    except OSError as error:
        raise UsageError(f"cannot write {out} ({error.strerror}); pass another --out") from error
    try:
        yield
    finally:
        lock.release()


if __name__ == "__main__":
    run_command(main)
