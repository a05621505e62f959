"""Characters of Shakespeare by a transformer with normalisation, with what replaces it, and with linked MLPs instead.

    python -m experiments.charlm
    python -m experiments.charlm --rows layer_norm lk_gelu --depths 4 --seeds 1
    python -m experiments.charlm --text book.txt --iterations 300 --out runs/book

nanoGPT's setting for a CPU: 4 layers, 4 heads, 128 wide, windows of 64 characters, 12 a batch, 2,000 iterations, no
dropout; its README reports a validation loss of 1.88. Each row tries three rates with seed 0 and takes the one with the
least training loss; the other seeds then run at that rate, and some at ten times the rate. All rows have as many
parameters: linked MLPs are narrower inside. What the rows are: `experiments/charlm/net.py`.

Expected: the table of results/charlm. A run takes two to four minutes on one core, six times as long at depth 24.

The same command resumes; another one with more rows, depths, rates or seeds and the same --out adds to the record. The
data are prepared once, or pass --text.
"""

import dataclasses
from typing import Any

import jax

from experiments.charlm import data as text_data
from experiments.charlm.net import BLOCK, HEADS, ROWS, WIDTH
from experiments.charlm.table import chosen, losses, markdown, picture, table
from experiments.charlm.training import BATCH, MEASURED, OPTIMIZER, Work
from experiments.engine.checks import command_line, in_range, known
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.files import write_whole
from experiments.engine.records import Record
from experiments.engine.study import open_record


@dataclasses.dataclass(frozen=True)
class Settings:
    """A transformer on characters: with normalisation, with what replaces it, and with linked MLPs instead."""

    rows: tuple[str, ...] = ("all",)
    """One or several; all: every one. A wrong name lists them."""
    depths: tuple[int, ...] = (4,)
    """Layers of the transformer."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Each row tries all of them with seed 0."""
    seeds: int = 3
    """How many seeds, from 0."""
    tenfold_seeds: int = 1
    """How many seeds, from 0, run at ten times the chosen rate."""
    iterations: int = 2000
    """Updates of a run."""
    time_steps: int = 20
    """Time that many training steps of each net, in turns; 0 does not."""
    text: str | None = None
    """A text file in UTF-8, whose last tenth validates; by default Tiny Shakespeare."""
    out: str = "runs/charlm"
    """The folder of the record. One that is there and was made alike is resumed."""
    data_dir: str | None = None
    """The folder of TensorFlow Datasets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, with a UsageError; name all rows, and each value once."""
    in_range(settings, {"seeds": (1, 100), "tenfold_seeds": (0, 100), "time_steps": (0, 10_000)})
    in_range(settings, {"iterations": (1, 1_000_000)})
    for name, least, most in (("depths", 1, 1000), ("rates", 1e-9, 1.0)):
        values = getattr(settings, name)
        if not values or not all(least <= value <= most for value in values):  # nor nan
            raise UsageError(f"--{name} takes values from {least:g} to {most:g}, got {values}; try the default")
    rows = known("rows", ROWS if "all" in settings.rows else settings.rows, ROWS)
    once = {name: tuple(dict.fromkeys(getattr(settings, name))) for name in ("depths", "rates")}
    return dataclasses.replace(settings, rows=rows, **once)


class Study:
    """The runs of a command, added to a record one by one."""

    def __init__(self, settings: Settings, record: Record, work: Work, console: Console):
        self.settings, self.record, self.work, self.console = settings, record, work, console

    def costs(self, depth: int) -> None:
        """What the nets of a depth cost, of those whose lines the record lacks."""
        keys = [{"kind": "net", "row": row, "depth": depth} for row in self.settings.rows]
        steps = self.settings.time_steps
        with self.console.progress(f"timing depth {depth}", steps) as advance:

            def make(missing: list[int]) -> list[dict[str, Any]]:
                return self.work.costs([(self.settings.rows[i], depth) for i in missing], steps, advance)

            lines = self.record.once_each(keys, make)
        if untimed := [line["row"] for line in lines if steps and line["step_seconds"] is None]:
            self.console.say(f"no times of {', '.join(untimed)}: their line was made without; begin another record")
        jax.clear_caches()

    def runs(self, depth: int) -> None:
        """All rates of all rows with seed 0, then seed after seed, then ten times the rate: a cut leaves all rows."""
        rows, seeds, tenfold = self.settings.rows, self.settings.seeds, self.settings.tenfold_seeds
        for row in rows:
            for rate in self.settings.rates:
                self._once(row, depth, rate, 0)
        for seed in range(1, seeds):
            for row in rows:
                self._once(row, depth, self._rate(row, depth), seed)
        for seed in range(tenfold):
            for row in rows:
                self._once(row, depth, 10 * self._rate(row, depth), seed, tenfold=True)

    def _rate(self, row: str, depth: int) -> float:
        return chosen(depth, row, self.record.lines)[0]["rate"]

    def _once(self, row: str, depth: int, rate: float, seed: int, *, tenfold: bool = False) -> None:
        key = {"kind": "run", "row": row, "depth": depth, "rate": rate, "tenfold": tenfold, "seed": seed}
        if self.record.find(key) is not None:
            return
        says = f"{row} depth {depth}, rate {rate:g}, seed {seed}"
        unfinished = self.record.checkpoints(says.replace(",", "").replace(" ", "-"))
        with self.console.progress(says, self.work.iterations) as advance:
            line = self.record.once(
                key, lambda: self.work.run(row, depth, rate, seed, unfinished=unfinished, advance=advance)
            )
        unfinished.clear()
        self.console.say(f"{says}: {losses([line])}, {line['seconds']:.0f} s")


def main() -> None:
    """Run what is missing, then print the tables and draw the picture."""
    settings = check(command_line(Settings, "python -m experiments.charlm"))
    text, console = text_data.load(settings.text, settings.data_dir, block=BLOCK), Console()
    work = Work(text, settings.iterations)
    says = {row: ROWS[row].says for row in ROWS}
    protocol = {
        "iterations": settings.iterations,
        "batch": BATCH,
        "block": BLOCK,
        "width": WIDTH,
        "heads": HEADS,
        "optimizer": OPTIMIZER,
        "measured": MEASURED,
    }
    with open_record("charlm", settings.out, protocol=protocol, data=text, rows=says) as record:
        study = Study(settings, record, work, console)
        for depth in settings.depths:
            study.costs(depth)
            study.runs(depth)
    for depth in settings.depths:
        title = f"depth {depth}: validation loss, mean ± standard deviation over seeds"
        console.table(title, table(depth, record.lines))
    write_whole(record.folder / "table.md", markdown(record.config, record.lines))
    console.say(f"record   {record.folder}\npicture  {picture(record.lines, record.folder / 'charlm.png')}")


if __name__ == "__main__":
    run_command(main)
