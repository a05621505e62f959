"""What `experiments.revive` found, as tables and as a picture, made from a record's lines alone."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine.plots import COLOURS, figure, label_ends, mean_band, save
from experiments.engine.study import Line
from experiments.engine.tables import markdown as markdown_table
from experiments.engine.tables import provenance, spread

LEGEND = "test accuracy, mean ± standard deviation over seeds, and dead units by layer, means over seeds"
_COLOURS = {"harmed": 6, "continued": 7, "redo": 0, "revived": 3, "fresh": 2, "fresh_linked": 1}
"""Of `COLOURS`, in the order in which they are drawn."""


def of_way(harm: str, way: str, lines: Sequence[Line]) -> list[Line]:
    """The nets that went on like that, one a seed."""
    return [line for line in lines if (line["harm"], line["way"]) == (harm, way)]


def table(harm: str, lines: Sequence[Line]) -> list[dict[str, str]]:
    """A row for each way to go on: before, at that moment, after an epoch and after the last."""
    harmed = of_way(harm, "harmed", lines)
    rows = []
    for way in dict.fromkeys(line["way"] for line in lines if line["harm"] == harm and line["way"] != "harmed"):
        runs, new = of_way(harm, way, lines), way.startswith("fresh")
        rows.append(
            {
                "net": way,
                "before": "-" if new else spread([run["accuracy"][-1] for run in harmed]),
                "at": spread([run["accuracy"][0] for run in runs]),
                "after 1 epoch": spread([run["accuracy"][1] for run in runs]),
                "after": spread([run["accuracy"][-1] for run in runs]),
                "logits differ by": "-" if new else f"{max(run['difference'] for run in runs):.2g}",
                "of": "-" if new else f"{max(run['largest_logit'] for run in runs):.3g}",
                "dead before": "-" if new else _dead(harmed, -1),
                "dead at": _dead(runs, 0),
                "dead after": _dead(runs, -1),
                "seeds": str(len(runs)),
            }
        )
    return rows


def _dead(runs: Sequence[Line], when: int) -> str:
    layers = zip(*(run["dead"][when] for run in runs), strict=True)
    return " / ".join(f"{statistics.fmean(layer):.1f}".removesuffix(".0") for layer in layers)


def markdown(config: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The page of a record."""
    protocol, data = config["protocol"], config["data"]
    parts = [
        "# Revival: a dead ReLU net is linked and learns again",
        f"{data['description']}, fingerprint {data['fingerprint']}; standardised pixels plus {protocol['offset']:g}, "
        f"three hidden layers of {protocol['units']} units, Adam, batch size {protocol['batch_size']}. "
        f"{protocol['harmful_epochs']} epochs at a rate that harms, then {protocol['epochs']} at {protocol['rate']:g}. "
        "Test accuracy, mean ± sample standard deviation over seeds: before, at the moment of the change, after one "
        "epoch and after the last. logits differ by: the largest difference at that moment of any logit of any test "
        "image and seed; of: the largest logit. dead: units that are zero on all training images, by layer, means over "
        "seeds; a linked unit is dead if both of its members are. continued: nothing is done; redo: dormant units (tau "
        f"{protocol['tau']}) are made anew before each epoch; revived: linked once; fresh, fresh_linked: new nets.",
    ]
    for harm, rate in protocol["harmful_rates"].items():
        parts += [f"## {harm} (rate {rate:g})", markdown_table(table(harm, lines))]
    parts.append(provenance(config))
    return "\n\n".join(parts) + "\n"


def picture(config: Mapping[str, Any], lines: Sequence[Line], path: Path) -> Path:
    """Accuracy and the share of dead units by epoch, a row a harm; bands are one standard deviation."""
    harms, turn = config["protocol"]["harmful_rates"], config["protocol"]["harmful_epochs"]
    sheet = figure(13, 4.2 * len(harms) + 0.6)
    for (harm, rate), (left, right) in zip(harms.items(), sheet.subplots(len(harms), 2, squeeze=False), strict=True):
        for way, colour in _COLOURS.items():
            runs = of_way(harm, way, lines)
            shares = np.array([run["dead"] for run in runs]).sum(axis=2) / (3 * config["protocol"]["units"])
            for panel, values in ((left, np.array([run["accuracy"] for run in runs])), (right, shares)):
                epoch = np.arange(values.shape[1]) + (0 if way == "harmed" else turn)
                mean_band(panel, epoch, values, COLOURS[colour], "-", way if way != "harmed" else "_")
        for panel, title in ((left, "test accuracy"), (right, "dead share of hidden units")):
            panel.axvline(turn, color="0.6", lw=0.8)
            panel.set(title=f"{harm} (black: rate {rate:g}, up to the line): {title}", xlabel="epoch", xlim=(0, None))
            panel.set_ylim(-0.02, 1.02)
            panel.grid(alpha=0.25)
            label_ends(panel)
    return save(sheet, path, 100)
