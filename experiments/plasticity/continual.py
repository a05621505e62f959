"""Train nets of one kind on a stream of tasks, several seeds and rates at once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from experiments.engine import tasks as tasks_lib
from experiments.engine.loop import Carry, advance
from experiments.engine.records import Record
from experiments.engine.tasks import Task
from experiments.plasticity.net import METHODS, TAU, Method, Round, build, loop_for
from experiments.plasticity.plots import chosen, ends
from linked_jax.diagnostics import dead_units, dormant_units
from linked_jax.probe import observe
from linked_jax.signal_statistics import effective_rank

RATES = (3e-4, 1e-3, 3e-3)
_CHANGE = 2**31 - 1  # minus the round: the key of what is not training
_fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stream: `tasks` of `rounds` of `epochs` of batches. A net may be changed before each round."""

    stream: str
    tasks: int
    rounds: int
    epochs: int
    batch_size: int


def run_net(
    record: Record, plan: Plan, base: Task, row: str, width: int, *, seeds: int, say: Callable[[str], None],
    on_task: Callable[[int], None],
) -> None:  # fmt: skip
    """Add the runs of a net on a stream that the record lacks: all rates with seed 0, then the best with other seeds.

    `say` gets a line for each run, `on_task` the number of tasks just done: runs that are computed together count once.
    """
    net = {"stream": plan.stream, "row": row, "width": width}

    def once(runs: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        keys = [{**net, "rate": rate, "seed": seed} for seed, rate in runs]

        def make(missing: Sequence[int]) -> list[dict[str, Any]]:
            new = [runs[i] for i in missing]
            found = learn(METHODS[row], width, plan, base, new, on_task)
            for (seed, rate), measures in zip(new, found, strict=True):
                first, last = (np.mean(part) for part in ends(measures["accuracy"]))
                say(f"{plan.stream} {row} {width} units, rate {rate:g}, seed {seed}: {first:.3f} -> {last:.3f}")
            return found

        if all(map(record.find, keys)):
            on_task(plan.tasks)
        return record.once_each(keys, make)

    (best,) = chosen(once([(0, rate) for rate in RATES]))
    if seeds > 1:
        once([(seed, best["rate"]) for seed in range(1, seeds)])


def learn(
    method: Method, width: int, plan: Plan, base: Task, runs: Sequence[tuple[int, float]],
    on_task: Callable[[int], None] = lambda _: None,
) -> list[dict[str, list[float]]]:  # fmt: skip
    """One net for each run (seed, rate), from its first task to the last; together, and as alone but for rounding.

    `on_task` is called after each task with 1.

    Returns:
      For each run, after each task: accuracy; dead and dormant, as shares of all hidden units; rank, the effective
      rank of the last hidden layer's outputs; finite, whether the outputs are numbers.
    """
    seeds, rates = (jnp.array(values) for values in zip(*runs, strict=True))
    models = [build(method, base.images.shape[1], width, tasks_lib.CLASSES, seed) for seed, _ in runs]
    model, carry = models[0], loop_for(models[0], stacked=True).start(models)
    sizes = {"size": len(base.labels), "epochs": plan.epochs, "batch_size": plan.batch_size}
    batches_of, found = functools.partial(tasks_lib.batches, **sizes), []
    for task in range(plan.tasks):
        keys = jax.vmap(tasks_lib.task_key, in_axes=(0, None))(seeds, task)
        own = _tasks(plan.stream, base, keys)
        for number in range(plan.rounds):
            if method.change is not None:
                changes = zip(own.images, _fold(keys, _CHANGE - number), strict=True)
                rounds = [Round(task, plan.tasks, number, images, key) for images, key in changes]
                model, carry = _changed(method.change, model, carry, rounds)
            round_keys = _fold(keys, number)
            batches = np.stack([batches_of(key) for key in round_keys])
            carry, _ = advance(loop_for(model, stacked=True), carry, own, batches, round_keys, lr=rates)
        found.append(jax.device_get(_measure(nnx.graphdef(model), carry.parameters, own)))
        on_task(1)
    return [
        {name: [round(float(after[name][run]), 5) for after in found] for name in found[0]} for run in range(len(runs))
    ]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def _tasks(stream, base, key) -> Task:
    return tasks_lib.STREAMS[stream](base, key)


def _changed(change: Any, model: nnx.Sequential, carry: Carry, rounds: Sequence[Round]) -> tuple[nnx.Sequential, Carry]:
    """A model, and the carry of all runs' nets after a change of each on its own."""
    nets = []
    for run, now in enumerate(rounds):
        own: Carry = jax.tree.map(lambda leaf, run=run: leaf[run], carry)
        nets.append(change((nnx.merge(nnx.graphdef(model), own.parameters), own.opt_state), now))
    models, opt_states = zip(*nets, strict=True)
    return models[0], loop_for(models[0], stacked=True).start(models, opt_states)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def _measure(graph, parameters, task) -> dict[str, Float[Array, ""]]:
    """What the net does on the test images of the task that it has just learnt."""
    logits, taps = observe(lambda model, x: model(x), nnx.merge(graph, parameters), task.test_images)
    return {
        "accuracy": (logits.argmax(axis=1) == task.test_labels).mean(),
        "dead": jnp.concatenate([dead_units(tap.stats) for tap in taps]).mean(),
        "dormant": jnp.concatenate([dormant_units(tap.stats, TAU) for tap in taps]).mean(),
        "rank": jnp.nan_to_num(effective_rank(taps[-1].features)),
        "finite": jnp.isfinite(logits).all(),
    }
