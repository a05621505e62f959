"""The four problems, as pure functions of a seed and the number of a task.

    permuted_mnist      500 tasks: 10,000 images, their pixels permuted anew, 1 epoch, batch 16     625 steps a task
    random_label_mnist   50 tasks: 1,200 images that stay, their labels shuffled anew, 400 epochs    30,000
    random_label_cifar   the same on CIFAR-10                                                        30,000
    cifar_5plus1         30 tasks of CIFAR-100: 5 new classes of 500 images (hard), 1 (easy), ...    780, batch 32

Images are drawn from the split that is there. They are shuffled anew each epoch, and a last batch that is not full is
left out. Nothing tells a net that a task begins. Inputs are standardised as the authors' code does it.

Reference: Kumar et al., Maintaining plasticity in continual learning via regenerative regularization, 2023
(arXiv 2308.11958). Their code's batches of an epoch leave out the last full one too; here it is in, so that 1,200
images are 75 steps and the steps of a task are whole epochs. Its configuration of 5+1 says 625 steps of batch 16; the
paper's text says 780 of 32, which is what runs here.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from experiments.engine import tasks
from experiments.engine.data import Split


class Task(NamedTuple):
    """What is learnt: images as the net's input shape, labels."""

    images: UInt8[Array, "n *shape"]
    labels: Int[Array, " n"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A stream of tasks.

    Attributes:
      says: its name in print.
      dataset: the TFDS name.
      kind: what is new in a task: the order of the pixels, the labels, or the classes.
      tasks: how many.
      images: of a task; of a hard one.
      epochs: of a task; of a hard one.
      batch_size: of a step.
      classes: outputs of the net.
      mean: of the inputs, per channel, of pixels divided by 255.
      deviation: likewise.
    """

    says: str
    dataset: str
    kind: Literal["pixels", "labels", "classes"]
    tasks: int
    images: int
    epochs: int
    batch_size: int = 16
    classes: int = 10
    mean: tuple[float, ...] = (0.5,)
    deviation: tuple[float, ...] = (0.5,)

    @property
    def steps(self) -> int:
        """Of a task: the same for hard and easy ones."""
        return self.epochs * (self.images // self.batch_size)

    @property
    def is_conv(self) -> bool:
        """Whether the conv net learns it."""
        return len(self.mean) > 1

    def hard(self, number: int) -> bool:
        """Whether the task counts: all, and of 5+1 every other one, the first included."""
        return self.kind != "classes" or number % 2 == 0


_CIFAR: Any = {"mean": (0.4914, 0.4822, 0.4465), "deviation": (0.247, 0.243, 0.261)}
PROBLEMS = {
    "permuted_mnist": Problem("Permuted MNIST", "mnist", "pixels", 500, 10_000, 1),
    "random_label_mnist": Problem("Random-label MNIST", "mnist", "labels", 50, 1200, 400),
    "random_label_cifar": Problem("Random-label CIFAR", "cifar10", "labels", 50, 1200, 400, **_CIFAR),
    "cifar_5plus1": Problem("5+1 CIFAR", "cifar100", "classes", 30, 2500, 10, batch_size=32, classes=100, **_CIFAR),
}
HARD, EASY, OF_A_CLASS = 5, 1, 500


def task(problem: Problem, data: Split, seed: int, number: int) -> Task:
    """A task of a stream, by its number from 0; the same for every method."""
    of_stream, of_task = jax.random.fold_in(jax.random.key(seed), 2**31 - 1), tasks.task_key(seed, number)
    size = min(problem.images, len(data.labels))
    if problem.kind == "classes":
        rows, labels = _of_classes(data.labels, classes_of(of_stream, number)), None
    elif problem.kind == "pixels":
        rows, labels = _permutation(jax.random.fold_in(of_task, 0), len(data.labels))[:size], None
    else:
        rows = _permutation(of_stream, len(data.labels))[:size]
        labels = data.labels[rows][_permutation(of_task, size)]
    images, labels = data.images[rows], data.labels[rows] if labels is None else labels
    if not problem.is_conv:
        images = images.reshape(size, -1)
    if problem.kind == "pixels":
        images = np.take(images, _permutation(jax.random.fold_in(of_task, 1), images.shape[1]), axis=1)
    return Task(images, labels)  # pyright: ignore[reportArgumentType]


def batches(problem: Problem, key: PRNGKeyArray, size: int) -> Int[np.ndarray, "steps batch"]:
    """The indices of a task's batches: as many whole epochs of its images as make the steps of a task."""
    of_an_epoch = size // problem.batch_size
    epochs = -(-problem.steps // of_an_epoch)
    return tasks.batches(key, size, epochs=epochs, batch_size=problem.batch_size)[: problem.steps]


def classes_of(key: PRNGKeyArray, number: int) -> Int[np.ndarray, " classes"]:
    """The classes of a task of 5+1: those in a random order, 5 and 1 by turns; no class comes back."""
    first = number // 2 * (HARD + EASY) + (number % 2) * HARD
    return _permutation(key, 100)[first : first + (EASY if number % 2 else HARD)]


def _of_classes(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.flatnonzero(labels == label)[:OF_A_CLASS] for label in classes])


def _permutation(key: PRNGKeyArray, size: int) -> np.ndarray:
    return np.asarray(jax.random.permutation(key, size))
