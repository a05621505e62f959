"""Tables, made from metrics lines alone. A diverged run counts as chance, and is counted."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.engine.published import published, published_time

HEADINGS = {"depth": "layers", "width": "units", "lr": "learning rate"}
"""Column headings of axes whose names do not speak for themselves."""
CHANCE = 0.1  # of the ten classes that every set of the paper has; a run that diverged gets it


def summary(experiment: str, lines: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[dict[str, str]]:
    """A row for each net: mean and standard deviation over its seeds, last epoch first.

    Args:
      experiment: the table's name, for what the paper and its later edition printed.
      lines: of metrics.jsonl, with the axes, seed and epoch, in rising order of epochs.
      axes: what tells nets apart; those with one value are not shown, but for act.

    Returns:
      Rows of column name to text. A mean over fewer seeds than the row with the most has a * after its number.
    """
    nets = by_net(lines, axes)
    shown = [axis for axis in axes if axis == "act" or len({net[axis] for net, _ in nets}) > 1]
    most = max(len(runs) for _, runs in nets)
    both = [published(experiment, net) for net, _ in nets]
    rows = []
    for (net, runs), printed in zip(nets, both, strict=True):
        row = {HEADINGS.get(axis, axis): _text(net[axis]) for axis in shown}
        row["seeds"] = f"{len(runs)}{'*' if len(runs) < most else ''}"
        row["last epoch"] = spread([last_accuracy(run) for run in runs])
        row["best"] = f"{np.mean([best_accuracy(run) for run in runs]):.4f}"
        if any(value is not None for printed in both for value in printed.values()):
            row |= {f"{edition} (best)": _text(value) for edition, value in printed.items()}
        if any("diverged" in run[-1] for _, runs in nets for run in runs):
            row["diverged"] = str(sum("diverged" in run[-1] for run in runs))
        rows.append(row | _health(runs))
    return rows


def by_net(
    lines: Iterable[Mapping[str, Any]], axes: Sequence[str]
) -> list[tuple[dict[str, Any], list[list[Mapping[str, Any]]]]]:
    """The nets in the order of their first lines, each with its runs: the lines of one seed."""
    nets: dict[tuple[Any, ...], dict[int, list[Mapping[str, Any]]]] = {}
    for line in lines:
        nets.setdefault(tuple(line[axis] for axis in axes), {}).setdefault(line["seed"], []).append(line)
    return [(dict(zip(axes, net, strict=True)), list(runs.values())) for net, runs in nets.items()]


def last_accuracy(run: Sequence[Mapping[str, Any]]) -> float:
    """Of the last epoch; chance if the run diverged."""
    return CHANCE if "diverged" in run[-1] else run[-1]["test_accuracy"]


def best_accuracy(run: Sequence[Mapping[str, Any]]) -> float:
    """Of the best epoch; chance if it diverged before the first."""
    return max((line["test_accuracy"] for line in run if "test_accuracy" in line), default=CHANCE)


def _health(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Dead units, where they begin, the signal from the first to the last layer, and the time of a run."""
    last = [evaluated[-1] for run in runs if (evaluated := [line for line in run if "dead_units" in line])]
    if not last:
        return {"dead": "-", "from": "-", "signal": "-", "time": "-"}
    layers = [layer for line in last for layer, dead in enumerate(line["dead_by_layer"], start=1) if dead]
    first_signal, last_signal = (float(np.mean([line["signal_by_layer"][i] for line in last])) for i in (0, -1))
    seconds = [sum(line.get("seconds", 0.0) for line in run) for run in runs]
    return {
        "dead": f"{np.mean([line['dead_units'] for line in last]):.3g}/{last[0]['units']}",
        "from": f"layer {min(layers)}" if layers else "none",
        "signal": f"{first_signal:.2g} to {last_signal:.2g}",
        "time": f"{np.mean(seconds):.0f} s",
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float]) -> str:
    """Mean and, from two values on, sample standard deviation.

    >>> from experiments.engine.tables import spread
    >>> spread([0.9]), spread([0.8, 1.0])
    ('0.9000', '0.9000 ± 0.1414')
    """
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows with the same keys as a Markdown table.

    >>> from experiments.engine.tables import markdown
    >>> print(markdown([{"act": "relu", "best": "0.1"}]))
    | act | best |
    | --- | --- |
    | relu | 0.1 |
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def time_table(medians: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Step times relative to lk_relu's, or to the first net's, beside what both editions printed (table 6).

    Args:
      medians: of times.json: act, other axes, step_seconds.
    """
    base = next((net for net in medians if net["act"] == "lk_relu"), medians[0])["step_seconds"]
    rows = []
    for net in medians:
        row = {HEADINGS.get(key, key): _text(value) for key, value in net.items() if key != "step_seconds"}
        row["time"] = f"{net['step_seconds'] / base:.2f}"
        rows.append(row | {edition: _text(value) for edition, value in published_time(net["act"]).items()})
    return rows
