"""The picture of the README, dead against alive, from two records: `python -m experiments.report.front`."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine.console import Console
from experiments.engine.errors import run_command
from experiments.engine.plots import COLOURS, figure, mean_band, save
from experiments.engine.records import read_config, read_lines
from experiments.engine.tables import CHANCE
from experiments.plasticity.plots import chosen, of_net

RESULTS = Path(__file__).parents[2] / "results"
_NETS = {"relu": COLOURS[0], "lk_relu": COLOURS[1]}
_SAYS = {"relu": "ReLU", "lk_relu": "linked ReLU"}


def deep(act: str) -> np.ndarray:
    """Test accuracy of 50 layers of 4 units on digits, with this library's start: (seeds, epochs)."""
    lines = [
        line
        for line in read_lines(RESULTS / "records" / "depth-digits")
        if (line["act"], line["init"]) == (act, "auto")
    ]
    seeds = sorted({line["seed"] for line in lines})
    return np.array([[line["test_accuracy"] for line in lines if line["seed"] == seed] for seed in seeds])


def continual(act: str) -> np.ndarray:
    """Share of 256 random labels that is memorised, in each of 50 tasks, at equal parameters: (seeds, tasks)."""
    nets = read_config(RESULTS / "plasticity")["nets"]
    width = next(net["width"] for net in nets if (net["row"], net["column"]) == (act, "equal_parameters"))
    runs = chosen(of_net("random_labels", act, width, read_lines(RESULTS / "plasticity")))
    return np.array([run["accuracy"] for run in runs])


def draw(panel: Any, found: dict[str, np.ndarray], places: dict[str, tuple[float, float]], title: str, x: str) -> None:
    """A line for each net, with its name beside it, and the level of chance."""
    last = next(iter(found.values())).shape[1]
    for act, values in found.items():
        mean_band(panel, np.arange(1, values.shape[1] + 1), values, _NETS[act], "-", _SAYS[act])
        panel.text(*places[act], _SAYS[act], color=_NETS[act], fontsize=12, weight="bold")
    panel.axhline(CHANCE, color="0.5", lw=1, ls=":")
    panel.text(last, CHANCE - 0.015, "chance", color="0.4", fontsize=9, ha="right", va="top")
    panel.set_title(title, fontsize=12)
    panel.set(xlabel=x, ylim=(0, 1.04), xlim=(1, last))
    panel.grid(alpha=0.2)
    panel.spines[["top", "right"]].set_visible(False)


def picture(path: Path) -> Path:
    """Write the picture; gives its path."""
    sheet = figure(10.5, 3.7)
    left, right = sheet.subplots(1, 2)
    draw(left, {act: deep(act) for act in _NETS}, {"relu": (14, 0.14), "lk_relu": (15, 0.85)},
         "50 layers, no normalisation: test accuracy", "epoch")  # fmt: skip
    draw(right, {act: continual(act) for act in _NETS}, {"relu": (22, 0.36), "lk_relu": (20, 0.92)},
         "task after task, nothing reset: what is still learned", "task")  # fmt: skip
    return save(sheet, path)


if __name__ == "__main__":
    run_command(lambda: Console().say(f"picture  {picture(RESULTS / 'front.png')}"))
