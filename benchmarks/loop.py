"""The training loop: an epoch as one program, or one jitted update a call.

    python -m benchmarks.loop

Nets of table 2 (10 layers) and of table 4 on digits. Times are of a block of updates, the median of rounds in which the
ways take turns, relative to one update a call. This is the measurement behind `Loop.scanned`; measure on your platform.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks import turns
from benchmarks.steps import Step
from experiments import allcnn, depth
from experiments.engine import data as data_lib
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from experiments.engine.loop import advance

_BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Time of some updates, as one program and one by one."""

    updates: int = 20
    """In a block."""


class Way(Step):
    """One way to make a block of updates of a net."""

    def __init__(self, model: Any, data: data_lib.Dataset, updates: int, *, scanned: bool):
        super().__init__([model], data, _BATCH_SIZE)
        self.loop = dataclasses.replace(self.loop, scanned=scanned)
        self.batches = np.arange(updates * _BATCH_SIZE, dtype=np.int32).reshape(updates, -1) % len(data.train_labels)

    def block(self) -> Any:
        """The updates; their losses."""
        self.carry, losses = advance(self.loop, self.carry, self.data, self.batches, self.key, lr=self.lr)
        return losses


def main() -> None:
    """Measure, print the ratios, and write the record."""
    settings = turns.parse(Settings, "loop")
    console, data = Console(), data_lib.load("digits")
    unrolled = depth.Settings(scan_layers="no")
    nets = {
        "depth": depth.build(unrolled, {"act": "lk_relu", "init": "auto", "depth": 10}, data, 0),
        "allcnn": allcnn.build(allcnn.QUICK, {"act": "lk_relu", "init": "auto", "schedule": "fixed"}, data, 0),
    }
    results = {}
    for name, model in nets.items():
        ways = {"calls": False, "one program": True}
        blocks = {way: Way(model, data, settings.updates, scanned=scanned).block for way, scanned in ways.items()}
        results[name] = turns.medians(blocks, settings.rounds, console, name)
    rows = [
        {"net": name, "one program": f"{found['one program'] / found['calls']:.2f}"} for name, found in results.items()
    ]
    console.table(f"{settings.updates} updates on {jax.devices()[0].device_kind}, relative to one a call:", rows)
    turns.save(settings, "loop", results)


if __name__ == "__main__":
    run_command(main)
