"""What `experiments.dynamics` found, made from a record's lines: a table, and decision surfaces with gradients."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dynamics.toy import Moons, Toy
from experiments.engine.plots import COLOURS, figure, save
from experiments.engine.study import Line
from experiments.engine.tables import spread

_UNITS = COLOURS[:6]  # black and grey are the surface's
_DASHES = ("-", "--", ":", "-.")
_GRID = 121  # points along each side of a surface
_FLOOR = 1e-9  # a log axis has no zero: gradients below are drawn here


def table(toy: Toy, lines: Sequence[Line]) -> list[dict[str, str]]:
    """A row for each activation, from its first and last lines of each seed."""
    rows = []
    for act in dict.fromkeys(line["act"] for line in lines):
        mine = [line for line in lines if line["act"] == act]
        first, last = ([line for line in mine if line["step"] == step] for step in (0, toy.steps))
        loss, dead, one_sided = (
            [statistics.fmean(line[key] for line in end) for end in (first, last)]
            for key in ("loss", "dead_units", "one_sided_units")
        )
        rows.append(
            {
                "act": act,
                "loss": f"{loss[0]:.3f} to {loss[1]:.3f}",
                "accuracy": spread([line["accuracy"] for line in last]),
                "dead": f"{dead[0]:.3g} to {dead[1]:.3g} of {toy.units}",
                "one-sided": f"{one_sided[0]:.3g} to {one_sided[1]:.3g}",
                "gradient": f"{np.mean([line['gradient_norms'] for line in first]):.2g}",
            }
        )
    return rows


def picture(
    lines: Sequence[Line], data: Moons, toy: Toy, path: Path, *, title: str,
    on_surface: Callable[[int], None] = lambda _: None,
) -> Path:  # fmt: skip
    """A row for each activation: surfaces with each unit's zero line, then the gradient norm of each unit.

    The lines are of one seed; on_surface is called with 1 for each surface done. The surfaces reach a little beyond the
    first bias, so that zero lines are seen from the start.
    """
    acts = list(dict.fromkeys(line["act"] for line in lines))
    steps = [line["step"] for line in lines if line["act"] == acts[0] and "parameters" in line]
    reach = float(np.abs(data.points).max())
    reach = min(max(1.15 * reach, 1.25 * abs(toy.bias)), 2 * reach)
    top = 10 * max(_FLOOR, *(max(line["gradient_norms"]) for line in lines))
    sheet = figure(2.2 * len(steps) + 4.4, 2.2 * len(acts) + 1.2)
    sheet.suptitle(title, fontsize=13)
    panels = sheet.subplots(
        len(acts), len(steps) + 1, squeeze=False, sharex="col", width_ratios=[*[1] * len(steps), 1.8]
    )
    for act, row in zip(acts, panels, strict=True):
        mine = [line for line in lines if line["act"] == act]
        for line, axes in zip((line for line in mine if "parameters" in line), row, strict=False):
            _surface(axes, toy.restore(line), data, reach)
            axes.text(0.03, 0.03, f"accuracy {line['accuracy']:.3f}", transform=axes.transAxes, fontsize=9,
                      bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5})  # fmt: skip
            on_surface(1)
        row[0].set_ylabel(act, fontsize=13)
        _gradients(row[-1], mine, top)
    for axes, step in zip(panels[0], steps, strict=False):
        axes.set_title(f"step {step:,}", fontsize=12)
    panels[0, -1].set_title("gradient norm of each unit, by step", fontsize=12)
    handles, names = panels[0, 0].get_legend_handles_labels()
    sheet.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=11)
    return save(sheet, path, 110)


def _surface(axes: Any, net: Any, data: Moons, reach: float) -> None:
    """The probability of class 1 (darker is more), the boundary, the data, and the line z = 0 of each unit."""
    side = np.linspace(-reach, reach, _GRID)
    points = jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), jnp.float32)
    probability = np.asarray(jax.nn.softmax(net(points))[:, 1]).reshape(_GRID, _GRID)
    axes.imshow(1 - probability, extent=(-reach, reach, -reach, reach), origin="lower", cmap="gray", vmin=-1.2, vmax=1)
    if probability.min() < 0.5 < probability.max():
        axes.contour(side, side, probability, levels=[0.5], colors="black", linewidths=1.8)
    for number, (w, b) in enumerate(zip(net.hidden.kernel[...].T, net.hidden.bias[...], strict=True)):
        ends = _zero_line(np.asarray(w, np.float64), float(b), reach)
        axes.plot(*ends, **_style(number), label="" if number else "a unit's z = 0, coloured as its gradient")
    axes.plot([], [], color="black", linewidth=1.8, label="boundary between the classes")
    for label, (marker, colour) in enumerate((("o", "white"), ("^", "black"))):
        mine = np.asarray(data.points)[np.asarray(data.labels) == label]
        axes.scatter(
            *mine.T, s=9, marker=marker, c=colour, edgecolors="black", linewidths=0.5, zorder=3, label=f"class {label}"
        )
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])


def _zero_line(w: np.ndarray, b: float, reach: float) -> np.ndarray:
    """Two ends, (2, 2) with x first, of the line w.x + b = 0; beyond the picture, so that they are not seen."""
    length = max(float(np.hypot(*w)), 1e-30)
    foot = -b * w / length**2
    along = 3 * reach * np.array([-w[1], w[0]]) / length
    return np.stack([foot - along, foot + along], axis=1)


def _gradients(axes: Any, lines: Sequence[Line], top: float) -> None:
    steps = [line["step"] for line in lines]
    norms = np.maximum([line["gradient_norms"] for line in lines], _FLOOR)
    for number, unit in enumerate(norms.T):
        axes.plot(steps, unit, **_style(number))
    if not any(any(line["gradient_norms"]) for line in lines):
        axes.text(0.5, 0.16, "exactly 0 for every unit", transform=axes.transAxes, ha="center", fontsize=11)
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set(yscale="log", ylim=(_FLOOR / 10, top), xlim=(0, steps[-1]))
    ticks = [10.0**power for power in range(-7, 39, 2) if 10.0**power < top]
    axes.set_yticks([_FLOOR, *ticks], ["$<10^{-9}$", *(f"$10^{{{round(np.log10(tick))}}}$" for tick in ticks)])
    axes.minorticks_off()
    axes.yaxis.tick_right()
    axes.grid(alpha=0.25)
    axes.spines[["top", "left"]].set_visible(False)


def _style(unit: int) -> dict[str, Any]:
    dash = _DASHES[unit // len(_UNITS) % len(_DASHES)]
    return {"color": _UNITS[unit % len(_UNITS)], "linestyle": dash, "linewidth": 1.3}
