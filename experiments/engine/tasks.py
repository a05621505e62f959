"""Streams of tasks for continual learning: one net learns one task after the other.

    permuted        x -> x[p_k], a fresh permutation p_k of the pixels for each task k; labels stay
    random_labels   y_k uniform at random for each task k; images stay, and their labels are to be memorised

Images are flat, grey, at most 16x16 pixels (larger ones are averaged over blocks) and standardised by the mean and the
deviation over all pixels of the training set. Tasks depend on the seed and the number of the task alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.engine.data import Dataset

_LARGEST_SIDE = 16


class Task(NamedTuple):
    """What is learnt, and what it is measured on."""

    images: Float[Array, "n features"]
    labels: Int[Array, " n"]
    test_images: Float[Array, "m features"]
    test_labels: Int[Array, " m"]


def flat(data: Dataset, size: int) -> Task:
    """The first `size` training images, and the whole test set, as vectors.

    >>> from experiments.engine import data, tasks
    >>> tasks.flat(data.load("digits"), 100).images.shape
    (100, 64)
    """
    train, test = _grey(data.train_images), _grey(data.test_images)
    mean, deviation = train.mean(), train.std()
    train, test = (train[:size] - mean) / deviation, (test - mean) / deviation
    return Task(train, data.train_labels[:size], test, data.test_labels)


def _grey(images: Array) -> Array:
    grey = images.astype(jnp.float32).mean(axis=-1) / 255
    n, height, width = grey.shape
    side = max(-(-height // _LARGEST_SIDE), -(-width // _LARGEST_SIDE))
    if side > 1:
        grey = grey[:, : height // side * side, : width // side * side]
        grey = grey.reshape(n, height // side, side, width // side, side).mean(axis=(2, 4))
    return grey.reshape(n, -1)


def permuted(base: Task, key: PRNGKeyArray) -> Task:
    """All images with one permutation of their pixels; measured on the test set."""
    order = jax.random.permutation(key, base.images.shape[1])
    return base._replace(images=base.images[:, order], test_images=base.test_images[:, order])


def random_labels(base: Task, key: PRNGKeyArray) -> Task:
    """The same images with labels drawn at random from ten; measured on themselves: how many are memorised."""
    labels = jax.random.randint(key, base.labels.shape, 0, CLASSES)
    return Task(base.images, labels, base.images, labels)


CLASSES = 10
STREAMS: dict[str, Callable[[Task, PRNGKeyArray], Task]] = {"permuted": permuted, "random_labels": random_labels}


def task_key(seed: int | Array, number: int | Array) -> PRNGKeyArray:
    """The randomness of a task: the same for every method."""
    return jax.random.fold_in(jax.random.key(seed), number)
