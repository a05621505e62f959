"""Pictures, made from metrics lines alone: lines are means over seeds, runs that diverged are not drawn."""

import dataclasses
import io
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine.tables import HEADINGS, Run, by_net, numbers, text, varying

# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
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


Facet = tuple[str, list[_Curve]]


def _accuracy(panel: Any, curve: _Curve) -> None:
    _by_epoch(panel, curve, lambda line: line["test_accuracy"])
    panel.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1))


def _dead_by_epoch(panel: Any, curve: _Curve) -> None:
    _by_epoch(panel, curve, lambda line: 100 * line["dead_units"] / max(line["units"], 1))
    panel.set(xlabel="epoch", ylabel="dead units, %", ylim=(-2, 102))


def _dead_by_layer(panel: Any, curve: _Curve) -> None:
    _by_layer(panel, curve, "dead_by_layer", 0)
    panel.set(xlabel="layer", ylabel="dead units of the layer")
    panel.set_ylim(-0.1, max(1.0, panel.get_ylim()[1]))


def _signal_by_layer(panel: Any, curve: _Curve) -> None:
    _by_layer(panel, curve, "signal_by_layer", _TINY)
    panel.set(xlabel="layer", ylabel="mean square of pre-activations", yscale="log")


_PANELS: dict[str, Callable[[Any, _Curve], None]] = {
    "Test accuracy by epoch": _accuracy,
    "Dead units by epoch": _dead_by_epoch,
    "Dead units by layer, after training": _dead_by_layer,
    "Signal by layer, after training": _signal_by_layer,
}


def accuracy_picture(lines: Sequence[Mapping[str, Any]], axes: Sequence[str], path: Path, *, title: str) -> Path:
    """Accuracy and dead units by epoch, dead units and signal by layer after the last; many nets in several rows.

    Args:
      lines: of metrics.jsonl, with the axes, seed, epoch, test_accuracy, units, dead_units, dead_by_layer and
        signal_by_layer.
      axes: what tells nets apart.
      path: of the PNG to write.
      title: stands above.

    Returns:
      The path.
    """
    facets = _facets(lines, axes)
    figure = _figure(15, 0.8 + 2.9 * len(facets))
    grid = figure.subplots(len(facets), len(_PANELS), squeeze=False)
    for row, facet in zip(grid, facets, strict=True):
        for panel, (name, draw) in zip(row, _PANELS.items(), strict=True):
            _draw(panel, facet, draw, ": ".join(filter(None, (name, facet[0]))))
    _legend(figure, grid[:, 0], "outside right center", columns=1)
    figure.suptitle(f"{title}{'; ' * bool(caption(lines, axes))}{caption(lines, axes)}", fontsize=11)
    path.write_bytes(_png(figure))
    return path


def panel_pictures(lines: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> dict[str, bytes]:
    """The panels of `accuracy_picture`, each as a PNG that a phone can show; many nets one below the other."""
    facets = _facets(lines, axes)
    labels = {curve.style["label"] for _, curves in facets for curve in curves}
    columns = max(1, min(3, 56 // max(10 + len(label) for label in labels)))
    pictures = {}
    for name, draw in _PANELS.items():
        figure = _figure(4.4, 2.4 * len(facets) + 0.4 + 0.19 * -(-len(labels) // columns))
        panels = figure.subplots(len(facets), squeeze=False)[:, 0]
        for panel, facet in zip(panels, facets, strict=True):
            _draw(panel, facet, draw, facet[0])
        _legend(figure, panels, "outside lower center", columns=columns)
        pictures[name] = _png(figure)
    return pictures


def caption(lines: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> str:
    """What the lines of the pictures are, where it needs saying."""
    seeds = len({line["seed"] for line in lines})
    bands = any(curve.band for _, curves in _facets(lines, axes) for curve in curves)
    said = [f"lines are means over {seeds} seeds" + ", bands span them" * bands] if seeds > 1 else []
    if any("diverged" in line for line in lines):
        said.append("runs that diverged are not drawn")
    return "; ".join(said)


def table_picture(experiment: str, lines: Sequence[Mapping[str, Any]], axes: Sequence[str], *, title: str) -> bytes:
    """The table as a PNG: a line for each net, with each seed, mean ± deviation, best epoch, and what was printed.

    Args:
      experiment: the table's name.
      lines: of metrics.jsonl.
      axes: what tells nets apart.
      title: stands above.
    """
    rows = numbers(experiment, lines, axes)
    shown = varying(rows, axes)
    figure = _figure(5.6, 1.6 + 0.24 * len(rows))
    panel = figure.subplots()
    y = np.arange(len(rows))
    means = [float(np.mean(row["last"])) for row in rows]
    deviations = [float(np.std(row["last"], ddof=1)) if len(row["last"]) > 1 else 0.0 for row in rows]
    seeds = [(value, place) for place, row in zip(y, rows, strict=True) for value in row["last"]]
    keys = [
        panel.errorbar(means, y, xerr=deviations, fmt="o", color=_COLOURS[1], ms=5, capsize=2.5, lw=1.2, zorder=3),
        *panel.plot(*zip(*seeds, strict=True), "|", color=_COLOURS[1], ms=8, alpha=0.6),
        *panel.plot(
            [float(np.mean(row["best"])) for row in rows], y, "o", mfc="none", mec=_COLOURS[1], ms=8, alpha=0.7
        ),
    ]
    labels = ["last epoch, mean ± deviation", "last epoch, each seed", "best epoch, mean"]
    for edition, marker, colour in (("paper", "x", _COLOURS[0]), ("later", "+", _COLOURS[2])):
        found = [(row[edition], place) for place, row in zip(y, rows, strict=True) if row[edition] is not None]
        if found:
            keys += panel.plot(*zip(*found, strict=True), marker, color=colour, ms=7, mew=1.6)
            labels.append(f"{edition} edition: CIFAR-10, best epoch")
    panel.set_yticks(y, [_name(row, shown) for row in rows])
    panel.tick_params(labelsize=8)
    panel.set(xlabel="test accuracy", xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.6))
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(keys, labels, frameon=False, loc="outside lower center", ncols=2, fontsize=7.5)
    figure.suptitle(textwrap.fill(title, 70), fontsize=9)
    return _png(figure)


def mean_band(panel: Any, x: np.ndarray, values: np.ndarray, colour: str, line: str, label: str) -> None:
    """The mean over seeds, values being (seeds, x), and a band of one sample standard deviation."""
    mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1 if len(values) > 1 else 0)
    panel.plot(x, mean, line, color=colour, label=label, lw=1.6)
    panel.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.13, lw=0)


def _facets(lines: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[Facet]:
    """The nets in rows of panels that stay legible.

    Up to eight activations have a colour each, and the other axes dashes. With more of them, the base activation has
    the colour, its variants (linked, sqrt2, bn) the dashes. The axes with most values become rows until it fits.
    """
    nets = by_net(lines, axes)
    shown = varying([net for net, _ in nets], axes)
    values = {axis: list(dict.fromkeys(net[axis] for net, _ in nets)) for axis in shown}
    inside, rows = [axis for axis in shown if axis != "act"], []
    acts = values["act"]
    by_base = len(acts) > len(_COLOURS)
    while inside and (
        len({tuple(net[a] for a in inside) for net, _ in nets}) > (1 if by_base else len(_DASHES))
        or _largest(nets, rows) > _NETS_IN_A_PANEL
    ):
        widest = max(inside, key=lambda axis: len(values[axis]))
        inside.remove(widest)
        rows = [axis for axis in shown if axis != "act" and axis not in inside]
    bases = list(dict.fromkeys(_base(act) for act in acts))
    variants = list(dict.fromkeys(act.replace(_base(act), "") for act in acts))
    dashes = list(dict.fromkeys(tuple(net[axis] for axis in inside) for net, _ in nets))
    facets: dict[str, list[_Curve]] = {}
    few = _largest(nets, rows) <= _BANDS_IN_A_PANEL
    for net, runs in nets:
        act, other = net["act"], tuple(net[axis] for axis in inside)
        colour = bases.index(_base(act)) if by_base else acts.index(act)
        dash = variants.index(act.replace(_base(act), "")) if by_base else dashes.index(other)
        style = {
            "color": _COLOURS[colour % len(_COLOURS)],
            "linestyle": _DASHES[dash % len(_DASHES)],
            "label": _name(net, ["act", *inside]),
        }
        whole = [run for run in runs if "diverged" not in run[-1]]
        facet = ", ".join(f"{HEADINGS.get(axis, axis)} {text(net[axis])}" for axis in rows)
        facets.setdefault(facet, []).append(_Curve(whole, style, few and len(whole) > 1))
    return list(facets.items())


def _largest(nets: Sequence[tuple[Mapping[str, Any], Any]], rows: Sequence[str]) -> int:
    of_row = [tuple(net[axis] for axis in rows) for net, _ in nets]
    return max(of_row.count(row) for row in set(of_row))


def _base(act: str) -> str:
    return act.removeprefix("lk_").removesuffix("_bn").removesuffix("_sqrt2")


def _name(net: Mapping[str, Any], axes: Sequence[str]) -> str:
    return ", ".join(text(net[axis]) for axis in axes)


def _by_epoch(panel: Any, curve: _Curve, value: Callable[[Mapping[str, Any]], float]) -> None:
    columns = [[value(line) for line in lines] for lines in zip(*curve.runs, strict=False)]
    _band(panel, columns, curve)


def _by_layer(panel: Any, curve: _Curve, key: str, least: float) -> None:
    columns = list(zip(*(np.maximum(run[-1][key], least) for run in curve.runs), strict=True))
    _band(panel, columns, curve)


def _band(panel: Any, columns: Sequence[Sequence[float]], curve: _Curve) -> None:
    """The mean line by 1, 2, ..., and a band from the least to the greatest value; a single point gets a dot."""
    x, means = range(1, len(columns) + 1), [float(np.mean(values)) for values in columns]
    panel.plot(x, means, lw=1.4, marker="." if len(x) == 1 else "", **curve.style)
    if len(x) == 1:
        panel.set_xlim(0.5, 1.5)
    if curve.band:
        colour = curve.style["color"]
        panel.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.13, lw=0)


def _draw(panel: Any, facet: Facet, draw: Callable[[Any, _Curve], None], title: str) -> None:
    for curve in facet[1]:
        if curve.runs:
            draw(panel, curve)
        else:
            panel.plot([], [], **curve.style)  # for the legend
    panel.set_title(title, fontsize=9)
    panel.xaxis.label.set_size(8.5)
    panel.yaxis.label.set_size(8.5)
    panel.grid(alpha=0.25)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _legend(figure: Any, panels: Sequence[Any], place: str, *, columns: int) -> None:
    """One for all rows: each label once."""
    found = (zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels)
    handles = {label: handle for handle, label in itertools.chain.from_iterable(found)}
    figure.legend(list(handles.values()), list(handles), frameon=False, loc=place, fontsize=7.5, ncols=columns,
                  handlelength=3.2)  # fmt: skip


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
