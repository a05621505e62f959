"""Table 3: is it the link, or its parameters? Single, widened by sqrt(2), and linked, in a four-conv network.

    python -m experiments.parameters --preset quick --seeds 3
    python -m experiments.parameters --preset paper

The paper matched parameters only; this prints FLOPs and activation memory of each net beside them.

Expected: see results/README.md. The paper (CIFAR-10, best epoch, one run): relu 0.7232, relu_sqrt2 0.7394, lk_relu
0.7360 (later edition: 0.7337, 0.7581, 0.7696).
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
from experiments.models.parameters_net import ParametersNet


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
    """Single, widened by sqrt(2), and linked nets of four convs (table 3 of the paper)."""

    act: tuple[str, ...] = ("all",)
    """One or several rows, such as relu, lk_relu, relu_sqrt2, relu_bn; all: the paper's twelve."""
    optimizer: Literal["adam", "rmsprop", "sgd", "nesterov"] = "rmsprop"
    """With Keras' update rules."""


PAPER = Settings(
    preset="paper", dataset="cifar10", init=("glorot_normal",), epochs=200, batch_size=32, lr=(1e-4,), decay=1e-6,
    shuffle=False, seed=100,
)  # fmt: skip


def build(_settings: Settings, cell: settings_lib.Cell, data: data_lib.Dataset, seed: int) -> ParametersNet:
    """The network of one run."""
    shape, row = data.train_images.shape[1:], Row.parse(cell["act"])
    return ParametersNet(shape, data.classes, row, cell["init"], rngs=nnx.Rngs(seed))


TABLE = Experiment(
    name="parameters",
    title="Table 3: single, sqrt(2) and linked",
    presets={"auto": Settings(), "quick": Settings(preset="quick", dataset="digits"), "paper": PAPER},
    rows=(
        "relu", "relu_sqrt2", "lk_relu", "prelu", "prelu_sqrt2", "lk_prelu", "selu", "selu_sqrt2", "lk_selu", "swish",
        "swish_sqrt2", "lk_swish",
    ),
    build=build,
    learning_rate=lambda _settings, _cell: 1e-4,
    count_costs=True,
)  # fmt: skip

if __name__ == "__main__":
    run_command(lambda: run(TABLE))
