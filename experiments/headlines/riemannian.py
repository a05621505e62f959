"""Riemannian batch normalisation: kernels before batch norm on the sphere, against Nesterov SGD with batch norm."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from experiments.engine.data import Dataset
from experiments.headlines.claim import Claim, Measures, train
from linked_jax import relu
from linked_jax.remedies.riemannian import (
    adam_g,
    orthogonality_penalty,
    riemannian,
    scale_invariant,
    sgd_g,
    to_sphere,
)

WIDTHS = (1, 16, 16, 32, 32)
BATCH_SIZE, EARLY = 64, 2
SCALES = (1.0, 3.0, 10.0)  # of the authors' rates
RATES = {"nesterov": 0.1, "sgd_g": 0.2, "adam_g": 0.05}
REST = 0.01
WEIGHT_DECAY = 5e-4


class Net(nnx.Module):
    """Four times conv 3x3, batch norm and relu, with stride 2 in the third; the mean over space; a dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.convs, self.norms = nnx.List([]), nnx.List([])
        for number, (a, b) in enumerate(itertools.pairwise(WIDTHS)):
            self.convs.append(nnx.Conv(a, b, (3, 3), strides=1 + (number == 2), use_bias=False, rngs=rngs))
            self.norms.append(nnx.BatchNorm(b, momentum=0.9, rngs=rngs))
        self.dense = nnx.Linear(WIDTHS[-1], 10, rngs=rngs)

    def __call__(
        self, images: Any, train: bool = False, tap: Callable[..., Any] | None = None
    ) -> tuple[Any, list[Any]]:
        """Images (N, H, W, 1) -> logits (N, 10), and what the tap returned for each pre-activation."""
        y, taps = images, []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            z = norm(conv(y), use_running_average=not train)
            if tap is not None:
                taps.append(jax.tree.map(lambda leaf: leaf[None], tap(relu, z, z.shape[-1])))
            y = nnx.relu(z)
        return self.dense(y.mean((1, 2))), taps


def _mask(model: Net) -> Any:
    return scale_invariant(nnx.state(model, nnx.Param), ["convs"])


@functools.cache
def _optimizer(row: str, scale: float, steps: int) -> optax.GradientTransformation:
    def rate(at_start: float) -> optax.Schedule:
        drops = {int(steps * part): 0.2 for part in (0.3, 0.6, 0.8)}
        return optax.piecewise_constant_schedule(scale * at_start, drops)

    def nesterov(at_start: float) -> optax.GradientTransformation:
        sgd = optax.sgd(rate(at_start), momentum=0.9, nesterov=True)
        return optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), sgd)

    if row == "nesterov":
        return nesterov(RATES[row])
    mask = _mask(Net(nnx.Rngs(0)))
    on_spheres = {"sgd_g": sgd_g, "adam_g": adam_g}[row](rate(RATES[row]))
    slope = jax.grad(lambda params: orthogonality_penalty(params, mask))
    penalty = optax.stateless(lambda gradients, params: optax.tree.add(gradients, slope(params)))
    return optax.chain(penalty, riemannian(on_spheres, nesterov(REST), mask))


_tried: dict[tuple[str, float, int, int], list[dict[str, Any]]] = {}


def _train(row: str, scale: float, seed: int, data: Dataset, epochs: int) -> list[dict[str, Any]]:
    key = (row, scale, seed, epochs)
    if key not in _tried:
        model = Net(nnx.Rngs(seed))
        if row != "nesterov":
            nnx.update(model, to_sphere(nnx.state(model, nnx.Param), _mask(model)))
        optimizer = _optimizer(row, scale, epochs * -(-len(data.train_labels) // BATCH_SIZE))
        _, _tried[key] = train(model, data, optimizer=optimizer, epochs=epochs, batch_size=BATCH_SIZE, seed=seed)
    return _tried[key]


def run(row: str, seed: int, data: Dataset, epochs: int) -> Measures:
    """Train at the rates with the least training loss on seed 0; test accuracy after few epochs and at the last."""

    def loss(scale: float) -> float:
        return _train(row, scale, 0, data, epochs)[-1].get("train_loss", float("inf"))

    scale = min(SCALES, key=loss)
    lines = [line for line in _train(row, scale, seed, data, epochs) if "diverged" not in line]
    measured = {"scale": scale}
    if len(lines) >= EARLY:
        measured["early"] = lines[EARLY - 1]["test_accuracy"]
    if len(lines) == epochs:
        measured |= {"last": lines[-1]["test_accuracy"], "loss": lines[-1]["train_loss"]}
    return measured


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
)
