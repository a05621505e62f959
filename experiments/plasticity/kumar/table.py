"""What `--protocol kumar` found, as tables and pictures, made from a record's lines and the published numbers alone."""

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine.plots import COLOURS, IN_A_PANEL, figure, label_ends, save
from experiments.engine.study import Line
from experiments.engine.tables import markdown as markdown_table
from experiments.engine.tables import provenance
from experiments.plasticity.kumar.methods import METHODS
from experiments.plasticity.kumar.problems import PROBLEMS
from experiments.plasticity.plots import smoothed_band

FIRST_SEED = 3
"""Seeds below it choose the rate; those from it on are the result."""
_SMOOTHED = {"permuted_mnist": 10}


@functools.cache
def published() -> dict[str, Any]:
    """What was printed: about, and for each problem a score in per cent by row."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def best_rate(lines: Sequence[Line]) -> float | None:
    """The rate with the best mean score over the seeds that choose it; None if none of them has run.

    >>> from experiments.plasticity.kumar.table import best_rate
    >>> best_rate([{"rate": 0.1, "seed": 0, "score": 0.2}, {"rate": 0.2, "seed": 0, "score": 0.3}])
    0.2
    """
    tried = {line["rate"] for line in lines if line["seed"] < FIRST_SEED}
    means = {rate: statistics.fmean(_scores(lines, rate)) for rate in tried}
    return max(means, key=means.__getitem__, default=None)


def result(lines: Sequence[Line]) -> list[Line]:
    """The runs of a row that its score is made of: at the chosen rate, by other seeds than chose it, if there are any.

    Without a choice: those at the rate that most seeds have.
    """
    rate, rates = best_rate(lines), [line["rate"] for line in lines]
    runs = [line for line in lines if line["rate"] == (statistics.mode(rates) if rate is None else rate)]
    return [line for line in runs if line["seed"] >= FIRST_SEED] or runs


def table(problem: str, tasks: int, lines: Sequence[Line]) -> list[dict[str, str]]:
    """A row for each method that has run, the best first; accuracies in per cent."""
    rows = []
    for row, of_row in by_row(problem, tasks, lines).items():
        runs = result(of_row)
        hard = [of_hard(problem, run) for run in runs]
        easy = [of_hard(problem, run, hard=False) for run in runs]
        only_tuning = "*" if runs[0]["seed"] < FIRST_SEED else ""
        texts = {
            "method": row + " (diverged)" * (not all(run["finite"] for run in runs)),
            "score": _spread([run["score"] for run in runs]),
            "first 3": _spread([statistics.fmean(a[:3]) for a in hard]),
            "last 5": _spread([statistics.fmean(a[-5:]) for a in hard]),
        }
        if any(easy):
            texts["easy tasks"] = _spread([statistics.fmean(a) for a in easy])
        texts |= {
            "dormant, last": f"{statistics.fmean(run['dormant'][-1] for run in runs):.3f}",
            "rank, last": f"{statistics.fmean(run['rank'][-1] for run in runs):.1f}",
            "rms weight, last": f"{statistics.fmean(run['weights'][-1] for run in runs):.3f}",
            "rate": f"{runs[0]['rate']:g}",
            "seeds": f"{len(runs)}{only_tuning}",
            "units": " ".join(map(str, runs[0]["units"])),
            "parameters": f"{runs[0]['parameters']:,}",
            "seconds a run": f"{statistics.fmean(run['training_seconds'] for run in runs):.0f}",
        }
        rows.append((statistics.fmean(run["score"] for run in runs), texts))
    return [texts for _, texts in sorted(rows, key=lambda pair: -pair[0])]


def left_out(problem: str, tasks: int, lines: Sequence[Line]) -> str:
    """The runs that no table shows: of seeds that do not choose, at another rate than the row's; empty if none is."""
    told = []
    for row, of_row in by_row(problem, tasks, lines).items():
        shown = result(of_row)
        others = [line for line in of_row if line["seed"] >= FIRST_SEED and line not in shown]
        told += [f"{row} at {line['rate']:g}, seed {line['seed']}: {100 * line['score']:.2f}" for line in others]
    return f"Not in the table, at other rates: {'; '.join(told)}." if told else ""


def rates_table(problem: str, tasks: int, lines: Sequence[Line]) -> list[dict[str, str]]:
    """The mean score at each rate, of the seeds that choose it, for the rows that tried several."""
    found, rows = by_row(problem, tasks, lines), []
    rates = sorted({x["rate"] for of_row in found.values() for x in of_row if x["seed"] < FIRST_SEED}, reverse=True)
    for row, of_row in found.items():
        scores = {f"rate {rate:g}": _scores(of_row, rate) for rate in rates}
        if any(scores.values()):
            rows.append({"method": row} | {name: _spread(s) if s else "-" for name, s in scores.items()})
    return rows


def beside_published(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The rows that were published, each as ours / published, at the problems' own number of tasks."""
    printed = published()["problems"]
    rows = []
    for row in printed["cifar_5plus1"]:
        texts = {"method": row}
        for name, problem in PROBLEMS.items():
            runs = by_row(name, problem.tasks, lines).get(row)
            ours = f"{100 * statistics.fmean(run['score'] for run in result(runs)):.2f}" if runs else "-"
            texts[problem.says] = f"{ours} / {printed[name][row]:.2f}"
        rows.append(texts)
    return rows


def markdown(config: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The page of a record."""
    parts = [
        "# Plasticity: the protocol of Kumar et al.",
        "Online accuracy in per cent: each batch is scored before it is learnt. score: the mean over all steps, of 5+1 "
        f"over those of its hard tasks. Mean ± standard deviation over seeds; seeds 0 to {FIRST_SEED - 1} choose the "
        "rate, others are the result (* the choosing seeds themselves, for want of others). first 3, last 5: of the "
        "tasks that count. dormant: share of hidden units; rank: effective rank of the last hidden layer; rms weight: "
        "root mean square of all parameters; all three after the last task. Adam; nothing is reset between tasks.",
    ]
    for problem, tasks in groups(lines):
        data = next(line["data"] for line in lines if (line["problem"], line["tasks"]) == (problem, tasks))
        what = PROBLEMS[problem]
        steps = f"{tasks} tasks of {what.steps:,} steps of batch {what.batch_size}. Data: {data}."
        parts += [f"## {what.says}", steps, markdown_table(table(problem, tasks, lines))]
        if rates := rates_table(problem, tasks, lines):
            parts += ["Score at each rate, of the seeds that choose it:", markdown_table(rates)]
        if left := left_out(problem, tasks, lines):
            parts.append(left)
    parts += ["## Beside the published numbers", "Ours / published. " + published()["about"]]
    parts.append(markdown_table(beside_published(lines)))
    rows = dict.fromkeys(line["row"] for line in lines)
    said = [{"method": row, "is": METHODS[row].says, "start": METHODS[row].start} for row in rows if row in METHODS]
    parts += ["## The rows", markdown_table(said)] if said else []
    hours = sum(line["training_seconds"] for line in lines) / 3600
    parts.append(provenance(config, f"; {hours:.1f} hours of training"))
    return "\n\n".join(parts) + "\n"


def groups(lines: Sequence[Line]) -> list[tuple[str, int]]:
    """The problems that have run, each with its number of tasks, in the order of `PROBLEMS`."""
    found = dict.fromkeys((line["problem"], line["tasks"]) for line in lines)
    return sorted(found, key=lambda pair: (list(PROBLEMS).index(pair[0]), -pair[1]))


def by_row(problem: str, tasks: int, lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The runs of each row on a problem."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if (line["problem"], line["tasks"]) == (problem, tasks):
            found.setdefault(line["row"], []).append(line)
    return found


def picture(problem: str, tasks: int, lines: Sequence[Line], path: Path) -> Path:
    """Online accuracy by task, of the tasks that count; bands are one standard deviation over seeds."""
    rows, what = by_row(problem, tasks, lines), PROBLEMS[problem]
    best_first = sorted(rows, key=lambda row: -statistics.fmean(run["score"] for run in result(rows[row])))
    together = [best_first[i : i + IN_A_PANEL] for i in range(0, len(rows), IN_A_PANEL)]
    kind = "hard task" if what.kind == "classes" else "task"
    smoothed = f", mean of {_SMOOTHED[problem]} tasks" if problem in _SMOOTHED else ""
    sheet = figure(6.5, 3.4 * len(together) + 0.4)
    for panel, drawn in zip(sheet.subplots(len(together), squeeze=False)[:, 0], together, strict=True):
        for colour, row in zip(COLOURS, drawn, strict=False):
            values = 100 * np.array([of_hard(problem, run) for run in result(rows[row])])
            wide = min(_SMOOTHED.get(problem, 1), max(1, values.shape[1] // 2))
            smoothed_band(panel, values, wide, colour, f"{row} {values.mean():.1f}")
        panel.set(xlabel=f"{kind}{smoothed}", ylabel=f"online accuracy in the {kind}, %", ylim=(0, 100))
        panel.grid(alpha=0.25)
        label_ends(panel)
    sheet.suptitle(f"{what.says}: accuracy before learning, by task, at equal parameters")
    return save(sheet, path, 110)


def of_hard(problem: str, run: Line, *, hard: bool = True) -> list[float]:
    """The accuracies of a run's hard tasks, those that count, or of its easy ones."""
    return [a for number, a in enumerate(run["accuracy"]) if PROBLEMS[problem].hard(number) == hard]


def _scores(lines: Sequence[Line], rate: float) -> list[float]:
    """Of the seeds that choose the rate."""
    return [line["score"] for line in lines if line["rate"] == rate and line["seed"] < FIRST_SEED]


def _spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, in per cent."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.2f}"
