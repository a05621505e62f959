"""Several seeds: one after another, in one vmapped program, or spread over devices.

    python -m benchmarks.seeds --devices 2

The net of table 2 on digits. Times are of one training step of all seeds, the median of rounds in which the ways take
turns, relative to one after another. This is the measurement behind `--seeds-mode auto`; measure on your platform.
"""

import dataclasses

import jax
import numpy as np

from benchmarks import turns
from experiments import depth
from experiments.engine import data as data_lib
from experiments.engine import loop, training
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.optimizers import adam
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


class Way:
    """One way to make a step of all seeds."""

    def __init__(self, settings: Settings, place: Placement, data: data_lib.Dataset):
        net = depth.Settings(width=settings.width)
        cell = {"act": "lk_relu", "init": "auto", "depth": settings.depth}
        models = [depth.build(net, cell, data, seed) for seed in range(settings.seeds)]
        plan = training.Plan(adam(1e-3), epochs=1, batch_size=settings.batch_size, place=place)
        groups = [models] if place.stacked else [[model] for model in models]
        started = [training.start(group, plan) for group in groups]
        self.loop = started[0][0]
        self.carries = [snapshot.arrays for _, snapshot in started]
        self.data, self.lr = plan.arrays(data)
        index = np.arange(settings.batch_size, dtype=np.int32)
        self.batch = place.batch(np.tile(index, (settings.seeds, 1)) if place.stacked else index)
        keys = jax.random.split(jax.random.key(0), settings.seeds) if place.stacked else jax.random.key(0)
        self.key = place.of_seeds(keys)

    def step(self) -> None:
        """One step of all seeds."""
        for number, carry in enumerate(self.carries):
            carry, loss = loop.step(self.loop, carry, self.data, self.batch, self.key, np.int32(0), self.lr)
            self.carries[number] = carry
            jax.block_until_ready(loss)


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
    ways = {
        mode: Way(
            settings, placement(depth.Settings(seeds=settings.seeds, seeds_mode=mode, devices=devices[mode])), data
        )
        for mode in modes
    }
    medians = turns.medians({mode: way.step for mode, way in ways.items()}, settings.rounds, console, "steps")
    rows = [
        {"seeds": mode, "devices": str(devices[mode]), "step time": f"{median / medians['sequential']:.2f}"}
        for mode, median in medians.items()
    ]
    title = (
        f"{settings.seeds} seeds of {settings.depth} layers on {jax.devices()[0].device_kind}, relative to sequential:"
    )
    console.table(title, rows)
    turns.save(settings, "seeds", medians)


if __name__ == "__main__":
    run_command(main)
