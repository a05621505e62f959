"""Noise-aware batch norm: the accuracy of a net with noisy weights, before and after recalibration."""

import functools
import statistics
from typing import Any

import jax
import optax
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine.training import Plan, train
from experiments.headlines.claim import Claim, Measures
from experiments.headlines.net import ConvNet, accuracy, batch_norm
from linked_jax.remedies.noise_aware import perturb, recalibrate

NOISES = (0.05, 0.1, 0.2)
DRAWS = 20
BATCH_SIZE = 64
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


def run(row: str, seed: int, data: data_lib.Dataset, epochs: int) -> Measures:
    """Train; calibrate for each noise; the accuracy without noise and the mean accuracy under each noise."""
    conv = functools.partial(nnx.Conv, use_bias=False)
    net = ConvNet((16, 16, 32, 32, 32), strided=(), conv=conv, norm=batch_norm, rngs=nnx.Rngs(seed))
    model, _ = train(net, data, Plan(OPTIMIZER, epochs, BATCH_SIZE), seed)
    images, tested = data_lib.scale(data.train_images), data_lib.scale(data.test_images)
    batches = images[: len(images) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE, *images.shape[1:])
    calibrate = functools.partial(recalibrate, batches=batches, forward=_forward)
    keys = jax.random.split(jax.random.key(1000 + seed), DRAWS)  # the same draws for all rows
    if row == "recalibrated":
        model = calibrate(model)
    measured = {}
    for noise in (0.0, *NOISES):
        calibrated = model
        if row == "noise_aware":
            calibrated = calibrate(model, noise=noise, key=jax.random.key(2000 + seed))
        accuracies = []
        for key in keys if noise else keys[:1]:
            graph, state = nnx.split(calibrated)
            noisy = nnx.merge(graph, perturb(state, key, noise=noise))
            if row == "each_draw":
                noisy = calibrate(noisy)
            accuracies.append(accuracy(noisy, tested, data.test_labels))
        measured[f"accuracy_{noise:g}"] = statistics.fmean(accuracies)
    return measured


def _forward(model: ConvNet, images: Any) -> Any:
    return model(images, train=True)


CLAIM = Claim(
    name="noise_aware",
    title="Accuracy under weight noise, before and after the recalibration of batch norm",
    says=(
        "after training, batch-norm statistics that are measured under weight noise restore accuracy under such noise "
        "(Tsai et al., Robust processing-in-memory neural networks via noise-aware normalization, 2020)"
    ),
    protocol=(
        "One net for all rows of a seed: five 3x3 convolutions (16, 16, 32, 32, 32) with batch norm and relu, mean "
        f"over space, dense; SGD, rate 0.05, momentum 0.9, batches of {BATCH_SIZE}. Noise eta: N(0, (eta max|w|)^2) "
        f"on each kernel; accuracy is the mean over {DRAWS} draws, the same for all rows. recalibrated: statistics of "
        "the training images without noise; noise_aware: under the noise of the test, a new draw for each batch; "
        "each_draw, our addition: of each noisy net that is tested, with its own noise, as if the noise of a device "
        "stayed."
    ),
    rows=("as_trained", "recalibrated", "noise_aware", "each_draw"),
    measures={"accuracy_0": "no noise"} | {f"accuracy_{noise:g}": f"eta {noise:g}" for noise in NOISES},
    epochs=10,
    run=run,
)
