"""Several seeds: one after another, in one vmapped program, or spread over devices.

    python -m benchmarks.seeds --devices 2

The net of table 2 on digits. Times are of one training step of all seeds, the median of rounds in which the ways take
turns, relative to one after another. This is the measurement behind `--seeds-mode auto`; measure on your platform.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments import depth
from experiments.engine import data as data_lib
from experiments.engine import records, training
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.optimizers import adam
from experiments.engine.parallel import Placement, check_devices, placement, request_devices
from experiments.engine.settings import SeedsMode

_WARM_UP = 2  # rounds; the first one compiles
_MODES: tuple[SeedsMode, ...] = ("sequential", "vmap", "spread")


@dataclasses.dataclass(frozen=True)
class Settings:
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
    rounds: int = 20
    """Timed steps of each way."""
    out: Path | None = None
    """A JSON file for the record."""


class Way:
    """One way to make a step of all seeds."""

    def __init__(self, settings: Settings, place: Placement, data: data_lib.Dataset):
        net = depth.Settings(width=settings.width)
        cell = {"act": "lk_relu", "init": "auto", "depth": settings.depth}
        models = [depth.build(net, cell, data, seed) for seed in range(settings.seeds)]
        self.plan = training.Plan(adam(1e-3), epochs=1, batch_size=settings.batch_size, place=place)
        groups = [models] if place.stacked else [[model] for model in models]
        started = [training.start(group, self.plan) for group in groups]
        self.graph = started[0][0]
        self.carries = [moment.arrays for _, moment in started]
        index = np.arange(settings.batch_size, dtype=np.int32)
        keys = jax.random.split(jax.random.key(0), settings.seeds) if place.stacked else jax.random.key(0)
        self.rest: tuple[Any, ...] = (
            *place.shared((data.train_images, data.train_labels)),
            *place.shared((self.plan.inputs, np.float32(1))),
            place.batch(np.tile(index, (settings.seeds, 1)) if place.stacked else index),
            place.of_seeds(keys),
            np.int32(0),
        )

    def step(self) -> float:
        """Seconds of one step of all seeds."""
        begin = time.perf_counter()
        for number, carry in enumerate(self.carries):
            carry, loss = training.step(self.plan.place, self.graph, self.plan.optimizer, False, carry, *self.rest)
            self.carries[number] = carry
            jax.block_until_ready(loss)
        return time.perf_counter() - begin


def main() -> None:
    """Measure, print the ratios, and write the record."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.seeds")
    for option, value in dataclasses.asdict(settings).items():
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} is at least 1, got {value}")
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
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    with console.progress("steps", settings.rounds + _WARM_UP) as advance:
        for done in range(settings.rounds + _WARM_UP):
            for mode, way in ways.items():
                taken = way.step()
                if done >= _WARM_UP:
                    seconds[mode].append(taken)
            advance(1)
    medians = {mode: statistics.median(times) for mode, times in seconds.items()}
    rows = [
        {"seeds": mode, "devices": str(devices[mode]), "step time": f"{median / medians['sequential']:.2f}"}
        for mode, median in medians.items()
    ]
    title = (
        f"{settings.seeds} seeds of {settings.depth} layers on {jax.devices()[0].device_kind}, relative to sequential:"
    )
    console.table(title, rows)
    if settings.out:
        config = {key: value for key, value in dataclasses.asdict(settings).items() if key != "out"}
        record = {"benchmark": "seeds", "settings": config, "results": medians, **records.environment()}
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
