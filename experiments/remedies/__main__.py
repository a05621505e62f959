"""All remedies on the same work, beside linked neurons: two networks, one data pipeline, one budget.

    python -m experiments.remedies
    python -m experiments.remedies --methods relu lk_relu normprop --nets depth --seeds 1 --out runs/three

Rates: each method tries three with seed 0 and takes the one with the least training loss of the last epoch; the test
set has no say. The other seeds then run at that rate. Methods that learn are stressed: batches of 2, raw pixels
instead of standardised ones, ten times the rate. The same command resumes a record.

Expected: the table and the verdicts of results/remedies, from three seeds in about an hour and a half on two cores.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from experiments.engine import costs, records, study
from experiments.engine import data as data_lib
from experiments.engine.checks import command_line, in_range, known
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from experiments.engine.files import write_whole
from experiments.remedies.methods import METHODS
from experiments.remedies.net import NETS
from experiments.remedies.runs import BATCH, MICRO_BATCH, Work, of_method, planned
from experiments.remedies.table import markdown, picture, table


@dataclasses.dataclass(frozen=True)
class Settings:
    """All remedies on the same work, beside linked neurons, on embedded digits."""

    methods: tuple[str, ...] = ("all",)
    """One or several rows; all: every one. A wrong name lists them."""
    nets: tuple[str, ...] = ("depth", "four_conv")
    """depth: table 2's network with 30 layers of 8 units. four_conv: table 3's."""
    seeds: int = 3
    """How many seeds, from 0."""
    epochs: int = 10
    """Passes over the training set, in batches of 32."""
    stress: bool = True
    """Also run batches of 2, raw pixels and ten times the rate, for the methods that learn."""
    time_steps: int = 100
    """Time that many training steps of each method, in turns; 0 does not."""
    out: str = "runs/remedies"
    """The folder of the record. The same command resumes one that is there."""


_SAME = ("experiment", "protocol", "data", "nets")


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, with a UsageError; name all methods."""
    methods = known("methods", METHODS if "all" in settings.methods else settings.methods, METHODS)
    nets = known("nets", settings.nets, NETS)
    in_range(settings, {"seeds": (1, math.inf), "epochs": (1, math.inf), "time_steps": (0, math.inf)})
    return dataclasses.replace(settings, methods=methods, nets=nets)


def main() -> None:
    """Run what is missing, then print the table and draw the picture."""
    settings = check(command_line(Settings, "python -m experiments.remedies"))
    console, work = Console(), Work(data_lib.load("digits"), settings.epochs)
    methods, nets, folder = settings.methods, settings.nets, Path(settings.out)

    def make(net: str, row: str, stress: str, rate: float, seed: int) -> dict[str, Any]:
        line = work.run(net, row, stress, rate, seed)
        said = line.get("diverged") or f"test {line['test_accuracy']:.4f}  loss {line['train_loss']:.4f}"
        console.say(f"{net} {row} {stress if stress != 'none' else ''} rate {rate:g} seed {seed}  {said}")
        return line

    with study.open_record("remedies", folder, data=work.data, same=_SAME, **_config(settings, work)) as record:
        with console.progress("runs", planned(methods, nets, settings.seeds, settings.stress)) as advance:
            for net in nets:
                for method in methods:
                    options: Any = {"seeds": settings.seeds, "stress": settings.stress, "make": make}
                    for done in of_method(record, net, method, **options):
                        advance(done)
                    jax.clear_caches()
        if settings.time_steps and records.read_times(folder) is None:
            medians = []
            for net in nets:
                with console.progress(f"timing {net}", settings.time_steps) as advance:
                    seconds = work.step_seconds(net, methods, settings.time_steps, advance)
                for method, median in zip(methods, seconds, strict=True):
                    medians.append({"net": net, "row": method, "step_seconds": median})
            record.write_times({"steps": settings.time_steps, "medians": medians})
    times = records.read_times(folder)
    for net in nets:
        title = f"{net}: digits, {settings.epochs} epochs, last epoch, mean ± standard deviation over seeds"
        console.table(title, table(net, record.lines, record.config["nets"], times))
    write_whole(folder / "table.md", markdown(record.config, record.lines, times))
    drawn = picture(record.config, record.lines, times, folder / "remedies.png")
    console.say(f"record   {folder}\npicture  {drawn}")


def _config(settings: Settings, work: Work) -> dict[str, Any]:
    """The protocol, and of each network what it is and costs."""
    shape, nets = work.data.train_images.shape[1:], []
    for net in settings.nets:
        for row in settings.methods:
            counted = costs.count(lambda net=net, row=row: work.build(net, row, 0), shape)
            says, batch_one = METHODS[row].says, METHODS[row].batch_one
            nets.append({"net": net, "row": row, "says": says, "batch_one": batch_one, **counted})
    protocol = {
        "epochs": settings.epochs,
        "batch_size": BATCH,
        "micro_batch_size": MICRO_BATCH,
        "micro_epochs": work.micro_epochs,
        "rates": {name: list(METHODS[name].rates) for name in settings.methods},
        "inputs": "standardised",
    }
    return {"protocol": protocol, "nets": nets}


if __name__ == "__main__":
    run_command(main)
