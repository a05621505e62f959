"""Table 4: All-CNN with each activation and its link; the paper's step schedule, and a fixed rate.

    python -m experiments.allcnn --preset quick --act all --seeds 3
    python -m experiments.allcnn --preset paper --act all --lr 0.01 0.001 --schedule step fixed

Expected: see results/README.md. The paper (CIFAR-10, 3,000 epochs, best epoch, one run): relu 0.3170, lk_relu 0.8674
(later edition: 0.9301, 0.9468).
"""

import dataclasses
from typing import Literal

import optax
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import settings as settings_lib
from experiments.engine.errors import UsageError, run_command
from experiments.engine.experiment import Experiment
from experiments.engine.rows import Row
from experiments.engine.run import run
from experiments.models.allcnn_net import AllCNN
from linked_jax import inverse_time_decay

EPOCHS = 3000
FACTORS = {0: 1.0, 500: 0.75, 2000: 0.5, 2350: 0.1, 2750: 0.05}
"""Of the learning rate, by the epoch of 3000 from which they hold (the paper's section on All-CNN)."""


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
    """All-CNN with each activation and its link (table 4 of the paper)."""

    act: tuple[str, ...] = ("relu", "lk_relu")
    """One or several rows, such as relu, lk_relu, relu_sqrt2, relu_bn; all: the paper's eight."""
    width: int = 96
    """Units of the first three convs; the others have twice as many."""
    dropout: float = 0.5
    """The rate after each strided conv."""
    schedule: tuple[Literal["step", "fixed"], ...] = ("step",)
    """step: factors 1, 0.75, 0.5, 0.1, 0.05 of the rate, from the paper's fractions of training. fixed: none."""
    optimizer: Literal["adam", "rmsprop", "sgd", "nesterov"] = "nesterov"
    """With Keras' update rules; nesterov has momentum 0.9."""
    decay: float = 1e-6
    """Keras' decay: the rate of update t is lr / (1 + decay * t)."""
    augment: bool = True
    """Flip images at random and shift them by up to 10 %."""


QUICK = Settings(preset="quick", dataset="digits", width=24, augment=False)
"""A quarter of the width; digits do not look the same flipped."""
PAPER = Settings(preset="paper", dataset="cifar10", init=("glorot",), epochs=3000, batch_size=32, lr=(0.01,), seed=100)
"""The authors' lk_relu ran with batches of 128; some rows of the paper have a rate of 0.001: --lr 0.001."""


def build(settings: Settings, cell: settings_lib.Cell, data: data_lib.Dataset, seed: int) -> AllCNN:
    """The network of one run."""
    if not 0 <= settings.dropout < 1:
        raise UsageError(f"--dropout is at least 0 and below 1, got {settings.dropout}; the paper's is 0.5")
    return AllCNN(
        data.train_images.shape[-1], data.classes, Row.parse(cell["act"]), cell["init"], width=settings.width,
        dropout=settings.dropout, rngs=nnx.Rngs(seed),
    )  # fmt: skip


def schedule(settings: Settings, cell: settings_lib.Cell, steps_per_epoch: int) -> optax.Schedule:
    """The rate's factor by update: the paper's steps or none, times Keras' decay."""
    decay = inverse_time_decay(1.0, settings.decay)
    if cell["schedule"] == "fixed":
        return decay
    assert settings.epochs is not None
    steps = step_factors(settings.epochs * steps_per_epoch)
    return lambda count: steps(count) * decay(count)


def step_factors(updates: int) -> optax.Schedule:
    """The paper's five steps, stretched over a run of that many optimiser updates.

    Update `count` takes the factor that the paper has at the same fraction of training, so a step begins with the
    update ceil(epoch * updates / 3000). With a number of epochs that is no multiple of 60 a step may begin within an
    epoch, which keeps all five steps in short runs.

    >>> [float(step_factors(60)(count)) for count in (0, 9, 10, 39, 40)]
    [1.0, 1.0, 0.75, 0.75, 0.5]
    """
    boundaries = [-(-epoch * updates // EPOCHS) for epoch in FACTORS]  # ceil, in integers
    if boundaries[-1] >= updates:
        raise UsageError(
            f"--schedule step: the five steps need at least 12 updates, got {updates}; train for longer, or pass "
            "--schedule fixed"
        )
    return optax.join_schedules([optax.constant_schedule(factor) for factor in FACTORS.values()], boundaries[1:])


TABLE = Experiment(
    name="allcnn",
    title="Table 4: All-CNN",
    presets={"auto": Settings(), "quick": QUICK, "paper": PAPER},
    rows=("relu", "lk_relu", "prelu", "lk_prelu", "selu", "lk_selu", "swish", "lk_swish"),
    build=build,
    axes=("schedule",),
    learning_rate=lambda _settings, _cell: 0.01,
    schedule=schedule,
)

if __name__ == "__main__":
    run_command(lambda: run(TABLE))
