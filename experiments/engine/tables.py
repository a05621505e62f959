"""Tables, made from metrics lines alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def depth_table(lines: Sequence[dict[str, Any]], *, width: int) -> list[dict[str, str]]:
    """A row for each net: mean and standard deviation over its seeds, last epoch first.

    Args:
      lines: of metrics.jsonl, with act, depth, seed, epoch, test_accuracy, dead_units, dead_by_layer, signal_by_layer
        and seconds, in rising order of epochs.
      width: units of a layer.

    Returns:
      Rows of column name to text.
    """
    rows = []
    for act, depth in dict.fromkeys((line["act"], line["depth"]) for line in lines):
        mine = [line for line in lines if (line["act"], line["depth"]) == (act, depth)]
        runs = [
            [line for line in mine if line["seed"] == seed] for seed in dict.fromkeys(line["seed"] for line in mine)
        ]
        last = [run[-1] for run in runs]
        dead_layers = [layer for line in last for layer, dead in enumerate(line["dead_by_layer"], start=1) if dead]
        signal = np.mean([line["signal_by_layer"] for line in last], axis=0)
        rows.append(
            {
                "act": act,
                "layers": f"{depth:,}",
                "last epoch": spread([line["test_accuracy"] for line in last]),
                "best": f"{np.mean([max(line['test_accuracy'] for line in run) for run in runs]):.4f}",
                "dead": f"{np.mean([line['dead_units'] for line in last]):.3g}/{depth * width}",
                "from": f"layer {min(dead_layers)}" if dead_layers else "none",
                "signal": f"{signal[0]:.2g} to {signal[-1]:.2g}",
                "time": f"{np.mean([sum(line['seconds'] for line in run) for run in runs]):.0f} s",
            }
        )
    return rows


def spread(values: Sequence[float]) -> str:
    """Mean and, from two values on, sample standard deviation.

    >>> from experiments.engine.tables import spread
    >>> spread([0.9]), spread([0.8, 1.0])
    ('0.9000', '0.9000 ± 0.1414')
    """
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.4f}"


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
