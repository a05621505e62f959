"""Test the headline claims of the remedies, each by a small run on digits.

    python -m experiments.headlines lcw ic --seeds 3
    python -m experiments.headlines all

Expected: the tables and verdicts of results/remedies.
"""

import dataclasses
import importlib
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments.engine import data as data_lib
from experiments.engine import records, tables
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.headlines.claim import Claim

PAGE = "table.md"
NAMES = ("lcw", "batch_one", "bcn", "enorm", "ic", "bkn", "riemannian", "noise_aware", "apr")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The remedies' own claims, each tested by a small run on embedded digits."""

    claims: Annotated[tuple[str, ...], tyro.conf.Positional]
    """One or several of lcw, batch_one, bcn, enorm, ic, bkn, riemannian, noise_aware, apr; or all."""
    seeds: int = 3
    """How many seeds, from 0."""
    epochs: int | None = None
    """Passes over the training set; by default the claim's own."""
    out: str = "runs/headlines"
    """The folder; each claim has a record in it. A record that is there is gone on with, if it was made alike."""


def main() -> None:
    """Run each claim and print its table."""
    settings = tyro.cli(Settings, prog="python -m experiments.headlines")
    names = NAMES if "all" in settings.claims else tuple(dict.fromkeys(settings.claims))
    for name in names:
        if name not in NAMES:
            raise UsageError(f"there is no claim {name!r}; take one of {', '.join(NAMES)}, or all")
    if not names:
        raise UsageError(f"no claim was named; take one of {', '.join(NAMES)}, or all")
    if settings.seeds < 1 or (settings.epochs is not None and settings.epochs < 1):
        raise UsageError(f"--seeds and --epochs are at least 1, got {settings.seeds} and {settings.epochs}")
    data = data_lib.load("digits", None)
    for name in names:
        claim: Claim = importlib.import_module(f"experiments.headlines.{name}").CLAIM
        _test(claim, settings, data)


def _test(claim: Claim, settings: Settings, data: data_lib.Dataset) -> None:
    console, epochs = Console(), settings.epochs or claim.epochs
    console.say(f"claim    {claim.name}: {claim.says}\nprotocol {claim.protocol}")
    config = {
        "experiment": f"headlines.{claim.name}",
        "command": shlex.join(
            ["python", "-m", "experiments.headlines", claim.name, "--seeds", str(settings.seeds)]
            + (["--epochs", str(epochs)] if settings.epochs else [])
        ),
        "says": claim.says,
        "protocol": {"text": claim.protocol, "rows": list(claim.rows), "epochs": epochs},
        "data": {"name": data.name, "fingerprint": data.fingerprint, "description": str(data)},
    }
    record = records.Record.open(Path(settings.out) / claim.name, config, same=("experiment", "protocol", "data"))
    try:
        done = {(line["row"], line["seed"]) for line in record.lines}
        todo = [(row, seed) for row in claim.rows for seed in range(settings.seeds) if (row, seed) not in done]
        with console.progress(claim.name, len(todo)) as advance:
            for row, seed in todo:
                began = time.perf_counter()
                measured = {key: float(value) for key, value in claim.run(row, seed, data, epochs).items()}
                seconds = round(time.perf_counter() - began, 1)
                record.add({"row": row, "seed": seed, **measured, "seconds": seconds})
                said = "  ".join(f"{claim.measures[key]} {value:.4g}" for key, value in measured.items())
                console.say(f"{row} seed {seed}  {said}  {seconds:.0f} s")
                advance(1)
                if seed == settings.seeds - 1:
                    jax.clear_caches()
    finally:
        record.close()
    console.table(
        f"{claim.title}. digits, {epochs} epochs, mean ± sample standard deviation.", table(claim, record.lines)
    )
    (record.folder / PAGE).write_text(page(claim, record.config, record.lines), encoding="utf-8")
    console.say(f"record   {record.folder}\n")


def table(claim: Claim, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each method: each measure's mean and deviation over the seeds."""
    rows = []
    for name in claim.rows:
        runs = [line for line in lines if line["row"] == name]
        if runs:
            row = {"row": name}
            for key, heading in claim.measures.items():
                values = [run[key] for run in runs if key in run]
                row[heading] = tables.spread(values) if values else "-"
            seconds = statistics.fmean(run["seconds"] for run in runs)
            rows.append(row | {"seeds": str(len(runs)), "time": f"{seconds:.0f} s"})
    return rows


def page(claim: Claim, config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """The page of a record, from the record alone."""
    parts = [
        f"# {claim.title}",
        f"The claim: {config['says']}",
        f"The test: {config['protocol']['text']}",
        f"{config['data']['description']}, fingerprint {config['data']['fingerprint']}; {config['protocol']['epochs']} "
        "epochs; mean ± sample standard deviation over seeds.",
        tables.markdown(table(claim, lines)),
        tables.provenance(config),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run_command(main)
