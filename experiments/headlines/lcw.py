"""LCW: with weights that sum to zero a sigmoid network of 50 layers learns, alone and with batch norm."""

import operator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from experiments.engine.data import Dataset, scale
from experiments.engine.rows import normalised
from experiments.engine.training import Plan, train
from experiments.headlines.claim import Claim, Measures, early_and_last, early_and_last_headings
from experiments.headlines.net import batch_norm
from linked_jax import sigmoid
from linked_jax.remedies.lcw import LCWLinear, keep_variance

DEPTH, WIDTH = 50, 64
MIDDLE = DEPTH // 2
OPTIMIZERS = {rate: optax.adam(rate) for rate in (0.0003, 0.001, 0.003)}


class Layer(nnx.Module):
    """sigmoid -> dense -> norm? All rows but `sigmoid` start with weights of the same variance."""

    def __init__(self, row: str, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal() if row == "sigmoid" else keep_variance(sigmoid)
        dense = LCWLinear if row.startswith("lcw") else nnx.Linear
        self.dense = dense(WIDTH, WIDTH, kernel_init=init, rngs=rngs)
        self.norm = nnx.data(batch_norm(WIDTH, rngs=rngs) if row.endswith("_bn") else None)

    def __call__(self, z: Any, train: bool) -> Any:
        """Pre-activations (N, WIDTH) -> those of the next layer."""
        return normalised(self.dense(nnx.sigmoid(z)), self.norm, train)


class Net(nnx.Module):
    """dense -> [sigmoid -> dense -> norm?] 49 times, scanned -> sigmoid -> dense."""

    def __init__(self, row: str, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, WIDTH, rngs=rngs)
        self.layers = nnx.vmap(lambda rngs: Layer(row, rngs))(rngs.split(DEPTH - 1))
        self.last = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: Any, train: bool = False) -> Any:
        """Images (N, 8, 8, 1) -> logits (N, 10)."""
        z = through(self.layers, self.first(images.reshape(len(images), -1)), train)
        return self.last(nnx.sigmoid(z))


def through(layers: Layer, z: Any, train: bool) -> Any:
    """Pre-activations (N, WIDTH) through layers that are stacked."""
    return nnx.scan(lambda layer, z: layer(z, train), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, z)


def moments(model: Net, images: Any) -> dict[str, float]:
    """Of what the middle layer's weights give, before its norm; batch norms take all images as their batch.

    shift: the spread over units of the mean over images. signal: the mean over units of the deviation over images.
    """
    before, middle = (jax.tree.map(operator.itemgetter(part), model.layers) for part in (slice(MIDDLE), MIDDLE))
    z = through(before, model.first(scale(images).reshape(len(images), -1)), train=True)
    z = np.asarray(middle.dense(nnx.sigmoid(z)), np.float64)
    return {"shift": float(z.mean(0).std()), "signal": float(z.std(0).mean())}


def run(row: str, seed: int, data: Dataset, epochs: int) -> Measures:
    """The shift at the start, and for each rate the test accuracy after few epochs and after the last."""
    measured = moments(Net(row, nnx.Rngs(seed)), data.train_images)
    for rate, optimizer in OPTIMIZERS.items():
        _, lines = train(Net(row, nnx.Rngs(seed)), data, Plan(optimizer, epochs, 64), seed)
        measured |= early_and_last(lines, epochs, f"_{rate}")
    return measured


CLAIM = Claim(
    name="lcw",
    title="Linearly constrained weights in sigmoid networks of 50 layers",
    says=(
        "weights that sum to zero remove the activation shift, so that sigmoid networks of 50 layers, which do not "
        "learn otherwise, do, without batch norm and better with it (Kutsuna, Linearly constrained weights: reducing "
        "activation shift for faster training of neural networks, 2020)"
    ),
    protocol=(
        "50 hidden layers of 64 sigmoid units on flattened images, then a dense layer; the first and the last layer "
        "are plain in all rows. sigmoid: Flax' default init; sigmoid_scaled: weights of variance 1 / (fan-in Var[g]), "
        "g the sigmoid, that keep the variance where there is no shift; the other rows start with it too. bn: batch "
        "norm between weights and sigmoid, not in the first layer; running statistics keep 0.9. Batches of 64; Adam at "
        "three rates, all reported for all rows. The spread of means is that over units of the mean over the training "
        "images, of what the weights of the middle layer give before any batch norm; next to it the deviation over "
        "images."
    ),
    rows=("sigmoid", "sigmoid_scaled", "sigmoid_bn", "lcw", "lcw_bn"),
    measures={"shift": "spread of means at the start", "signal": "deviation over images at the start"}
    | early_and_last_headings(tuple(OPTIMIZERS)),
    epochs=15,
    run=run,
)
