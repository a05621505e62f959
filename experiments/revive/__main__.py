"""Train a ReLU net into death, then bring it back by linking its neurons.

    python -m experiments.revive

An MLP of three hidden layers learns the digits with Adam on standardised pixels plus 5, at two rates that are too high:
at 0.01 more than half of its units die (partly), at 0.03 nearly all of them, and it knows nothing (wholly). From there
it goes on at a sane rate, on the same inputs, in three ways: as it is (continued), with ReDo before each epoch (redo),
and linked (revived): each relu becomes (relu(z), relu(-z)) and each next kernel W becomes [W; 0], so that nothing
changes at that moment; Adam's moments are kept. Beside them two new nets learn at the sane rate, on the same inputs:
one with relu (fresh) and one with its link (fresh_linked).

The same command again resumes. Expected: see results/revive; a minute or two on two cores.
"""

import dataclasses

from experiments.engine import data as data_lib
from experiments.engine.checks import command_line, in_range
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from experiments.engine.files import write_whole
from experiments.engine.study import open_record
from experiments.plasticity.net import TAU
from experiments.revive import plots
from experiments.revive.ways import BATCH_SIZE, HARMS, OFFSET, RATE, UNITS, WAYS, run_seed, shifted


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train a ReLU net into death, then bring it back by linking its neurons."""

    seeds: int = 5
    """How many seeds, from 0."""
    harmful_epochs: int = 10
    """Passes over the digits at the rate that kills units."""
    epochs: int = 20
    """Passes over the digits after that, at a sane rate."""
    out: str = "runs/revive"
    """The folder of the record. One that is there and was made alike is resumed."""


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, with a UsageError."""
    in_range(settings, {"seeds": (1, 100), "harmful_epochs": (1, 1000), "epochs": (1, 1000)})
    return settings


def main() -> None:
    """Run the seeds that are missing, then print the table and draw the picture."""
    settings = check(command_line(Settings, "python -m experiments.revive"))
    data, console = data_lib.load("digits"), Console()
    task, epochs = shifted(data), {"harmful_epochs": settings.harmful_epochs, "epochs": settings.epochs}
    protocol = {
        **epochs,
        "units": UNITS,
        "offset": OFFSET,
        "harmful_rates": HARMS,
        "rate": RATE,
        "batch_size": BATCH_SIZE,
        "optimizer": "adam",
        "tau": TAU,
    }
    with (
        open_record("revive", settings.out, protocol=protocol, data=data) as record,
        console.progress("nets", len(HARMS) * settings.seeds * (1 + len(WAYS))) as advance,
    ):
        for harm in HARMS:
            for seed in range(settings.seeds):
                run_seed(record, task, harm, seed, **epochs, say=console.say, on_net=advance)
    for harm in HARMS:
        console.table(f"{harm}: {plots.LEGEND}", plots.table(harm, record.lines))
    write_whole(record.folder / "table.md", plots.markdown(record.config, record.lines))
    drawn = plots.picture(record.config, record.lines, record.folder / "revive.png")
    console.say(f"record   {record.folder}\npicture  {drawn}")


if __name__ == "__main__":
    run_command(main)
