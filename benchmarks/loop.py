"""The training loop: an epoch as one program, or one jitted update a call; and what the loop costs around its updates.

    python -m benchmarks.loop

Nets of table 2 (10 layers) and of table 4 on digits. Times are of a block of updates, the median of rounds in which the
ways take turns, relative to one update a call. This is the measurement behind `Loop.scanned`; measure on your platform.

The loop's own cost is that of `training.train`, which draws orders, watches losses, offers snapshots and tests (here on
one image), relative to the same updates called one after the other: table 2 (50 layers), epochs of 44 updates, on the
digits' 8x8 pixels and on 32x32x3. The longer an update and an epoch, the less it is. Goal: 1.03.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks import turns
from benchmarks.steps import Step, noise
from experiments import allcnn, depth
from experiments.engine import data as data_lib
from experiments.engine import training
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from experiments.engine.loop import advance, step

_BATCH_SIZE, _EPOCHS = 32, 5


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


class Epochs(Step):
    """Some epochs, by their updates alone and as the experiments run them."""

    def __init__(self, model: Any, data: data_lib.Dataset):
        size = len(data.train_labels) // _BATCH_SIZE * _BATCH_SIZE  # no batch is smaller than the others
        one_test = {"test_images": data.test_images[:1], "test_labels": data.test_labels[:1]}
        self.set = dataclasses.replace(data_lib.first(data, size), **one_test)
        super().__init__([model], self.set, _BATCH_SIZE)
        self.model, self.plan = model, dataclasses.replace(self.plan, epochs=_EPOCHS)
        self.batches = np.arange(size, dtype=np.int32).reshape(-1, _BATCH_SIZE)

    def updates(self) -> Any:
        """One call after the other; their losses."""
        losses = []
        for number, batch in enumerate([*self.batches] * _EPOCHS):
            self.carry, loss = step(self.loop, self.carry, self.data, batch, self.key, np.int32(number), self.lr)
            losses.append(loss)
        return losses

    def train(self) -> Any:
        """What the experiments do; its lines."""
        return training.train(self.model, self.set, self.plan, 0)[1]


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
    device = jax.devices()[0].device_kind
    rows = [
        {"net": name, "one program": f"{found['one program'] / found['calls']:.2f}"} for name, found in results.items()
    ]
    console.table(f"{settings.updates} updates on {device}, relative to one a call:", rows)
    for images, of_images in {"8x8": data, "32x32x3": noise(32, 3, len(data.train_labels))}.items():
        net = depth.build(depth.Settings(), {"act": "lk_relu", "init": "auto", "depth": 50}, of_images, 0)
        epochs = Epochs(net, of_images)
        ways = {"updates": epochs.updates, "train": epochs.train}
        found = results[f"epochs of {images}"] = turns.medians(ways, settings.rounds, console, f"epochs of {images}")
        ratio = found["train"] / found["updates"]
        console.say(f"{_EPOCHS} epochs of {images}, relative to their updates alone: {ratio:.3f}")
    turns.save(settings, "loop", results)


if __name__ == "__main__":
    run_command(main)
