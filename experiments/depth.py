"""Table 2: a very deep, very narrow network, with each activation and its link.

    python -m experiments.depth --act relu lk_relu --dataset digits
    python -m experiments.depth --preset paper --act all

Expected, test accuracy of the last epoch, digits, 50 layers of 4 units, 30 epochs, 3 seeds: see results/README.md.
The paper (CIFAR-10, 200 epochs, best epoch, one run): relu 0.1000, lk_relu 0.2014 (later edition: 0.5667).
"""

import dataclasses
from typing import Literal

from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import settings as settings_lib
from experiments.engine.errors import run_command
from experiments.engine.experiment import Experiment
from experiments.engine.rows import Row
from experiments.engine.run import run
from experiments.engine.settings import SMALL_SET
from experiments.models.depth_net import DepthNet
from linked_jax.convolution import NARROW

_UNROLL_UP_TO = 100  # layers; beyond it, and on small sets, compile time rules and layers are scanned


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
    """A very deep, very narrow network, with each activation and its link (table 2 of the paper)."""

    depth: tuple[int, ...] = (50,)
    """One or several numbers of 3x3 layers."""
    width: int = 4
    """Units in every layer."""
    scan_layers: Literal["auto", "yes", "no"] = "auto"
    """Loop over the layers: compiles fast. auto: yes, but for <= 100 layers of > 4 units on > 10,000 images."""


PAPER = Settings(
    preset="paper", dataset="cifar10", init=("glorot",), epochs=200, batch_size=32, lr=(1e-3,), decay=1e-6,
    shuffle=False, seed=100,
)  # fmt: skip


def learning_rate(_settings: Settings, cell: settings_lib.Cell) -> float:
    """1e-3 up to 50 layers and 0.05 / depth beyond: the usable rate falls about as 1 / depth."""
    return 1e-3 * min(1.0, 50 / cell["depth"])


def build(settings: Settings, cell: settings_lib.Cell, data: data_lib.Dataset, seed: int) -> DepthNet:
    """The network of one run."""
    narrow = 2 * settings.width**2 <= NARROW  # linked layers that are products on a CPU, as fast within a loop
    scan = narrow or cell["depth"] > _UNROLL_UP_TO or len(data.train_labels) <= SMALL_SET
    return DepthNet(
        data.train_images.shape[1:], data.classes, Row.parse(cell["act"]), cell["init"], depth=cell["depth"],
        width=settings.width, unroll=not {"auto": scan, "yes": True, "no": False}[settings.scan_layers],
        rngs=nnx.Rngs(seed),
    )  # fmt: skip


TABLE = Experiment(
    name="depth",
    title="Table 2: many narrow layers",
    presets={"auto": Settings(), "quick": Settings(preset="quick", dataset="digits"), "paper": PAPER},
    rows=(
        "relu", "lk_relu", "relu_sqrt2", "prelu", "lk_prelu", "prelu_sqrt2", "selu", "lk_selu", "selu_sqrt2", "swish",
        "lk_swish", "swish_sqrt2", "relu_bn",
    ),
    build=build,
    axes=("depth",),
    learning_rate=learning_rate,
)  # fmt: skip

if __name__ == "__main__":
    run_command(lambda: run(TABLE))
