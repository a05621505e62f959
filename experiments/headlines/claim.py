"""A claim of a paper, as data: what it compares, how that is run, and its table. `__main__.py` runs it."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.engine.study import Line
from experiments.engine.tables import markdown, provenance, spread

Measures = Mapping[str, float]
EARLY = 2  # epochs


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and its test.

    Attributes:
      name: of its module.
      title: of its table.
      says: what the paper claims, and which paper.
      protocol: networks, rates and how they were chosen, in a few sentences; it is recorded with the run.
      rows: the methods.
      measures: key of a measure -> its heading. A run may leave one out, for a method that has no such thing.
      epochs: passes over the training set, by default.
      run: (row, seed, data, epochs) -> the measures of one run; with rates (row, seed, data, epochs, rate). The same
        optimiser object for the same rate lets the step compile once: no run makes its own.
      rates: all are tried with seed 0. The one with the least measure `loss` is kept for all seeds of the row.
      rate: the measure that is the rate.
    """

    name: str
    title: str
    says: str
    protocol: str
    rows: tuple[str, ...]
    measures: Mapping[str, str]
    epochs: int
    run: Callable[..., Measures]
    rates: tuple[float, ...] = ()
    rate: str = "rate"


def early_and_last(lines: Sequence[Line], epochs: int, suffix: str = "") -> dict[str, float]:
    """The test accuracy after few epochs and after the last, as far as a run came.

    >>> from experiments.headlines.claim import early_and_last
    >>> early_and_last([{"test_accuracy": 0.1}, {"test_accuracy": 0.2}, {"diverged": "nan"}], 3)
    {'early': 0.2}
    """
    accuracy = [line["test_accuracy"] for line in lines if "diverged" not in line]
    measured = {"early": accuracy[EARLY - 1]} if len(accuracy) >= EARLY else {}
    measured |= {"last": accuracy[-1]} if len(accuracy) == epochs else {}
    return {f"{when}{suffix}": value for when, value in measured.items()}


def early_and_last_headings(rates: Sequence[float]) -> dict[str, str]:
    """The headings of `early_and_last`, whose suffix is the rate."""
    said = {"early": f"after {EARLY} epochs", "last": "at the last"}
    return {f"{when}_{rate}": f"accuracy {text}, rate {rate}" for rate in rates for when, text in said.items()}


def table(claim: Claim, lines: Sequence[Line]) -> list[dict[str, str]]:
    """A row for each method: each measure's mean and deviation over the seeds, and the median time of a run.

    A run that lacks a measure diverged: `main` asks for as many epochs as each measure needs.
    """
    rows = []
    for name in claim.rows:
        runs = [line for line in lines if line["row"] == name]
        if runs:
            row = {"row": name}
            for key, heading in claim.measures.items():
                values = [run[key] for run in runs if key in run]
                lost = f" ({len(runs) - len(values)} of {len(runs)} diverged)" if len(values) < len(runs) else ""
                row[heading] = (spread(values) if values else "-") + lost
            seconds = statistics.median(run["seconds"] for run in runs)
            rows.append(row | {"seeds": str(len(runs)), "time": f"{seconds:.1f} s"})
    return rows


def page(claim: Claim, config: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The page of a record."""
    parts = [
        f"# {claim.title}",
        f"The claim: {config['says']}",
        f"The test: {config['protocol']['text']}",
        f"{config['data']['description']}, fingerprint {config['data']['fingerprint']}; {config['protocol']['epochs']} "
        "epochs; mean ± sample standard deviation over seeds. time: of a run, the median over seeds; the first "
        "compiles, and where there are several rates it tries them all.",
        markdown(table(claim, lines)),
        provenance(config),
    ]
    return "\n\n".join(parts) + "\n"
