"""What the forms of a convolution y = x * K share: its sizes, and how many images they take at a time."""

import math
from typing import NamedTuple

from jax import lax
from jaxtyping import Array

_PIXELS = 2048  # of the images at a time; measured: python -m benchmarks.convolution


class Geometry(NamedTuple):
    """Of images (N, *space, C), a kernel (*window, C, C_out) and y (N, *outputs, C_out)."""

    space: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    precision: lax.PrecisionLike = None

    @property
    def outputs(self) -> tuple[int, ...]:
        """The space of y."""
        sizes = zip(self.space, self.window, self.strides, self.pads, strict=True)
        return tuple((n + sum(pad) - k) // s + 1 for n, k, s, pad in sizes)


def few(x: Array, geometry: Geometry) -> Array:
    """Images in steps of a few, whose temporaries fit a cache: (N, ...) -> (steps, images, ...)."""
    count = math.gcd(len(x), 2 ** int(math.log2(max(1, _PIXELS // math.prod(geometry.space)))))
    return x.reshape(-1, count, *x.shape[1:])
