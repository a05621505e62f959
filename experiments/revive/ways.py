"""How a harmed net goes on, and how it is trained and measured."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from experiments.engine import tasks
from experiments.engine.data import Dataset
from experiments.engine.loop import advance
from experiments.engine.records import Record
from experiments.engine.tasks import Task
from experiments.plasticity.net import METHODS, RULE, Net, build, linked, loop_for, redo_dormant
from linked_jax.diagnostics import dead_units
from linked_jax.probe import observe

UNITS = 64
OFFSET = 5.0
"""Added to the standardised pixels."""
HARMS = {"partly": 0.01, "wholly": 0.03}
"""How much dies -> Adam's rate."""
RATE = 1e-3
BATCH_SIZE = 32
Line = dict[str, Any]


def shifted(data: Dataset) -> Task:
    """The standardised images plus the offset."""
    task = tasks.flat(data, len(data.train_labels))
    return task._replace(images=task.images + OFFSET, test_images=task.test_images + OFFSET)


def fresh(name: str, task: Task, seed: int) -> Net:
    """A new net: a row of `experiments.plasticity`."""
    model = build(METHODS[name], task.images.shape[1], UNITS, tasks.CLASSES, seed)
    return model, RULE.init(nnx.state(model, nnx.Param))


WAYS: dict[str, Callable[[Net, Task, int], Net]] = {
    "continued": lambda harmed, _task, _seed: harmed,
    "redo": lambda harmed, task, seed: redo_dormant(harmed, task.images, jax.random.key(seed)),
    "revived": lambda harmed, _task, _seed: linked(harmed),
    "fresh": lambda _harmed, task, seed: fresh("relu", task, seed),
    "fresh_linked": lambda _harmed, task, seed: fresh("lk_relu", task, seed),
}
"""How a net goes on: (harmed, task, seed) -> the net at that moment."""


def run_seed(
    record: Record, task: Task, harm: str, seed: int, *, harmful_epochs: int, epochs: int, say: Callable[[str], None],
    on_net: Callable[[int], None],
) -> None:  # fmt: skip
    """Add the nets of a seed that the record lacks. If one is missing, the harmed net is trained again.

    `say` gets a line for each way, `on_net` is called after each net with 1.
    """
    key = jax.random.key(seed)

    @functools.cache
    def harmed() -> tuple[Net, Line]:
        return fit(fresh("relu", task, seed), task, key, harmful_epochs, HARMS[harm])

    def went_on(way: str) -> Line:
        before, _ = harmed()
        net = WAYS[way](before, task, seed)
        logits, now = before[0](task.test_images), net[0](task.test_images)
        _, found = fit(net, task, jax.random.fold_in(key, 1), epochs, RATE, redo=way == "redo")
        accuracy, dead = found["accuracy"], found["dead"]
        say(
            f"{harm} seed {seed}  {way:<12} accuracy {accuracy[0]:.4f} -> {accuracy[-1]:.4f}, dead units "
            f"{dead[0]} -> {dead[-1]}"
        )
        compared = {"difference": jnp.abs(now - logits), "largest_logit": jnp.abs(logits)}
        return {**found, **{name: float(values.max()) for name, values in compared.items()}}

    here = {"harm": harm, "seed": seed}
    record.once({**here, "way": "harmed"}, lambda: harmed()[1])
    on_net(1)
    for way in WAYS:
        record.once({**here, "way": way}, functools.partial(went_on, way))
        on_net(1)


def fit(net: Net, task: Task, key: PRNGKeyArray, epochs: int, rate: float, *, redo: bool = False) -> tuple[Net, Line]:
    """Train, and measure before the first epoch and after each; with ReDo before each but the first."""
    found = [measure(net[0], task)]
    for epoch in range(1, epochs + 1):
        own = jax.random.fold_in(key, epoch)
        model, opt_state = redo_dormant(net, task.images, own) if redo and epoch > 1 else net
        loop = loop_for(model)
        batches = tasks.batches(own, len(task.labels), epochs=1, batch_size=BATCH_SIZE)
        carry, _ = advance(loop, loop.start([model], [opt_state]), task, batches, own, lr=rate)
        net = nnx.merge(nnx.graphdef(model), carry.parameters), carry.opt_state
        found.append(measure(net[0], task))
    return net, {name: [after[name] for after in found] for name in found[0]}


def measure(model: nnx.Sequential, task: Task) -> Line:
    """The test accuracy, and each layer's units that are zero on all training images, a unit being a whole link."""
    accuracy, dead = _measure(model, task)
    return {"accuracy": round(float(accuracy), 5), "dead": [int(count) for count in dead]}


@jax.jit
def _measure(model, task) -> tuple[Any, list[Any]]:
    _, taps = observe(lambda model, x: model(x), model, task.images)
    right = model(task.test_images).argmax(axis=1) == task.test_labels
    return right.mean(), [dead_units(tap.stats).sum() for tap in taps]
