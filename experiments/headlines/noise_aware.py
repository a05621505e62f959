"""Noise-aware batch norm: the accuracy of a net with noisy weights, before and after recalibration."""

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from experiments.engine import data as data_lib
from experiments.headlines.claim import Claim, Measures, train
from linked_jax.remedies.noise_aware import perturb, recalibrate

NOISES = (0.05, 0.1, 0.2)
DRAWS = 20
BATCH_SIZE = 64
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


class Net(nnx.Module):
    """Five convolutions with batch norm, the mean over space, and a dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        widths = (1, 16, 16, 32, 32, 32)
        self.convs = nnx.List(
            [nnx.Conv(a, b, (3, 3), use_bias=False, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in widths[1:]])
        self.dense = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(
        self, images: Any, train: bool = False, tap: Callable[..., Any] | None = None
    ) -> tuple[Any, list[Any]]:
        """Images (N, H, W, 1) -> logits (N, 10), and no taps."""
        del tap
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x), use_running_average=not train))
        return self.dense(x.mean((1, 2))), []


def run(row: str, seed: int, data: data_lib.Dataset, epochs: int) -> Measures:
    """Train; calibrate for each noise; the accuracy without noise and the mean accuracy under each noise."""
    net = Net(nnx.Rngs(seed))
    model, _ = train(net, data, optimizer=OPTIMIZER, epochs=epochs, batch_size=BATCH_SIZE, seed=seed)
    images = data_lib.scale(data.train_images)
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
            accuracies.append(float(_accuracy(*nnx.split(noisy), data.test_images, data.test_labels)))
        measured[f"accuracy_{noise:g}"] = statistics.fmean(accuracies)
    return measured


def _forward(model: Net, images: Any) -> Any:
    return model(images, train=True)


@functools.partial(jax.jit, static_argnums=0)
def _accuracy(graph, state, images, labels):
    return (nnx.merge(graph, state)(data_lib.scale(images))[0].argmax(-1) == labels).mean()


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
