"""What computes: versions, hardware, commit and commands, as records have them."""

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "linked_jax")


def environment() -> dict[str, Any]:
    """Versions, hardware and commit of this process."""
    devices = jax.devices()
    processes = jax.process_count()
    return {
        **program(),
        "hardware": {
            "platform": devices[0].platform,
            "device": devices[0].device_kind,
            "devices": len(devices),
            **({"processes": processes} if processes > 1 else {}),
            "cpu_cores": os.cpu_count(),
            "machine": platform.machine(),
            "system": platform.system(),
        },
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def program() -> dict[str, Any]:
    """What computes: versions and commit. It does not start JAX."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    return {"versions": versions, "commit": _commit()}


def commands(config: Mapping[str, Any]) -> list[str]:
    """Those that made a record, the one that began it first."""
    return [config["command"], *config.get("more_commands", ())]


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
