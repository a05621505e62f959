"""How near is `linked(g)`, forward and backward, to the speed of a copy? It has little to compute and much to move.

    python -m benchmarks.bandwidth

A link reads z and the gradient of its outputs, and writes these outputs and the gradient of z: twice the bytes of z and
of the outputs, where all is fused. The ratio is the bytes a second of that, over those of a copy (twice the bytes of z)
of the same array in the same run. Goal on a GPU: 0.85. Times are medians of rounds in which all take turns.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks import turns
from experiments.engine.checks import known
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from linked_jax import ACTIVATION_NAMES, get_activation


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Bytes a second of links, forward and backward, over those of a copy."""

    links: tuple[str, ...] = ("lk_relu", "lk_swish", "fourier")
    """Names of links."""
    rows: int = 2**16
    """Of z."""
    channels: int = 256
    """Pre-activations in a row."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of z."""


def both_ways(link: Callable[[Any], Any], z: Array, cotangent: Array) -> tuple[Array, Array]:
    """The link's outputs, and the gradient of z."""
    h, pull = jax.vjp(link, z)
    return h, pull(cotangent)[0]


def main() -> None:
    """Measure, print the ratios, and write the record."""
    settings, console = turns.parse(Settings, "bandwidth"), Console()
    z = jax.random.normal(jax.random.key(0), (settings.rows, settings.channels), settings.dtype)
    # One more add is free, and unlike a mere copy it is not optimised away.
    actions: dict[str, Callable[[], Any]] = {"copy": functools.partial(jax.jit(lambda z: z + 1), z)}
    nbytes = {"copy": 2 * z.nbytes}
    for name in known("links", settings.links, ACTIVATION_NAMES):
        link = get_activation(name, settings.channels)
        cotangent = jnp.ones_like(link(z))
        actions[name] = functools.partial(jax.jit(functools.partial(both_ways, link)), z, cotangent)
        nbytes[name] = 2 * (z.nbytes + cotangent.nbytes)
    times = turns.medians(actions, settings.rounds, console, "links")
    moved = {name: nbytes[name] / taken for name, taken in times.items()}
    rows = [
        {"what": name, "GB/s": f"{rate / 1e9:.3g}", "over a copy": f"{rate / moved['copy']:.2f}"}
        for name, rate in moved.items()
    ]
    console.table(f"{settings.dtype} of shape {z.shape}, on {jax.devices()[0].device_kind}:", rows)
    turns.save(settings, "bandwidth", {"seconds": times, "bytes_a_second": moved})


if __name__ == "__main__":
    run_command(main)
