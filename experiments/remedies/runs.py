"""The runs of the comparison: which there are, how each trains, what it leaves."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.covariate_shift import inputs
from experiments.engine import data as data_lib
from experiments.engine import training
from experiments.engine.records import Record
from experiments.engine.timing import step_times
from experiments.remedies.methods import METHODS
from experiments.remedies.table import STRESSES, chosen, learners
from linked_jax.probe import observe
from linked_jax.signal_statistics import activation_shift, variance

BATCH, MICRO_BATCH = 32, 2
MICRO_EPOCHS = 5  # times fewer epochs with batches of 2, which are still more updates


@dataclasses.dataclass(frozen=True)
class Work:
    """The work that is the same for all methods: a data set and a number of epochs."""

    data: data_lib.Dataset
    epochs: int

    @property
    def micro_epochs(self) -> int:
        """The epochs with batches of 2."""
        return max(1, self.epochs // MICRO_EPOCHS)

    def build(self, net: str, method: str, seed: int) -> nnx.Module:
        """The network of a run, before training."""
        return METHODS[method].build(net, self.data.train_images.shape[1:], self.data.classes, seed)

    def plan(self, net: str, method: str, stress: str, rate: float) -> training.Plan:
        """How a run trains."""
        optimizer, factor = METHODS[method].rule(net, rate)
        seen = inputs({"inputs": "raw" if stress == "raw" else "standardised"}, self.data)
        epochs, size = (self.micro_epochs, MICRO_BATCH) if stress == "batch 2" else (self.epochs, BATCH)
        return training.Plan(optimizer, epochs, size, lr=factor, inputs=seen)

    def run(self, net: str, row: str, stress: str, rate: float, seed: int) -> dict[str, Any]:
        """Train; the measures of the last epoch, or how the run diverged."""
        plan = self.plan(net, row, stress, rate)
        model, lines = training.train(self.build(net, row, seed), self.data, plan, seed)
        last = lines[-1]
        if "diverged" in last:
            return {"diverged": last["diverged"]}
        kept = {key: last[key] for key in ("test_accuracy", "train_loss", "units", "dead_units")}
        return kept | {"shift": relative_shift(model, data_lib.scale(self.data.test_images, plan.inputs))}

    def step_seconds(self, net: str, methods: Sequence[str], steps: int, advance: Callable[[int], None]) -> list[float]:
        """Median seconds of a step of each method, in turns."""
        started = []
        for method in methods:
            plan = self.plan(net, method, "none", METHODS[method].rates[0])
            started.append((*training.start([self.build(net, method, 0)], plan), plan))
        return step_times(started, self.data, steps, advance)


def relative_shift(model: nnx.Module, images: Any) -> float:
    """How far units of a layer differ in what they see; 0 where all have the same mean.

    std over units of E[z] / sqrt(mean over units of var z), averaged over the layers that `probe` sees
    """
    return statistics.fmean(map(float, _shifts(model, images)))


@jax.jit
def _shifts(model: Any, images: Any) -> list[jax.Array]:
    _, taps = observe(lambda model, x: model(x, train=False), model, images)
    tiny = jnp.finfo(jnp.float32).tiny
    return [activation_shift(tap.stats).spread / jnp.sqrt(variance(tap.stats).mean() + tiny) for tap in taps]


def planned(methods: Sequence[str], nets: Sequence[str], seeds: int, stress: bool) -> int:
    """How many runs there are, had all methods learned."""
    stressed = len(STRESSES) * seeds if stress else 0
    return len(nets) * sum(len(METHODS[method].rates) + seeds - 1 + stressed for method in methods)


def of_method(
    record: Record, net: str, method: str, *, seeds: int, stress: bool, make: Callable[..., dict[str, Any]]
) -> Iterator[int]:
    """Every run of a method in a network, once: its rates with seed 0, the other seeds at the best, then under stress.

    Only methods that learn run under stress. Runs that the record has are not made again; the line of a new one is what
    `make` gives for net=, row=, stress=, rate= and seed=.

    Yields:
      How many of the `planned` runs are done since the last time; those that a method that does not learn is spared
      count as done.
    """

    def once(stress: str, rate: float, seed: int) -> int:
        key = {"net": net, "row": method, "stress": stress, "rate": rate, "seed": seed}
        record.once(key, functools.partial(make, **key))
        return 1

    for rate in METHODS[method].rates:
        yield once("none", rate, 0)
    rate = chosen(net, method, record.lines)[0]["rate"]
    for seed in range(1, seeds):
        yield once("none", rate, seed)
    if stress and method not in learners(net, record.lines):
        yield len(STRESSES) * seeds
    elif stress:
        for name in STRESSES:
            for seed in range(seeds):
                yield once(name, rate * (10 if name == "rate x10" else 1), seed)
