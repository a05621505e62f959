"""A claim of a paper, as data: the methods it compares, and how one of them is run. `__main__.py` runs it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import nnx

from experiments.engine import training
from experiments.engine.data import Dataset

Measures = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and its test.

    Attributes:
      name: of its module.
      title: of its table.
      says: what the paper claims, and which paper.
      protocol: networks, rates and how they were chosen, in a few sentences; it is recorded with the run.
      rows: the methods.
      measures: key of a measure -> its heading. A run may leave one out, for a method that has no such thing.
      epochs: passes over the training set, by default.
      run: (row, seed, data, epochs) -> the measures of one run.

    Raises:
      ValueError: if there are no rows or no measures.
    """

    name: str
    title: str
    says: str
    protocol: str
    rows: tuple[str, ...]
    measures: Mapping[str, str]
    epochs: int
    run: Callable[[str, int, Dataset, int], Measures]

    def __post_init__(self):
        if not self.rows or not self.measures:
            raise ValueError(f"a claim has rows and measures, got {self.rows} and {dict(self.measures)}")


def train(
    model: nnx.Module,
    data: Dataset,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[Any, list[dict[str, Any]]]:
    """Train in THE loop.

    Args:
      model: model(images, train=, tap=) -> (logits, taps), see `engine/training.py`; left as it is. taps may be empty.
      data: the set.
      optimizer: with its rate. The same object for the same rate lets the step compile once: keep it, do not make it
        anew for each seed.
      epochs: passes over the training set.
      batch_size: the last batch of an epoch may be smaller.
      seed: of the order of the examples.

    Returns:
      The trained model, and a line for each epoch: train_loss, test_accuracy, ... A run that diverges has a last line
      with diverged, and no further ones; its model is what was left.
    """
    return training.train(model, data, training.Plan(optimizer, epochs, batch_size), seed)
