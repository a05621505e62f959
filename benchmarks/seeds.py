"""Several seeds: one after another, in one vmapped program, or spread over devices.

    python -m benchmarks.seeds --devices 2

The net of table 2 on digits. Times are of one training step of all seeds, the median of rounds in which the ways take
turns, relative to one after another. This is the measurement behind `--seeds-mode auto`; measure on your platform.
"""

import dataclasses
from collections.abc import Callable

import jax

from benchmarks import turns
from benchmarks.steps import Step
from experiments import depth
from experiments.engine import data as data_lib
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.parallel import Placement, check_devices, placement, request_devices
from experiments.engine.settings import SeedsMode

_MODES: tuple[SeedsMode, ...] = ("sequential", "vmap", "spread")


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Time of a training step of several seeds, run in three ways."""

    depth: int = 50
    """3x3 layers."""
    width: int = 4
    """Units in every layer."""
    batch_size: int = 128
    """Images."""
    seeds: int = 4
    """Nets to train."""
    devices: int = 1
    """Devices to spread over; on a CPU they are virtual. With 1, nothing is spread."""


def step_of_all(settings: Settings, place: Placement, data: data_lib.Dataset) -> Callable[[], None]:
    """A step of all seeds, to be taken in one way."""
    net, cell = depth.Settings(width=settings.width), {"act": "lk_relu", "init": "auto", "depth": settings.depth}
    models = [depth.build(net, cell, data, seed) for seed in range(settings.seeds)]
    groups = [models] if place.stacked else [[model] for model in models]
    steps = [Step(group, data, settings.batch_size, place) for group in groups]

    def take() -> None:
        for step in steps:
            jax.block_until_ready(step.take())

    return take


def main() -> None:
    """Measure, print the ratios, and write the record."""
    settings = turns.parse(Settings, "seeds")
    if settings.seeds < 2 or settings.seeds % settings.devices:
        raise UsageError(f"--seeds is at least 2 and a multiple of --devices, got {settings.seeds}; try --seeds 4")
    request_devices(settings.devices)
    check_devices(settings.devices)
    console, data = Console(), data_lib.load("digits")
    modes = _MODES if settings.devices > 1 else _MODES[:2]
    devices = {mode: settings.devices if mode == "spread" else 1 for mode in modes}
    ways = {}
    for mode in modes:
        place = placement(depth.Settings(seeds=settings.seeds, seeds_mode=mode, devices=devices[mode]))
        ways[mode] = step_of_all(settings, place, data)
    medians = turns.medians(ways, settings.rounds, console, "steps")
    rows = [
        {"seeds": mode, "devices": str(devices[mode]), "step time": f"{median / medians['sequential']:.2f}"}
        for mode, median in medians.items()
    ]
    nets, device = f"{settings.seeds} seeds of {settings.depth} layers", jax.devices()[0].device_kind
    console.table(f"{nets} on {device}, relative to sequential:", rows)
    turns.save(settings, "seeds", medians)


if __name__ == "__main__":
    run_command(main)
