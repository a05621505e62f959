"""IC: batch norm with a little dropout before the weights trains better than batch norm before the activation."""

import functools

import optax
from flax import nnx

from experiments.engine.data import Dataset
from experiments.engine.training import Plan, train
from experiments.headlines.claim import Claim, Measures, early_and_last, early_and_last_headings
from experiments.headlines.net import ConvNet, batch_norm
from linked_jax.remedies.ic import IndependentComponent

DROPOUT = {"ic": 0.05, "ic_no_dropout": 0.0}
OPTIMIZERS = {rate: optax.sgd(rate, momentum=0.9) for rate in (0.02, 0.1)}


def net(row: str, seed: int) -> ConvNet:
    """bn: conv, batch norm, relu. ic: relu, IC, and then the next conv or the dense layer."""
    norm = batch_norm if row == "bn" else None
    ic = functools.partial(IndependentComponent, rate=DROPOUT[row], momentum=0.9) if row in DROPOUT else None
    return ConvNet(norm=norm, after=ic, rngs=nnx.Rngs(seed))


def run(row: str, seed: int, data: Dataset, epochs: int) -> Measures:
    """Train at each rate; the test accuracy after few epochs and after the last."""
    measured = {}
    for rate, optimizer in OPTIMIZERS.items():
        _, lines = train(net(row, seed), data, Plan(optimizer, epochs, 64), seed)
        measured |= early_and_last(lines, epochs, f"_{rate}")
    return measured


CLAIM = Claim(
    name="ic",
    title="The independent-component layer before the weights, and batch norm before the activation",
    says=(
        "batch norm with dropout as one layer before the weights trains faster and ends better than batch norm before "
        "the activation (Chen et al., Rethinking the usage of batch normalization and dropout in the training of deep "
        "neural networks, 2019)"
    ),
    protocol=(
        "Four 3x3 convolutions of 16, 16, 32 and 32 units, the third with stride 2, each with ReLU, then the mean over "
        "space and a dense layer. none: no normalisation; bn: batch norm before each ReLU; ic: batch norm and dropout "
        "of rate 0.05 after each ReLU; ic_no_dropout: the same at rate 0. Running statistics keep 0.9. Batches of 64; "
        "SGD with momentum 0.9 at two rates, 0.02 and 0.1, both reported for all rows."
    ),
    rows=("none", "bn", "ic", "ic_no_dropout"),
    measures=early_and_last_headings(tuple(OPTIMIZERS)),
    epochs=15,
    run=run,
)
