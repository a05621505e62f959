"""The time of a training step, of several nets in one run: in turns, after warm-up, synchronised, medians."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import training
from experiments.engine.loop import step

_WARM_UP = 3  # steps; the first one compiles


def step_times(
    nets: Sequence[tuple[nnx.Module, training.Plan]],
    data: data_lib.Dataset,
    steps: int,
    on_step: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Median seconds of a training step of each net, by its plan, on the first batch.

    A slow moment of the machine meets all nets alike: each round times one step of every net.
    """
    loops, carries, arguments = [], [], []
    for model, plan in nets:
        loop, snapshot = training.start([model], plan)
        arrays, lr = plan.arrays(data)
        index = plan.place.batch(np.arange(plan.batch_size, dtype=np.int32))
        loops.append(loop)
        carries.append(snapshot.arrays)
        arguments.append((arrays, index, plan.place.of_seeds(jax.random.key(0)), np.int32(0), lr))

    def take(net: int) -> jax.Array:
        carries[net], loss = step(loops[net], carries[net], *arguments[net])
        return loss

    return in_turns([functools.partial(take, net) for net in range(len(nets))], steps, on_step)


def in_turns(
    actions: Sequence[Callable[[], Any]], rounds: int, on_round: Callable[[int], None] = lambda _: None
) -> list[float]:
    """Median seconds of each action until its arrays are there, after warm-up; each round times one of every action."""

    def timed(action: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(action())
        return time.perf_counter() - begin

    for action in actions:
        for _ in range(_WARM_UP):
            timed(action)
    seconds = []
    for _ in range(rounds):
        seconds.append([timed(action) for action in actions])
        on_round(1)
    return [statistics.median(times) for times in zip(*seconds, strict=True)]
