"""How the cost of a training step grows with depth, width and batch, linked and plain.

    python -m benchmarks.growth --out runs/growth.json

The net of table 2 on images of 8x8, its layers in a scan. One axis at a time grows; the others stay at 50 layers of 4
units and 32 images. Of each net: seconds to compile, the median of a step, and the temporary memory that the program
asks for. The exponent p of cost ~ axis^p is fitted over the larger half of each axis; 1 is proportional, and "-" says
that a cost is a quarter away from any power, as where a wider net has another form of the convolution.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import turns
from benchmarks.steps import Step, noise
from experiments import depth
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.plots import COLOURS, figure, save

BASE = {"depth": 50, "width": 4, "batch_size": 32}
AXES = {
    "depth": (10, 32, 100, 316, 1000, 3162, 10_000),
    "width": (4, 8, 16, 32, 64, 128),
    "batch_size": (8, 32, 128, 512, 2048),
}
NETS = ("relu", "lk_relu")
COSTS = {
    "compile_seconds": "time to compile, s",
    "step_seconds": "step, s",
    "temporary_bytes": "temporary memory, bytes",
}
_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """What a training step costs as the net grows."""

    rounds: int = 5
    """Timed steps of each net."""


def cost(act: str, shape: dict[str, int], rounds: int, console: Console) -> dict[str, Any]:
    """What a net of this shape costs."""
    data = noise(_SIZE, 1, shape["batch_size"])
    settings = depth.Settings(width=shape["width"], scan_layers="yes")
    net = depth.build(settings, {"act": act, "init": "auto", "depth": shape["depth"]}, data, 0)
    step = Step([net], data, shape["batch_size"])
    start = time.perf_counter()
    compiled = step.compile()
    compile_seconds = time.perf_counter() - start
    return {
        "act": act, **shape, "compile_seconds": compile_seconds,
        "step_seconds": turns.medians({"": step.take}, rounds, console, f"{act}, {shape}")[""],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }  # fmt: skip


def exponent(values: Any, costs: Any) -> float:
    """p of cost ~ value^p, by least squares of logarithms over the larger half; nan where no power is near.

    >>> from benchmarks.growth import exponent
    >>> round(exponent([1, 10, 100, 1000], [7, 8, 90, 900]), 2)
    1.0
    >>> exponent([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 2, 4])
    nan
    """
    x, y = (np.log(numbers[len(values) // 2 :]) for numbers in (values, costs))
    power = np.polyfit(x, y, 1)
    return float(power[0]) if abs(np.polyval(power, x) - y).max() < np.log(1.25) else math.nan


def table(points: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Of each net and axis: the exponents, and the ratios between the ends."""
    rows = []
    for axis in AXES:
        for act in NETS:
            line = _line(points, axis, act)
            row = {"net": act, "axis": f"{axis.replace('_', ' ')}, {line[0][axis]:,} to {line[-1][axis]:,}"}
            for name, title in COSTS.items():
                power = exponent([p[axis] for p in line], [p[name] for p in line])
                row[title] = "-" if math.isnan(power) else f"{power:.2f}"
            rows.append(row)
    return rows


def picture(points: list[dict[str, Any]], path: Path) -> None:
    """Costs over axes, both logarithmic."""
    sheet = figure(11, 8)
    panels = sheet.subplots(len(COSTS), len(AXES), sharex="col", sharey="row")
    for row, (name, title) in zip(panels, COSTS.items(), strict=True):
        row[0].set_ylabel(title)
        for panel, axis in zip(row, AXES, strict=True):
            for act, colour in zip(NETS, COLOURS, strict=False):
                line = _line(points, axis, act)
                panel.loglog([p[axis] for p in line], [p[name] for p in line], "o-", color=colour, label=act)
            panel.grid(alpha=0.3)
    for panel, axis in zip(panels[-1], AXES, strict=True):
        others = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in BASE.items() if key != axis)
        panel.set_xlabel(f"{axis.replace('_', ' ')}\n({others})")
    panels[0][0].legend()
    save(sheet, path, 120)


def _line(points: list[dict[str, Any]], axis: str, act: str) -> list[dict[str, Any]]:
    others = {key: value for key, value in BASE.items() if key != axis}
    line = [p for p in points if p["act"] == act and all(p[key] == value for key, value in others.items())]
    return sorted((p for p in line if p[axis] in AXES[axis]), key=lambda p: p[axis])


def main() -> None:
    """Measure, print the exponents, and write the record and its picture."""
    settings, console = turns.parse(Settings, "growth"), Console()
    if settings.out and settings.out.suffix == ".png":
        raise UsageError(f"--out is the record, got {settings.out}, which its picture will be; try .json")
    shapes = {tuple({**BASE, axis: value}.items()) for axis, values in AXES.items() for value in values}
    points = []
    for shape in sorted(shapes):
        for act in NETS:
            point = cost(act, dict(shape), settings.rounds, console)
            said = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in point.items()}
            console.say("  ".join(f"{key} {value}" for key, value in said.items()))
            points.append(point)
    console.table(f"Exponents on {jax.devices()[0].device_kind}: cost ~ axis^p.", table(points))
    turns.save(settings, "growth", points)
    if settings.out:
        picture(points, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
