"""What `experiments.plasticity` found, as tables and as pictures, made from a record's lines alone."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine.plots import COLOURS, IN_A_PANEL, figure, label_ends, mean_band, save
from experiments.engine.study import Line, at_best_rate
from experiments.engine.tables import markdown as markdown_table
from experiments.engine.tables import provenance, spread

_ROWS = ("redo", "lk_relu", "fourier", "revived", "layer_norm", "lk_swish", "relu", "leaky_relu")
_COLOURS: dict[str, str] = dict(zip(_ROWS, COLOURS, strict=True))
_TOGETHER = (("relu", "leaky_relu", "layer_norm", "redo", "revived"), ("relu", "lk_relu", "lk_swish", "fourier"))
"""In a row of panels."""
_PANELS = {"accuracy": "accuracy after the task", "dormant": "dormant share of units", "rank": "effective rank"}
_SMOOTHED = {"permuted": 5, "random_labels": 1}
"""How many tasks are averaged for a point of the accuracy's line."""
_MEASURED = {
    "permuted": "test accuracy on the permuted test images",
    "random_labels": "share of the random labels that are memorised",
}


def of_net(stream: str, row: str, width: int, lines: Sequence[Line]) -> list[Line]:
    """All runs of a net on a stream."""
    return [line for line in lines if (line["stream"], line["row"], line["width"]) == (stream, row, width)]


def chosen(runs: Sequence[Line]) -> list[Line]:
    """The runs, one a seed, at the rate of the best mean accuracy over all tasks of seed 0."""
    return at_best_rate(runs, lambda run: -statistics.fmean(run["accuracy"]))


def ends(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Those of the first tenth of the tasks, and of the last.

    >>> from experiments.plasticity.plots import ends
    >>> ends([1.0, 2.0, 3.0])
    ([1.0], [3.0])
    """
    tenth = max(1, round(len(values) / 10))
    return values[:tenth], values[-tenth:]


def table(stream: str, column: str, config: Mapping[str, Any], lines: Sequence[Line]) -> list[dict[str, str]]:
    """A row for each method, the best on the last tasks first."""
    found = [(net, chosen(of_net(stream, net["row"], net["width"], lines))) for net in _nets(column, config)]
    return [
        {
            "method": net["row"] + " (diverged)" * (not all(min(run["finite"]) for run in runs)),
            "last tasks": spread([_last(run, "accuracy") for run in runs]),
            "first tasks": spread([_first(run, "accuracy") for run in runs]),
            "difference": spread([_last(run, "accuracy") - _first(run, "accuracy") for run in runs]),
            "all tasks": spread([statistics.fmean(run["accuracy"]) for run in runs]),
            "dead, last": spread([_last(run, "dead") for run in runs]),
            "dormant, last": spread([_last(run, "dormant") for run in runs]),
            "rank, first": f"{statistics.fmean(_first(run, 'rank') for run in runs):.1f}",
            "rank, last": f"{statistics.fmean(_last(run, 'rank') for run in runs):.1f}",
            "rate": f"{runs[0]['rate']:g}",
            "seeds": str(len(runs)),
            "units": str(net["width"]),
            "parameters": f"{net['parameters']:,}",
        }
        for net, runs in sorted(found, key=lambda pair: -statistics.fmean(_last(run, "accuracy") for run in pair[1]))
    ]


def rates_table(stream: str, column: str, config: Mapping[str, Any], lines: Sequence[Line]) -> list[dict[str, str]]:
    """Mean accuracy over all tasks, and on the last ones, at each rate that was tried with seed 0."""
    rows = []
    for net in _nets(column, config):
        tried = [run for run in of_net(stream, net["row"], net["width"], lines) if run["seed"] == 0]
        said = {
            f"rate {run['rate']:g}": f"{statistics.fmean(run['accuracy']):.4f} (last {_last(run, 'accuracy'):.4f})"
            for run in tried
        }
        rows.append({"method": net["row"], **said})
    return rows


def _first(run: Line, measure: str) -> float:
    return statistics.fmean(ends(run[measure])[0])


def _last(run: Line, measure: str) -> float:
    return statistics.fmean(ends(run[measure])[1])


def _nets(column: str, config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [net for net in config["nets"] if net["column"] == column]


def smoothed_band(panel: Any, runs: Any, wide: int, colour: str, label: str) -> None:
    """Draw the mean and the deviation over runs of what each has by task, averaged over that many tasks."""
    values = np.array([np.convolve(run, np.ones(wide) / wide, "valid") for run in runs])
    mean_band(panel, np.arange(wide, wide + values.shape[1]), values, colour, "-", label)


def markdown(config: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The page of a record: what was done, the tables, the rates that were tried."""
    protocol, data = config["protocol"], config["data"]
    tenth = len(ends(range(protocol["tasks"]))[0])
    parts = [
        "# Plasticity: does it go on learning?",
        f"{data['description']}, fingerprint {data['fingerprint']}; {protocol['features']} grey pixels, standardised. "
        f"{protocol['tasks']} tasks one after the other, {protocol['hidden_layers']} hidden layers, Adam at a constant "
        f"rate, batch size {protocol['batch_size']}; nothing is reset between tasks. Each net tried the rates "
        f"{', '.join(f'{rate:g}' for rate in protocol['rates'])} with seed 0 and kept the one with the best mean "
        f"accuracy over all tasks. Mean ± sample standard deviation over seeds; first and last tasks: mean over the "
        f"first and last {tenth} of {protocol['tasks']}. dead: share of all hidden units that are zero on all images "
        f"that are measured; dormant: share with a score of at most {protocol['tau']}, a unit scored by its link; "
        "rank: effective rank of the last hidden layer's outputs.",
    ]
    for stream in protocol["streams"]:
        images, epochs, rounds = protocol["images"][stream], protocol["epochs"][stream], protocol["rounds"]
        parts += [
            f"## {stream}",
            f"{images:,} images, {epochs} epochs a task in {rounds} rounds; accuracy: {_MEASURED[stream]}.",
        ]
        for column in protocol["widths"]:
            parts += [f"### {column.replace('_', ' ')}", markdown_table(table(stream, column, config, lines))]
        for column in protocol["widths"]:
            rows = markdown_table(rates_table(stream, column, config, lines))
            parts += [f"Mean over all tasks at each rate, seed 0, {column.replace('_', ' ')}:", rows]
    says = {net["row"]: net["says"] for net in config["nets"]}
    parts += ["## The rows", markdown_table([{"method": row, "is": text} for row, text in says.items()])]
    minutes = sum(line["seconds"] for line in lines) / 60
    parts.append(provenance(config, f"; {minutes:.0f} minutes of training"))
    return "\n\n".join(parts) + "\n"


def picture(column: str, config: Mapping[str, Any], lines: Sequence[Line], path: Path) -> Path:
    """Accuracy, dormant share and effective rank by task, a row or two a stream; bands are one standard deviation."""
    nets = {net["row"]: net for net in _nets(column, config)}
    groups = _TOGETHER if len(nets) > IN_A_PANEL else [list(nets)]
    together = [[net for net in names if net in nets] for names in groups]
    streams: list[str] = config["protocol"]["streams"]
    kinds = list(itertools.product(streams, together))
    sheet = figure(15, 3.4 * len(kinds) + 0.6)
    panels = sheet.subplots(len(kinds), len(_PANELS), squeeze=False)
    for (stream, names), row in zip(kinds, panels, strict=True):
        for (measure, title), panel in zip(_PANELS.items(), row, strict=True):
            most = max(1, config["protocol"]["tasks"] // 2)  # so that a line is left
            wide = min(_SMOOTHED[stream], most) if measure == "accuracy" else 1
            for net in names:
                runs = chosen(of_net(stream, net, nets[net]["width"], lines))
                label = f"{net}, rate {runs[0]['rate']:g}"
                smoothed_band(panel, [run[measure] for run in runs], wide, _COLOURS[net], label)
            title += f", mean of {wide} tasks" if wide > 1 else ""
            panel.set(title=f"{stream}: {title}", xlabel="task", xlim=(1, None))
            if measure != "accuracy":
                panel.set_ylim(bottom=0)
            panel.grid(alpha=0.25)
        label_ends(row[-1])
    sheet.suptitle(f"{config['data']['name']}, {column.replace('_', ' ')}: mean over seeds and one standard deviation")
    return save(sheet, path, 100)
