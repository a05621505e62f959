"""A 3x3 convolution with 16 products for every 36, and both of its gradients: for CPUs and many channels.

Winograd's F(2x2, 3x3). A tile X of 4x4 pixels, which overlaps the next one by two, gives 2x2 pixels Y of x * K:

    Y = A' [(G K G') . (B' X B)] A,    dL/dK = G' [sum over tiles of (B' X B) . (A dL/dY A')] G

where . is a product over channels: a matrix product for each of the 16 places in a tile. B' X B, A' M A and A g A' are
sums and differences of pixels. Rounding is of the size of the direct sums' own.

Reference: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from linked_jax.convolution.geometry import Geometry, few

WINDOW = (3, 3)
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def convolve(x: Array, kernel: Array, at: Geometry) -> Array:
    """x * K."""
    g = jnp.asarray(_G, x.dtype)
    weights = jnp.einsum("ai,bj,ijcd->abcd", g, g, kernel, precision="highest").reshape(16, *kernel.shape[2:])
    height, width = at.outputs

    def of_images(x: Array) -> Array:
        products = jnp.matmul(_of_tiles(x, at), weights, precision=at.precision)
        products = products.reshape(4, 4, len(x), *_tiles(at), -1)
        pixels = jnp.stack([jnp.stack(_a_transposed(row), axis=3) for row in _a_transposed(products)], axis=2)
        down, across = _tiles(at)
        return pixels.reshape(len(x), 2 * down, 2 * across, -1)[:, :height, :width]

    return lax.map(of_images, few(x, at)).reshape(len(x), height, width, -1)


def image_gradient(g: Array, kernel: Array, at: Geometry) -> Array:
    """dL/dx from g = dL/dy: a convolution of g with the flipped kernel."""
    around = tuple((2 - low, 2 - high) for low, high in at.pads)
    return convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), at._replace(space=at.outputs, pads=around))


def kernel_gradient(x: Array, g: Array, at: Geometry) -> Array:
    """dL/dK from g = dL/dy."""

    @jax.checkpoint  # or transposing would lay out the tiles of all images
    def add(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
        x, g = images
        return total + jnp.matmul(_of_tiles(x, at).swapaxes(1, 2), _spread(g), precision=at.precision), None

    total = jnp.zeros((16, x.shape[-1], g.shape[-1]), x.dtype)
    total, _ = lax.scan(add, total, (few(x, at), few(g, at)))
    back = jnp.asarray(_G, x.dtype)
    return jnp.einsum("ai,bj,abcd->ijcd", back, back, total.reshape(4, 4, *total.shape[1:]), precision="highest")


def _tiles(at: Geometry) -> list[int]:
    return [-(-size // 2) for size in at.outputs]


def _of_tiles(x: Array, at: Geometry) -> Array:
    """B' X B of all tiles: (16, tiles, C)."""
    down, across = _tiles(at)
    ends = [2 * count + 2 - low - n for count, n, (low, _) in zip(_tiles(at), at.space, at.pads, strict=True)]
    x = jnp.pad(x, [(0, 0), *((low, end) for (low, _), end in zip(at.pads, ends, strict=True)), (0, 0)])
    rows = _b_transposed([x[:, a : a + 2 * down - 1 : 2] for a in range(4)])
    tiles = [_b_transposed([row[:, :, b : b + 2 * across - 1 : 2] for b in range(4)]) for row in rows]
    return jnp.stack([place.reshape(-1, x.shape[-1]) for row in tiles for place in row])


def _spread(g: Array) -> Array:
    """A g A' of all tiles: (16, tiles, C_out)."""
    g = jnp.pad(g, [(0, 0), (0, g.shape[1] % 2), (0, g.shape[2] % 2), (0, 0)])
    tiles = [_a([row[:, :, 0::2], row[:, :, 1::2]]) for row in _a([g[:, 0::2], g[:, 1::2]])]
    return jnp.stack([place.reshape(-1, g.shape[-1]) for row in tiles for place in row])


def _b_transposed(x: Sequence[Array]) -> list[Array]:
    return [x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]]


def _a_transposed(m: Sequence[Array] | Array) -> list[Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _a(y: Sequence[Array]) -> list[Array]:
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]
