"""The benchmarks that this machine can run, one after the other, each in a process of its own.

    python -m benchmarks
    python -m benchmarks --rounds 5 --out runs/benchmarks

The second is quicker, and keeps the records. Not among them: `benchmarks.scaling`, which is about many devices.
"""

import dataclasses
import importlib.util
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.engine.checks import command_line, in_range
from experiments.engine.errors import UsageError, run_command

ALL: tuple[tuple[str, ...], ...] = (
    ("linked_layer",),
    ("bandwidth",),
    ("convolution",),
    ("certify",),
    ("monitor",),
    ("loop",),
    ("seeds",),
    ("warm_up",),
    ("growth",),
    ("pytorch", "--net", "depth", "--batch-size", "128"),
    ("pytorch", "--net", "depth", "--batch-size", "32"),
    ("pytorch", "--net", "allcnn", "--batch-size", "64"),
    ("pytorch", "--net", "allcnn", "--act", "relu", "--batch-size", "64"),
    ("pytorch", "--net", "resnet50", "--batch-size", "128"),
    *(
        ("pytorch", "--net", net, "--batch-size", "128", "--dtype", "bfloat16")
        for net in ("depth", "allcnn", "resnet50")
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Run the benchmarks that this machine can."""

    rounds: int | None = None
    """Timed rounds of each; by default its own number."""
    out: Path | None = None
    """A folder for the records."""


def why_not(name: str, options: Sequence[str]) -> str | None:
    """What this machine lacks for a benchmark."""
    if name == "pytorch" and importlib.util.find_spec("torch") is None:
        return 'PyTorch is not installed: pip install "torch>=2.13"'
    if name == "convolution" and jax.default_backend() != "cpu":
        return "it is about a CPU: JAX_PLATFORMS=cpu"
    if "bfloat16" in options and jax.default_backend() == "cpu":
        return "it is about a GPU"
    return None


def main() -> None:
    """Run them, and say which were left out or failed."""
    settings = command_line(Settings, "python -m benchmarks")
    in_range(settings, {} if settings.rounds is None else {"rounds": (1, math.inf)})
    if settings.out and settings.out.is_file():
        raise UsageError(f"--out is a folder for the records, got the file {settings.out}")
    failed = []
    for name, *options in ALL:
        if reason := why_not(name, options):
            print(f"--- {name}: left out; {reason}", flush=True)
            continue
        if name == "pytorch" and jax.default_backend() != "cpu":
            options.append("--compiled")
        words = [option for option in options if not option.startswith("--")]
        if settings.rounds and name != "warm_up":  # whose numbers are losses
            options += ["--rounds", str(settings.rounds)]
        if settings.out:
            options += ["--out", str(settings.out / f"{'_'.join([name, *words])}.json")]
        print(f"--- python -m benchmarks.{' '.join([name, *options])}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=False).returncode:
            failed.append(name)
    if failed:
        raise UsageError(f"these benchmarks failed: {', '.join(failed)}; see above")


if __name__ == "__main__":
    run_command(main)
