"""What a run leaves: a folder with config.json and metrics.jsonl. Tables and pictures are made from these alone."""

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from experiments.engine.errors import UsageError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "linked_jax")


class Record:
    """A run's folder. It is made when the run starts; each metrics line is on disk when `add` returns.

    Args:
      folder: must not exist yet.
      config: everything that determines the run; versions, hardware and commit are added.

    Raises:
      UsageError: if the folder exists or cannot be written.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.folder = folder
        text = json.dumps({**config, **environment()}, indent=2)  # before the folder is made: it may fail
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise UsageError(f"the record {folder} exists; pass another --out, or delete it") from None
        except OSError as error:
            raise _cannot_write(folder, error) from error
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl."""
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        """Close metrics.jsonl."""
        self._metrics.close()


def new_folder(out: str | None, name: str) -> Path:
    """The folder for a new record: `out`, or runs/<time>-<name>; checked to be writable, and not made.

    Raises:
      UsageError: if it exists, or its parent cannot be written.
    """
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    folder = Path(out) if out else Path("runs") / f"{time}-{name}"
    try:
        exists = folder.exists()
    except OSError as error:  # a name that is too long
        raise _cannot_write(folder, error) from error
    if exists:
        raise UsageError(f"the record {folder} exists; pass another --out, or delete it")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"no permission to write the record {folder}; pass --out with a folder that you can write")
    return folder


def environment() -> dict[str, Any]:
    """Versions, hardware and commit of this process."""
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": {
            "platform": devices[0].platform,
            "device": devices[0].device_kind,
            "devices": len(devices),
            "cpu_cores": os.cpu_count(),
            "machine": platform.machine(),
            "system": platform.system(),
        },
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def as_config(settings: Any) -> dict[str, Any]:
    """A settings dataclass as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of this checkout, "+changes" if code or settings differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        code = [":/linked_jax", ":/experiments", ":/benchmarks", ":/pyproject.toml"]
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cannot_write(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write the record {folder} ({error.strerror}); pass --out with a folder that you can write"
    )
