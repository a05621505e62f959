"""The picture of a report: which units are alive, and how the signal fares with depth."""

import os
from typing import Any

import numpy as np

STATES = (
    ("alive", "#9ecae1"),
    ("linearised", "#fdd870"),
    ("dormant", "#f16913"),
    ("dead or no gradient", "#252525"),
    ("not finite", "#e31a1c"),
)
"""From the mildest to the gravest; a unit is drawn in its gravest state."""


def draw(report: Any, path: str | os.PathLike[str]) -> None:
    """Save the picture of a `linked_jax.probe.Report`; the format is that of the path's end."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("Report.plot needs matplotlib: pip install matplotlib") from error
    layers = report.layers
    depth = np.arange(len(layers))
    names = [layer.name for layer in layers]
    figure = Figure(figsize=(11, min(max(3.5, 0.28 * len(layers) + 1.8), 40)), layout="constrained")
    units, signal = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)

    states = unit_states(layers)
    colours = ListedColormap([colour for _, colour in STATES])
    units.pcolormesh(states, cmap=colours, vmin=0, vmax=len(STATES) - 1)
    units.set(xlabel="unit", title="state of each unit")
    units.xaxis.set_major_locator(MaxNLocator(integer=True))
    every = -(-len(layers) // 60)
    units.set_yticks(depth[::every] + 0.5, names[::every], fontsize=8)
    units.invert_yaxis()
    patches = [
        Patch(color=colour, label=f"{state} {int((states == k).sum())}") for k, (state, colour) in enumerate(STATES)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(STATES), frameon=False)

    signal.plot([layer.mean_square for layer in layers], depth + 0.5, "o-", ms=3, label="forward: z²")
    if any(layer.gradient_mean_square is not None for layer in layers):
        backward = [np.nan if layer.gradient_mean_square is None else layer.gradient_mean_square for layer in layers]
        signal.plot(backward, depth + 0.5, "s--", ms=3, label="backward: (dL/dz)²")
    signal.set(xscale="log", xlabel="mean square", title="signal by depth")
    signal.legend(fontsize=8)
    signal.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def unit_states(layers: Any) -> np.ma.MaskedArray:
    """(layers, most units): the index of each unit's state in STATES; masked beyond a layer's last unit."""
    states = np.ma.masked_all((len(layers), max(layer.units for layer in layers)), int)
    for row, layer in zip(states, layers, strict=True):
        grave = [layer.linearised, layer.dormant, layer.dead | layer.dead_link, layer.not_finite]
        row[: layer.units] = np.max([(k + 1) * flags for k, flags in enumerate(grave)], axis=0)
    return states
