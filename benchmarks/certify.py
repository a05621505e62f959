"""`certify` over every float32 value, beside the loop that one would write by hand.

    python -m benchmarks.certify

By hand: chunks of 2^20 values through `jax.jvp` of the link, and the least of max_i |g_i'(z)|, jitted; every 16th chunk
is timed, times 16. `certify` also finds where a link is dead or not finite. Seconds; goal: 15. Minutes on two cores.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import turns
from experiments.engine.checks import known
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from linked_jax import ACTIVATION_NAMES, certify, get_activation

_CHUNK, _SHARE = 2**20, 16


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Time to try all float32 values."""

    rounds: int = 3
    """Timed rounds; in each, what is compared takes turns."""
    links: tuple[str, ...] = ("lk_relu", "lk_swish", "lk_gelu", "lk_tanh", "fourier")
    """Names of links."""


def by_hand(link: Callable[[jax.Array], jax.Array]) -> Callable[[], None]:
    """A function that tries some of the values in the plain way, compiled once."""

    @jax.jit
    def least(first: jax.Array) -> jax.Array:
        patterns = first + jnp.arange(_CHUNK, dtype=jnp.uint32)
        z = jax.lax.bitcast_convert_type(patterns, jnp.float32)[:, None]
        gradients = jnp.abs(jax.jvp(link, (z,), (jnp.ones_like(z),))[1])
        return jnp.nanmin(gradients.max(axis=-1))

    def share() -> None:
        for first in range(0, 2**32, _SHARE * _CHUNK):
            least(np.uint32(first)).block_until_ready()

    return share


def main() -> None:
    """Measure, print seconds, and write the record."""
    settings, console, results = turns.parse(Settings, "certify"), Console(), {}
    for name in known("links", settings.links, ACTIVATION_NAMES):
        link = get_activation(name, 1)
        ways = {"certify": functools.partial(certify, link), "by hand": by_hand(link)}
        found = turns.medians(ways, settings.rounds, console, name)
        results[name] = {"certify": found["certify"], "by hand": _SHARE * found["by hand"]}
    rows = [
        {"link": name, "certify": f"{taken['certify']:.1f} s", "by hand": f"{taken['by hand']:.1f} s"}
        for name, taken in results.items()
    ]
    console.table("All 2^32 float32 values:", rows)
    turns.save(settings, "certify", results)


if __name__ == "__main__":
    run_command(main)
