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
from experiments.engine.tables import HEADINGS, Nets, Run, chance, tested_on, text, varying

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Okabe and Ito's, which colour-blind readers can tell apart; then black and grey."""
IN_A_PANEL = 5
"""Lines, at most."""
_TINY = 1e-30  # a log axis has no zero
_DPI = 140


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A net in a panel."""

    runs: list[Run]  # those that did not diverge
    colour: str
    label: str


@dataclasses.dataclass(frozen=True)
class _Panel:
    """What is drawn of a run, as values at 1, 2, ..., and how its axes are set."""

    values: Callable[[Run], Sequence[float]]
    axes: dict[str, Any]
    least_top: float | None = None  # of an axis whose greatest value may be 0
    chance: bool = False  # is drawn


Facet = tuple[str, list[_Curve]]
_PANELS = {
    "Test accuracy by epoch": _Panel(
        lambda run: [line["test_accuracy"] for line in run],
        {"xlabel": "epoch", "ylabel": "test accuracy", "ylim": (0, 1)},
        chance=True,
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
    """Write the picture; gives its path."""
    write_whole(path, png(figure, dpi))
    return path


def accuracy_picture(nets: Nets, path: Path, *, title: str, data: Mapping[str, Any]) -> Path:
    """Accuracy and dead units by epoch, dead units and signal by layer after the last; gives the path of the PNG.

    A row has at most five nets. Lines have epoch, test_accuracy, units, dead_units, dead_by_layer, signal_by_layer.
    """
    facets = _facets(nets)
    whole = figure(15, 0.8 + 2.7 * len(facets))
    grid = whole.subplots(len(facets), len(_PANELS), squeeze=False)
    for row, (named, curves) in zip(grid, facets, strict=True):
        for panel, what in zip(row, _PANELS.values(), strict=True):
            _draw(panel, curves, what, data)
        label_ends(row[0])
        row[0].set_title(named, fontsize=9, loc="left", weight="bold")
    for panel, name in zip(grid[0], _PANELS, strict=True):
        panel.set_title(_of_images(name, data), fontsize=9, loc="right")
    whole.suptitle("; ".join(filter(None, (title, caption(nets)))), fontsize=11)
    return save(whole, path, dpi=100)


def panel_pictures(nets: Nets, *, data: Mapping[str, Any]) -> dict[str, bytes]:
    """The panels of `accuracy_picture`, each as a PNG that a phone can show; many nets one below the other."""
    facets, pictures = _facets(nets), {}
    for name, what in _PANELS.items():
        one = figure(4.6, 0.2 + 2.4 * len(facets))
        panels = one.subplots(len(facets), squeeze=False)[:, 0]
        for panel, (named, curves) in zip(panels, facets, strict=True):
            _draw(panel, curves, what, data)
            label_ends(panel)
            panel.set_title(named, fontsize=9)
        pictures[_of_images(name, data)] = png(one)
    return pictures


def _of_images(value: Any, data: Mapping[str, Any]) -> Any:
    """Texts that speak of the test set, where the accuracies are of other images."""
    if not isinstance(value, str) or tested_on(data) == "test":
        return value
    return value.replace("Test", tested_on(data).capitalize()).replace("test", tested_on(data))


def caption(nets: Nets) -> str:
    """What the lines of the pictures are, where it needs saying."""
    runs, counts = [run for _, runs in nets for run in runs], sorted({len(runs) for _, runs in nets})
    seeds = " to ".join(map(str, counts[:: max(1, len(counts) - 1)]))
    said = [f"lines are means over {seeds} seeds, bands span them"] if max(counts, default=1) > 1 else []
    if any("diverged" in run[-1] for run in runs):
        said.append("runs that diverged are not drawn")
    return "; ".join(said)


def table_picture(
    rows: Sequence[Mapping[str, Any]], axes: Sequence[str], *, title: str, data: Mapping[str, Any]
) -> bytes:
    """A table of `numbers` as a PNG: for each net each seed, mean ± deviation, best epoch, and what was printed."""
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
    panel.set(xlabel=_of_images("test accuracy", data), xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.6))
    _plain(panel)
    whole.legend(keys, labels, frameon=False, loc="outside lower center", ncols=2, fontsize=7.5)
    whole.suptitle(textwrap.fill(title, 70), fontsize=9)
    return png(whole)


def mean_band(panel: Any, x: np.ndarray, values: np.ndarray, colour: str, line: str, label: str) -> None:
    """Draw the mean over seeds, values being (seeds, x), and a band of one sample standard deviation."""
    mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1 if len(values) > 1 else 0)
    panel.plot(x, mean, line, color=colour, label=label, lw=1.6)
    panel.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.13, lw=0)


def label_ends(panel: Any, fontsize: float = 8) -> None:
    """Write the name of each line that has one at the height of its end, in its colour; after all is drawn."""
    panel.get_ylim()  # scales the axes
    lines = [line for line in panel.get_lines() if len(line.get_xdata()) and not line.get_label().startswith("_")]
    to_panel = panel.transScale + panel.transLimits
    ends = [to_panel.transform((line.get_xdata()[-1], line.get_ydata()[-1]))[1] for line in lines]
    inches = 0.8 * panel.figure.get_figheight() / panel.get_subplotspec().get_gridspec().nrows
    for place, line in zip(_apart(ends, 0.17 * fontsize / 8 / inches), lines, strict=True):
        panel.text(1.02, place, line.get_label(), color=line.get_color(), fontsize=fontsize, va="center",
                   transform=panel.transAxes)  # fmt: skip


def _facets(nets: Nets) -> list[Facet]:
    """The nets in as few rows of panels as have at most five each; the nets of a row share the values of some axes.

    Among these are the base activation, such as relu of relu, lk_relu, relu_sqrt2 and relu_bn, and the family: some
    bases with at most five activations. In all rows a colour has one meaning: a variant of the base activation where
    that is shared, else an activation; with the axes that are not shared. More meanings than colours have none.
    """
    axes = varying([net for net, _ in nets], list(nets[0][0]))
    families = _families([net["act"] for net, _ in nets])
    tagged = [({**net, "base": _base(net["act"]), "family": families[_base(net["act"])]}, runs) for net, runs in nets]
    ways = [way for n in range(len(axes) + 3) for way in itertools.combinations(["base", "family", *axes], n)]

    def rows(way: Sequence[str]) -> collections.Counter[tuple[Any, ...]]:
        return collections.Counter(tuple(net[axis] for axis in way) for net, _ in tagged)

    shared = min((way for way in ways if max(rows(way).values()) <= IN_A_PANEL), key=lambda way: len(rows(way)))
    own = [axis for axis in axes if axis == "act" or axis not in shared]

    def meaning(net: Mapping[str, Any]) -> str:
        return _name({**net, "act": net["act"].replace(net["base"], "") if "base" in shared else net["act"]}, own)

    meanings = list(dict.fromkeys(meaning(net) for net, _ in tagged))
    facets: dict[tuple[Any, ...], Facet] = {}
    for net, runs in tagged:
        whole = [run for run in runs if "diverged" not in run[-1]]
        says = {axis: f"{HEADINGS.get(axis, axis)} {text(net[axis])}" for axis in axes} | {"base": net["base"]}
        title = ", ".join(says[axis] for axis in shared if axis in says)
        _, curves = facets.setdefault(tuple(net[axis] for axis in shared), (title, []))
        colour = meanings.index(meaning(net)) if len(meanings) <= len(COLOURS) else len(curves)
        curves.append(_Curve(whole, COLOURS[colour], _name(net, own)))
    return list(facets.values())


def _families(acts: Sequence[str]) -> dict[str, int]:
    """The base of each activation -> the number of its family, in order.

    >>> from experiments.engine.plots import _families
    >>> _families(["relu", "lk_relu", "relu_bn", "elu", "lk_elu", "selu"])
    {'relu': 0, 'elu': 0, 'selu': 1}
    """
    sizes = collections.Counter(map(_base, dict.fromkeys(acts)))
    families, family, size = {}, 0, 0
    for base, count in sizes.items():
        if size and size + count > IN_A_PANEL:
            family, size = family + 1, 0
        families[base], size = family, size + count
    return families


def _base(act: str) -> str:
    return act.removeprefix("lk_").removesuffix("_bn").removesuffix("_sqrt2")


def _name(net: Mapping[str, Any], axes: Sequence[str]) -> str:
    return ", ".join(text(net[axis]) for axis in axes)


def _draw(panel: Any, curves: Sequence[_Curve], what: _Panel, data: Mapping[str, Any]) -> None:
    """For each net the mean line, and a band from the least to the greatest value; a single point gets a dot."""
    for curve in curves:
        runs = [what.values(run) for run in curve.runs]
        length = min(map(len, runs), default=0)  # all may have diverged
        if not length:
            continue
        x, values = range(1, length + 1), np.array([run[:length] for run in runs], np.float64)
        panel.plot(x, values.mean(axis=0), lw=1.4, marker="." if length == 1 else "", color=curve.colour,
                   label=curve.label)  # fmt: skip
        panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=curve.colour, alpha=0.13, lw=0)
        if length == 1:
            panel.set_xlim(0.5, 1.5)
    panel.set(**{name: _of_images(value, data) for name, value in what.axes.items()})
    if what.least_top is not None:
        panel.set_ylim(-0.1, max(what.least_top, panel.get_ylim()[1]))
    if what.chance:
        guess = chance(data)
        panel.axhline(guess, color="0.5", lw=1, ls=":")
        panel.text(
            0.01, guess - 0.01, "chance", color="0.4", fontsize=7, va="top", transform=panel.get_yaxis_transform()
        )
    panel.xaxis.label.set_size(8.5)
    panel.yaxis.label.set_size(8.5)
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _plain(panel)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Places that are a gap apart, in the same order, near the given ones; between 0 and 1 if they fit.

    >>> from experiments.engine.plots import _apart
    >>> [round(place, 2) for place in _apart([0.5, 0.98, 0.97, 1.0], 0.1)]
    [0.5, 0.9, 0.8, 1.0]
    """
    order = np.argsort(places, kind="stable")
    found = np.clip(np.asarray(places, np.float64)[order], 0, 1)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + gap)
    for i in reversed(range(len(found))):
        found[i] = min(found[i], 1 - gap * (len(found) - 1 - i))
    return found[np.argsort(order)].tolist()


def _plain(panel: Any) -> None:
    panel.grid(alpha=0.25)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
