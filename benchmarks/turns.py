"""What the benchmarks share: options, timing in turns, and the record."""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from experiments.engine.checks import command_line, in_range, option
from experiments.engine.console import Console
from experiments.engine.environment import environment
from experiments.engine.errors import UsageError
from experiments.engine.files import write_whole, writing
from experiments.engine.timing import in_turns

S = TypeVar("S", bound="Settings")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of every benchmark."""

    rounds: int = 20
    """Timed rounds; in each, what is compared takes turns."""
    out: Path | None = None
    """A JSON file for the record."""


def parse(kind: type[S], name: str) -> S:
    """The settings of the command `python -m benchmarks.NAME`.

    Raises:
      UsageError: if an integer is below 1, a real number is not positive, or the record cannot be written.
    """
    settings = command_line(kind, f"python -m benchmarks.{name}")
    numbers = {field: value for field, value in dataclasses.asdict(settings).items() if not isinstance(value, bool)}
    in_range(settings, {field: (1, math.inf) for field, value in numbers.items() if isinstance(value, int)})
    for field, value in numbers.items():
        if isinstance(value, float) and not 0 < value < math.inf:
            raise UsageError(f"{option(field)} is a positive number, got {value}")
    if settings.out:
        _writable(settings.out)
    return settings


def _writable(path: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    if path.is_dir():
        raise UsageError(f"--out is a file for the record, got the folder {path}; try {path / 'record.json'}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def seconds(action: Callable[[], Any]) -> float:
    """Of one call, until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - start


def medians(actions: Mapping[str, Callable[[], Any]], rounds: int, console: Console, title: str) -> dict[str, float]:
    """Median seconds of each action; they take turns, after warm-up."""
    with console.progress(title, rounds) as advance:
        return dict(zip(actions, in_turns(list(actions.values()), rounds, advance), strict=True))


def save(settings: Settings, name: str, results: Any) -> None:
    """Write the record, if its file is named: the settings, the results and where they were measured."""
    if settings.out:
        config = {key: value for key, value in dataclasses.asdict(settings).items() if key != "out"}
        record = {"benchmark": name, "settings": config, "results": results, **environment()}
        write_whole(settings.out, json.dumps(record, indent=2) + "\n")
