"""The picture of the README, units that die against units that cannot: `python -m experiments.report.front`."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.engine.checks import command_line
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from experiments.engine.plots import COLOURS, figure, label_ends, mean_band, save
from experiments.engine.records import read_lines
from experiments.engine.tables import CHANCE
from experiments.plasticity.kumar.problems import PROBLEMS
from experiments.plasticity.kumar.table import by_row, of_hard, result

RESULTS = Path(__file__).parents[2] / "results"
_RED, _BLUE, _GREEN, _GREY = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[7]


class Curve(NamedTuple):
    """A net: its row in the record, its name in the picture, its colour."""

    row: str
    says: str
    colour: str


DEEP = (
    Curve("lk_swish", "linked Swish", _BLUE),
    Curve("selu", "SELU", _GREEN),
    Curve("relu_bn", "ReLU, batch norm", _GREY),
    Curve("relu", "ReLU", _RED),
)
CONTINUAL = (
    Curve("lk_swish_ours", "linked Swish", _BLUE),
    Curve("swish_ours", "Swish, same start", _GREEN),
    Curve("lk_relu", "CReLU", _GREY),
    Curve("relu", "ReLU", _RED),
)


def deep(row: str) -> np.ndarray:
    """Test accuracy of 50 layers of 4 units on CIFAR-10, with this library's start: (seeds, epochs)."""
    lines = read_lines(RESULTS / "records" / "depth-cifar10-original" / row)
    seeds = sorted({line["seed"] for line in lines})
    return np.array([[line["test_accuracy"] for line in lines if line["seed"] == seed] for seed in seeds])


def continual(row: str) -> np.ndarray:
    """Online accuracy in the hard tasks of 5+1 CIFAR-100: (seeds, tasks)."""
    problem, lines = "cifar_5plus1", read_lines(RESULTS / "plasticity" / "kumar")
    runs = result(by_row(problem, PROBLEMS[problem].tasks, lines)[row])
    return np.array([of_hard(problem, run) for run in runs])


def draw(panel: Any, found: dict[Curve, np.ndarray], title: str, x: str) -> None:
    """A line for each net, with its name at its end."""
    last = next(iter(found.values())).shape[1]
    for curve, values in found.items():
        mean_band(panel, np.arange(1, values.shape[1] + 1), values, curve.colour, "-", curve.says)
    panel.set_title(title, fontsize=12)
    panel.set(xlabel=x, ylim=(0, None), xlim=(1, last))
    panel.grid(alpha=0.2)
    label_ends(panel, fontsize=11)
    panel.spines[["top", "right"]].set_visible(False)


def picture(path: Path) -> Path:
    """Write the picture; gives its path."""
    sheet = figure(10.5, 3.7)
    left, right = sheet.subplots(1, 2)
    draw(left, {c: deep(c.row) for c in DEEP}, "CIFAR-10, 50 layers of 4 units: test accuracy", "epoch")
    left.axhline(CHANCE, color="0.5", lw=1, ls=":")
    left.text(10, CHANCE - 0.01, "chance", color="0.4", fontsize=9, ha="right", va="top")
    title = "CIFAR-100, new classes again and again: online accuracy"
    draw(right, {c: continual(c.row) for c in CONTINUAL}, title, "hard task (five new classes)")
    return save(sheet, path)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The picture of the README, from the records."""

    out: str = str(RESULTS / "front.png")
    """The file to write."""


def main() -> None:
    """Draw it where the command line says."""
    settings = command_line(Settings, "python -m experiments.report.front")
    Console().say(f"picture  {picture(Path(settings.out))}")


if __name__ == "__main__":
    run_command(main)
