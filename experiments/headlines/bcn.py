"""BCN: batch-channel normalisation keeps ReLU neurons away from staying deactivated, also in batches of two."""

import functools
import statistics
from typing import Any

import optax
from flax import nnx

from experiments.engine.data import Dataset, scale
from experiments.engine.training import Plan, train
from experiments.headlines.claim import Claim, Measures
from experiments.headlines.net import ConvNet, batch_norm
from linked_jax.probe import observe
from linked_jax.remedies.bcn import BatchChannelNorm
from linked_jax.remedies.weight_standardization import WSConv
from linked_jax.signal_statistics import elimination

GROUPS = 4
OPTIMIZERS = {2: optax.sgd(0.01, momentum=0.9), 32: optax.sgd(0.05, momentum=0.9)}
HEADINGS = {
    "accuracy": "accuracy",
    "active": "least active share",
    "means": "spread of means",
    "stds": "spread of deviations",
}


def norm_of(row: str, width: int, *, rngs: nnx.Rngs) -> Any:
    """The normalisation between a convolution and its activation."""
    if row.startswith("gn"):
        return nnx.GroupNorm(width, num_groups=GROUPS, epsilon=1e-5, rngs=rngs)
    if row.startswith("bn"):
        return batch_norm(width, epsilon=1e-5, rngs=rngs)
    return BatchChannelNorm(width, GROUPS, estimate="estimated" in row, rngs=rngs)


def net(row: str, seed: int) -> ConvNet:
    """The net of a row."""
    conv = functools.partial(WSConv if row.endswith("_ws") else nnx.Conv, use_bias=False)
    return ConvNet(conv=conv, norm=functools.partial(norm_of, row), rngs=nnx.Rngs(seed))


def distance(model: Any, images: Any) -> dict[str, float]:
    """Our proxy of the distance to elimination singularities, from each channel's pre-activations over all images.

    `active` is the smallest share Phi(mean / std) of positive pre-activations that a channel would have if they were
    Gaussian; means and stds are the deviations over the channels of a layer, averaged over the layers.
    """
    _, taps = observe(lambda model, x: model(x, train=False), model, scale(images))
    layers = [elimination(tap.stats) for tap in taps]
    return {
        "active": min(float(layer.least_active) for layer in layers),
        "means": statistics.fmean(float(layer.spread_of_mean) for layer in layers),
        "stds": statistics.fmean(float(layer.spread_of_std) for layer in layers),
    }


def run(row: str, seed: int, data: Dataset, epochs: int) -> Measures:
    """Train with each batch size; the test accuracy and the distance after the last epoch."""
    measured = {}
    for batch_size, optimizer in OPTIMIZERS.items():
        model, lines = train(net(row, seed), data, Plan(optimizer, epochs, batch_size), seed)
        if "diverged" not in lines[-1]:
            found = {"accuracy": lines[-1]["test_accuracy"]} | distance(model, data.test_images)
            measured |= {f"{key}_{batch_size}": value for key, value in found.items()}
    return measured


CLAIM = Claim(
    name="bcn",
    title="Batch-channel normalisation and group norm: distance to elimination singularities",
    says=(
        "group norm lets ReLU neurons come near to staying deactivated, batch norm does not, and with weight "
        "standardisation (WS) batch-channel normalisation (BCN) keeps them away and is the more accurate, also in "
        "micro batches with estimated statistics (Qiao et al., Rethinking normalization and elimination singularity in "
        "neural networks, 2019)"
    ),
    protocol=(
        "Four 3x3 convolutions of 16, 16, 32 and 32 units without biases, the third with stride 2, each with its "
        "normalisation and ReLU, then the mean over space and a dense layer; 4 groups; running statistics keep 0.9. "
        "SGD with momentum 0.9, the same rate for all rows: 0.01 at batch size 2 and 0.05 at 32. The distance is our "
        "proxy, on the test set in evaluation mode: the least active share is the smallest Phi(mean/std) of a "
        "channel's pre-activations (far from singularities: near 0.5); the spreads are deviations over channels, "
        "averaged over layers (far: near 0)."
    ),
    rows=("gn", "gn_ws", "bn", "bcn_ws", "bcn_estimated_ws"),
    measures={
        f"{key}_{batch_size}": f"{heading}, batch {batch_size}"
        for batch_size in OPTIMIZERS
        for key, heading in HEADINGS.items()
    },
    epochs=4,
    run=run,
)
