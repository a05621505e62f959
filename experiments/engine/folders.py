"""The folder of a run: the names of its files, whether it is free, and the lock of the process that writes in it."""

import datetime
import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.engine.errors import UsageError
from experiments.engine.files import write_whole

CONFIG, METRICS, TIMES = "config.json", "metrics.jsonl", "times.json"
_LOCK, _HOLDER = ".lock", ".holder"
_BEFORE_CONFIG = {_LOCK, _HOLDER, f"{_HOLDER}.tmp", f"{CONFIG}.tmp"}


def new_folder(out: str | None, name: str) -> Path:
    """The folder for a new record: `out`, or runs/<time>-<name>; checked to be new and writable, and not made."""
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # to the microsecond: several may begin at once
    folder = Path(out) if out else Path("runs") / f"{time}-{name}"
    if is_taken(folder):
        raise _exists(folder)
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"no permission to write the record {folder}; pass --out with a folder that you can write")
    return folder


def is_taken(folder: Path) -> bool:
    """Whether something is there: more than what a process leaves that was killed before it had a config.json."""
    try:
        return not {path.name for path in folder.iterdir()} <= _BEFORE_CONFIG
    except FileNotFoundError:
        return False
    except NotADirectoryError:  # the folder, or one above it, is a file
        return folder.exists()
    except OSError as error:  # a name that is too long, which Path.exists() no longer tells from Python 3.14 on
        raise _unwritable(folder, error) from error


def make(folder: Path) -> FileLock:
    """Make the folder of a new run and lock it; one that exists is refused."""
    if is_taken(folder):
        raise _exists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    held = lock(folder)
    if (folder / CONFIG).exists():  # of another process that began at the same moment, and has ended
        unlock(folder, held)
        raise _exists(folder)
    return held


def lock(folder: Path) -> FileLock:
    """Keep other processes from a folder until `unlock`; one that another process has is refused, and says which."""
    held = _acquire(folder)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    write_whole(folder / _HOLDER, f"process {os.getpid()} on {platform.node()} since {now}")
    return held


def unlock(folder: Path, held: FileLock) -> None:
    """Let others have the folder."""
    (folder / _HOLDER).unlink(missing_ok=True)
    (folder / _LOCK).unlink(missing_ok=True)  # before it is released: afterwards it may be another process's
    held.release()


def _acquire(folder: Path) -> FileLock:
    held = FileLock(folder / _LOCK, timeout=0)
    try:
        held.acquire()
    except Timeout:
        try:
            holder = (folder / _HOLDER).read_text(encoding="utf-8")
        except OSError:
            holder = "another process"
        raise UsageError(f"the run {folder} is being written by {holder}; wait for it, or stop it") from None
    return held


def _exists(folder: Path) -> UsageError:
    if (folder / _HOLDER).exists():
        _acquire(folder).release()  # or says who holds it
    return UsageError(f"the record {folder} exists; pass another --out, resume it with --resume {folder}, or delete it")


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write the record {folder} ({error.strerror}); pass --out with a folder that you can write"
    )
