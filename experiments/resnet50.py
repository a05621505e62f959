"""Tables 5 and 6: a scaled ResNet-50 with each activation and its link, with batch norm and without; and its time.

    python -m experiments.resnet50 --preset quick --act lk_relu selu lk_selu --norm none --seeds 3
    python -m experiments.resnet50 --preset quick --act lk_relu lk_relu_bn selu selu_bn --time-steps 50
    python -m experiments.resnet50 --preset paper --act all

Expected: see results/README.md. The paper (CIFAR-10, 2,000 epochs, best epoch, one run): lk_relu with batch norm
0.7176, without 0.7656, which took 1 / 2.30 of the time (later edition: 0.9027, 0.9048, 1 / 2.09).
"""

import dataclasses

from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import settings as settings_lib
from experiments.engine.errors import UsageError, run_command
from experiments.engine.experiment import Experiment
from experiments.engine.rows import Row
from experiments.engine.run import run
from experiments.models.resnet50_net import LinkWhere, ResNet50


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
    """A scaled ResNet-50 with batch norm and without (tables 5 and 6 of the paper)."""

    act: tuple[str, ...] = ("lk_relu", "lk_relu_bn")
    """One or several rows, such as relu, lk_relu, lk_relu_bn (batch norm); all: the paper's eight, with and without."""
    link: tuple[LinkWhere, ...] = ("inside",)
    """One or several. inside: the two activations in a bottleneck, as the authors did. everywhere: all of them."""
    augment: bool = True
    """Flip images at random and shift them by up to 10 %."""


QUICK = Settings(preset="quick", dataset="digits", epochs=15, augment=False)
"""Digits do not look the same flipped."""
PAPER = Settings(
    preset="paper", dataset="cifar10", init=("glorot",), epochs=2000, batch_size=128, lr=(1e-3,), decay=1e-6, seed=100
)


def build(_settings: Settings, cell: settings_lib.Cell, data: data_lib.Dataset, seed: int) -> ResNet50:
    """The network of one run."""
    row = Row.parse(cell["act"])
    if row.sqrt2:
        raise UsageError(f"--act {cell['act']}: the ResNet has fixed widths; leave _sqrt2 out")
    shape = data.train_images.shape[1:]
    return ResNet50(shape, data.classes, row, cell["init"], link=cell["link"], rngs=nnx.Rngs(seed))


_ACTS = ("relu", "lk_relu", "prelu", "lk_prelu", "selu", "lk_selu", "swish", "lk_swish")
TABLE = Experiment(
    name="resnet50",
    title="Tables 5 and 6: ResNet-50",
    presets={"auto": Settings(), "quick": QUICK, "paper": PAPER},
    rows=(*(f"{act}_bn" for act in _ACTS), *_ACTS),
    build=build,
    axes=("link",),
)

if __name__ == "__main__":
    run_command(lambda: run(TABLE))
