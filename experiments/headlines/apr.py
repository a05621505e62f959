"""APR: images with the amplitude of other images, in training, make a net more accurate on corrupted images."""

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from experiments.engine import data as data_lib
from experiments.engine.loop import Loop, advance
from experiments.headlines.claim import Claim, Measures
from experiments.headlines.net import ConvNet, accuracy
from linked_jax.remedies.apr import apr_p, apr_s

BATCH_SIZE = 64
OPTIMIZER = optax.adam(0.003)  # not sgd: a sum of two losses would have twice the rate
PAIRED = ("apr_p", "apr_sp")
AUGMENTED = {"augmented": 0.0, "apr_s": 0.5, "apr_sp": 0.5}
"""The probability of a recombination of single images; at 0 the augmentations are left."""


def augment(key: Any, images: Any) -> Any:
    """One of five things for each image: rotate, shear across or along, posterise, solarise. None is a corruption."""
    choice_key, size_key = jax.random.split(key)
    choice = jax.random.randint(choice_key, (len(images),), 0, 5)
    size = jax.random.uniform(size_key, (len(images),), minval=-1.0, maxval=1.0)
    return jax.vmap(_augmented)(images, choice, size)


def _augmented(image, choice, size):
    angle = jnp.where(choice == 0, 0.35 * size, 0.0)  # 20 degrees
    across, along = (jnp.where(choice == which, 0.3 * size, 0.0) for which in (1, 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.array([[cos, across - sin], [along + sin, cos]])
    middle = (np.array(image.shape[:2]) - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, image.shape[:2]), indexing="ij"), -1)
    rows, columns = jnp.moveaxis((grid - middle) @ matrix.T + middle, -1, 0)
    warped = jax.scipy.ndimage.map_coordinates(image[..., 0], [rows, columns], order=1)[..., None]
    posterised = jnp.floor(image * 3.999) / 3  # four levels
    solarised = jnp.where(image > 0.6 + 0.4 * jnp.abs(size), 1 - image, image)
    return jnp.select([choice == 3, choice == 4], [posterised, solarised], warped)


def corruptions(images: np.ndarray) -> dict[str, np.ndarray]:
    """The corrupted copies of images (N, H, W, 1) in [0, 1]; always the same ones."""
    rng = np.random.default_rng(0)
    noisy = np.clip(images + rng.normal(0, 0.25, images.shape), 0, 1)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    weights = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
    blurred = sum(weights[i, j] * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
    mean = images.mean((1, 2, 3), keepdims=True)
    moves = rng.choice([[0, 1], [0, -1], [1, 0], [-1, 0]], len(images))
    shifted = np.stack([np.roll(image, move, (0, 1)) for image, move in zip(images, moves, strict=True)])
    dropped = np.where(rng.random(images.shape) < 0.2, 0, images)
    contrast = mean + 0.3 * (images - mean)
    made = {"noise": noisy, "blur": blurred, "contrast": contrast, "shift": shifted, "dropout": dropped}
    return {name: np.asarray(x, np.float32) for name, x in made.items()}


@dataclasses.dataclass(frozen=True)
class Recombined:
    """The mean cross-entropy of a batch of recombined images, given by its indices; for pairs that of both is added."""

    graph: Any
    row: str

    def __call__(self, parameters: Any, state: Any, data: Any, batch: Array, key: Array) -> tuple[Array, Any]:
        """See `loop.Loss`; data: images, labels."""
        images, labels = data
        single_key, pair_key = jax.random.split(key)
        x, model = images[batch], nnx.merge(self.graph, parameters, state)
        if self.row in AUGMENTED:
            x = apr_s(single_key, x, augment, probability=AUGMENTED[self.row])
        batches = [x, apr_p(pair_key, x)] if self.row in PAIRED else [x]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        losses = [cross_entropy(model(x, train=True), labels[batch]).mean() for x in batches]
        return jnp.stack(losses).sum(), state


def run(row: str, seed: int, data: data_lib.Dataset, epochs: int) -> Measures:
    """Train; the test accuracy on clean images and on each kind of corrupted ones."""
    net = ConvNet(rngs=nnx.Rngs(seed))
    loop = Loop(Recombined(nnx.graphdef(net), row), OPTIMIZER)
    carry, images, clean = loop.start([net]), data_lib.scale(data.train_images), data_lib.scale(data.test_images)
    whole = len(images) // BATCH_SIZE * BATCH_SIZE
    for epoch in range(epochs):
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        batches = data_lib.order(key, len(images))[:whole].reshape(-1, BATCH_SIZE)
        carry, losses = advance(loop, carry, (images, data.train_labels), batches, key)
        if not np.isfinite(losses[-1]):
            return {}
    nnx.update(net, carry.parameters)
    kinds = {"clean": clean} | corruptions(np.asarray(clean, np.float64))
    found = {name: accuracy(net, x, data.test_labels) for name, x in kinds.items()}
    corrupted = statistics.fmean(value for name, value in found.items() if name != "clean")
    return {"clean": found.pop("clean"), "corrupted": corrupted, **found}


CLAIM = Claim(
    name="apr",
    title="Amplitude-phase recombination: accuracy on clean and on corrupted images",
    says=(
        "training on images that have the amplitude of others makes nets more robust to common corruptions: of pairs "
        "(APR-P), of single images (APR-S), and most of all both (Chen et al., Amplitude-phase recombination, 2021)"
    ),
    protocol=(
        "Four 3x3 convolutions of 16, 16, 32 and 32 units, the third with stride 2, each with ReLU, then the mean over "
        f"space and a dense layer. Adam at 0.003 for all rows, batches of {BATCH_SIZE}. apr_p: cross entropy of the "
        "images plus that of mixed ones, mixed with probability 0.6 a batch, so twice the work a step. augmented: each "
        "image rotated, sheared, posterised or solarised; apr_s: with probability 0.5 recombined from two of these; "
        "apr_sp: apr_p on images of apr_s. Corrupted is the mean over five: Gaussian noise of deviation 0.25, a 3x3 "
        "binomial blur, contrast 0.3, a shift by one pixel (around the border), and a fifth of the pixels at 0; the "
        "same corrupted images for all."
    ),
    rows=("plain", "apr_p", "augmented", "apr_s", "apr_sp"),
    measures={name: name for name in ("clean", "corrupted", "noise", "blur", "contrast", "shift", "dropout")},
    epochs=30,
    run=run,
)
