"""How far does the loss of a net in good health rise once it is linked? With and without a warm-up of new weights.

    python -m benchmarks.warm_up

An MLP on digits is trained with Adam, then linked with its optimiser's state, and trained on: as it was (not linked),
linked at once (0), and with `warm_up_new` over some steps. All ways of a seed see the same batches. The loss is that of
all training images, after every update; each number is the largest of those after linking, or the last one, relative to
that before linking. The medians of the seeds are printed. A few minutes on two cores.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from benchmarks import turns
from experiments.engine import data as data_lib
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from linked_jax import lk_relu
from linked_jax.revive import link_sequential, link_sequential_opt_state, warm_up_new

_WARM_UPS = ("not linked", 0, 30, 100, 300, 1000)


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Loss of a net in good health after it is linked, by steps of warm-up."""

    rounds: int = 10
    """Seeds."""
    width: int = 128
    """Units in each of two hidden layers."""
    batch_size: int = 32
    """Images of an update."""
    rate: float = 1e-3
    """Adam's learning rate."""
    before: int = 2000
    """Updates before the net is linked."""
    after: int = 500
    """Updates after it."""


class Bench:
    """The data, and a loop that measures the loss after every update."""

    def __init__(self, settings: Settings):
        self.settings, data = settings, data_lib.load("digits")
        self.images = jnp.asarray(data.train_images, jnp.float32).reshape(len(data.train_images), -1) / 255
        self.labels = jnp.asarray(data.train_labels)
        self.classes = data.classes

    def net(self, seed: int) -> nnx.Sequential:
        """A plain net."""
        rngs, width = nnx.Rngs(seed), self.settings.width
        return nnx.Sequential(
            nnx.Linear(self.images.shape[1], width, rngs=rngs),
            jax.nn.relu,
            nnx.Linear(width, width, rngs=rngs),
            jax.nn.relu,
            nnx.Linear(width, self.classes, rngs=rngs),
        )

    def train(
        self, model: nnx.Sequential, tx: optax.GradientTransformation, state: Any, steps: int, key: Array
    ) -> tuple[nnx.Sequential, Any, np.ndarray]:
        """The net, the optimiser's state, and the loss of all images after each update."""
        graph, params = nnx.split(model)

        def loss(params: Any, images: Array, labels: Array) -> Array:
            logits = nnx.merge(graph, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(carry: Any, key: Array) -> tuple[Any, Array]:
            params, state = carry
            batch = jax.random.randint(key, (self.settings.batch_size,), 0, len(self.labels))
            grads = jax.grad(loss)(params, self.images[batch], self.labels[batch])
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), loss(params, self.images, self.labels)

        scanned = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
        (params, state), losses = scanned((params, state), jax.random.split(key, steps))
        return nnx.merge(graph, params), state, np.asarray(losses)

    def measure(self, seed: int) -> dict[str, dict[str, float]]:
        """By way: the largest loss after linking and the last one, relative to that before."""
        tx, before, after = optax.adam(self.settings.rate), jax.random.key(seed), jax.random.key(1000 + seed)
        plain = self.net(seed)
        plain, state, losses = self.train(plain, tx, tx.init(nnx.state(plain)), self.settings.before, before)
        linked, linked_state = link_sequential(plain, lk_relu), link_sequential_opt_state(state, plain, lk_relu, tx=tx)
        found = {}
        for steps in _WARM_UPS:
            if steps == "not linked":
                way = plain, tx, state
            elif steps == 0:
                way = linked, tx, linked_state
            else:
                warm = warm_up_new(int(steps))
                way = linked, optax.chain(tx, warm), (linked_state, warm.init(nnx.state(linked)))
            *_, then = self.train(*way, self.settings.after, after)
            found[str(steps)] = {"largest": float(then.max() / losses[-1]), "last": float(then[-1] / losses[-1])}
        return found


def rows(results: list[dict[str, dict[str, float]]]) -> list[dict[str, str]]:
    """Of the table, which docs/optimisers.md has too: a row for each way, of all seeds."""
    table = []
    for steps in map(str, _WARM_UPS):
        largest, last = ([found[steps][name] for found in results] for name in ("largest", "last"))
        worst = {"largest loss": f"{np.median(largest):.2f}", "in the worst seed": f"{max(largest):.2f}"}
        table.append({"steps of warm-up": steps, **worst, "last loss": f"{np.median(last):.2f}"})
    return table


def main() -> None:
    """Measure, print medians and largest values, and write the record."""
    settings, console = turns.parse(Settings, "warm_up"), Console()
    bench, results = Bench(settings), []
    with console.progress("seeds", settings.rounds) as advance:
        for seed in range(settings.rounds):
            results.append(bench.measure(seed))
            advance(1)
    console.table(
        f"The loss in {settings.after} updates after linking, relative to that before; median of {settings.rounds}:",
        rows(results),
    )
    turns.save(settings, "warm_up", results)


if __name__ == "__main__":
    run_command(main)
