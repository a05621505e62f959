"""The forecasts of a record as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine import tables
from experiments.engine.plots import figure, label_ends, save
from experiments.engine.study import Line
from experiments.load_forecast.forecast import BASELINES
from experiments.load_forecast.series import HORIZON

_SHOWN_HOURS = (1, 6, 12, 24)


def table(lines: Sequence[Line], nets: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each forecast, from its test lines."""
    known = {net["cell"]: net for net in nets}
    rows = []
    for cell, errors in _by_cell(lines).items():
        net = known.get(cell)
        row = {"forecast": cell, "units": str(net["units"]) if net else "-"}
        row["parameters"] = f"{net['parameters']:,}" if net else "-"
        row["MAPE"] = tables.spread(errors.mean(axis=1).tolist())
        rows.append(row | {f"hour {hour}": f"{errors[:, hour - 1].mean():.3f}" for hour in _SHOWN_HOURS})
    return rows


def picture(lines: Sequence[Line], path: Path, *, title: str) -> Path:
    """MAPE by the hour ahead: a line for the mean over seeds, and a band from the least to the greatest seed."""
    sheet = figure(8, 5)
    axes, hours = sheet.subplots(), np.arange(1, HORIZON + 1)
    for cell, errors in _by_cell(lines).items():
        style = ("--", "-.")[list(BASELINES).index(cell)] if cell in BASELINES else "-"
        (drawn,) = axes.plot(hours, errors.mean(axis=0), style, label=cell, color="0.4" if cell in BASELINES else None)
        axes.fill_between(hours, errors.min(axis=0), errors.max(axis=0), alpha=0.2, color=drawn.get_color(), lw=0)
    axes.set(xlabel="hours ahead", ylabel="test MAPE, per cent", xlim=(1, HORIZON), ylim=(0, None))
    axes.set_title(title, fontsize=8)
    axes.set_xticks([1, *range(3, HORIZON + 1, 3)])
    axes.grid(alpha=0.25)
    label_ends(axes)
    return save(sheet, path, 110)


def _by_cell(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """Forecast -> its test errors (seeds, 24)."""
    found: dict[str, list[list[float]]] = {}
    for line in lines:
        if "test_mape_by_hour" in line:
            found.setdefault(line["cell"], []).append(line["test_mape_by_hour"])
    return {cell: np.array(errors) for cell, errors in found.items()}
