"""What `experiments.charlm` found, as tables and as a picture, made from a record's lines alone."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.engine.plots import COLOURS, IN_A_PANEL, figure, save
from experiments.engine.study import Line, at_best_rate
from experiments.engine.tables import markdown as markdown_table
from experiments.engine.tables import provenance, spread

STYLES = {
    "layer_norm": (COLOURS[6], "-"),
    "layer_norm_scaled": (COLOURS[6], ":"),
    "layer_norm_lk_gelu": (COLOURS[6], "--"),
    "layer_norm_lk_gelu_scaled": (COLOURS[2], "-"),
    "layer_norm_lk_gelu_gpt2": (COLOURS[2], "--"),
    "layer_norm_lk_gelu_wide": (COLOURS[2], ":"),
    "layer_norm_narrow": (COLOURS[6], "-."),
    "rms_norm": (COLOURS[7], "--"),
    "dyt": (COLOURS[0], "-"),
    "dyt_sqrt_width": (COLOURS[0], "--"),
    "derf": (COLOURS[4], "--"),
    "gelu": (COLOURS[3], "-"),
    "gelu_scaled": (COLOURS[3], "--"),
    "lk_gelu": (COLOURS[1], "-"),
    "lk_gelu_gpt2": (COLOURS[1], "--"),
    "lk_relu": (COLOURS[5], "--"),
}


def of_row(depth: int, row: str, lines: Sequence[Line], *, tenfold: bool = False) -> list[Line]:
    """The runs of a row at a depth, of the rates that are tried or of ten times the chosen one."""
    key = {"kind": "run", "row": row, "depth": depth, "tenfold": tenfold}
    return [line for line in lines if key.items() <= line.items()]


def chosen(depth: int, row: str, lines: Sequence[Line]) -> list[Line]:
    """The runs of a row at the rate that it chose: the least training loss of seed 0. Validation has no say."""
    return at_best_rate(of_row(depth, row, lines), lambda line: line.get("train_loss", float("inf")))


def depths(lines: Sequence[Line]) -> list[int]:
    """Those that have runs, the least first."""
    return sorted({line["depth"] for line in lines if line["kind"] == "run"})


def rows_at(depth: int, lines: Sequence[Line]) -> list[str]:
    """The rows that have runs at a depth, the least validation loss first."""
    rows = dict.fromkeys(line["row"] for line in lines if (line["kind"], line["depth"]) == ("run", depth))
    found = [(row, runs) for row in rows if (runs := chosen(depth, row, lines))]
    means = {row: statistics.fmean(run.get("validation_loss", float("inf")) for run in runs) for row, runs in found}
    return sorted(means, key=means.__getitem__)


def table(depth: int, lines: Sequence[Line]) -> list[dict[str, str]]:
    """A row for each net of a depth, the least validation loss first."""
    rows = []
    for row in rows_at(depth, lines):
        runs = chosen(depth, row, lines)
        rate = runs[0]["rate"]
        cost = next((x for x in lines if (x["kind"], x["row"], x["depth"]) == ("net", row, depth)), None)
        tenfold = [run for run in of_row(depth, row, lines, tenfold=True) if run["rate"] == 10 * rate]
        rows.append(
            {
                "row": row,
                "validation loss": losses(runs),
                "seeds": str(len(runs)),
                "rate": f"{rate:g}",
                "rate x10": losses(tenfold),
                "train loss": _mean(runs, "train_loss", ".4f"),
                "ms a step": _cost(cost, "step_seconds", 1e3, ".3g"),
                "MB a step": _cost(cost, "temporary_bytes", 1e-6, ".3g"),
                "dead": _mean(runs, "dead", ".1f"),
                "linear": _mean(runs, "linear", ".1f"),
                "units": _mean(runs, "units", ",.0f"),
                "parameters": _cost(cost, "parameters", 1, ",.0f"),
            }
        )
    return rows


def losses(runs: Sequence[Line]) -> str:
    """Mean ± deviation of the validation losses, and how many runs diverged.

    >>> from experiments.charlm.table import losses
    >>> losses([{"validation_loss": 1.5}, {"diverged": 7}]), losses([])
    ('1.5000 (1 of 2 diverged)', '-')
    """
    whole = [run["validation_loss"] for run in runs if "diverged" not in run]
    said = [spread(whole)] if whole else []
    if len(whole) < len(runs):
        said.append(f"({len(runs) - len(whole)} of {len(runs)} diverged)")
    return " ".join(said) or "-"


def _mean(runs: Sequence[Line], key: str, digits: str) -> str:
    values = [run[key] for run in runs if key in run]
    return f"{statistics.fmean(values):{digits}}" if values else "-"


def _cost(line: Line | None, key: str, factor: float, digits: str) -> str:
    return "-" if line is None or line[key] is None else f"{factor * line[key]:{digits}}"


def rates_table(depth: int, lines: Sequence[Line]) -> list[dict[str, str]]:
    """Validation loss with seed 0 at each rate that was tried."""
    found = {row: of_row(depth, row, lines) for row in rows_at(depth, lines)}
    tried = sorted({run["rate"] for runs in found.values() for run in runs})
    rows = []
    for row, runs in found.items():
        of_rate = {rate: [run for run in runs if (run["rate"], run["seed"]) == (rate, 0)] for rate in tried}
        rows.append({"row": row} | {f"rate {rate:g}": losses(of_rate[rate]) for rate in tried})
    return rows


def markdown(config: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The page of a record: what was done, the tables, what the rows are."""
    protocol, data = config["protocol"], config["data"]
    parts = [
        "# A transformer without normalisation?",
        f"{data['description']}, fingerprint {data['fingerprint']}. nanoGPT's setting for a CPU: width "
        f"{protocol['width']}, {protocol['heads']} heads, windows of {protocol['block']}, {protocol['batch']} a batch, "
        f"{protocol['iterations']:,} iterations, no dropout, no biases; AdamW as there. Validation loss after the last "
        "iteration, in nats a character, on the whole validation text in windows that do not overlap (nanoGPT "
        "estimates the same mean from random windows); mean ± sample standard deviation over seeds. Each row tried "
        "its rates with seed 0 and kept the one with the least training loss of the last tenth of the iterations. rate "
        "x10: the loss at ten times that rate. ms, MB a step: the median time of a training step, in turns with the "
        "other rows, and the temporary memory of its compiled program. dead: units of the MLPs that are 0 on "
        f"{protocol['measured']} validation windows; linear: units whose pre-activation never changes sign there.",
    ]
    for depth in depths(lines):
        parts += [f"## Depth {depth}", markdown_table(table(depth, lines))]
        parts += ["Validation loss with seed 0 at each rate:", markdown_table(rates_table(depth, lines))]
    used = {line["row"] for line in lines}
    says = [{"row": row, "is": text} for row, text in config["rows"].items() if row in used]
    hours = sum(line["seconds"] for line in lines) / 3600
    parts += ["## The rows", markdown_table(says), provenance(config, f"; {hours:.1f} hours")]
    return "\n\n".join(parts) + "\n"


def picture(lines: Sequence[Line], path: Path) -> Path:
    """Validation loss against the rate, that of ten times the chosen one too, of the five best rows; seed 0.

    A panel a depth, up to half a nat above the least loss: lines that leave it are far worse, or diverged.
    """
    found = depths(lines)
    sheet = figure(6.5 * len(found) + 1.5, 4.8)
    for depth, panel in zip(found, sheet.subplots(1, len(found), squeeze=False)[0], strict=True):
        for row in rows_at(depth, lines)[:IN_A_PANEL]:
            runs = of_row(depth, row, lines) + of_row(depth, row, lines, tenfold=True)
            points = sorted(
                {x["rate"]: x["validation_loss"] for x in runs if x["seed"] == 0 and "diverged" not in x}.items()
            )
            colour, dash = STYLES[row]
            panel.plot(*zip(*points, strict=True) if points else ((), ()), dash, color=colour, marker=".", label=row)
        panel.set(xscale="log", xlabel="rate", ylabel="validation loss, nats a character", title=f"depth {depth}")
        if panel.has_data():
            panel.set_ylim(panel.dataLim.y0 - 0.02, panel.dataLim.y0 + 0.5)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=9)
    return save(sheet, path)
