"""Riemannian batch normalisation: kernels before batch norm on the sphere, against Nesterov SGD with batch norm."""

import functools
from typing import Any

import jax
import optax
from flax import nnx

from experiments.engine.data import Dataset
from experiments.engine.training import Plan, train
from experiments.headlines.claim import EARLY, Claim, Measures, early_and_last
from experiments.headlines.net import ConvNet, batch_norm
from linked_jax.remedies.riemannian import adam_g, orthogonality_penalty, riemannian, scale_invariant, sgd_g, to_sphere

BATCH_SIZE = 64
SCALES = (1.0, 3.0, 10.0)  # of the authors' rates
RATES = {"nesterov": 0.1, "sgd_g": 0.2, "adam_g": 0.05}
REST = 0.01
WEIGHT_DECAY = 5e-4


def net(seed: int) -> ConvNet:
    """The same net for all rows."""
    return ConvNet(conv=functools.partial(nnx.Conv, use_bias=False), norm=batch_norm, rngs=nnx.Rngs(seed))


def mask(model: ConvNet) -> Any:
    """The kernels for the sphere."""
    return scale_invariant(nnx.state(model, nnx.Param), ["convs"])


@functools.cache  # another object would compile anew
def optimizer(row: str, scale: float, steps: int) -> optax.GradientTransformation:
    """Of a row at the authors' rates times a scale; one object."""

    def rate(at_start: float) -> optax.Schedule:
        drops = {int(steps * part): 0.2 for part in (0.3, 0.6, 0.8)}
        return optax.piecewise_constant_schedule(scale * at_start, drops)

    def nesterov(at_start: float) -> optax.GradientTransformation:
        sgd = optax.sgd(rate(at_start), momentum=0.9, nesterov=True)
        return optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), sgd)

    if row == "nesterov":
        return nesterov(RATES[row])
    kernels = mask(net(0))
    on_spheres = {"sgd_g": sgd_g, "adam_g": adam_g}[row](rate(RATES[row]))
    slope = jax.grad(lambda params: orthogonality_penalty(params, kernels))
    penalty = optax.stateless(lambda gradients, params: optax.tree.add(gradients, slope(params)))
    return optax.chain(penalty, riemannian(on_spheres, nesterov(REST), kernels))


def run(row: str, seed: int, data: Dataset, epochs: int, scale: float) -> Measures:
    """Train at the authors' rates times a scale; test accuracy after few epochs and at the last, training loss."""
    model = net(seed)
    if row != "nesterov":
        nnx.update(model, to_sphere(nnx.state(model, nnx.Param), mask(model)))
    steps = epochs * -(-len(data.train_labels) // BATCH_SIZE)
    _, lines = train(model, data, Plan(optimizer(row, scale, steps), epochs, BATCH_SIZE), seed)
    measured = early_and_last(lines, epochs)
    return measured | ({"loss": lines[-1]["train_loss"]} if "last" in measured else {})


CLAIM = Claim(
    name="riemannian",
    title="Riemannian batch normalisation and Nesterov SGD, both with batch norm",
    says=(
        "kernels before batch norm learn better on the unit sphere than by SGD with weight decay (Cho and Lee, "
        "Riemannian approach to batch normalization, 2017)"
    ),
    protocol=(
        "Four 3x3 convolutions of 16, 16, 32 and 32 units, the third with stride 2, each with batch norm and ReLU, "
        "then the mean over space and a dense layer; batches of 64. nesterov: SGD with momentum 0.9 and weight decay "
        f"{WEIGHT_DECAY:g}, rate {RATES['nesterov']}. sgd_g and adam_g: rates {RATES['sgd_g']} and {RATES['adam_g']} "
        "on the spheres (all convolutions but the first, which has more columns than rows), nesterov at "
        f"{REST} for the rest, and the orthogonality penalty. All rates fall by 0.2 after 30, 60 and 80% of the "
        "steps. A row's rates, the authors', are all multiplied by the one of 1, 3 and 10 that has the least training "
        "loss (without the penalty) on seed 0; the runs are short."
    ),
    rows=("nesterov", "sgd_g", "adam_g"),
    measures={
        "early": f"accuracy after {EARLY} epochs",
        "last": "accuracy at the last",
        "loss": "train loss",
        "scale": "factor of the rates",
    },
    epochs=15,
    run=run,
    rates=SCALES,
    rate="scale",
)
