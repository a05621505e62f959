"""Train nets of one row on a stream of tasks, from its first task to the last, and go on where it was cut off."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from experiments.engine import tasks as tasks_lib
from experiments.engine.checkpoints import Checkpoints, like
from experiments.engine.data import Split
from experiments.engine.loop import Carry, Loop, advance
from experiments.engine.parallel import Placement
from experiments.plasticity.kumar.methods import Method, seeded
from experiments.plasticity.kumar.net import Activation, Online, magnitudes
from experiments.plasticity.kumar.problems import Problem, Task, batches, task
from linked_jax import embed_plain_kernel, lk_relu
from linked_jax.diagnostics import relative_sizes
from linked_jax.revive.names import leaf_names
from linked_jax.signal_statistics import effective_rank, feature_moments

DORMANT = 0.025
_MEASURED_ON = 256  # images of a task
_OF_NET, _OF_OPTIMIZER = 2**31 - 2, 2**31 - 3  # beside the numbers of tasks


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run is, but for its seed and its rate."""

    problem: Problem
    method: Method
    data: Split
    tasks: int

    @functools.cached_property
    def loops(self) -> tuple[Loop, Loop]:
        """Before the task in the middle, and from it on."""
        first = self._loop(self.method.act)
        return first, self._loop(self.method.at_end, first.optimizer) if self.method.at_end else first

    def _loop(self, act: Activation, optimizer: Any = None) -> Loop:
        graph = nnx.graphdef(nnx.eval_shape(lambda: self.method.net(self.problem, jax.random.key(0), act)))
        loss = Online(graph, self.problem.mean, self.problem.deviation)
        optimizer = optimizer or self.method.rule(self.problem)
        return Loop(loss, optimizer, Placement(stacked=True), own_data=True, scanned=True)

    def start(self, runs: Sequence[tuple[int, float]]) -> Carry:
        """The carry before the first task, of runs given by seed and rate."""
        key = lambda seed, what: jax.random.fold_in(jax.random.key(seed), what)  # noqa: E731
        nets = [self.method.net(self.problem, key(seed, _OF_NET)) for seed, _ in runs]
        loop = self.loops[0]
        fresh = [loop.optimizer.init(nnx.state(net, nnx.Param)) for net in nets]
        pairs = zip(fresh, runs, strict=True)
        return loop.start(nets, [seeded(state, rate, key(seed, _OF_OPTIMIZER)) for state, (seed, rate) in pairs])

    def loop_at(self, number: int) -> Loop:
        """The loop of a task."""
        return self.loops[number >= self.tasks // 2]

    def after(self, carry: Carry, tasks: int) -> Carry:
        """A carry with the shapes of that after so many tasks, of the one before the first."""
        return linked(carry) if self.method.at_end and tasks > self.tasks // 2 else carry


def learn(
    work: Work, runs: Sequence[tuple[int, float]], *, unfinished: Checkpoints | None = None,
    on_task: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The runs (seed, rate), together: each as alone, but for rounding.

    `unfinished` keeps where they are, so that the same call goes on after it was cut off. `on_task` is called with the
    number of tasks done since the last call.

    Returns:
      Of each run: accuracy, of each task the mean over its steps, before each was learnt; dormant, the share of hidden
      units; rank, the effective rank of the last hidden layer; weights, the root mean square of all weights, all three
      after each task; finite, whether the last logits are numbers; score, the mean accuracy of the tasks that count;
      training_seconds, its share of the time of all tasks, before it was cut off too.
    """
    found: list[dict[str, list[float]]] = []
    carry, done = work.start(runs), 0
    if unfinished is not None and (saved := unfinished.load()) is not None:
        found = saved.facts["found"]
        done = len(found)
        carry = jax.tree.map(jnp.asarray, like(saved, work.after(carry, done)))
        on_task(done)
    for number in range(done, work.tasks):
        began = time.perf_counter()
        carry, measured = _after_task(work, runs, carry, number)
        share = (time.perf_counter() - began) / len(runs)
        found.append(measured | {"training_seconds": [share] * len(runs)})
        on_task(1)
        if unfinished is not None and unfinished.due() and number + 1 < work.tasks:
            unfinished.save(carry, {"found": found})
    return [_line(work, found, place) for place in range(len(runs))]


def _after_task(
    work: Work, runs: Sequence[tuple[int, float]], carry: Carry, number: int
) -> tuple[Carry, dict[str, list[float]]]:
    """The carry after one more task, and what `learn` says of it: of each run, one number a measure."""
    if work.method.at_end and number == work.tasks // 2:
        carry = linked(carry)
    loop, seeds = work.loop_at(number), [seed for seed, _ in runs]
    parts = [task(work.problem, work.data, seed, number) for seed in seeds]
    own = Task(*(jnp.asarray(np.stack(part)) for part in zip(*parts, strict=True)))
    keys = jnp.stack([tasks_lib.task_key(seed, number) for seed in seeds])
    steps = np.stack([batches(work.problem, key, own.labels.shape[1]) for key in keys])
    carry, _ = advance(loop, carry, own, steps, keys)
    right = np.asarray(carry.state["right"].get_value()) / steps.shape[1]
    carry = carry._replace(state=jax.tree.map(jnp.zeros_like, carry.state))
    some = Task(own.images[:, :_MEASURED_ON], own.labels[:, :_MEASURED_ON])
    measured = jax.device_get(_measure(loop.loss, carry, some, keys))
    return carry, {"accuracy": right.tolist()} | {name: v.tolist() for name, v in measured.items()}


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def _measure(loss: Online, carry: Carry, some: Task, key: Array) -> dict[str, Float[Array, ""]]:
    net = nnx.merge(loss.graph, carry.parameters, carry.state, copy=True)
    hidden, logits = net.hidden_and_logits(loss.inputs(some.images), key)
    sizes = [magnitudes(h, net.arity) for h in hidden]
    scores = [relative_sizes(size, finite=jnp.isfinite(size)) for size in sizes]
    weights = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(carry.parameters)])
    return {
        "dormant": (jnp.concatenate(scores) <= DORMANT).mean(),
        "rank": jnp.nan_to_num(effective_rank(feature_moments(hidden[-1]))),
        "weights": jnp.nan_to_num(jnp.sqrt(jnp.square(weights).mean())),
        "finite": jnp.isfinite(logits).all().astype(jnp.float32),
    }


def linked(carry: Carry) -> Carry:
    """The carry of a ReLU net as that of the net of lk_relu with the same outputs: [W; 0], and so Adam's moments."""
    first = [leaf_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(carry.parameters)]
    kernels = {name for name in first if name[-1] == "kernel" and name != ("layers", "0", "kernel")}

    def grown(path: Any, leaf: Array) -> Array:
        return embed_plain_kernel(leaf, lk_relu) if leaf_names(path)[-3:] in kernels else leaf

    grow = functools.partial(jax.tree_util.tree_map_with_path, grown)
    return Carry(grow(carry.parameters), carry.state, grow(carry.opt_state))


def _line(work: Work, found: Sequence[dict[str, list[float]]], place: int) -> dict[str, Any]:
    of_run = {name: [round(after[name][place], 5) for after in found] for name in found[0]}
    counted = [a for number, a in enumerate(of_run["accuracy"]) if work.problem.hard(number)]
    finite, seconds = bool(of_run.pop("finite")[-1]), round(sum(of_run.pop("training_seconds")), 1)
    return {"score": round(float(np.mean(counted)), 5), **of_run, "finite": finite, "training_seconds": seconds}
