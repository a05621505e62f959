"""BCN: batch-channel normalisation keeps ReLU neurons away from staying deactivated, also in batches of two."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.engine.data import Dataset, scale
from experiments.headlines.claim import Claim, Measures, train
from linked_jax import relu
from linked_jax.remedies.bcn import BatchChannelNorm
from linked_jax.remedies.weight_standardization import WSConv

WIDTHS = (16, 16, 32, 32)
GROUPS = 4
OPTIMIZERS = {2: optax.sgd(0.01, momentum=0.9), 32: optax.sgd(0.05, momentum=0.9)}


def norm_of(row: str, width: int, rngs: nnx.Rngs) -> Any:
    """The normalisation between a convolution and its activation."""
    if row.startswith("gn"):
        return nnx.GroupNorm(width, num_groups=GROUPS, epsilon=1e-5, rngs=rngs)
    if row.startswith("bn"):
        return nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs)
    return BatchChannelNorm(width, GROUPS, estimate="estimated" in row, rngs=rngs)


class Net(nnx.Module):
    """Four times conv 3x3, norm, relu, with stride 2 in the third; the mean over space; a dense layer."""

    def __init__(self, row: str, rngs: nnx.Rngs):
        convs, norms, features = [], [], 1
        for number, width in enumerate(WIDTHS):
            conv = WSConv if row.endswith("_ws") else nnx.Conv
            convs.append(conv(features, width, (3, 3), strides=1 + (number == 2), use_bias=False, rngs=rngs))
            norms.append(norm_of(row, width, rngs))
            features = width
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.dense = nnx.Linear(features, 10, rngs=rngs)

    def __call__(
        self, images: Any, train: bool = False, tap: Callable[..., Any] | None = None
    ) -> tuple[Any, list[Any]]:
        """Images (N, H, W, 1) -> logits (N, 10), and what the tap returned for each pre-activation."""
        y, taps = images, []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            z = conv(y)
            z = norm(z) if isinstance(norm, nnx.GroupNorm) else norm(z, use_running_average=not train)
            if tap is not None:
                taps.append(jax.tree.map(lambda leaf: leaf[None], tap(relu, z, z.shape[-1])))
            y = nnx.relu(z)
        return self.dense(y.mean((1, 2))), taps


def distance(model: Net, images: Any) -> dict[str, float]:
    """Our proxy of the distance to elimination singularities, from each channel's pre-activations over all images.

    `active` is the smallest share Phi(mean / std) of positive pre-activations that a channel would have if they were
    Gaussian; means and stds are the deviations over the channels of a layer, averaged over the layers.
    """
    _, taps = model(scale(images), train=False, tap=lambda _link, z, _units: (z.mean((0, 1, 2)), z.std((0, 1, 2))))
    moments = [(np.asarray(mean[0]), np.asarray(std[0])) for mean, std in taps]
    shares = [float(jax.scipy.special.ndtr(mean / jnp.maximum(std, 1e-12)).min()) for mean, std in moments]
    return {
        "active": min(shares),
        "means": float(np.mean([mean.std() for mean, _ in moments])),
        "stds": float(np.mean([std.std() for _, std in moments])),
    }


def run(row: str, seed: int, data: Dataset, epochs: int) -> Measures:
    """Train with each batch size; the test accuracy and the distance after the last epoch."""
    measured = {}
    for batch_size, optimizer in OPTIMIZERS.items():
        model, lines = train(
            Net(row, nnx.Rngs(seed)), data, optimizer=optimizer, epochs=epochs, batch_size=batch_size, seed=seed
        )
        if "diverged" not in lines[-1]:
            found = {"accuracy": lines[-1]["test_accuracy"]} | distance(model, data.test_images)
            measured |= {f"{key}_{batch_size}": value for key, value in found.items()}
    return measured


HEADINGS = {
    "accuracy": "accuracy",
    "active": "least active share",
    "means": "spread of means",
    "stds": "spread of deviations",
}

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
