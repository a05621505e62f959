"""ENorm: balancing adjacent layers after every step against weight decay."""

import functools
from typing import Any

import optax
from flax import nnx

from experiments.engine.data import Dataset
from experiments.engine.training import Plan, train
from experiments.headlines.claim import Claim, Measures
from linked_jax.remedies.enorm import Layer, enorm

DEPTH, WIDTH = 8, 64
RATES = (0.003, 0.01, 0.03, 0.1)
WEIGHT_DECAY = 1e-3
C = 1.2  # the authors', for dense nets
CHAIN = [Layer(f"layers.{number}") for number in range(DEPTH - 1)]  # without the read-out, as in the authors' code


class Net(nnx.Module):
    """Eight dense layers with ReLU between them."""

    def __init__(self, pixels: int, rngs: nnx.Rngs):
        widths = (pixels, *(WIDTH,) * (DEPTH - 1))
        init = nnx.initializers.he_normal()
        self.layers = nnx.List([nnx.Linear(width, WIDTH, kernel_init=init, rngs=rngs) for width in widths[:-1]])
        self.layers.append(nnx.Linear(WIDTH, 10, kernel_init=init, rngs=rngs))

    def __call__(self, images: Any, train: bool = False) -> Any:
        """Images (N, H, W, C) -> logits (N, 10)."""
        del train
        z = self.layers[0](images.reshape(len(images), -1))
        for layer in self.layers[1:]:
            z = layer(nnx.relu(z))
        return z


@functools.cache  # another object would compile anew
def optimizer(row: str, rate: float) -> optax.GradientTransformation:
    """Of a row at a rate; one object."""
    inner = optax.sgd(rate, momentum=0.9)
    if row in ("weight_decay", "enorm_weight_decay"):
        inner = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), inner)
    return enorm(inner, CHAIN, c=C) if row in ("enorm", "enorm_weight_decay") else inner


def run(row: str, seed: int, data: Dataset, epochs: int, rate: float) -> Measures:
    """Train at a rate; test accuracy, training loss and dead units at the last epoch."""
    net = Net(data.train_images[0].size, nnx.Rngs(seed))
    last = train(net, data, Plan(optimizer(row, rate), epochs, 64), seed)[1][-1]
    if "diverged" in last:
        return {}
    return {"accuracy": last["test_accuracy"], "loss": last["train_loss"], "dead": last["dead_units"]}


CLAIM = Claim(
    name="enorm",
    title="Equi-normalisation and weight decay in a plain net",
    says=(
        "balancing adjacent layers after every step of SGD generalises better than SGD with weight decay alone "
        "(Stock et al., Equi-normalization of neural networks, 2019)"
    ),
    protocol=(
        f"{DEPTH} dense layers of {WIDTH} units with biases and ReLU, no batch norm, He's initial kernels; batches of "
        f"64; SGD with momentum 0.9 at a constant rate, for each row the one of {RATES} with the least training loss "
        f"on seed 0. Weight decay {WEIGHT_DECAY:g} on all parameters. ENorm with c = {C} on all layers but the "
        "read-out, as in the authors' code; unlike there, biases are rescaled too, so that the net computes the same."
    ),
    rows=("sgd", "weight_decay", "enorm", "enorm_weight_decay"),
    measures={"accuracy": "accuracy", "loss": "train loss", "dead": "dead units", "rate": "rate"},
    epochs=30,
    run=run,
    rates=RATES,
)
