"""One call of a table's command: the grid of nets is trained and recorded, and can be killed and resumed."""

import dataclasses
import functools
import itertools
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments.engine import data as data_lib
from experiments.engine import folders, plots, processes, records, resumed, tables, training
from experiments.engine.checkpoints import Checkpoints, Saved, like
from experiments.engine.checks import option
from experiments.engine.console import Console
from experiments.engine.costs import count
from experiments.engine.environment import program
from experiments.engine.errors import InterruptedRunError, NonFiniteLossError, UsageError
from experiments.engine.experiment import Experiment
from experiments.engine.interrupts import Interrupts
from experiments.engine.optimizers import OPTIMIZERS
from experiments.engine.parallel import on_devices, placement, request_devices
from experiments.engine.settings import (
    LEFT_TO_THE_DATA,
    NOT_PROTOCOL,
    OF_THIS_COMMAND,
    Cell,
    Settings,
    check_processes,
    recorded,
    resumes,
    settle,
)
from experiments.engine.study import command
from experiments.engine.timing import step_times

_EACH_EPOCH_UP_TO = 12  # runs in a command; with more, one line a run
_WHERE = ("epoch", "step", "diverged", "seconds")  # of a snapshot
_AGREE_EVERY = 4  # updates between questions to all processes: has a signal come, is a checkpoint due?


def run(experiment: Experiment) -> None:
    """Read the command line, train every net, and leave a record, a table and a picture."""
    settings = experiment.parse(sys.argv[1:])
    check_processes(settings)
    if not resumes(settings, experiment.presets["auto"]):
        _start(experiment, settings)
        settings = experiment.check(settings)
        name = f"{experiment.name}-{'-'.join(settings.act[:3])}"
        folder = processes.from_first(lambda: str(folders.new_folder(settings.out, name)))
        _Run(experiment, settings, Path(folder), None).go()
        return
    folder = Path(settings.resume)
    config = records.resumable_config(folder)
    settings = resumed.settings_of(experiment, folder, config, settings)
    _start(experiment, settings)
    with _open(folder, config, lambda: records.Record.reopen(folder)) as record:
        _Run(experiment, settings, folder, record).go()


def _start(experiment: Experiment, settings: Settings) -> None:
    """What comes before JAX runs: meet the other processes, ask for devices."""
    options = {option(name): value for name, value in vars(settings).items() if name not in OF_THIS_COMMAND}
    request_devices(settings.devices // processes.join(settings, {"table": experiment.name, **program(), **options}))


def _open(folder: Path, config: dict[str, Any], open_it: Callable[[], records.Record]) -> records.Record:
    """The record, which process 0 writes."""
    return processes.everywhere(open_it if processes.is_first() else lambda: records.Unwritten(folder, config))


def _data(settings: Settings) -> data_lib.Dataset:
    """The set that all processes have, in the parts that the settings ask for."""
    data = processes.everywhere(lambda: data_lib.load(settings.dataset, settings.data_dir))
    if len(found := set(processes.texts(data.fingerprint))) > 1:
        raise UsageError(f"the processes have different data, with fingerprints {', '.join(sorted(found))}; copy one")
    if settings.held_out:
        data = data_lib.hold_out(data, settings.held_out)
    return data_lib.first(data, settings.train_size) if settings.train_size else data


class _Run:
    """A grid of nets, each with its seeds; a run is a net with one seed, or with all of them where they are stacked."""

    def __init__(self, experiment: Experiment, settings: Any, folder: Path, record: records.Record | None):
        self.experiment, self.folder, self.console = experiment, folder, Console(quiet=not processes.is_first())
        asked = {name: getattr(settings, name) for name in LEFT_TO_THE_DATA}
        settings = on_devices(settings)
        self.data = _data(settings)
        self.settings = settle(settings, self.data)
        if record:
            resumed.check_data(folder, record.config["data"], self.data)
        self.cells = experiment.cells(self.settings)
        self.place = placement(self.settings)
        seeds = list(range(self.settings.seed, self.settings.seed + self.settings.seeds))
        groups = [seeds] if self.place.stacked else [[seed] for seed in seeds]
        self.runs = [(cell, group) for cell in self.cells for group in groups]
        self.steps_per_epoch = -(-len(self.data.train_labels) // self.settings.batch_size)
        self.optimizers: dict[tuple[Any, ...], optax.GradientTransformation] = {}
        self.plans = {id(cell): self._plan(cell) for cell in self.cells}  # a schedule that does not fit is refused here
        axes = experiment.all_axes
        self.shown = [axis for axis in axes if axis == "act" or len({cell[axis] for cell in self.cells}) > 1]
        self.say_what_comes()
        self.counted = self._count()
        config = {**self._config(), "asked": asked}
        self.record = record or _open(folder, config, lambda: records.Record.create(folder, config))

    def say_what_comes(self) -> None:
        settings, say = self.settings, self.console.say
        say(f"data     {self.data} (fingerprint {self.data.fingerprint})")
        of = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        say(f"device   {settings.devices} x {jax.devices()[0].device_kind}{of}, jax {jax.__version__}")
        say(
            f"runs     {len(self.cells)} nets x {settings.seeds} seeds, {settings.optimizer}, "
            f"batch {settings.batch_size}, {settings.epochs} epochs"
        )

    def go(self) -> None:
        """Train what is not trained, time the nets if that was asked for, and show the tables."""
        checkpoints = Checkpoints(self.folder / "checkpoint", self.settings.checkpoint_every)
        with self.record:
            with Interrupts() as interrupts:
                self._train_all(checkpoints, interrupts)
            if self.settings.time_steps and not (self.folder / folders.TIMES).exists():
                self._time()
        if processes.is_first():
            self._show()
        diverged = [line["diverged"] for line in self.record.lines if "diverged" in line]
        if diverged:
            runs = "" if len(diverged) == 1 else f"{len(diverged)} runs diverged; the first: "
            raise NonFiniteLossError(f"{runs}{diverged[0]}; try a smaller --lr or another --init")

    def _train_all(self, checkpoints: Checkpoints, interrupts: Interrupts) -> None:
        saved = processes.everywhere(checkpoints.load)
        first, lines = (saved.facts["run"], saved.facts["lines"]) if saved else resumed.finished(self.record, self.runs)
        resumed.check_lines(self.record, lines)
        if first == len(self.runs):
            self.console.say(f"the run {self.folder} is complete")
            return
        if self.record.lines and not saved:
            self.console.say(f"no checkpoint is left: {first} of {len(self.runs)} runs are whole, the next begins anew")
        self.record.keep(lines)
        latest: Callable[[], training.Snapshot] | None = None
        for number, (cell, seeds) in enumerate(self.runs[first:], start=first):
            if cell is not self.runs[number - 1][0] or number == first:
                counted = self.counted[self._architecture(cell)]
                self.console.say(f"network  {self.experiment.describe(self.settings, cell, counted)}")
            loop, snapshot = training.start([self._build(cell, seed) for seed in seeds], self.plans[id(cell)])
            if saved:
                snapshot, saved = self._restored(saved, snapshot), None
            latest = self._train(number, loop, snapshot, checkpoints, interrupts)
        assert latest is not None
        self._save(checkpoints, latest(), len(self.runs))

    def _is_good(self, snapshot: training.Snapshot) -> bool:
        """Whether it may be saved: else one with a loss that is not finite would take the place of a good one."""
        finite = self.settings.on_nonfinite == "skip" or np.isfinite(snapshot.losses).all()
        return bool(finite or snapshot.diverged)

    def _save(self, checkpoints: Checkpoints, snapshot: training.Snapshot, run: int) -> None:
        where = {name: getattr(snapshot, name) for name in _WHERE}
        facts = {"run": run, "lines": len(self.record.lines), **where}
        checkpoints.save([snapshot.losses, snapshot.arrays], facts)

    def _restored(self, saved: Saved, start: training.Snapshot) -> training.Snapshot:
        """The snapshot that was saved, on the devices; one before the first update has its shapes."""
        losses, *leaves = saved.leaves
        arrays = self.place.of_seeds(like(saved._replace(leaves=leaves), start.arrays))
        where = {name: saved.facts[name] for name in _WHERE}
        return training.Snapshot(arrays, losses, **{**where, "diverged": tuple(where["diverged"])})

    def _train(
        self, number: int, loop: Any, snapshot: training.Snapshot, checkpoints: Checkpoints, interrupts: Interrupts
    ) -> Callable[[], training.Snapshot]:
        """Train one run from a snapshot on; gives what makes the last one."""
        cell, seeds = self.runs[number]
        plan, named = self.plans[id(cell)], tables.named(cell[axis] for axis in self.shown)
        each_epoch = len(self.cells) * self.settings.seeds <= _EACH_EPOCH_UP_TO
        latest: list[Callable[[], training.Snapshot]] = [lambda: snapshot]
        agree_every = 1 if jax.process_count() == 1 else _AGREE_EVERY
        updates, bar = itertools.count(1), f"{named} seed {', '.join(map(str, seeds))}"

        with self.console.progress(bar, plan.epochs * self.steps_per_epoch) as advance:
            advance((snapshot.epoch - 1) * self.steps_per_epoch + snapshot.step)

            def on_step(now: Callable[[], training.Snapshot], done: int) -> None:
                advance(done)
                latest[0] = now
                if next(updates) % agree_every:
                    return
                signum, due = processes.greatest([interrupts.signum or 0, checkpoints.due()])
                if (signum or due) and self._is_good(snapshot := now()):
                    self._save(checkpoints, snapshot, number)
                if signum:
                    raise InterruptedRunError(signum, f"The run is saved; resume it with: {self._again()}")

            for lines in training.fit(loop, snapshot, self.data, plan, seeds, on_step=on_step):
                for line in lines:
                    self.record.add({**cell, **line})
                    if each_epoch or tables.is_last(line, plan.epochs):
                        self.console.say(f"{named} {_said(line, plan.epochs, self.data.tested_on)}")
        return latest[0]

    def _again(self) -> str:
        """The command that resumes this run."""
        settings, again = self.settings, ["python", "-m", f"experiments.{self.experiment.name}"]
        again += ["--resume", str(self.folder), *["--distributed"] * settings.distributed]
        default = self.experiment.presets["auto"]
        for name in OF_THIS_COMMAND:
            value = getattr(settings, name)
            if name != "distributed" and value != getattr(default, name):
                again += [option(name), str(value)]
        return shlex.join(again)

    def _count(self) -> dict[tuple[Any, ...], dict[str, int]]:
        """Parameters, and costs if the table shows them, of each architecture."""
        nets = {self._architecture(cell): cell for cell in self.cells}
        shape, found = self.data.train_images.shape[1:], {}
        with self.console.progress("counting parameters", len(nets)) as advance:
            for architecture, cell in nets.items():
                build = functools.partial(self._build, cell, 0)
                found[architecture] = count(build, shape, all_of_them=self.experiment.count_costs)
                advance(1)
        return found

    def _architecture(self, cell: Cell) -> tuple[Any, ...]:
        return tuple(cell[axis] for axis in ("act", *self.experiment.axes))

    def _build(self, cell: Cell, seed: int) -> Any:
        return self.experiment.build(self.settings, cell, self.data, seed)

    def _config(self) -> dict[str, Any]:
        settings, axes = recorded(self.settings), self.experiment.all_axes
        return {
            "experiment": self.experiment.name,
            "command": command(self.experiment.name),
            "settings": settings,
            "axes": list(axes),
            "protocol": {name: value for name, value in settings.items() if name not in (*NOT_PROTOCOL, *axes)},
            "data": self.data.identity,
            "nets": [{**cell, **self.counted[self._architecture(cell)]} for cell in self.cells],
        }

    def _time(self) -> None:
        """Median seconds of a step of each net: of its first initialiser and rate, one seed, this placement."""
        nets = list({self._architecture(cell): cell for cell in reversed(self.cells)}.values())[::-1]
        place = dataclasses.replace(self.place, stacked=False, spread=False)
        plans = [dataclasses.replace(self.plans[id(cell)], place=place) for cell in nets]
        models = [self._build(cell, self.settings.seed) for cell in nets]
        with self.console.progress("timing", self.settings.time_steps) as advance:
            seconds = step_times(list(zip(models, plans, strict=True)), self.data, self.settings.time_steps, advance)
        names = ("act", *self.experiment.axes)
        medians = [
            {**{name: cell[name] for name in names}, "step_seconds": median}
            for cell, median in zip(nets, seconds, strict=True)
        ]
        self.record.write_times({"steps": self.settings.time_steps, "medians": medians})

    def _plan(self, cell: Cell) -> training.Plan:
        settings, experiment = self.settings, self.experiment
        key = tuple(cell[axis] for axis in experiment.axes)
        if key not in self.optimizers:  # nets with one schedule share the object: the step then compiles once
            schedule = experiment.schedule(settings, cell, self.steps_per_epoch)
            self.optimizers[key] = OPTIMIZERS[settings.optimizer](schedule)
        return training.Plan(
            self.optimizers[key], settings.epochs, settings.batch_size, lr=cell["lr"],
            inputs=experiment.inputs(cell, self.data), shuffle=settings.shuffle, augment=settings.augment,
            place=self.place, skip_nonfinite=settings.on_nonfinite == "skip",
        )  # fmt: skip

    def _show(self) -> None:
        nets, data = tables.by_net(self.record.lines, self.experiment.all_axes), self.data.identity
        protocol = records.read_config(self.folder)["protocol"]
        rows = tables.summary(tables.numbers(self.experiment.name, data, protocol, nets), self.experiment.all_axes)
        self.console.table(f"{self.experiment.title}, {self.data.name}. {tables.legend(rows, data)}", rows)
        path = self.folder / f"{self.experiment.name}.png"
        picture = plots.accuracy_picture(nets, path, title=str(self.data), data=data)
        self.console.say(f"record   {self.folder}\npicture  {picture}")
        if times := records.read_times(self.folder):
            title = f"Median time of a training step, {times['steps']} steps of each net in turns."
            self.console.table(title, tables.time_table(self.experiment.name, times["medians"]))


def _said(line: Mapping[str, Any], epochs: int, tested_on: str) -> str:
    if "diverged" in line:
        return f"seed {line['seed']}  {line['diverged']}"
    skipped = f"  skipped {line['skipped']}" if line.get("skipped") else ""
    return (
        f"seed {line['seed']}  epoch {line['epoch']:>3}/{epochs}  loss {line['train_loss']:.4f}  "
        f"{tested_on} {line['test_accuracy']:.4f}  dead {line['dead_units']}{skipped}  {line['seconds']:.1f} s"
    )
