"""The time of a training step, of several nets in one run: in turns, after warm-up, synchronised, medians."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.engine import data as data_lib
from experiments.engine import training

_WARM_UP = 3  # steps; the first one compiles


def step_times(
    nets: Sequence[tuple[Any, training.Moment, training.Plan]],
    data: data_lib.Dataset,
    steps: int,
    on_step: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Median seconds of a training step of each net.

    A slow moment of the machine meets all nets alike: each round times one step of every net.

    Args:
      nets: graph and moment from `training.start`, and the plan.
      data: the set; the first batch is used.
      steps: rounds.
      on_step: called with 1 after each round.

    Returns:
      Seconds, one a net.
    """
    runs = []
    for graph, moment, plan in nets:
        images, labels = plan.place.shared((data.train_images, data.train_labels))
        index = plan.place.batch(np.arange(plan.batch_size, dtype=np.int32))
        key = plan.place.of_seeds(jax.random.key(0))
        rest = (images, labels, *plan.place.shared((plan.inputs, np.float32(plan.lr))), index, key, np.int32(0))
        carry = moment.arrays
        loss = None
        for _ in range(_WARM_UP):
            carry, loss = training.step(plan.place, graph, plan.optimizer, plan.augment, carry, *rest)
        jax.block_until_ready(loss)
        runs.append([graph, plan, carry, rest])
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(steps):
        for number, (graph, plan, carry, rest) in enumerate(runs):
            begin = time.perf_counter()
            runs[number][2], loss = training.step(plan.place, graph, plan.optimizer, plan.augment, carry, *rest)
            jax.block_until_ready(loss)
            seconds[number].append(time.perf_counter() - begin)
        on_step(1)
    return [statistics.median(times) for times in seconds]
