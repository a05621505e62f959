"""Tables, made from metrics lines alone. A run that diverged counts as chance, and is counted."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.engine.environment import commands
from experiments.engine.published import EDITIONS, published, published_time

HEADINGS = {"depth": "layers", "width": "units", "lr": "learning rate"}
"""Column headings of axes whose names do not speak for themselves."""
CHANCE = 0.1  # of the ten classes that every set of the paper has
FEW = 3  # seeds; a row with fewer is marked, its deviation says little
Net = dict[str, Any]
Run = list[Mapping[str, Any]]
Nets = Sequence[tuple[Net, list[Run]]]
"""Of `by_net`."""


def summary(found: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[dict[str, str]]:
    """A row for each net of `numbers`, as column name -> text: mean and deviation over its seeds, last epoch first.

    `legend` explains it. Axes with one value are not shown, but for act and init.
    """
    shown = varying(found, axes)
    printed = any(row[edition] is not None for row in found for edition in EDITIONS)
    rows = []
    for row in found:
        texts = {HEADINGS.get(axis, axis): text(row[axis]) for axis in shown}
        texts |= {"last epoch": spread(row["last"]), "best": spread(row["best"])}
        texts["seeds"] = f"{len(row['seeds'])}{'*' if len(row['seeds']) < FEW else ''}"
        if printed:
            texts |= {f"{edition} (best)": text(row[edition]) for edition in EDITIONS}
        if any(other["diverged"] for other in found):
            texts["diverged"] = str(row["diverged"])
        if any(other["skipped"] for other in found):
            texts["skipped"] = f"{row['skipped']:,}"
        if "parameters" in row:
            texts["parameters"] = text(row["parameters"])
        if "flops" in row:
            texts |= {"MFLOP": f"{row['flops'] / 1e6:.3g}", "activation KiB": f"{row['activation_bytes'] / 1024:.4g}"}
        rows.append(texts | _health(row))
    return rows


def chance(data: Mapping[str, Any]) -> float:
    """The accuracy of a guess, which a run that diverged gets; data is a record's entry."""
    return 1 / data["classes"] if "classes" in data else CHANCE  # older records are of ten


def tested_on(data: Mapping[str, Any]) -> str:
    """Which images the accuracies are of: "test" or "held-out"."""
    return "held-out" if "held-out images" in data["description"] else "test"


def legend(rows: Sequence[Mapping[str, str]], data: Mapping[str, Any]) -> str:
    """What the columns of `summary` mean, of those that it has."""
    columns, images = rows[0], tested_on(data)
    few, costs = any(row["seeds"].endswith("*") for row in rows), "MFLOP" in columns
    said = {
        f"{images.capitalize()} accuracy, mean ± sample standard deviation over seeds: of the last epoch, and of each "
        "run's best.": True,
        "paper, later: the paper's two editions: CIFAR-10, one run, its best epoch.": "paper (best)" in columns,
        f"* fewer than {FEW} seeds: too few to compare.": few,
        f"diverged: runs whose loss did; their last epoch counts as chance, {chance(data):g}.": "diverged" in columns,
        "MFLOP, activation KiB: of one image, the forward pass and what it keeps for the backward pass.": costs,
        "skipped: updates that were left out, of all seeds, where a number was not finite.": "skipped" in columns,
        f"dead: units that are zero on all {images} images, of all units; from: the first layer with one in any "
        "seed.": True,
        "signal: mean square of the pre-activations, first to last layer. time: of a run, with compilation.": True,
    }
    return " ".join(text for text, holds in said.items() if holds)


def numbers(
    experiment: str, data: Mapping[str, Any], protocol: Mapping[str, Any], nets: Nets,
    configured: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """What `summary` shows, as numbers: a row for each net of `by_net`, with the values of each seed.

    Returns:
      Rows with all axes; parameters, flops and activation_bytes where `configured`, the nets of config.json, has them;
      seeds, last and best (lists, one value a seed); paper and later (None where the two editions of the paper print
      none, as on all sets but cifar10, for held-out images, and for nets of other sizes); diverged; skipped; dead
      (mean), units, dead_from (a layer from 1, or None), first_signal, last_signal and seconds (means). The last six
      are None if no epoch was evaluated.
    """
    axes, guess = list(nets[0][0]) if nets else [], chance(data)
    has_printed = (data["name"], tested_on(data)) == ("cifar10", "test")
    counts = {tuple(net[axis] for axis in axes): {k: v for k, v in net.items() if k not in axes} for net in configured}
    return [
        {
            **net,
            **counts.get(tuple(net.values()), {}),
            "seeds": [run[0]["seed"] for run in runs],
            "last": [guess if "diverged" in run[-1] else run[-1]["test_accuracy"] for run in runs],
            "best": [
                max((line["test_accuracy"] for line in run if "test_accuracy" in line), default=guess) for run in runs
            ],
            **(published(experiment, {**protocol, **net}) if has_printed else dict.fromkeys(EDITIONS)),
            "diverged": sum("diverged" in run[-1] for run in runs),
            "skipped": sum(line.get("skipped", 0) for run in runs for line in run),
            **_layers(runs),
        }
        for net, runs in nets
    ]


def _layers(runs: Sequence[Run]) -> dict[str, Any]:
    """Dead units, where they begin, and the signal after each run's last evaluated epoch; the time of a run."""
    last = [evaluated[-1] for run in runs if (evaluated := [line for line in run if "dead_units" in line])]
    if not last:
        return dict.fromkeys(("dead", "units", "dead_from", "first_signal", "last_signal", "seconds"))
    with_dead = [layer for line in last for layer, dead in enumerate(line["dead_by_layer"], start=1) if dead]
    return {
        "dead": statistics.fmean(line["dead_units"] for line in last),
        "units": last[0]["units"],
        "dead_from": min(with_dead, default=None),
        "first_signal": statistics.fmean(line["signal_by_layer"][0] for line in last),
        "last_signal": statistics.fmean(line["signal_by_layer"][-1] for line in last),
        "seconds": statistics.fmean(sum(line.get("seconds", 0.0) for line in run) for run in runs),
    }


def _health(row: Mapping[str, Any]) -> dict[str, str]:
    if row["units"] is None:
        return {"dead": "-", "from": "-", "signal": "-", "time": "-"}
    return {
        "dead": f"{row['dead']:.1f}".removesuffix(".0") + f"/{row['units']}",
        "from": "none" if row["dead_from"] is None else f"layer {row['dead_from']}",
        "signal": f"{row['first_signal']:.3g} to {row['last_signal']:.3g}",
        "time": f"{row['seconds']:.0f} s",
    }


def by_net(lines: Iterable[Mapping[str, Any]], axes: Sequence[str]) -> list[tuple[Net, list[Run]]]:
    """The nets in the order of their first lines, each with its runs: the lines of one seed, by rising epochs."""
    nets: dict[tuple[Any, ...], dict[int, Run]] = {}
    for line in lines:
        nets.setdefault(tuple(line[axis] for axis in axes), {}).setdefault(line["seed"], []).append(line)
    return [(dict(zip(axes, net, strict=True)), list(runs.values())) for net, runs in nets.items()]


def is_last(line: Mapping[str, Any], epochs: int) -> bool:
    """Whether a run ends with this line: with its last epoch, or because it diverged."""
    return "diverged" in line or line["epoch"] == epochs


def varying(nets: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[str]:
    """The axes with several values; and act and init, which are never hidden choices."""
    return [axis for axis in axes if axis in ("act", "init") or len({net[axis] for net in nets}) > 1]


def text(value: Any) -> str:
    """A value as tables show it: 1,000 for numbers, - for None."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def named(net: Iterable[Any]) -> str:
    """A net's axes' values in one line."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in net)


def spread(values: Sequence[float]) -> str:
    """Mean and, from two values on, sample standard deviation.

    >>> from experiments.engine.tables import spread
    >>> spread([0.9]), spread([0.8, 1.0])
    ('0.9000', '0.9000 ± 0.1414')
    """
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    r"""Rows with the same keys as a Markdown table.

    >>> from experiments.engine.tables import markdown
    >>> print(markdown([{"act": "relu", "best": "0.1"}, {"act": "a | b", "best": "0.2"}]))
    | act | best |
    | --- | --- |
    | relu | 0.1 |
    | a \| b | 0.2 |
    """
    cells = ([cell.replace("|", r"\|") for cell in row.values()] for row in rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(config: Mapping[str, Any], more: str = "") -> str:
    """What a record was made with, as the last lines of its page: versions, commit, hardware and more, the commands."""
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    hardware, made_by = config["hardware"], "\n".join(commands(config))
    return (
        f"- versions: {versions}\n- commit: {config['commit']}\n- hardware: {hardware['devices']} x "
        f"{hardware['device']}, {hardware['cpu_cores']} cores{more}\n\n```bash\n{made_by}\n```"
    )


def time_table(experiment: str, medians: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Step times relative to lk_relu's, or without it to the first net's; table 6 beside what both editions printed."""
    base = next((net for net in medians if net["act"] == "lk_relu"), medians[0])
    rows = []
    for net in medians:
        row = {HEADINGS.get(key, key): text(value) for key, value in net.items() if key != "step_seconds"}
        row["ms a step"] = f"{net['step_seconds'] * 1000:.3g}"
        row[f"time / {base['act']}"] = f"{net['step_seconds'] / base['step_seconds']:.2f}"
        if (experiment, base["act"], net.get("link")) == ("resnet50", "lk_relu", "inside"):
            row |= {edition: text(value) for edition, value in published_time(net["act"]).items()}
        rows.append(row)
    return rows
