"""What a run leaves: a folder with config.json and metrics.jsonl. Tables and pictures are made from these alone."""

import json
import os
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

from experiments.engine import folders
from experiments.engine.checkpoints import Checkpoints
from experiments.engine.environment import commands, environment, program
from experiments.engine.errors import UsageError
from experiments.engine.files import write_whole, writing
from experiments.engine.folders import CONFIG, METRICS, TIMES

Line = dict[str, Any]


class Record:
    """A run's folder, locked while it is open; a context manager. Lines are on disk when `add` returns.

    Its config is everything that determines the run, with versions, hardware and commit.
    """

    def __init__(self, folder: Path, config: dict[str, Any], lines: list[Line], held: FileLock):
        self.folder, self.config, self.lines = folder, config, lines
        self._held = held
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")

    @classmethod
    def create(cls, folder: Path, config: Mapping[str, Any]) -> "Record":
        """Make the folder of a new run; one that exists is refused."""
        complete = {**config, **environment()}
        text = json.dumps(complete, indent=2)  # before the folder is made: it may fail
        held = folders.make(folder)
        try:
            write_whole(folder / CONFIG, text + "\n")
            return cls(folder, complete, [], held)
        except BaseException:
            folders.unlock(folder, held)
            raise

    @classmethod
    def reopen(cls, folder: Path) -> "Record":
        """Resume a run that ended early; refused if it is damaged, belongs to other code, or another process has it."""
        _check_is_there(folder)
        held = folders.lock(folder)
        try:
            config = resumable_config(folder)
            lines = read_lines(folder, damaged_end=True)
            record = cls(folder, config, lines, held)
            content = (folder / METRICS).read_bytes()
            if content.count(b"\n") != len(lines) or content[-1:] not in (b"", b"\n"):
                record.keep(len(lines))  # a half-written end: drop it from the file
            return record
        except BaseException:
            folders.unlock(folder, held)
            raise

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any], *, same: Sequence[str]) -> "Record":
        """A new record, or the one that is there, if these entries of its config are the same."""
        if not folders.is_taken(folder):
            return cls.create(folder, config)
        if not (folder / CONFIG).is_file():
            raise UsageError(f"{folder} is there and is no record; pass --out with a new folder, or that of a record")
        record = cls.reopen(folder)
        for key in same:
            if record.config.get(key) != config[key]:
                record.close()
                told = _difference(record.config.get(key), config[key])
                raise UsageError(f"{folder} is a record with another {key}{told}; pass another --out, or remove it")
        return record

    def made_by(self, command: str) -> None:
        """Add a command that adds to the record, beside the one that began it."""
        if command not in commands(self.config):
            self.config["more_commands"] = [*self.config.get("more_commands", ()), command]
            write_whole(self.folder / CONFIG, json.dumps(self.config, indent=2) + "\n")

    def add(self, *lines: Mapping[str, Any]) -> None:
        """Append JSON objects to metrics.jsonl: one, or several together, all of them or none."""
        if len(lines) != 1:
            self._rewrite([*self.lines, *map(dict, lines)])
            return
        with writing(self.folder / METRICS):
            self._metrics.write(_json(lines[0]))
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        self.lines.append(dict(lines[0]))

    def find(self, key: Mapping[str, Any]) -> Line | None:
        """The first line that has these entries."""
        return next((line for line in self.lines if key.items() <= line.items()), None)

    def once(self, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> Line:
        """The line with this key. If there is none `make` gives the rest of it, which is timed and added."""
        return self.once_each([key], lambda _missing: [make()])[0]

    def once_each(
        self, keys: Sequence[Mapping[str, Any]], make: Callable[[list[int]], Sequence[Mapping[str, Any]]]
    ) -> list[Line]:
        """The lines with these keys. Those that are missing are made together; each gets its share of the time.

        `make` takes the positions of the keys that are missing, and gives the rest of their lines. Seconds in a line
        are those before it was cut off, and are added.
        """
        missing = [place for place, key in enumerate(keys) if self.find(key) is None]
        if missing:
            began = time.perf_counter()
            made = make(missing)
            share = (time.perf_counter() - began) / len(missing)
            timed = [{**line, "seconds": round(share + line.get("seconds", 0.0), 1)} for line in made]
            self.add(*({**keys[i], **line} for i, line in zip(missing, timed, strict=True)))
        return [line for key in keys if (line := self.find(key)) is not None]

    def once_all(self, key: Mapping[str, Any], make: Callable[[], Sequence[Mapping[str, Any]]]) -> list[Line]:
        """All lines with this key, which are made together: a run with a line an epoch, and one at its end."""
        if self.find(key) is None:
            self.add(*({**key, **line} for line in make()))
        return [line for line in self.lines if key.items() <= line.items()]

    def checkpoints(self, name: str) -> Checkpoints:
        """Those of a run that has no line yet, in a folder of the record; clear them when it has."""
        return Checkpoints(self.folder / "unfinished" / name, every=30.0)

    def keep(self, count: int) -> None:
        """Drop all lines but the first `count`."""
        self._rewrite(self.lines[:count])

    def _rewrite(self, lines: list[Line]) -> None:
        write_whole(self.folder / METRICS, "".join(map(_json, lines)))
        self._metrics.close()
        self._metrics = (self.folder / METRICS).open("a", encoding="utf-8")
        self.lines = lines

    def write_times(self, times: Mapping[str, Any]) -> None:
        """Leave step times beside the metrics."""
        write_whole(self.folder / TIMES, json.dumps(times, indent=2) + "\n")

    def close(self) -> None:
        """Close metrics.jsonl and let others have the folder; nothing if it is closed."""
        self._metrics.close()
        if self._held.is_locked:
            folders.unlock(self.folder, self._held)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Unwritten(Record):
    """The record of a process that writes nothing, beside the one that does."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder, self.config = folder, config
        self.lines = read_lines(folder, damaged_end=True)

    def add(self, *lines: Mapping[str, Any]) -> None:
        """See `Record.add`; in memory."""
        self._rewrite([*self.lines, *map(dict, lines)])

    def _rewrite(self, lines: list[Line]) -> None:
        self.lines = lines

    def write_times(self, times: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def resumable_config(folder: Path) -> dict[str, Any]:
    """The config.json of a run that this program can resume; one of other code is refused."""
    _check_is_there(folder)
    config = read_config(folder)
    for what, now in program().items():
        if config.get(what) != now:
            raise UsageError(
                f"the run {folder} was begun with {what} {config.get(what)}, this is {now}: resuming it would "
                "mix two programs in one record; go back to that, or start anew"
            )
    return config


def _difference(had: Any, has: Any) -> str:
    """The first entry in which two JSON objects differ, in brackets; empty for other values."""
    if not (isinstance(had, dict) and isinstance(has, dict)):
        return ""
    name = next(name for name in {**had, **has} if had.get(name) != has.get(name))
    return f" ({name}: {_brief(had.get(name))} there, {_brief(has.get(name))} here)"


def _brief(value: Any) -> str:
    return textwrap.shorten(json.dumps(value), 60, placeholder=" ...")


def _check_is_there(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"there is no run {folder}; pass --resume with the folder of one")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a run; one that is missing or damaged is refused."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / CONFIG} cannot be read ({error}); the run is damaged, start anew") from error
    return config


def read_lines(folder: Path, *, damaged_end: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the error names the first one that is damaged.

    Args:
      folder: of the run.
      damaged_end: leave out a last line that was not written whole.
    """
    path = folder / METRICS
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        texts = [] if damaged_end else _damaged(path, 0, "there is no such file")
    except (OSError, ValueError) as error:
        texts = _damaged(path, 0, error)
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("no JSON object")
            lines.append(line)
        except ValueError as error:
            if not damaged_end or number < len(texts):
                _damaged(path, number, error)
    return lines


def read_times(folder: Path) -> dict[str, Any] | None:
    """The step times of a run, {"steps": n, "medians": [{"act", ..., "step_seconds"}]}; None if it was not timed."""
    path = folder / TIMES
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); delete it, and --resume measures again") from error


def _damaged(path: Path, line: int, error: object) -> NoReturn:
    raise UsageError(f"{path}, line {line} cannot be read ({error}); the record is damaged, make it again")


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
