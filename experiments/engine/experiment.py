"""A table of the paper, as data: its nets, its presets, and how they are trained. `run.py` runs it."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import tables
from experiments.engine.checks import command_line
from experiments.engine.settings import AXES, Cell, Settings, check
from linked_jax import inverse_time_decay


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table."""

    name: str  # of its module
    title: str
    presets: Mapping[str, Any]  # auto, quick and paper
    rows: tuple[str, ...]  # what --act all means
    build: Callable[[Any, Cell, data_lib.Dataset, int], nnx.Module]  # settings, cell, data, seed -> the model
    axes: tuple[str, ...] = ()  # its own options whose values are combined, beside act, init and lr
    learning_rate: Callable[[Any, Cell], float] = lambda _settings, _cell: 1e-3  # where --lr does not say
    schedule: Callable[[Any, Cell, int], optax.Schedule] = lambda settings, _cell, _steps: inverse_time_decay(
        1.0, settings.decay
    )  # settings, cell, updates an epoch -> the rate's factor by update, from 0
    inputs: Callable[[Cell, data_lib.Dataset], data_lib.Affine] = lambda _cell, _data: data_lib.UNIT  # of pixels
    count_costs: bool = False  # print FLOPs and activation memory beside the parameters

    @property
    def all_axes(self) -> tuple[str, ...]:
        """What tells the nets of this table apart."""
        return (AXES[0], *self.axes, *AXES[1:])

    def parse(self, arguments: Sequence[str], before: Sequence[str] = ()) -> Any:
        """The settings of a command line: the preset's, where no option says otherwise. See `command_line`."""
        prog = f"python -m experiments.{self.name}"
        preset = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
        preset.add_argument("--preset", choices=sorted(self.presets), default="auto")
        default = self.presets[preset.parse_known_args([*before, *arguments])[0].preset]
        return command_line(type(default), prog, arguments, before=before, default=default)

    def check(self, settings: Any) -> Any:
        """Refuse what cannot run, see `settings.check`."""
        return check(settings, self.rows, self.axes)

    def cells(self, settings: Settings) -> list[Cell]:
        """The nets: every combination of the axes' values."""
        names = (AXES[0], *self.axes, "init")
        found = []
        for values in itertools.product(*(getattr(settings, name) for name in names)):
            cell = dict(zip(names, values, strict=True))
            found.extend({**cell, "lr": lr} for lr in settings.lr or (self.learning_rate(settings, cell),))
        return list({tuple(cell.values()): cell for cell in found}.values())

    def describe(self, settings: Settings, cell: Cell, counted: Mapping[str, int]) -> str:
        """One line on a net."""
        own = ", ".join(f"{tables.HEADINGS.get(axis, axis)} {cell[axis]}" for axis in self.axes)
        costs = f"{counted['parameters']:,} parameters"
        if "flops" in counted:
            costs += f", {counted['flops'] / 1e6:.3g} MFLOP and {counted['activation_bytes'] / 1024:.4g} KiB an image"
        return f"{cell['act']}, {own + ', ' if own else ''}{costs}, init {cell['init']}, learning rate {cell['lr']:g}"
