"""Pictures, made from metrics lines alone: lines are means over seeds, runs that diverged are not drawn."""

import collections
import dataclasses
import io
import itertools
import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine.files import write_whole
from experiments.engine.tables import HEADINGS, Nets, Run, text, varying

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Okabe and Ito's, which colour-blind readers can tell apart; then black and grey."""
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (8, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_NETS_IN_A_PANEL = 12
_BANDS_IN_A_PANEL = 6  # with more they hide the lines
_TINY = 1e-30  # a log axis has no zero
_DPI = 140


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A net in a panel."""

    runs: list[Run]  # those that did not diverge
    style: dict[str, Any]
    band: bool


@dataclasses.dataclass(frozen=True)
class _Panel:
    """What is drawn of a run, as values at 1, 2, ..., and how its axes are set."""

    values: Callable[[Run], Sequence[float]]
    axes: dict[str, Any]
    least_top: float | None = None  # of an axis whose greatest value may be 0


Facet = tuple[str, list[_Curve]]
_PANELS = {
    "Test accuracy by epoch": _Panel(
        lambda run: [line["test_accuracy"] for line in run],
        {"xlabel": "epoch", "ylabel": "test accuracy", "ylim": (0, 1)},
    ),
    "Dead units by epoch": _Panel(
        lambda run: [100 * line["dead_units"] / max(line["units"], 1) for line in run],
        {"xlabel": "epoch", "ylabel": "dead units, %", "ylim": (-2, 102)},
    ),
    "Dead units by layer, after training": _Panel(
        lambda run: run[-1]["dead_by_layer"], {"xlabel": "layer", "ylabel": "dead units of the layer"}, least_top=1
    ),
    "Signal by layer, after training": _Panel(
        lambda run: np.maximum(run[-1]["signal_by_layer"], _TINY).tolist(),
        {"xlabel": "layer", "ylabel": "mean square of pre-activations", "yscale": "log"},
    ),
}


def figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches, which lays itself out and needs no display."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its advice, where its cache cannot be written
    from matplotlib.figure import Figure  # takes a while: only who draws imports it

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Any, dpi: int = _DPI) -> bytes:
    """The picture's file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Any, path: Path, dpi: int = _DPI) -> Path:
    """Write the picture; gives its path.

    Raises:
      UsageError: if it cannot be written.
    """
    write_whole(path, png(figure, dpi))
    return path


def accuracy_picture(nets: Nets, path: Path, *, title: str) -> Path:
    """Accuracy and dead units by epoch, dead units and signal by layer after the last; many nets in several rows.

    Args:
      nets: of `by_net`; lines have epoch, test_accuracy, units, dead_units, dead_by_layer and signal_by_layer.
      path: of the PNG to write.
      title: stands above.

    Returns:
      The path.
    """
    facets = _facets(nets)
    whole = figure(15, 0.8 + 2.9 * len(facets))
    grid = whole.subplots(len(facets), len(_PANELS), squeeze=False)
    for row, (named, curves) in zip(grid, facets, strict=True):
        for panel, (name, what) in zip(row, _PANELS.items(), strict=True):
            _draw(panel, curves, what, ": ".join(filter(None, (name, named))))
    _legend(whole, grid[:, 0], "outside right center", columns=1)
    whole.suptitle("; ".join(filter(None, (title, caption(nets)))), fontsize=11)
    return save(whole, path)


def panel_pictures(nets: Nets) -> dict[str, bytes]:
    """The panels of `accuracy_picture`, each as a PNG that a phone can show; many nets one below the other."""
    facets = _facets(nets)
    labels = {curve.style["label"] for _, curves in facets for curve in curves}
    columns = max(1, min(3, 56 // max(10 + len(label) for label in labels)))
    pictures = {}
    for name, what in _PANELS.items():
        one = figure(4.4, 2.4 * len(facets) + 0.4 + 0.19 * -(-len(labels) // columns))
        panels = one.subplots(len(facets), squeeze=False)[:, 0]
        for panel, (named, curves) in zip(panels, facets, strict=True):
            _draw(panel, curves, what, named)
        _legend(one, panels, "outside lower center", columns=columns)
        pictures[name] = png(one)
    return pictures


def caption(nets: Nets) -> str:
    """What the lines of the pictures are, where it needs saying."""
    runs = [run for _, runs in nets for run in runs]
    seeds = len({run[0]["seed"] for run in runs})
    bands = any(curve.band for _, curves in _facets(nets) for curve in curves)
    said = [f"lines are means over {seeds} seeds" + ", bands span them" * bands] if seeds > 1 else []
    if any("diverged" in run[-1] for run in runs):
        said.append("runs that diverged are not drawn")
    return "; ".join(said)


def table_picture(rows: Sequence[Mapping[str, Any]], axes: Sequence[str], *, title: str) -> bytes:
    """The table as a PNG: a line for each net, with each seed, mean ± deviation, best epoch, and what was printed.

    Args:
      rows: of `numbers`.
      axes: what tells nets apart.
      title: stands above.
    """
    shown, y = varying(rows, axes), np.arange(len(rows))
    whole = figure(5.6, 1.6 + 0.24 * len(rows))
    panel = whole.subplots()
    means, best = ([float(np.mean(row[key])) for row in rows] for key in ("last", "best"))
    deviations = [float(np.std(row["last"], ddof=1)) if len(row["last"]) > 1 else 0.0 for row in rows]
    seeds = [(value, place) for place, row in zip(y, rows, strict=True) for value in row["last"]]
    keys = [
        panel.errorbar(means, y, xerr=deviations, fmt="o", color=COLOURS[1], ms=5, capsize=2.5, lw=1.2, zorder=3),
        *panel.plot(*zip(*seeds, strict=True), "|", color=COLOURS[1], ms=8, alpha=0.6),
        *panel.plot(best, y, "o", mfc="none", mec=COLOURS[1], ms=8, alpha=0.7),
    ]
    labels = ["last epoch, mean ± deviation", "last epoch, each seed", "best epoch, mean"]
    for edition, marker, colour in (("paper", "x", COLOURS[0]), ("later", "+", COLOURS[2])):
        found = [(row[edition], place) for place, row in zip(y, rows, strict=True) if row[edition] is not None]
        if found:
            keys += panel.plot(*zip(*found, strict=True), marker, color=colour, ms=7, mew=1.6)
            labels.append(f"{edition} edition: CIFAR-10, best epoch")
    panel.set_yticks(y, [_name(row, shown) for row in rows])
    panel.set(xlabel="test accuracy", xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.6))
    _plain(panel)
    whole.legend(keys, labels, frameon=False, loc="outside lower center", ncols=2, fontsize=7.5)
    whole.suptitle(textwrap.fill(title, 70), fontsize=9)
    return png(whole)


def mean_band(panel: Any, x: np.ndarray, values: np.ndarray, colour: str, line: str, label: str) -> None:
    """Draw the mean over seeds, values being (seeds, x), and a band of one sample standard deviation."""
    mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1 if len(values) > 1 else 0)
    panel.plot(x, mean, line, color=colour, label=label, lw=1.6)
    panel.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.13, lw=0)


def _facets(nets: Nets) -> list[Facet]:
    """The nets in rows of panels that stay legible.

    Up to eight activations have a colour each, and the other axes dashes. With more of them, the base activation has
    the colour, its variants (linked, sqrt2, bn) the dashes. The axes with most values become rows until it fits.
    """
    shown = varying([net for net, _ in nets], list(nets[0][0]))

    def distinct(axes: Sequence[str]) -> list[tuple[Any, ...]]:
        return list(dict.fromkeys(tuple(net[axis] for axis in axes) for net, _ in nets))

    def largest(rows: Sequence[str]) -> int:
        return max(collections.Counter(tuple(net[axis] for axis in rows) for net, _ in nets).values())

    by_base = len(distinct(["act"])) > len(COLOURS)
    inside, rows = [axis for axis in shown if axis != "act"], []
    while inside and (len(distinct(inside)) > (1 if by_base else len(_DASHES)) or largest(rows) > _NETS_IN_A_PANEL):
        inside.remove(max(inside, key=lambda axis: len(distinct([axis]))))
        rows = [axis for axis in shown if axis not in ("act", *inside)]

    def kinds(net: Mapping[str, Any]) -> tuple[Any, Any]:
        """What the colour tells, and what the dashes tell."""
        base = net["act"].removeprefix("lk_").removesuffix("_bn").removesuffix("_sqrt2")
        others = tuple(net[axis] for axis in inside)
        return (base, net["act"].replace(base, "")) if by_base else (net["act"], others)

    colours, dashes = (list(dict.fromkeys(found)) for found in zip(*(kinds(net) for net, _ in nets), strict=True))
    facets: dict[str, list[_Curve]] = {}
    for net, runs in nets:
        colour, dash = kinds(net)
        style = {
            "color": COLOURS[colours.index(colour) % len(COLOURS)],
            "linestyle": _DASHES[dashes.index(dash) % len(_DASHES)],
            "label": _name(net, ["act", *inside]),
        }
        whole = [run for run in runs if "diverged" not in run[-1]]
        band = largest(rows) <= _BANDS_IN_A_PANEL and len(whole) > 1
        facet = ", ".join(f"{HEADINGS.get(axis, axis)} {text(net[axis])}" for axis in rows)
        facets.setdefault(facet, []).append(_Curve(whole, style, band))
    return list(facets.items())


def _name(net: Mapping[str, Any], axes: Sequence[str]) -> str:
    return ", ".join(text(net[axis]) for axis in axes)


def _draw(panel: Any, curves: Sequence[_Curve], what: _Panel, title: str) -> None:
    """For each net the mean line, and a band from the least to the greatest value; a single point gets a dot."""
    for curve in curves:
        runs = [what.values(run) for run in curve.runs]
        length = min(map(len, runs), default=0)  # all may have diverged
        x, values = range(1, length + 1), np.array([run[:length] for run in runs], np.float64)
        panel.plot(x, values.mean(axis=0) if length else [], lw=1.4, marker="." if len(x) == 1 else "",
                   **curve.style)  # fmt: skip
        if len(x) == 1:
            panel.set_xlim(0.5, 1.5)
        if curve.band and length:
            colour = curve.style["color"]
            panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.13, lw=0)
    panel.set(**what.axes)
    if what.least_top is not None:
        panel.set_ylim(-0.1, max(what.least_top, panel.get_ylim()[1]))
    panel.set_title(title, fontsize=9)
    panel.xaxis.label.set_size(8.5)
    panel.yaxis.label.set_size(8.5)
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _plain(panel)


def _plain(panel: Any) -> None:
    panel.grid(alpha=0.25)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, panels: Sequence[Any], place: str, *, columns: int) -> None:
    """One for all rows: each label once."""
    found = (zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels)
    handles = {label: handle for handle, label in itertools.chain.from_iterable(found)}
    figure.legend(list(handles.values()), list(handles), frameon=False, loc=place, fontsize=7.5, ncols=columns,
                  handlelength=3.2)  # fmt: skip
