"""The comparison of remedies as a table and as a picture, made from a record's lines alone."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.engine.plots import COLOURS, figure, save
from experiments.engine.study import Line, at_best_rate
from experiments.engine.tables import CHANCE, provenance, spread
from experiments.engine.tables import markdown as markdown_table

STRESSES = ("batch 2", "raw", "rate x10")
_LEARNS_FROM = 3 * CHANCE
_BASE = "relu"


def chosen(net: str, row: str, lines: Sequence[Line]) -> list[Line]:
    """The runs of a row at the rate that it chose: the least training loss of seed 0. One a seed."""
    runs = [line for line in lines if (line["net"], line["row"], line["stress"]) == (net, row, "none")]
    return at_best_rate(runs, lambda line: line.get("train_loss", float("inf")))


def accuracy(line: Line) -> float:
    """Of a run; chance if it diverged."""
    return line.get("test_accuracy", CHANCE)


def learners(net: str, lines: Sequence[Line]) -> list[str]:
    """The rows whose mean accuracy is at least three times chance."""
    rows = dict.fromkeys(line["row"] for line in lines if line["net"] == net)
    means = {row: statistics.fmean(map(accuracy, chosen(net, row, lines) or [{}])) for row in rows}
    return [row for row, mean in means.items() if mean >= _LEARNS_FROM]


def table(
    net: str, lines: Sequence[Line], nets: Sequence[Mapping[str, Any]], times: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    """A row for each method, best accuracy first; the nets are those of config.json, the times those of times.json.

    Time and activation memory are relative to relu's; stresses are those that were run.
    """
    cost = _costs(net, nets, times)
    stresses = [stress for stress in STRESSES if any(line["stress"] == stress for line in lines)]
    found = [(row, runs) for row in cost if (runs := chosen(net, row, lines))]
    rows = []
    for row, runs in sorted(found, key=lambda pair: -statistics.fmean(map(accuracy, pair[1]))):
        alive = [run for run in runs if "diverged" not in run]
        own = cost[row]
        texts = {
            "method": row,
            "accuracy": spread([accuracy(run) for run in runs]),
            "seeds": str(len(runs)),
            "rate": f"{runs[0]['rate']:g}",
            "diverged": str(len(runs) - len(alive)),
            "dead": _mean(alive, "dead_units", ".1f").removesuffix(".0") + (f"/{alive[0]['units']}" if alive else ""),
            "shift": _mean(alive, "shift", ".2f"),
            "time": _ratio(own.get("time")),
            "memory": _ratio(own.get("memory")),
            "parameters": f"{own['parameters']:,}",
            "batch 1": "yes" if own["batch_one"] else "no",
        }
        for stress in stresses:
            under = [line for line in lines if (line["net"], line["row"], line["stress"]) == (net, row, stress)]
            texts[stress] = spread([accuracy(line) for line in under]) if under else "-"
        rows.append(texts)
    return rows


def _costs(net: str, nets: Sequence[Mapping[str, Any]], times: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Parameters, and time and activation memory relative to relu's, of each row."""
    own = {entry["row"]: dict(entry) for entry in nets if entry["net"] == net}
    medians = times["medians"] if times else []
    seconds = {line["row"]: line["step_seconds"] for line in medians if line["net"] == net}
    for row, entry in own.items():
        if _BASE in own:
            entry["memory"] = entry["activation_bytes"] / own[_BASE]["activation_bytes"]
        if _BASE in seconds and row in seconds:
            entry["time"] = seconds[row] / seconds[_BASE]
    return own


def _mean(runs: Sequence[Line], key: str, digits: str) -> str:
    return f"{statistics.fmean(run[key] for run in runs):{digits}}" if runs else "-"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def markdown(config: Mapping[str, Any], lines: Sequence[Line], times: Mapping[str, Any] | None) -> str:
    """The page of a record: what was done, a table a network, what the rows are."""
    protocol = config["protocol"]
    nets = list(dict.fromkeys(entry["net"] for entry in config["nets"]))
    data, micro = config["data"], protocol["micro_epochs"]
    parts = [
        "# All remedies on the same work",
        f"{data['description']}, fingerprint {data['fingerprint']}; {protocol['epochs']} epochs, batch size "
        f"{protocol['batch_size']}, standardised inputs. Test accuracy of the last epoch, mean ± sample standard "
        "deviation over seeds. Each method tried its own three rates with seed 0 and kept the one with the least "
        "training loss. A run that diverged counts as chance. dead: units that are zero on all test images; shift: "
        "standard deviation over units of their mean pre-activation, relative to its deviation over examples. time: of "
        "a training step, relative to relu's in the same run, medians; memory: what the backward pass keeps for an "
        "image, relative to relu's. batch 1: whether it can train on one example, by construction.",
    ]
    if any(line["stress"] != "none" for line in lines):
        parts[-1] += (
            f" batch 2 ({micro} epochs), raw (pixels from 0 to 255), rate x10: accuracy under that stress, for methods "
            "that learn at all."
        )
    for net in nets:
        parts += [f"## {net}", markdown_table(table(net, lines, config["nets"], times))]
    says = {entry["row"]: entry["says"] for entry in config["nets"]}
    tried = {row: ", ".join(f"{rate:g}" for rate in rates) for row, rates in protocol["rates"].items()}
    rows = [{"method": row, "is": text, "rates": tried[row]} for row, text in says.items()]
    parts += ["## The rows", markdown_table(rows), provenance(config)]
    return "\n\n".join(parts) + "\n"


def picture(config: Mapping[str, Any], lines: Sequence[Line], times: Mapping[str, Any] | None, path: Path) -> Path:
    """Accuracy against the time of a step, a panel a network; bars are standard deviations."""
    nets = list(dict.fromkeys(entry["net"] for entry in config["nets"]))
    sheet = figure(8.5 * len(nets), 6)
    for panel, net in zip(sheet.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        cost = _costs(net, config["nets"], times)
        found = {row: [accuracy(run) for run in chosen(net, row, lines)] for row in cost if "time" in cost[row]}
        ranked = sorted((row for row in found if found[row]), key=lambda row: -statistics.fmean(found[row]))
        for rank, row in enumerate(ranked, start=1):
            mean, error = statistics.fmean(found[row]), statistics.stdev(found[row]) if len(found[row]) > 1 else 0
            colour = COLOURS[1 if row.startswith("lk_") else 0]
            bar = panel.errorbar(cost[row]["time"], mean, error, fmt="o", color=colour, capsize=3, ms=4)
            bar.set_label(f"{rank}  {row}  {mean:.4f}")
            panel.annotate(str(rank), (cost[row]["time"], mean), xytext=(4, 3), textcoords="offset points")
        panel.set(title=net, xlabel="time of a training step / relu's", ylabel="test accuracy, last epoch")
        if ranked:
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    sheet.suptitle(f"{config['data']['name']}, {config['protocol']['epochs']} epochs; linked neurons in blue")
    return save(sheet, path, 110)
