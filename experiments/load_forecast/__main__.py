"""Recurrent nets that forecast the next 24 hours of an hourly load: tanh, ReLU, LK-ReLU and DReLU cells.

    python -m experiments.load_forecast
    python -m experiments.load_forecast --csv load.csv --time-column time --load-column load

A simple recurrent net sees the last 168 hours, their load, hour of the day and weekday, and gives 24 loads at once:

    h_t = f(W x_t + U h_{t-1} + b),   forecast = V h_T + c

    tanh, relu    f(z)
    lk_relu       f(z) = (max(0, z), max(0, -z)): the state has both
    drelu         f(a, b) = max(0, a) - max(0, b): two pre-activations

All cells have about the same number of parameters, the same optimiser and the same rate. Without --csv the series is
made here, two years with the cycles of a town's load (`experiments/load_forecast/series.py`). The hours are split by
time: 70 % train, 15 % validate, 15 % test. The epoch with the best validation error is tested. The measure is the mean
absolute percentage error (MAPE) of each hour ahead, beside two forecasts without a net: the same hours of last week and
of yesterday. Over all hours, 3 seeds, on the series made here:

    last week    yesterday    tanh     relu     lk_relu    drelu
    6.41         5.21         2.99     3.04     3.00       3.08       --lr 0.01 (the default); two minutes on 2 cores
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from experiments.engine import folders, study
from experiments.engine.checks import command_line, in_range, known
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.load_forecast import series as load_series
from experiments.load_forecast.forecast import BASELINES, baseline, train
from experiments.load_forecast.net import CELLS, parameters, units_for
from experiments.load_forecast.series import HORIZON
from experiments.load_forecast.table import picture, table

CellName = Literal["tanh", "relu", "lk_relu", "drelu"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Recurrent nets that forecast the next 24 hours of an hourly load."""

    preset: Literal["quick"] = "quick"
    """There is no other: the paper has no such experiment."""
    csv: str | None = None
    """A CSV file with a header and a row for each hour; by default a series made here."""
    time_column: str = "time"
    """The file's column of times, such as 2024-01-31 23:00."""
    load_column: str = "load"
    """The file's column of loads, positive numbers in any unit."""
    cells: tuple[CellName, ...] = ("tanh", "relu", "lk_relu", "drelu")
    """One or several cells."""
    parameters: int = 2580
    """About how many parameters each net has; at 2580 they differ by less than a per cent."""
    epochs: int = 30
    """Passes over the windows that train."""
    lr: float = 0.01
    """Adam's learning rate, the same for all cells; it falls to 0 as a cosine."""
    seeds: int = 3
    """How many seeds, from 0."""
    out: str | None = None
    """The record's folder, by default a new one in runs/. The same command with a record's folder resumes it."""


def main() -> None:
    """Read the command line, train every net, and leave a record, a table and a picture."""
    console = Console()
    settings = check(command_line(Settings, "python -m experiments.load_forecast"))
    folder = Path(settings.out) if settings.out else folders.new_folder(None, "load_forecast")
    if settings.csv is None:
        series = load_series.made()
    else:
        series = load_series.read_csv(settings.csv, settings.time_column, settings.load_column)
    cut = load_series.windows(series)
    units = {cell: units_for(cell, settings.parameters) for cell in settings.cells}
    nets = [{"cell": cell, "units": count, "parameters": parameters(cell, count)} for cell, count in units.items()]
    counts = ", ".join(f"{len(starts):,} {part}" for part, starts in cut.starts.items())
    console.say(f"data     {series} (fingerprint {series.fingerprint})\nwindows  {counts}")
    console.say(f"device   {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for each in nets:
        console.say(f"net      {each['cell']}: {each['units']} units, {each['parameters']:,} parameters")
    options = {"seeds": settings.seeds, "epochs": settings.epochs, "lr": settings.lr, "console": console}
    csv = settings.csv and Path(settings.csv).name
    protocol = dataclasses.asdict(settings) | {"cells": list(settings.cells), "csv": csv}
    del protocol["out"]
    with study.open_record("load_forecast", folder, protocol=protocol, data=series, nets=nets) as record:
        for name in BASELINES:
            record.once_all({"cell": name}, lambda name=name: [baseline(name, series, cut)])
        for cell in settings.cells:
            record.once_all({"cell": cell}, lambda cell=cell: train(cell, units[cell], series, cut, **options))
    console.table(
        f"Test MAPE in per cent, over all {HORIZON} hours and at some hours ahead; mean ± sample standard deviation of "
        f"{settings.seeds} seed{'s' * (settings.seeds > 1)}.",
        table(record.lines, nets),
    )
    sheet = picture(record.lines, folder / "load_forecast.png", title=str(series))
    console.say(f"record   {folder}\npicture  {sheet}")


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, with a UsageError, before anything is written; name each cell once."""
    in_range(settings, {"seeds": (1, 100), "epochs": (1, 100_000), "parameters": (1, 1_000_000)})
    if not 0 < settings.lr <= 1:  # nor nan
        raise UsageError(f"--lr is a positive number up to 1, got {settings.lr}; try 0.01")
    return dataclasses.replace(settings, cells=known("cells", settings.cells, CELLS))


if __name__ == "__main__":
    run_command(main)
