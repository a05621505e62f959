"""Table 1: one conv layer, narrow and wide, with each activation and its link.

    python -m experiments.width --preset quick --seeds 3
    python -m experiments.width --preset paper

Expected: see results/README.md. The paper (CIFAR-10, best epoch, one run), 50 units: relu 0.5706, lk_relu 0.5707;
400 units: relu 0.5934, lk_relu 0.5863 (later edition: 0.6154, 0.6165).
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
from experiments.models.width_net import WidthNet


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
    """One conv layer, narrow and wide, with each activation and its link (table 1 of the paper)."""

    act: tuple[str, ...] = ("all",)
    """One or several rows, such as relu, lk_relu, relu_sqrt2, relu_bn; all: the paper's eight."""
    width: tuple[int, ...] = (50, 400)
    """One or several numbers of units."""
    optimizer: Literal["adam", "rmsprop", "sgd", "nesterov"] = "sgd"
    """With Keras' update rules."""


PAPER = Settings(
    preset="paper", dataset="cifar10", init=("glorot",), epochs=50, batch_size=32, lr=(0.01,), shuffle=False, seed=100
)
"""The paper says 50 epochs, its authors' script 200."""


def build(_settings: Settings, cell: settings_lib.Cell, data: data_lib.Dataset, seed: int) -> WidthNet:
    """The network of one run."""
    shape, row = data.train_images.shape[1:], Row.parse(cell["act"])
    return WidthNet(shape, data.classes, row, cell["init"], width=cell["width"], rngs=nnx.Rngs(seed))


TABLE = Experiment(
    name="width",
    title="Table 1: one layer, narrow and wide",
    presets={"auto": Settings(), "quick": Settings(preset="quick", dataset="digits"), "paper": PAPER},
    rows=("relu", "lk_relu", "prelu", "lk_prelu", "selu", "lk_selu", "swish", "lk_swish"),
    build=build,
    axes=("width",),
    learning_rate=lambda _settings, _cell: 0.01,
)

if __name__ == "__main__":
    run_command(lambda: run(TABLE))
