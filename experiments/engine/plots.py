"""Pictures, made from metrics lines alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")


def depth_picture(lines: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path:
    """Accuracy by epoch, and dead units and signal by layer after the last epoch; bands span the seeds.

    Args:
      lines: of metrics.jsonl, with act, depth, seed, epoch, test_accuracy, dead_by_layer and signal_by_layer.
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
    for colour, (act, depth) in zip(
        _COLOURS * 99, dict.fromkeys((line["act"], line["depth"]) for line in lines), strict=False
    ):
        mine = [line for line in lines if (line["act"], line["depth"]) == (act, depth)]
        last = [line for line in mine if line["epoch"] == max(line["epoch"] for line in mine)]
        epochs = sorted({line["epoch"] for line in mine})
        by_epoch = [[line["test_accuracy"] for line in mine if line["epoch"] == epoch] for epoch in epochs]
        style = {"color": colour, "label": f"{act}, {depth:,} layers"}
        _band(accuracy, epochs, by_epoch, style)
        layers = range(1, depth + 1)
        _band(dead, layers, list(zip(*(line["dead_by_layer"] for line in last), strict=True)), style)
        tiny = 1e-30  # a log axis has no zero
        signals = np.maximum([line["signal_by_layer"] for line in last], tiny)
        _band(signal, layers, list(zip(*signals, strict=True)), style)
    accuracy.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1), title="Test accuracy")
    dead.set(xlabel="layer", ylabel="dead units", title="Dead units after training")
    dead.set_ylim(bottom=-0.1)
    signal.set(xlabel="layer", ylabel="mean square of pre-activations", yscale="log", title="Signal after training")
    for axes in (accuracy, dead, signal):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.legend(frameon=False, loc="best")
    seeds = len({line["seed"] for line in lines})
    figure.suptitle(title + (f"; lines are means of {seeds} seeds, bands span them" if seeds > 1 else ""))
    figure.savefig(path, dpi=110)
    return path


def _band(axes: Any, x: Sequence[int], values: Sequence[Sequence[float]], style: dict[str, str]) -> None:
    """The mean line, and a band from the least to the greatest value."""
    axes.plot(x, [float(np.mean(v)) for v in values], **style)
    axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.15, lw=0)
