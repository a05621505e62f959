"""What does linking cost? A linked conv net beside the plain net of equal width and the naive concatenation.

    python -m benchmarks.linked_layer

plain     nnx.Conv after jax.nn.relu: what a user has now.
naive     nnx.Conv after jnp.concatenate([relu(z), relu(-z)]): what a user would write.
linked    linked_jax.LinkedConv; on a CPU its convolutions are products of patches, which are fast and take memory.
lax       linked_jax.LinkedConv with jax.lax's convolution.

Step time is forward and backward, the median of rounds in which all take turns; memory is XLA's temporary buffers
of the compiled step. Both relative to the plain net. Memory goal, under scan: lax <= 0.9 plain and <= 0.45 naive.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from benchmarks import turns
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from linked_jax import LinkedConv


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Step time and memory of a linked conv net beside the plain one and the naive concatenation."""

    depth: int = 50
    """Conv layers."""
    width: int = 4
    """Pre-activations of every layer."""
    size: int = 16
    """Height and width of the images."""
    batch_size: int = 128
    """Images."""


def naive_link(z: Array) -> Array:
    """CReLU by concatenation."""
    return jnp.concatenate([jax.nn.relu(z), jax.nn.relu(-z)], axis=-1)


LAYERS: dict[str, Callable[[int, nnx.Rngs], Any]] = {
    "plain": lambda width, rngs: nnx.Sequential(jax.nn.relu, nnx.Conv(width, width, (3, 3), rngs=rngs)),
    "naive": lambda width, rngs: nnx.Sequential(naive_link, nnx.Conv(2 * width, width, (3, 3), rngs=rngs)),
    "linked": lambda width, rngs: LinkedConv(width, width, (3, 3), rngs=rngs),
    "lax": lambda width, rngs: LinkedConv(
        width, width, (3, 3), conv_general_dilated=jax.lax.conv_general_dilated, rngs=rngs
    ),
}


def compile_step(name: str, settings: Settings, *, scan: bool) -> tuple[Any, tuple[Any, Array]]:
    """The compiled gradient of a net's mean square, and its arguments."""
    layers = nnx.vmap(lambda rngs: LAYERS[name](settings.width, rngs))(nnx.Rngs(0).split(settings.depth))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def step(layers: Any, images: Array) -> Array:
        z, _ = jax.lax.scan(lambda z, layer: (layer(z), None), images, layers, unroll=1 if scan else settings.depth)
        return jnp.square(z).mean()

    shape = (settings.batch_size, settings.size, settings.size, settings.width)
    arguments = (layers, jax.random.normal(jax.random.key(0), shape))
    return step.lower(*arguments).compile(), arguments


def measure(settings: Settings, console: Console, *, scan: bool) -> dict[str, dict[str, float]]:
    """For each net: temporary memory in bytes, and the median seconds of a step."""
    steps = {name: compile_step(name, settings, scan=scan) for name in LAYERS}
    actions = {name: functools.partial(step, *arguments) for name, (step, arguments) in steps.items()}
    times = turns.medians(actions, settings.rounds, console, "scanned layers" if scan else "unrolled layers")
    return {
        name: {"temporary_bytes": step.memory_analysis().temp_size_in_bytes, "step_seconds": times[name]}
        for name, (step, _) in steps.items()
    }


def main() -> None:
    """Measure, print the ratios, and write the record."""
    settings, console = turns.parse(Settings, "linked_layer"), Console()
    results = {mode: measure(settings, console, scan=mode == "scanned") for mode in ("scanned", "unrolled")}
    rows = [
        {
            "layers": mode,
            "net": name,
            "step time": f"{net['step_seconds'] / nets['plain']['step_seconds']:.2f}",
            "memory": f"{net['temporary_bytes'] / nets['plain']['temporary_bytes']:.2f}",
            "memory to naive": f"{net['temporary_bytes'] / nets['naive']['temporary_bytes']:.2f}",
        }
        for mode, nets in results.items()
        for name, net in nets.items()
    ]
    console.table(f"{settings.depth} conv layers of {settings.width} units, relative to the plain net:", rows)
    turns.save(settings, "linked_layer", results)


if __name__ == "__main__":
    run_command(main)
