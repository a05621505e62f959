"""A 3x3 convolution with 16 products for every 36, and both of its gradients: for CPUs and many channels.

Winograd's F(2x2, 3x3). A tile X of 4x4 pixels, which overlaps the next one by two, gives 2x2 pixels Y of x * K:

    Y = A' [(G K G') . (B' X B)] A,    dL/dK = G' [sum over tiles of (B' X B) . (A dL/dY A')] G

where . is a product over channels: a matrix product for each of the 16 places in a tile. B' X B, A' M A and A g A' are
sums and differences of pixels, of a few images at a time, so that they stay in the cache. Rounding is about twice that
of the direct sums.

Reference: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

WINDOW = (3, 3)
_PIXELS = 2048  # of the images at a time; measured: python -m benchmarks.convolution
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])

Pads = tuple[tuple[int, int], ...]


def convolve(x: Array, kernel: Array, pads: Pads, precision: lax.PrecisionLike = None) -> Array:
    """x * K: (N, H, W, C) -> (N, H', W', C_out), H' = H + padding - 2."""
    (height, down), (width, across) = _outputs(x, pads)
    weights = jnp.einsum("ai,bj,ijcd->abcd", *_g(x), kernel, precision="highest").reshape(16, *kernel.shape[2:])

    def of_images(x: Array) -> Array:
        products = jnp.matmul(_of_tiles(x, pads), weights, precision=precision)
        products = products.reshape(4, 4, len(x), down, across, -1)
        pixels = jnp.stack([jnp.stack(_a_transposed(row), axis=3) for row in _a_transposed(products)], axis=2)
        return pixels.reshape(len(x), 2 * down, 2 * across, -1)[:, :height, :width]

    return lax.map(of_images, _few(x, at_once(x))).reshape(len(x), height, width, -1)


def image_gradient(g: Array, kernel: Array, pads: Pads, precision: lax.PrecisionLike = None) -> Array:
    """dL/dx from g = dL/dy: a convolution of g with the flipped kernel."""
    around = tuple((2 - low, 2 - high) for low, high in pads)
    return convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), around, precision)


def kernel_gradient(x: Array, g: Array, pads: Pads, precision: lax.PrecisionLike = None) -> Array:
    """dL/dK from g = dL/dy."""

    def add(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
        x, g = images
        return total + jnp.matmul(_of_tiles(x, pads).swapaxes(1, 2), _spread(g), precision=precision), None

    total, count = jnp.zeros((16, x.shape[-1], g.shape[-1]), x.dtype), at_once(x)
    total, _ = lax.scan(add, total, (_few(x, count), _few(g, count)))
    return jnp.einsum("ai,bj,abcd->ijcd", *_g(x), total.reshape(4, 4, *total.shape[1:]), precision="highest")


def at_once(x: Array) -> int:
    """How many images there are in a step: a power of two that divides theirs."""
    return math.gcd(len(x), 2 ** int(math.log2(max(1, _PIXELS // (x.shape[1] * x.shape[2])))))


def _few(x: Array, count: int) -> Array:
    return x.reshape(-1, count, *x.shape[1:])


def _outputs(x: Array, pads: Pads) -> list[tuple[int, int]]:
    """Of each axis of space: pixels, and tiles."""
    sizes = [n + sum(pad) - 2 for n, pad in zip(x.shape[1:3], pads, strict=True)]
    return [(size, -(-size // 2)) for size in sizes]


def _of_tiles(x: Array, pads: Pads) -> Array:
    """B' X B of all tiles: (16, tiles, C)."""
    (_, down), (_, across) = _outputs(x, pads)
    (top, _), (left, _) = pads
    x = jnp.pad(x, [(0, 0), (top, 2 * down + 2 - top - x.shape[1]), (left, 2 * across + 2 - left - x.shape[2]), (0, 0)])
    rows = _b_transposed([x[:, a : a + 2 * down - 1 : 2] for a in range(4)])
    tiles = [_b_transposed([row[:, :, b : b + 2 * across - 1 : 2] for b in range(4)]) for row in rows]
    return jnp.stack([place.reshape(-1, x.shape[-1]) for row in tiles for place in row])


def _spread(g: Array) -> Array:
    """A g A' of all tiles: (16, tiles, C_out)."""
    g = jnp.pad(g, [(0, 0), (0, g.shape[1] % 2), (0, g.shape[2] % 2), (0, 0)])
    tiles = [_a([row[:, :, 0::2], row[:, :, 1::2]]) for row in _a([g[:, 0::2], g[:, 1::2]])]
    return jnp.stack([place.reshape(-1, g.shape[-1]) for row in tiles for place in row])


def _g(x: Array) -> tuple[Array, Array]:
    g = jnp.asarray(_G, x.dtype)
    return g, g


def _b_transposed(x: Sequence[Array]) -> list[Array]:
    return [x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]]


def _a_transposed(m: Sequence[Array] | Array) -> list[Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _a(y: Sequence[Array]) -> list[Array]:
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]
