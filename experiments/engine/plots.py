"""Pictures, made from metrics lines alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine.tables import by_net

# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
_DASHES = ("-", "--", ":", "-.")
_INSIDE_UP_TO = 8  # nets whose legend fits into the panel
_TINY = 1e-30  # a log axis has no zero


def accuracy_picture(lines: Sequence[dict[str, Any]], axes: Sequence[str], path: Path, *, title: str) -> Path:
    """Accuracy by epoch, and dead units and signal by layer after the last epoch; bands span the seeds.

    Args:
      lines: of metrics.jsonl, with the axes, seed, epoch, test_accuracy, dead_by_layer and signal_by_layer.
      axes: what tells nets apart.
      path: of the PNG to write.
      title: stands above.

    Returns:
      The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, dead, signal = figure.subplots(1, 3)
    nets = by_net(lines, axes)
    shown = [axis for axis in axes if axis == "act" or len({net[axis] for net, _ in nets}) > 1]
    for number, (net, runs) in enumerate(nets):
        style = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
            "label": ", ".join(str(net[axis]) for axis in shown),
        }
        evaluated = [[line for line in run if "test_accuracy" in line] for run in runs]
        whole = [run for run in evaluated if len(run) == max(map(len, evaluated))]
        if not whole[0]:
            continue
        _band(accuracy, [line["epoch"] for line in whole[0]], _columns(whole, "test_accuracy"), style)
        last = [run[-1] for run in whole]
        layers = range(1, len(last[0]["dead_by_layer"]) + 1)
        _band(dead, layers, list(zip(*(line["dead_by_layer"] for line in last), strict=True)), style)
        signals = np.maximum([line["signal_by_layer"] for line in last], _TINY)
        _band(signal, layers, list(zip(*signals, strict=True)), style)
    accuracy.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1), title="Test accuracy")
    dead.set(xlabel="layer", ylabel="dead units", title="Dead units after training")
    dead.set_ylim(bottom=-0.1)
    signal.set(xlabel="layer", ylabel="mean square of pre-activations", yscale="log", title="Signal after training")
    for panel in (accuracy, dead, signal):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if len(nets) <= _INSIDE_UP_TO:
        accuracy.legend(frameon=False, loc="best")
    else:
        figure.legend(*accuracy.get_legend_handles_labels(), frameon=False, loc="outside right center", fontsize=7,
                      ncols=1 + len(nets) // 40)  # fmt: skip
    seeds = len({line["seed"] for line in lines})
    figure.suptitle(title + (f"; lines are means of {seeds} seeds, bands span them" if seeds > 1 else ""))
    figure.savefig(path, dpi=110)
    return path


def _columns(runs: Sequence[Sequence[Any]], key: str) -> list[list[float]]:
    """The values of all runs, epoch by epoch."""
    return [[line[key] for line in lines] for lines in zip(*runs, strict=True)]


def _band(axes: Any, x: Sequence[int], values: Sequence[Sequence[float]], style: dict[str, str]) -> None:
    """The mean line, and a band from the least to the greatest value."""
    axes.plot(x, [float(np.mean(v)) for v in values], **style)
    axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.15, lw=0)
