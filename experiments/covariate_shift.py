"""The paper's claim about inputs: linked nets need no standardised input. The same nets on inputs that are shifted.

    python -m experiments.covariate_shift --preset quick --seeds 3

The paper has no table for this, so the protocol is ours: the network of table 2 with 10 layers of 8 units, on
pixels divided by 255 (unit), standardised per channel, raw (0 to 255), standardised plus 10 (offset), and standardised
times 100 and 0.01; with batch norm and without.

Expected: see results/README.md.
"""

import dataclasses
from typing import Literal

import numpy as np

from experiments import depth
from experiments.engine import data as data_lib
from experiments.engine.errors import run_command
from experiments.engine.experiment import Experiment
from experiments.engine.run import run
from experiments.engine.settings import Cell

Inputs = Literal["unit", "standardised", "raw", "offset", "x100", "x0.01"]
_OFFSET = 10.0  # standard deviations


@dataclasses.dataclass(frozen=True)
class Settings(depth.Settings):
    """The same nets on standardised, raw, shifted and scaled inputs."""

    act: tuple[str, ...] = ("all",)
    """One or several rows, such as relu, lk_relu, relu_sqrt2, relu_bn; all: six, with batch norm and without."""
    inputs: tuple[Inputs, ...] = ("unit", "standardised", "raw", "offset", "x100", "x0.01")
    """One or several. unit: pixels / 255. raw: pixels. offset, x100, x0.01: standardised + 10, * 100, * 0.01."""
    depth: tuple[int, ...] = (10,)
    """One or several numbers of 3x3 layers."""
    width: int = 8
    """Units in every layer."""


def inputs(cell: Cell, data: data_lib.Dataset) -> data_lib.Affine:
    """The factor and the offset for pixels / 255, from the training set's mean and deviation of each channel."""
    if cell["inputs"] == "unit":
        return data_lib.UNIT
    if cell["inputs"] == "raw":
        return np.float32(255), np.float32(0)  # pyright: ignore[reportReturnType]
    pixels = np.asarray(data.train_images, np.float64) / 255
    mean, deviation = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))
    scale = {"standardised": 1.0, "offset": 1.0, "x100": 100.0, "x0.01": 0.01}[cell["inputs"]]
    factor, offset = scale / deviation, -scale * mean / deviation + _OFFSET * (cell["inputs"] == "offset")
    return factor.astype(np.float32), offset.astype(np.float32)  # pyright: ignore[reportReturnType]


PAPER = Settings(
    preset="paper", dataset="cifar10", init=("glorot",), epochs=200, batch_size=32, lr=(1e-3,), decay=1e-6, seed=100
)
_ACTS = ("relu", "lk_relu", "selu", "lk_selu", "swish", "lk_swish")
TABLE = Experiment(
    name="covariate_shift",
    title="Inputs that are not standardised",
    presets={"auto": Settings(), "quick": Settings(preset="quick", dataset="digits"), "paper": PAPER},
    rows=(*_ACTS, *(f"{act}_bn" for act in _ACTS)),
    build=depth.build,
    axes=("inputs", "depth"),
    learning_rate=depth.learning_rate,
    inputs=inputs,
)

if __name__ == "__main__":
    run_command(lambda: run(TABLE))
