"""What computes: versions, hardware, commit and commands, as records have them."""

import datetime
import hashlib
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
    """The commit, and "+changes-" and a digest of the code if that differs; else "unknown-" and the digest."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        code = [":/linked_jax", ":/experiments", ":/benchmarks", ":/pyproject.toml"]
        return git("rev-parse", "HEAD") + (f"+changes-{_digest()}" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.SubprocessError):
        return f"unknown-{_digest()}"


def _digest() -> str:
    """Of this package and of linked_jax beside it, so that two states of changed code are told apart."""
    root = Path(__file__).parents[2]
    files = [path for package in ("linked_jax", "experiments") for path in sorted((root / package).rglob("*.py"))]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()[:8]
