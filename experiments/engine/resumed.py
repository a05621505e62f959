"""A run that goes on: its settings, and whether its record and its data are those that it began with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.engine import data as data_lib
from experiments.engine import folders, records, tables
from experiments.engine.errors import UsageError
from experiments.engine.experiment import Experiment
from experiments.engine.settings import OF_THIS_COMMAND, Cell, Settings


def settings_of(experiment: Experiment, folder: Path, config: Mapping[str, Any], asked: Settings) -> Any:
    """The settings that the run began with, and what is this command's alone of those that were asked for."""
    if config.get("experiment") != experiment.name:
        raise UsageError(f"{folder} is a run of {config.get('experiment')}, not of {experiment.name}")
    kept = {name: getattr(asked, name) for name in ("resume", *OF_THIS_COMMAND)}
    try:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in config["settings"].items()}
        return type(experiment.presets["auto"])(**values, **kept)
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"the settings in {folder}/{folders.CONFIG} are damaged ({error}); start anew") from error


def finished(record: records.Record, runs: Sequence[tuple[Cell, Sequence[int]]]) -> tuple[int, int]:
    """How many of the first runs are whole, and how many lines they have: these stay where no checkpoint is left."""
    axes, epochs = record.config["axes"], record.config["settings"]["epochs"]
    first, lines = 0, 0
    for cell, seeds in runs:
        own = {(seed, *(cell[axis] for axis in axes)) for seed in seeds}
        end = lines
        while end < len(record.lines) and (record.lines[end]["seed"], *map(record.lines[end].get, axes)) in own:
            end += 1
        if len({line["seed"] for line in record.lines[lines:end] if tables.is_last(line, epochs)}) < len(seeds):
            break
        first, lines = first + 1, end
    return first, lines


def check_data(folder: Path, begun_on: Mapping[str, Any], data: data_lib.Dataset) -> None:
    """Refuse another data set than the run's."""
    if begun_on["fingerprint"] != data.fingerprint:
        raise UsageError(
            f"the run {folder} was begun on {begun_on['description']} with fingerprint {begun_on['fingerprint']}, this "
            f"set has {data.fingerprint}; pass its --data-dir"
        )


def check_lines(record: records.Record, saved: int) -> None:
    """Refuse a record with fewer lines than there were at the last checkpoint."""
    if len(record.lines) < saved:
        raise UsageError(
            f"{record.folder / folders.METRICS} has {len(record.lines)} lines, {saved} at the last checkpoint; a part "
            "of the record is lost: begin anew, with another --out"
        )
