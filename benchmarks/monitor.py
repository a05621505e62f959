"""What does a `Monitor` cost? A training loop with and without one, and one report beside one training step.

    python -m benchmarks.monitor

A linked conv net on digits, Adam. The loops with and without the monitor take turns, and so do the training step, the
forward pass and the report, on the same batch; times are medians after warm-up. The first report, for which the model
is traced and compiled, is timed by itself. With --with-loss a report has gradients too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from benchmarks import turns
from experiments.engine import data as data_lib
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from linked_jax import LinkedConv, LinkedLinear
from linked_jax.probe import Monitor


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Time of a training loop with and without a monitor, and of one report."""

    depth: int = 4
    """3x3 convs."""
    width: int = 32
    """Units in every layer."""
    batch_size: int = 128
    """Images of a step, and of a report."""
    every: int = 100
    """Steps from report to report."""
    steps: int = 300
    """Steps of a loop."""
    rounds: int = 7
    """Timed rounds of loops, which take turns. Each piece is timed ten times as often."""
    with_loss: bool = False
    """Let the monitor measure gradients too."""


class Bench:
    """The net, its training step, and a monitor of it."""

    def __init__(self, settings: Settings):
        self.settings = settings
        data, rngs, width = data_lib.load("digits"), nnx.Rngs(0), settings.width
        if settings.batch_size > len(data.train_labels):
            raise UsageError(f"--batch-size is at most the {len(data.train_labels)} images, got {settings.batch_size}")
        convs = (LinkedConv(width, width, (3, 3), rngs=rngs) for _ in range(settings.depth - 1))
        net = nnx.Sequential(
            nnx.Conv(1, width, (3, 3), rngs=rngs),
            *convs,
            lambda z: z.mean((1, 2)),
            LinkedLinear(width, data.classes, rngs=rngs),
        )
        graph, self.params = nnx.split(net, nnx.Param)
        self.images = data.train_images[: settings.batch_size].astype(np.float32) / 255
        self.labels, optimizer = data.train_labels[: settings.batch_size], optax.adam(1e-3)
        self.opt_state = optimizer.init(self.params)

        def model_fn(params: Any, images: Array) -> Array:
            return nnx.merge(graph, params)(images)

        def loss_fn(logits: Array, labels: Array) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        @jax.jit
        def step(params: Any, opt_state: Any, images: Array, labels: Array) -> tuple[Any, Any]:
            grads = jax.grad(lambda params: loss_fn(model_fn(params, images), labels))(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return optax.apply_updates(params, updates), opt_state

        self.step, self.forward = step, jax.jit(model_fn)
        batches, loss = ([(self.images, self.labels)], loss_fn) if settings.with_loss else ([self.images], None)
        self.monitor = Monitor(batches, every=settings.every, call=model_fn, loss_fn=loss)

    def loop(self, monitor: Callable[[int, Any], Any] | None = None) -> Any:
        """Train; with a monitor, there is a report from time to time."""
        carry = self.params, self.opt_state
        for step in range(self.settings.steps):
            if monitor:
                monitor(step, carry[0])
            carry = self.step(*carry, self.images, self.labels)
        return carry


def main() -> None:
    """Measure, print the ratios, and write the record."""
    settings, console = turns.parse(Settings, "monitor"), Console()
    bench = Bench(settings)
    pieces = {  # the parameters stay as they are
        "training step": lambda: bench.step(bench.params, bench.opt_state, bench.images, bench.labels),
        "forward pass": lambda: bench.forward(bench.params, bench.images),
        "report": lambda: bench.monitor(0, bench.params),
    }
    results = {"first report": turns.seconds(pieces["report"])}
    results |= turns.medians(pieces, 10 * settings.rounds, console, "pieces")
    loops = {"loop": bench.loop, "loop with monitor": lambda: bench.loop(bench.monitor)}
    results |= turns.medians(loops, settings.rounds, console, "loops")
    unit = dict.fromkeys(results, results["training step"]) | dict.fromkeys(loops, results["loop"])
    console.table(
        f"{settings.depth} linked convs of {settings.width} units on {jax.devices()[0].device_kind}, relative to a "
        f"training step, and to the loop of {settings.steps} steps:",
        [
            {"what": name, "milliseconds": f"{1e3 * taken:.3g}", "relative": f"{taken / unit[name]:.3g}"}
            for name, taken in results.items()
        ],
    )
    turns.save(settings, "monitor", results)


if __name__ == "__main__":
    run_command(main)
