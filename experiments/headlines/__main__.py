"""Test the headline claims of the remedies, each by a small run on digits.

    python -m experiments.headlines lcw ic --seeds 3
    python -m experiments.headlines all

Expected: the tables and verdicts of results/remedies.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments.engine import data as data_lib
from experiments.engine import study
from experiments.engine.checks import command_line, in_range
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.files import write_whole
from experiments.engine.records import Record
from experiments.headlines import apr, batch_one, bcn, bkn, enorm, ic, lcw, noise_aware, riemannian
from experiments.headlines.claim import EARLY, Claim, page, table

CLAIMS: dict[str, Claim] = {
    each.CLAIM.name: each.CLAIM for each in (lcw, batch_one, bcn, enorm, ic, bkn, riemannian, noise_aware, apr)
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The remedies' own claims, each tested by a small run on embedded digits."""

    claims: Annotated[tuple[str, ...], tyro.conf.Positional]
    """One or several of lcw, batch_one, bcn, enorm, ic, bkn, riemannian, noise_aware, apr; or all."""
    seeds: int = 3
    """How many seeds, from 0."""
    epochs: int | None = None
    """Passes over the training set, 2 or more; by default the claim's own."""
    out: str = "runs/headlines"
    """The folder; each claim has a record in it. The same command resumes a record that is there."""


def main() -> None:
    """Run each claim and print its table."""
    settings = command_line(Settings, "python -m experiments.headlines")
    names = tuple(CLAIMS) if "all" in settings.claims else tuple(dict.fromkeys(settings.claims))
    for name in names or ("",):
        if name not in CLAIMS:
            wrong = f"there is no claim {name!r}" if name else "no claim was named"
            raise UsageError(f"{wrong}; take one of {', '.join(CLAIMS)}, or all")
    in_range(settings, {"seeds": (1, math.inf)} | ({} if settings.epochs is None else {"epochs": (EARLY, math.inf)}))
    data = data_lib.load("digits")
    for name in names:
        _test(CLAIMS[name], settings, data)


def _test(claim: Claim, settings: Settings, data: data_lib.Dataset) -> None:
    console, epochs = Console(), settings.epochs or claim.epochs
    console.say(f"claim    {claim.name}: {claim.says}\nprotocol {claim.protocol}")
    arguments = [claim.name, "--seeds", str(settings.seeds)] + (["--epochs", str(epochs)] if settings.epochs else [])
    folder = Path(settings.out) / claim.name
    config = {
        "protocol": {"text": claim.protocol, "rows": list(claim.rows), "epochs": epochs},
        "command": study.command("headlines", arguments),
        "says": claim.says,
    }
    with (
        study.open_record(f"headlines.{claim.name}", folder, data=data, **config) as record,
        console.progress(claim.name, len(claim.rows) * settings.seeds) as advance,
    ):
        for row in claim.rows:
            for seed in range(settings.seeds):
                make = functools.partial(_measured, claim, row, seed, data, epochs, record)
                line = record.once({"row": row, "seed": seed}, make)
                said = "  ".join(f"{text} {line[key]:.4g}" for key, text in claim.measures.items() if key in line)
                console.say(f"{row} seed {seed}  {said}  {line['seconds']:.0f} s")
                advance(1)
            jax.clear_caches()
    title = f"{claim.title}. digits, {epochs} epochs, mean ± sample standard deviation."
    console.table(title, table(claim, record.lines))
    write_whole(folder / "table.md", page(claim, record.config, record.lines))
    console.say(f"record   {folder}\n")


def _measured(
    claim: Claim, row: str, seed: int, data: data_lib.Dataset, epochs: int, record: Record
) -> dict[str, float]:
    """The measures of one run; the rate, where a claim tries several, is the one that is best with seed 0."""
    run = functools.partial(claim.run, row, seed, data, epochs)
    if claim.rates and seed == 0:
        tried: list[Any] = [{"seed": 0, "rate": rate, "found": run(rate)} for rate in claim.rates]
        (best,) = study.at_best_rate(tried, lambda each: each["found"].get("loss", math.inf))
        found = {claim.rate: best["rate"], **best["found"]}
    elif claim.rates:
        rate = next(line for line in record.lines if (line["row"], line["seed"]) == (row, 0))[claim.rate]
        found = {claim.rate: rate, **run(rate)}
    else:
        found = run()
    return {key: float(value) for key, value in found.items()}


if __name__ == "__main__":
    run_command(main)
