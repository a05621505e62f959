"""Train the toy's net on the whole set, and measure it at steps that are dense at first."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from experiments.dynamics.toy import Moons, Net, Toy
from experiments.engine.errors import NonFiniteLossError
from experiments.engine.loop import Loop, advance
from experiments.engine.optimizers import OPTIMIZERS
from experiments.engine.tasks import LossOf, cross_entropy
from linked_jax.diagnostics import dead_units
from linked_jax.probe import observe

_RULES = {name: OPTIMIZERS[name](1.0) for name in ("sgd", "adam")}  # the loop multiplies their updates by the rate
_BLOCKS = (1000, 100, 10, 1)  # steps


def snapshots(steps: int) -> list[int]:
    """The steps whose parameters are kept and whose surfaces are drawn.

    >>> from experiments.dynamics.training import snapshots
    >>> snapshots(10_000), snapshots(3)
    ([0, 10, 100, 1000, 10000], [0, 3])
    """
    return sorted({0, *(steps // 10**power for power in range(4))})


def recorded_steps(steps: int) -> list[int]:
    """The steps that leave a line: about equally many in each power of ten.

    >>> from experiments.dynamics.training import recorded_steps
    >>> recorded_steps(5)
    [0, 1, 2, 3, 4, 5]
    """
    return sorted({*snapshots(steps), *map(int, np.geomspace(1, steps, 80).round())})


def blocks(steps: int) -> list[int]:
    """The steps in blocks, each a program: of few different lengths, so that few are compiled.

    >>> from experiments.dynamics.training import blocks
    >>> blocks(2103)
    [1000, 1000, 100, 1, 1, 1]
    """
    lengths = []
    for length in _BLOCKS:
        lengths += steps // length * [length]
        steps %= length
    return lengths


def train(
    toy: Toy, data: Moons, *, act: str, seed: int, say: Callable[[str], None] = lambda _: None,
    on_steps: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train one net on the whole set: a line for each recorded step; those of snapshots have the parameters.

    `say` gets a line for each snapshot, `on_steps` the number of steps just done.

    Raises:
      NonFiniteLossError: as soon as a recorded step shows it.
    """
    net, units = toy.net(act, seed), toy.units
    loop = Loop(LossOf(nnx.graphdef(net)), _RULES[toy.optimizer], scanned=True)
    carry, done, lines = loop.start([net]), 0, []
    whole_set, key = np.arange(len(data.labels), dtype=np.int32), jax.random.key(0)  # no step draws anything
    for step in recorded_steps(toy.steps):
        for count in blocks(step - done):
            batches = np.broadcast_to(whole_set, (count, len(whole_set)))
            carry, _ = advance(loop, carry, data, batches, key, lr=toy.lr)
            on_steps(count)
        done = step
        found = jax.device_get(measure(nnx.merge(nnx.graphdef(net), carry.parameters), data))
        line = {"step": step, **{name: value.tolist() for name, value in found.items()}}
        leaves = jax.device_get(jax.tree.leaves(carry.parameters))
        if not all(np.isfinite(values).all() for values in (line["loss"], line["gradient_norms"], *leaves)):
            raise NonFiniteLossError(f"the loss or its gradient is not finite at step {step}; try a smaller --lr")
        if step in snapshots(toy.steps):
            line["parameters"] = [leaf.tolist() for leaf in leaves]
            say(
                f"{act} seed {seed}  step {step:>6,}  loss {line['loss']:.4f}  accuracy {line['accuracy']:.4f}  "
                f"dead {line['dead_units']}/{units}  one-sided {line['one_sided_units']}/{units}"
            )
        lines.append(line)
    return lines


@jax.jit
def measure(net: Net, data: Moons) -> dict[str, Array]:
    """Loss, accuracy, dead and one-sided units, and the norm of the loss's gradient by each unit's w and b."""
    loss, by = jax.value_and_grad(cross_entropy)(net, data, slice(None), None)  # on the whole set, and no randomness
    logits, (tap,) = observe(lambda net, x: net(x), net, data.points)
    return {
        "loss": loss,
        "accuracy": (logits.argmax(axis=-1) == data.labels).mean(),
        "dead_units": dead_units(tap.stats).sum(),
        "one_sided_units": (~((tap.stats.active > 0) & tap.stats.negative)).sum(),
        "gradient_norms": jnp.sqrt(jnp.square(by.hidden.kernel[...]).sum(axis=0) + jnp.square(by.hidden.bias[...])),
    }
