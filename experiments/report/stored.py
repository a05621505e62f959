"""Records as a report reads them: each checked line by line, the damaged ones named and left out."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.engine import records
from experiments.engine.errors import UsageError
from experiments.engine.folders import CONFIG, METRICS
from experiments.engine.published import published
from experiments.engine.tables import is_last

Line = dict[str, Any]
NetKey = tuple[Any, ...]
Run = tuple[NetKey, int]
"""A net, as its axes' values, and a seed."""

# What a report needs of the files: a dict has at least these keys, a list has at least one item, a float may be an int.
_CONFIG = {
    "experiment": str, "command": str, "axes": [str], "settings": {"seed": int, "seeds": int, "epochs": int},
    "protocol": {}, "data": {"name": str, "fingerprint": str, "description": str},
    "nets": [{"act": str, "parameters": int}], "versions": {}, "hardware": {}, "commit": str, "time": str,
}  # fmt: skip
_LINE = {
    "train_loss": float, "test_accuracy": float, "units": int, "dead_units": int, "dead_by_layer": [float],
    "signal_by_layer": [float], "seconds": float,
}  # fmt: skip
_TIMES = {"steps": int, "medians": [{"act": str, "step_seconds": float}]}


@dataclasses.dataclass(frozen=True)
class StoredRecord:
    """A record that is whole, though its runs need not be finished."""

    place: str  # its folder below the searched one, with slashes; its own name if that was the one
    config: dict[str, Any]
    runs: dict[Run, list[Line]]  # all, in the order of config.json; one that has not begun has no lines
    times: dict[str, Any] | None

    def is_finished(self, run: Run) -> bool:
        """Whether a run has its last epoch, or diverged."""
        lines = self.runs[run]
        return bool(lines) and is_last(lines[-1], self.config["settings"]["epochs"])

    def progress(self, run: Run) -> str:
        """How far a run has come."""
        return f"epoch {len(self.runs[run])} of {self.config['settings']['epochs']}"

    @property
    def unfinished(self) -> list[Run]:
        """The runs that ended early, or have not begun."""
        return [run for run in self.runs if not self.is_finished(run)]


def read_records(folders: Iterable[str | Path]) -> tuple[list[StoredRecord], list[str]]:
    """Read all records in some folders and in the folders below them; a record has a config.json or a metrics.jsonl.

    Returns:
      The records, in the order of their places, and a line for each that is damaged or makes no table, with the reason.
    """
    found, problems, seen = [], [], set()
    for root in map(Path, folders):
        if not root.is_dir():
            raise UsageError(f"there is no folder {root}; pass folders with records, such as runs")
        for folder in _record_folders(root, problems):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            place = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
            try:
                found.append(read_record(folder, place))
            except UsageError as error:
                problems.append(f"{place}: {str(error).replace(str(folder), place)}")
    return found, problems


def _record_folders(root: Path, problems: list[str]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        problems.append(f"{Path(str(error.filename)).name}: the folder cannot be read ({error.strerror})")

    for path, inside, files in os.walk(root, onerror=unreadable):
        inside.sort()
        if CONFIG in files or METRICS in files:
            inside.clear()  # no records within a record
            yield Path(path)


def read_record(folder: Path, place: str) -> StoredRecord:
    """Read a record; one that is damaged, half written or of an experiment that makes no table is refused."""
    with _explained("config.json"):
        config = records.read_config(folder)
    if config.get("axes") is None:
        kind = config.get("experiment", "an unknown experiment")
        raise UsageError(f"no table is made of it: it is of {kind}, and its config.json has no axes")
    with _explained("config.json"):
        _check(config, _CONFIG)
        first, axes = config["settings"]["seed"], config["axes"]
        seeds = range(first, first + config["settings"]["seeds"])
        runs: dict[Run, list[Line]] = {(_key(net, axes), seed): [] for net in config["nets"] for seed in seeds}
        for net in config["nets"]:
            sizes = {**config["protocol"], **{axis: net[axis] for axis in axes}}
            published(config["experiment"], sizes)  # it looks them up
        if "act" not in axes:
            raise ValueError(f"axes is {axes}, without act")
    with _explained("metrics.jsonl"):
        lines = records.read_lines(folder)
    if not lines:
        raise UsageError("metrics.jsonl has no lines: no epoch is finished")
    for number, line in enumerate(lines, start=1):
        with _explained(f"metrics.jsonl, line {number}"):
            _add(line, runs, axes, config["settings"]["epochs"])
    with _explained("times.json"):
        times = records.read_times(folder)
        if times is not None:
            _check(times, _TIMES)
            if min(net["step_seconds"] for net in times["medians"]) <= 0:
                raise ValueError("a step took no time")
    return StoredRecord(place, config, runs, times)


def _key(net: Mapping[str, Any], axes: Iterable[str]) -> NetKey:
    return tuple(net[axis] for axis in axes)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what a garbled file raises into one line that names it."""
    try:
        yield
    except UsageError:
        raise
    except KeyError as error:
        raise UsageError(f"{what} has no {error.args[0]}") from error
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UsageError(f"{what} is garbled ({error})") from error


def _check(value: Any, kind: Any, name: str = "it") -> None:
    """Refuse a value that is not of a kind: a type; a dict of kinds by key; or [the kind of a list's items]."""
    if not _is(value, type(kind) if isinstance(kind, dict | list) else kind):
        raise ValueError(f"{name} is {value!r:.60}")
    if isinstance(kind, dict):
        for key, inner in kind.items():
            _check(value[key], inner, key)
    elif isinstance(kind, list):
        for item in value:
            if not (kind[0] is float is type(item) and math.isfinite(item)):  # as nearly all are, and there are many
                _check(item, kind[0], name)


def _is(value: Any, kind: type) -> bool:
    """An int is a float too; but NaN and infinity are none, True is no int, and a list has items."""
    if isinstance(value, bool) or value == [] or (isinstance(value, float) and not math.isfinite(value)):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _add(line: Line, runs: dict[Run, list[Line]], axes: Iterable[str], epochs: int) -> None:
    """Check a line and add it to its run."""
    _check(line, {"seed": int, "epoch": int})
    net, seed = run = (_key(line, axes), line["seed"])
    if run not in runs:
        raise ValueError(f"config.json knows no {' '.join(map(str, net))} with seed {seed}")
    before = runs[run]
    if line["epoch"] != len(before) + 1 or line["epoch"] > epochs:
        raise ValueError(f"epoch {line['epoch']} follows {len(before)} of {epochs}")
    if before and "diverged" in before[-1]:
        raise ValueError("the run has diverged before it")
    if "diverged" not in line:
        _check(line, _LINE)
        if len(line["dead_by_layer"]) != len(line["signal_by_layer"]):
            raise ValueError("dead_by_layer and signal_by_layer differ in length")
        if not 0 <= line["test_accuracy"] <= 1:
            raise ValueError(f"test_accuracy is {line['test_accuracy']}")
    before.append(line)
