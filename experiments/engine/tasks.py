"""Tasks of flat images, the loss on them, and streams of them for continual learning.

    permuted        x -> x[p_k], a fresh permutation p_k of the pixels for each task k; labels stay
    random_labels   y_k uniform at random for each task k; images stay, and their labels are to be memorised

Images are flat, grey, at most 16x16 pixels (larger ones are averaged over blocks) and standardised by the mean and the
deviation over all pixels of the training set. Tasks depend on the seed and the number of the task alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
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


def cross_entropy(model: Any, data: Any, batch: Any, _key: Any) -> Float[Array, ""]:
    """The mean over some examples, given by their indices; data: inputs and labels, and what may follow them."""
    inputs, labels, *_ = data
    return optax.softmax_cross_entropy_with_integer_labels(model(inputs[batch]), labels[batch]).mean()


@dataclasses.dataclass(frozen=True)
class LossOf:
    """A `loop.Loss` of nets without a state that changes: function(model, data, batch, key) -> the loss."""

    graph: Any
    function: Callable[[Any, Any, Any, Any], Array] = cross_entropy

    def __call__(self, parameters: Any, state: Any, data: Any, batch: Any, key: Any) -> tuple[Array, Any]:
        """See `loop.Loss`."""
        return self.function(nnx.merge(self.graph, parameters, state), data, batch, key), state


def batches(key: PRNGKeyArray, size: int, *, epochs: int, batch_size: int) -> Int[np.ndarray, "updates batch"]:
    """The indices of whole batches of shuffled examples, epoch after epoch; each leaves out what fills no batch.

    >>> import jax
    >>> from experiments.engine import tasks
    >>> tasks.batches(jax.random.key(0), 50, epochs=3, batch_size=20).shape
    (6, 20)
    """
    used = size // batch_size * batch_size
    orders = jax.vmap(lambda key: jax.random.permutation(key, size)[:used])(jax.random.split(key, epochs))
    return np.asarray(orders, np.int32).reshape(-1, batch_size)


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
