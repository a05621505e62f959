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
from experiments.engine.published import published

Line = dict[str, Any]
NetKey = tuple[Any, ...]

_CONFIG = {
    "experiment": str, "command": str, "settings": dict, "protocol": dict, "data": dict, "nets": list,
    "versions": dict, "hardware": dict, "commit": str, "time": str,
}  # fmt: skip
_LINE = {
    "train_loss": float, "test_accuracy": float, "units": int, "dead_units": int, "dead_by_layer": list,
    "signal_by_layer": list, "seconds": float,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StoredRecord:
    """A record that is whole, though its runs need not be finished.

    Attributes:
      place: its folder below the searched one, with slashes; its own name if that was the one.
      config: of config.json.
      runs: (net, seed) -> its lines, in the order of config.json; a net is its axes' values. None is missing, but a
        run that has not begun has no lines.
      times: of times.json, or None.
    """

    place: str
    config: dict[str, Any]
    runs: dict[tuple[NetKey, int], list[Line]]
    times: dict[str, Any] | None

    def is_finished(self, run: tuple[NetKey, int]) -> bool:
        """Whether a run has its last epoch, or diverged."""
        lines = self.runs[run]
        return bool(lines) and ("diverged" in lines[-1] or lines[-1]["epoch"] == self.config["settings"]["epochs"])

    def progress(self, run: tuple[NetKey, int]) -> str:
        """How far a run has come."""
        return f"epoch {len(self.runs[run])} of {self.config['settings']['epochs']}"

    @property
    def unfinished(self) -> list[tuple[NetKey, int]]:
        """The runs that ended early, or have not begun."""
        return [run for run in self.runs if not self.is_finished(run)]


def read_records(folders: Iterable[str | Path]) -> tuple[list[StoredRecord], list[str]]:
    """Read all records in some folders and in the folders below them.

    Args:
      folders: searched recursively; a record has a config.json or a metrics.jsonl.

    Returns:
      The records, in the order of their places, and a line for each that is damaged or makes no table, with the reason.

    Raises:
      UsageError: if a folder does not exist.
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


def _record_folders(root: Path, problems: list[str]) -> Iterable[Path]:
    def unreadable(error: OSError) -> None:
        problems.append(f"{Path(str(error.filename)).name}: the folder cannot be read ({error.strerror})")

    for path, inside, files in os.walk(root, onerror=unreadable):
        inside.sort()
        if records.CONFIG in files or records.METRICS in files:
            inside.clear()  # no records within a record
            yield Path(path)


def read_record(folder: Path, place: str) -> StoredRecord:
    """Read a record.

    Raises:
      UsageError: if it is damaged, half written or of an experiment that makes no table; with the reason.
    """
    with _explained("config.json"):
        config = records.read_config(folder)
    if config.get("axes") is None:
        kind = config.get("experiment", "an unknown experiment")
        raise UsageError(f"no table is made of it: it is of {kind}, and its config.json has no axes")
    with _explained("config.json"):
        _check_config(config)
    with _explained("metrics.jsonl"):
        lines = records.read_lines(folder)
    if not lines:
        raise UsageError("metrics.jsonl has no lines: no epoch is finished")
    seeds = range(config["settings"]["seed"], config["settings"]["seed"] + config["settings"]["seeds"])
    runs: dict[tuple[NetKey, int], list[Line]] = {(_key(net, config), s): [] for net in config["nets"] for s in seeds}
    for number, line in enumerate(lines, start=1):
        with _explained(f"metrics.jsonl, line {number}"):
            _add(line, runs, config)
    with _explained("times.json"):
        times = records.read_times(folder)
        _check_times(times)
    return StoredRecord(place, config, runs, times)


def _key(net: Mapping[str, Any], config: Mapping[str, Any]) -> NetKey:
    return tuple(net[axis] for axis in config["axes"])


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what a garbled file raises into one line that names it."""
    try:
        yield
    except KeyError as error:
        raise UsageError(f"{what} has no {error.args[0]}") from error
    except (TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UsageError(f"{what} is garbled ({error})") from error
    except ValueError as error:
        raise error if isinstance(error, UsageError) else UsageError(f"{what} is garbled ({error})") from error


def _typed(values: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], (int, float) if kind is float else kind) or isinstance(values[name], bool):
            raise ValueError(f"{name} is {values[name]!r:.60}")


def _check_config(config: Mapping[str, Any]) -> None:
    _typed(config, {**_CONFIG, "axes": list})
    _typed(config["settings"], {"seed": int, "seeds": int, "epochs": int})
    _typed(config["data"], {"name": str, "fingerprint": str, "description": str})
    if not config["nets"] or "act" not in config["axes"]:
        raise ValueError("it names no nets")
    for net in config["nets"]:
        _typed(net, {"act": str, "parameters": int})
        hash(_key(net, config))
        published(config["experiment"], net)


def _add(line: Line, runs: dict[tuple[NetKey, int], list[Line]], config: Mapping[str, Any]) -> None:
    """Check a line and add it to its run."""
    _typed(line, {"seed": int, "epoch": int})
    run = (_key(line, config), line["seed"])
    if run not in runs:
        raise ValueError(f"config.json knows no {' '.join(map(str, run[0]))} with seed {run[1]}")
    before = runs[run]
    if line["epoch"] != len(before) + 1 or line["epoch"] > config["settings"]["epochs"]:
        raise ValueError(f"epoch {line['epoch']} follows {len(before)} of {config['settings']['epochs']}")
    if before and "diverged" in before[-1]:
        raise ValueError("the run has diverged before it")
    if "diverged" not in line:
        _typed(line, _LINE)
        if len(line["dead_by_layer"]) != len(line["signal_by_layer"]) or not line["dead_by_layer"]:
            raise ValueError("dead_by_layer and signal_by_layer differ in length")
        if not 0 <= line["test_accuracy"] <= 1:
            raise ValueError(f"test_accuracy is {line['test_accuracy']}")
        if not all(map(math.isfinite, [line["train_loss"], *line["dead_by_layer"], *line["signal_by_layer"]])):
            raise ValueError("a number is not finite")
    before.append(line)


def _check_times(times: Any) -> None:
    if times is not None:
        _typed(times, {"steps": int, "medians": list})
        for net in times["medians"]:
            _typed(net, {"act": str, "step_seconds": float})
        if not times["medians"] or min(net["step_seconds"] for net in times["medians"]) <= 0:
            raise ValueError("it has no times")
