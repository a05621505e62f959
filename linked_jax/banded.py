"""A convolution of few channels as a matrix product, and both of its gradients: for CPUs.

For few channels the product of patches and kernel is too thin to be fast. Here B pixels of a row, with the pixels
around them, are one patch, and the kernel is a band of copies of K:

    Y = patches(x) band(K),    dL/dX = patches(g) band(flipped(K)),    dL/dband(flipped(K)) = patches(g)' X

with g = dL/dY.
Products are as fast within a loop, where XLA's convolutions on a CPU are many times slower. Outside of one they are
faster too, unless the patches are many megabytes (results/benchmarks/convolution.json).
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_PIXELS = 2  # B; measured: python -m benchmarks.convolution

Pads = tuple[tuple[int, int], ...]


def convolve(x: Array, kernel: Array, pads: Pads, precision: lax.PrecisionLike = None) -> Array:
    """x * K: (N, *space, C) -> (N, *space', C_out), in any number of axes."""
    *window, c, c_out = kernel.shape
    out = [n + sum(pad) - k + 1 for n, pad, k in zip(x.shape[1:-1], pads, window, strict=True)]
    blocks, seen = -(-out[-1] // _PIXELS), _PIXELS + window[-1] - 1
    (*around, (low, _)), width = pads, x.shape[-2]
    x = jnp.pad(x, [(0, 0), *around, (low, blocks * _PIXELS - _PIXELS + seen - low - width), (0, 0)])
    rows = jnp.stack([x[..., b * _PIXELS : b * _PIXELS + seen, :] for b in range(blocks)], axis=-3)
    rows = rows.reshape(*rows.shape[:-2], seen * c)
    taps = itertools.product(*map(range, window[:-1]))
    near = [[slice(t, t + n) for t, n in zip(tap, out[:-1], strict=True)] for tap in taps]
    patches = jnp.concatenate([rows[:, *some] for some in near], axis=-1)

    shifts = jnp.stack([jnp.eye(seen, _PIXELS, -t, dtype=kernel.dtype) for t in range(window[-1])])
    band = jnp.einsum("tsp,...tio->...sipo", shifts, kernel, precision="highest")  # row, pixel seen, in, pixel, out
    y = jnp.matmul(patches, band.reshape(-1, _PIXELS * c_out), precision=precision)
    return y.reshape(len(x), *out[:-1], -1, c_out)[..., : out[-1], :]


def image_gradient(g: Array, kernel: Array, pads: Pads, precision: lax.PrecisionLike = None) -> Array:
    """dL/dx from g = dL/dy: a convolution of g with the flipped kernel."""
    around = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape, pads, strict=False))
    return convolve(g, jnp.flip(kernel, range(kernel.ndim - 2)).swapaxes(-1, -2), around, precision)


def kernel_gradient(x: Array, g: Array, pads: Pads, precision: lax.PrecisionLike = None) -> Array:
    """dL/dK from g = dL/dy."""
    window = [n + sum(pad) - m + 1 for n, m, pad in zip(x.shape[1:-1], g.shape[1:-1], pads, strict=True)]
    kernel = jax.ShapeDtypeStruct((*window, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: image_gradient(g, kernel, pads, precision), kernel)(x)[0]
