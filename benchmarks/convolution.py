"""`linked_jax.convolution` beside `jax.lax`, on a CPU: values, gradients, and layers within a loop.

    python -m benchmarks.convolution

narrow    in times out at most 36 channels: a band of kernels (`linked_jax/convolution/banded.py`).
wide      at least 16 x 16 channels: Winograd's form (`linked_jax/convolution/winograd.py`).

Times are medians of rounds in which ours and lax take turns alone, as a larger program cools the caches for the next;
`kernel / forward` is the gradient of the kernel over x * K.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from benchmarks import turns
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from linked_jax import convolution

SHAPES = (
    (32, 16, 8, 4), (128, 16, 8, 4), (64, 32, 8, 4), (128, 32, 8, 4), (128, 16, 6, 6),
    (128, 32, 16, 16), (128, 32, 32, 16), (64, 16, 32, 16),
    (64, 16, 48, 48), (64, 32, 96, 96), (64, 32, 192, 96), (64, 16, 384, 192), (64, 8, 192, 192),
)  # fmt: skip
"""Images, their height and width, channels in and out; windows are 3x3."""
_LAYERS = 8
Conv = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Convolutions on a CPU in our forms, beside those of jax.lax."""

    rounds: int = 10
    """Timed rounds; in each, what is compared takes turns."""


def _conv(function: Callable[..., Array]) -> Conv:
    return lambda x, k: function(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


CONVS = {"ours": _conv(convolution.conv_general_dilated), "lax": _conv(lax.conv_general_dilated)}


def loop(conv: Conv, x: Array, kernel: Array) -> Array:
    """The gradient of a few layers in a scan, all with this kernel."""

    def layers(kernel: Array) -> Array:
        repeat = -(-kernel.shape[-2] // kernel.shape[-1])

        def layer(z: Array, _: None) -> tuple[Array, None]:
            return jnp.tile(conv(z, kernel), repeat)[..., : z.shape[-1]], None

        return jnp.square(lax.scan(layer, x, None, length=_LAYERS)[0]).mean()

    return jax.grad(layers)(kernel)


def programs(shape: tuple[int, int, int, int]) -> dict[str, Callable[[], Any]]:
    """What is timed of one shape, compiled, by name."""
    images, size, c, c_out = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(images, size, size, c)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, c, c_out)) / (9 * c) ** 0.5, jnp.float32)
    g = CONVS["lax"](x, kernel)
    found = {}
    for name, conv in CONVS.items():
        found[f"forward {name}"] = functools.partial(jax.jit(conv), x, kernel)
        of_kernel = jax.jit(lambda x, k, g, conv=conv: jax.vjp(lambda k: conv(x, k), k)[1](g))
        found[f"kernel {name}"] = functools.partial(of_kernel, x, kernel, g)
        both = jax.jit(lambda x, k, g, conv=conv: jax.vjp(conv, x, k)[1](g))
        found[f"gradients {name}"] = functools.partial(both, x, kernel, g)
        if c * c_out <= convolution.NARROW:
            found[f"loop {name}"] = functools.partial(jax.jit(functools.partial(loop, conv)), x, kernel)
    return found


def main() -> None:
    """Measure, print the ratios, and write the record."""
    settings, console = turns.parse(Settings, "convolution"), Console()
    if jax.default_backend() != "cpu":
        raise UsageError("on other platforms our convolution is that of jax.lax; run it with JAX_PLATFORMS=cpu")
    results, rows = [], []
    for shape in SHAPES:
        images, size, c, c_out = shape
        name = f"{images} x {size}x{size}, {c} to {c_out}"
        made, times = programs(shape), {}
        for what in ("forward", "kernel", "gradients", "loop"):
            rivals = {way: made[way] for way in (f"{what} {by}" for by in CONVS) if way in made}
            times |= turns.medians(rivals, settings.rounds, console, f"{name}, {what}")
        results.append({"images": images, "size": size, "channels": [c, c_out], "seconds": times})
        ratios = {
            what: f"{times[f'{what} lax'] / times[f'{what} ours']:.2f}" if f"{what} lax" in times else "-"
            for what in ("forward", "kernel", "gradients", "loop")
        }
        rows.append(
            {"3x3 convolution": name, **ratios}
            | {f"kernel / forward, {by}": f"{times[f'kernel {by}'] / times[f'forward {by}']:.2f}" for by in CONVS}
        )
    console.table("Time of jax.lax over ours; above 1 ours is faster:", rows)
    turns.save(settings, "convolution", results)


if __name__ == "__main__":
    run_command(main)
