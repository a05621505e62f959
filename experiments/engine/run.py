"""One call of a table's command: the grid of nets is trained, recorded, and can be killed and resumed."""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from experiments.engine import data as data_lib
from experiments.engine import plots, records, tables, training
from experiments.engine.checkpoints import Checkpoints
from experiments.engine.console import Console
from experiments.engine.costs import count
from experiments.engine.errors import InterruptedRunError, NonFiniteLossError, UsageError
from experiments.engine.experiment import Experiment
from experiments.engine.interrupts import Interrupts
from experiments.engine.optimizers import OPTIMIZERS
from experiments.engine.parallel import check_devices, placement, request_devices
from experiments.engine.settings import NOT_PROTOCOL, Cell, Settings, recorded, resumes, settle
from experiments.engine.study import command
from experiments.engine.timing import step_times

_EACH_EPOCH_UP_TO = 12  # runs in a command; with more, one line a run


def run(experiment: Experiment) -> None:
    """Read the command line, train every net, and leave a record, a table and a picture."""
    _Run(experiment, sys.argv[1:]).go()


class _Run:
    """One call of a table's command."""

    def __init__(self, experiment: Experiment, arguments: list[str]):
        self.experiment, self.console = experiment, Console()
        self.command = command(experiment.name, arguments)
        settings = experiment.parse(arguments)
        self.record: records.Record | None = None
        if resumes(settings, experiment.presets["auto"]):
            self.folder = Path(settings.resume)
            self.record = records.Record.reopen(self.folder)
            settings = self._recorded_settings(settings)
            request_devices(settings.devices)
        else:
            request_devices(settings.devices)
            settings = experiment.check(settings)
            self.folder = records.new_folder(settings.out, f"{experiment.name}-{'-'.join(settings.act[:3])}")
        try:
            check_devices(settings.devices)
            self.data = data_lib.load(settings.dataset, settings.data_dir)
            if settings.train_size:
                self.data = data_lib.first(self.data, settings.train_size)
            self.settings = settle(settings, self.data)
            if self.record is not None and self.record.config["data"]["fingerprint"] != self.data.fingerprint:
                raise UsageError(
                    f"the run {self.folder} was begun on {self.record.config['data']['description']} with fingerprint "
                    f"{self.record.config['data']['fingerprint']}, this set has {self.data.fingerprint}; pass "
                    "its --data-dir"
                )
        except BaseException:
            if self.record is not None:
                self.record.close()
            raise
        self.cells = experiment.cells(self.settings)
        self.place = placement(self.settings)
        seeds = list(range(self.settings.seed, self.settings.seed + self.settings.seeds))
        self.groups = [seeds] if self.place.stacked else [[seed] for seed in seeds]
        self.optimizers: dict[tuple[Any, ...], optax.GradientTransformation] = {}

    def _recorded_settings(self, asked: Settings) -> Any:
        assert self.record is not None
        config = self.record.config
        if config.get("experiment") != self.experiment.name:
            self.record.close()
            raise UsageError(f"{self.folder} is a run of {config.get('experiment')}, not of {self.experiment.name}")
        kept = {"data_dir": asked.data_dir, "checkpoint_every": asked.checkpoint_every}
        try:
            values = {key: tuple(v) if isinstance(v, list) else v for key, v in config["settings"].items()}
            return type(self.experiment.presets["auto"])(**values, **kept)
        except (AttributeError, KeyError, TypeError) as error:
            self.record.close()
            raise UsageError(
                f"the settings in {self.folder}/{records.CONFIG} are damaged ({error}); start anew"
            ) from error

    def go(self) -> None:
        settings, console = self.settings, self.console
        runs = len(self.cells) * settings.seeds
        console.say(f"data     {self.data} (fingerprint {self.data.fingerprint})")
        console.say(f"device   {settings.devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
        console.say(
            f"runs     {len(self.cells)} nets x {settings.seeds} seeds, {settings.optimizer}, "
            f"batch {settings.batch_size}, {settings.epochs} epochs"
        )
        counted = self._count()
        for cell in self.cells:
            self._plan(cell)  # a schedule that does not fit is refused before anything is written
        if self.record is None:
            self.record = records.Record.create(self.folder, self._config(counted))
        checkpoints = Checkpoints(self.folder, settings.checkpoint_every)
        try:
            with Interrupts() as interrupts:
                self._train_all(checkpoints, interrupts, counted, each_epoch=runs <= _EACH_EPOCH_UP_TO)
            if settings.time_steps and not (self.folder / records.TIMES).exists():
                self._time()
        finally:
            checkpoints.close()
            self.record.close()
        self._close_with_tables()

    def _count(self) -> list[dict[str, int]]:
        shape = self.data.train_images.shape[1:]
        found: dict[tuple[Any, ...], dict[str, int]] = {}
        with self.console.progress("counting parameters", len(self.cells)) as advance:
            for cell in self.cells:
                key = self._architecture(cell)
                if key not in found:
                    build = functools.partial(self.experiment.build, self.settings, cell, self.data, 0)
                    found[key] = count(build, shape, all_of_them=self.experiment.count_costs)
                advance(1)
        return [found[self._architecture(cell)] for cell in self.cells]

    def _architecture(self, cell: Cell) -> tuple[Any, ...]:
        return tuple(cell[axis] for axis in ("act", *self.experiment.axes))

    def _config(self, counted: list[dict[str, int]]) -> dict[str, Any]:
        return {
            "experiment": self.experiment.name,
            "command": self.command,
            "settings": recorded(self.settings),
            "axes": list(self.experiment.all_axes),
            "protocol": {
                name: value for name, value in recorded(self.settings).items()
                if name not in (*NOT_PROTOCOL, *self.experiment.all_axes)
            },
            "data": self.data.identity,
            "nets": [{**cell, **count} for cell, count in zip(self.cells, counted, strict=True)],
        }  # fmt: skip

    def _train_all(
        self, checkpoints: Checkpoints, interrupts: Interrupts, counted: list[dict[str, int]], *, each_epoch: bool
    ) -> None:
        assert self.record is not None
        saved = checkpoints.position()
        position = saved or {"cell": 0, "group": 0, "lines": 0, "complete": False}
        self.record.keep(position["lines"])
        if position["complete"]:
            self.console.say(f"the run {self.folder} is complete")
            return
        last: Callable[[], training.Snapshot] | None = None
        for number, cell in enumerate(self.cells):
            if number < position["cell"]:
                continue
            self.console.say(f"network  {self.experiment.describe(self.settings, cell, counted[number])}")
            plan = self._plan(cell)
            for group, seeds in enumerate(self.groups):
                if (number, group) < (position["cell"], position["group"]):
                    continue
                models = [self.experiment.build(self.settings, cell, self.data, seed) for seed in seeds]
                loop, snapshot = training.start(models, plan)
                if saved is not None:
                    snapshot, saved = checkpoints.snapshot(snapshot), None
                here = {"cell": number, "group": group, "complete": False}
                lines = functools.partial(training.fit, loop, snapshot, self.data, plan, seeds)
                last = self._train(lines, snapshot, plan, cell, seeds, here, checkpoints, interrupts, each_epoch)
        if last is not None:
            end = {"cell": len(self.cells), "group": 0, "lines": len(self.record.lines), "complete": True}
            checkpoints.save(last(), end)

    def _train(
        self, fit: Callable[..., Iterable[Any]], snapshot: training.Snapshot, plan: training.Plan, cell: Cell,
        seeds: list[int], here: Cell, checkpoints: Checkpoints, interrupts: Interrupts, each_epoch: bool,
    ) -> Callable[[], training.Snapshot]:  # fmt: skip
        assert self.record is not None
        record = self.record
        name = f"{_named(cell, self._shown())} seed {', '.join(map(str, seeds))}"
        steps_an_epoch = -(-len(self.data.train_labels) // plan.batch_size)
        latest: list[Callable[[], training.Snapshot]] = [lambda: snapshot]

        with self.console.progress(name, plan.epochs * steps_an_epoch) as advance:
            advance((snapshot.epoch - 1) * steps_an_epoch + snapshot.step)

            def on_step(now: Callable[[], training.Snapshot], done: int) -> None:
                advance(done)
                latest[0] = now
                if interrupts.signum is not None or checkpoints.due():
                    checkpoints.save(now(), {**here, "lines": len(record.lines)})
                if interrupts.signum is not None:
                    again = shlex.join(
                        ["python", "-m", f"experiments.{self.experiment.name}", "--resume", str(self.folder)]
                    )
                    raise InterruptedRunError(interrupts.signum, f"The run is saved; resume it with: {again}")

            for lines in fit(on_step=on_step):
                for line in lines:
                    record.add({**cell, **line})
                    if each_epoch or line["epoch"] == plan.epochs or "diverged" in line:
                        self.console.say(f"{_named(cell, self._shown())} {_said(line, plan.epochs)}")
        return latest[0]

    def _shown(self) -> list[str]:
        """The axes that tell this run's nets apart."""
        axes = self.experiment.all_axes
        return [axis for axis in axes if axis == "act" or len({cell[axis] for cell in self.cells}) > 1]

    def _time(self) -> None:
        """Median seconds of a step of each net: of its first initialiser and rate, one seed, this placement."""
        assert self.record is not None
        nets = {self._architecture(cell): cell for cell in reversed(self.cells)}
        started = []
        for cell in reversed(nets.values()):
            plan = dataclasses.replace(
                self._plan(cell), place=dataclasses.replace(self.place, stacked=False, spread=False)
            )
            model = self.experiment.build(self.settings, cell, self.data, self.settings.seed)
            started.append((*training.start([model], plan), plan))
        with self.console.progress("timing", self.settings.time_steps) as advance:
            seconds = step_times(started, self.data, self.settings.time_steps, advance)
        names = ["act", *self.experiment.axes]
        lines = [
            {**{name: cell[name] for name in names}, "step_seconds": median}
            for cell, median in zip(reversed(nets.values()), seconds, strict=True)
        ]
        self.record.write_times({"steps": self.settings.time_steps, "medians": lines})

    def _plan(self, cell: Cell) -> training.Plan:
        settings = self.settings
        assert settings.epochs is not None
        assert settings.batch_size is not None
        steps = -(-len(self.data.train_labels) // settings.batch_size)
        return training.Plan(
            self._optimizer(cell, steps), settings.epochs, settings.batch_size,
            lr=cell["lr"], inputs=self.experiment.inputs(cell, self.data), shuffle=settings.shuffle,
            augment=settings.augment, place=self.place,
        )  # fmt: skip

    def _optimizer(self, cell: Cell, steps: int) -> optax.GradientTransformation:
        """The same object for nets with the same schedule: as a static argument, it lets the step compile once."""
        key = tuple(cell[axis] for axis in self.experiment.axes)
        if key not in self.optimizers:
            schedule = self.experiment.schedule(self.settings, cell, steps)
            self.optimizers[key] = OPTIMIZERS[self.settings.optimizer](schedule)
        return self.optimizers[key]

    def _close_with_tables(self) -> None:
        assert self.record is not None
        lines, axes = self.record.lines, self.experiment.all_axes
        rows = tables.summary(self.experiment.name, lines, axes)
        self.console.table(f"{self.experiment.title}, {self.data.name}. {tables.legend(rows)}", rows)
        picture = plots.accuracy_picture(lines, axes, self.folder / f"{self.experiment.name}.png", title=str(self.data))
        self.console.say(f"record   {self.folder}\npicture  {picture}")
        times = records.read_times(self.folder)
        if times:
            title = f"Median time of a training step, {times['steps']} steps of each net in turns."
            self.console.table(title, tables.time_table(times["medians"]))
        diverged = [line["diverged"] for line in lines if "diverged" in line]
        if diverged:
            runs = "" if len(diverged) == 1 else f"{len(diverged)} runs diverged; the first: "
            raise NonFiniteLossError(f"{runs}{diverged[0]}; try a smaller --lr or another --init")


def _named(cell: Cell, axes: Sequence[str]) -> str:
    return " ".join(f"{cell[axis]:g}" if isinstance(cell[axis], float) else str(cell[axis]) for axis in axes)


def _said(line: dict[str, Any], epochs: int) -> str:
    if "diverged" in line:
        return f"seed {line['seed']}  {line['diverged']}"
    return (
        f"seed {line['seed']}  epoch {line['epoch']:>3}/{epochs}  loss {line['train_loss']:.4f}  "
        f"test {line['test_accuracy']:.4f}  dead {line['dead_units']}  {line['seconds']:.1f} s"
    )
