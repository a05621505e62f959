"""Train nets of one kind on a stream of tasks, several seeds and rates at once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.engine import tasks as tasks_lib
from experiments.plasticity.net import RULE, TAU, Method, Moment, build, hidden
from linked_jax.diagnostics import dead_units, dormant_units
from linked_jax.signal_statistics import effective_rank, feature_moments

_CHANGE = 2**31 - 1  # the key of what is not training


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stream: `tasks` of `rounds` of `epochs` of batches. A net may be changed before each round."""

    stream: str
    tasks: int
    rounds: int
    epochs: int
    batch_size: int


def learn(
    method: Method,
    width: int,
    plan: Plan,
    base: tasks_lib.Task,
    runs: Sequence[tuple[int, float]],
    on_task: Callable[[int], None] = lambda _: None,
) -> list[dict[str, list[float]]]:
    """One net for each run, from its first task to the last.

    Args:
      method: of `METHODS`.
      width: of the hidden layers.
      plan: the stream.
      base: the images that tasks are made of.
      runs: (seed, rate) of each; they are computed together, and as alone but for rounding.
      on_task: called after each task with 1.

    Returns:
      For each run, after each task: accuracy; dead and dormant, as shares of all hidden units; rank, the effective
      rank of the last hidden layer's outputs; finite, whether the outputs are numbers.
    """
    seeds, rates = jnp.array([seed for seed, _ in runs]), jnp.array([rate for _, rate in runs])
    nets = [build(method, base.images.shape[1], width, tasks_lib.CLASSES, seed) for seed, _ in runs]
    graph, state, opt_state = _stack([(net, RULE.init(nnx.state(net, nnx.Param))) for net in nets])
    found = []
    for task in range(plan.tasks):
        for number in range(plan.rounds):
            if method.change is not None:
                changed = []
                for (net, own), (seed, _) in zip(_unstack(graph, state, opt_state), runs, strict=True):
                    key = jax.random.fold_in(tasks_lib.task_key(seed, task), _CHANGE - number)
                    images = _images(plan.stream, base, seed, task)
                    changed.append(method.change(net, own, Moment(task, plan.tasks, number, images, key)))
                graph, state, opt_state = _stack(changed)
            state, opt_state = _round(graph, plan, base, seeds, rates, state, opt_state, task, number)
        found.append(jax.tree.map(np.asarray, _measure(graph, plan, base, seeds, state, task)))
        on_task(1)
    return [
        {name: [round(float(after[name][run]), 5) for after in found] for name in found[0]} for run in range(len(runs))
    ]


def _stack(nets: Sequence[tuple[nnx.Sequential, Any]]) -> tuple[Any, Any, Any]:
    graph = nnx.graphdef(nets[0][0])
    states, opt_states = [nnx.state(net) for net, _ in nets], [opt_state for _, opt_state in nets]
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (states, opt_states)]
    return graph, *stacked


def _unstack(graph: Any, state: Any, opt_state: Any) -> list[tuple[nnx.Sequential, Any]]:
    count = len(jax.tree.leaves(opt_state)[0])
    own = [jax.tree.map(lambda leaf, run=run: leaf[run], (state, opt_state)) for run in range(count)]
    return [(nnx.merge(graph, state), opt_state) for state, opt_state in own]


@functools.partial(jax.jit, static_argnums=0)
def _images(stream: str, base: tasks_lib.Task, seed: int, task: int) -> Array:
    return tasks_lib.STREAMS[stream](base, tasks_lib.task_key(seed, task)).images


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.vmap, in_axes=(None, None, None, 0, 0, 0, 0, None, None))
def _round(graph, plan, base, seed, rate, state, opt_state, task, number) -> tuple[Any, Any]:
    """Some epochs of a task."""
    key = tasks_lib.task_key(seed, task)
    own = tasks_lib.STREAMS[plan.stream](base, key)
    key = jax.random.fold_in(key, number)
    return train(graph, own, key, plan.epochs, plan.batch_size, rate, state, opt_state)


def train(
    graph: Any, task: tasks_lib.Task, key: PRNGKeyArray, epochs: int, batch_size: int, rate: Any, state: Any,
    opt_state: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The state and the optimiser's state after some epochs in shuffled whole batches; the loss is cross-entropy."""
    size = len(task.labels)
    used = size // batch_size * batch_size
    orders = jax.vmap(lambda key: jax.random.permutation(key, size)[:used])(jax.random.split(key, epochs))

    def loss(state: Any, batch: Array) -> Array:
        logits = nnx.merge(graph, state)(task.images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, task.labels[batch]).mean()

    def step(carry: Any, batch: Array) -> tuple[Any, None]:
        state, opt_state = carry
        updates, opt_state = RULE.update(jax.grad(loss)(state, batch), opt_state, state)
        return (optax.apply_updates(state, jax.tree.map(lambda u: -rate * u, updates)), opt_state), None

    return jax.lax.scan(step, (state, opt_state), orders.reshape(-1, batch_size))[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.vmap, in_axes=(None, None, None, 0, 0, None))
def _measure(graph, plan, base, seed, state, task) -> dict[str, Float[Array, ""]]:
    """What the net does on the test images of the task that it has just learnt."""
    own = tasks_lib.STREAMS[plan.stream](base, tasks_lib.task_key(seed, task))
    logits, seen = hidden(nnx.merge(graph, state), own.test_images)
    stats = [at.statistics for at in seen]
    features = seen[-1].h
    return {
        "accuracy": (logits.argmax(axis=1) == own.test_labels).mean(),
        "dead": jnp.concatenate([dead_units(layer) for layer in stats]).mean(),
        "dormant": jnp.concatenate([dormant_units(layer, TAU) for layer in stats]).mean(),
        "rank": jnp.nan_to_num(effective_rank(feature_moments(features))),
        "finite": jnp.isfinite(logits).all(),
    }
