"""A convolution of few channels as a matrix product, and both of its gradients: for CPUs.

For few channels the product of patches and kernel is too thin to be fast. Here B pixels of a row, with the pixels
around them, are one patch, and the kernel is a band of copies of K:

    Y = patches(x) band(K),    dL/dX = patches(g) band(flipped(K)),    dL/dband(flipped(K)) = patches(g)' X

with g = dL/dY. Products are as fast within a loop, where XLA's convolutions on a CPU are many times slower. Outside of
one the two are closer, and XLA's are faster for the largest patches (results/benchmarks/convolution.json).
"""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from linked_jax.convolution.geometry import Geometry

_PIXELS = 2  # B; measured: python -m benchmarks.convolution


def convolve(x: Array, kernel: Array, at: Geometry) -> Array:
    """x * K."""
    (*out, width), (*_, k), (*around, (low, _)) = at.outputs, at.window, at.pads
    c, c_out = kernel.shape[-2:]
    blocks, seen = -(-width // _PIXELS), _PIXELS + k - 1
    x = jnp.pad(x, [(0, 0), *around, (low, blocks * _PIXELS - _PIXELS + seen - low - at.space[-1]), (0, 0)])
    rows = jnp.stack([x[..., b * _PIXELS : b * _PIXELS + seen, :] for b in range(blocks)], axis=-3)
    rows = rows.reshape(*rows.shape[:-2], seen * c)
    taps = itertools.product(*map(range, at.window[:-1]))
    near = [[slice(t, t + n) for t, n in zip(tap, out, strict=True)] for tap in taps]
    patches = jnp.concatenate([rows[:, *some] for some in near], axis=-1)

    shifts = jnp.stack([jnp.eye(seen, _PIXELS, -t, dtype=kernel.dtype) for t in range(k)])
    band = jnp.einsum("tsp,...tio->...sipo", shifts, kernel, precision="highest")  # row, pixel seen, in, pixel, out
    y = jnp.matmul(patches, band.reshape(-1, _PIXELS * c_out), precision=at.precision)
    return y.reshape(len(x), *out, -1, c_out)[..., :width, :]


def image_gradient(g: Array, kernel: Array, at: Geometry) -> Array:
    """dL/dx from g = dL/dy: a convolution of g with the flipped kernel."""
    around = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(at.window, at.pads, strict=True))
    flipped = jnp.flip(kernel, range(kernel.ndim - 2)).swapaxes(-1, -2)
    return convolve(g, flipped, at._replace(space=at.outputs, pads=around))


def kernel_gradient(x: Array, g: Array, at: Geometry) -> Array:
    """dL/dK from g = dL/dy."""
    kernel = jax.ShapeDtypeStruct((*at.window, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: image_gradient(g, kernel, at), kernel)(x)[0]
