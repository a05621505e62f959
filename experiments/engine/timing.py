"""The time of a training step, of several nets in one run: in turns, after warm-up, synchronised, medians."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from experiments.engine import data as data_lib
from experiments.engine import training
from experiments.engine.loop import Loop, step

_WARM_UP = 3  # steps; the first one compiles


def step_times(
    nets: Sequence[tuple[Loop, training.Snapshot, training.Plan]],
    data: data_lib.Dataset,
    steps: int,
    on_step: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Median seconds of a training step of each net.

    A slow moment of the machine meets all nets alike: each round times one step of every net.

    Args:
      nets: loop and snapshot from `training.start`, and the plan.
      data: the set; the first batch is used.
      steps: rounds.
      on_step: called with 1 after each round.

    Returns:
      Seconds, one a net.
    """
    carries = [snapshot.arrays for _, snapshot, _ in nets]
    arguments = []
    for _, _, plan in nets:
        arrays, lr = plan.arrays(data)
        index = plan.place.batch(np.arange(plan.batch_size, dtype=np.int32))
        arguments.append((arrays, index, plan.place.of_seeds(jax.random.key(0)), np.int32(0), lr))

    def timed(net: int) -> float:
        begin = time.perf_counter()
        carries[net], loss = step(nets[net][0], carries[net], *arguments[net])
        jax.block_until_ready(loss)
        return time.perf_counter() - begin

    for net in range(len(nets)):
        for _ in range(_WARM_UP):
            timed(net)
    seconds: list[list[float]] = [[] for _ in nets]
    for _ in range(steps):
        for net, times in enumerate(seconds):
            times.append(timed(net))
        on_step(1)
    return [statistics.median(times) for times in seconds]
