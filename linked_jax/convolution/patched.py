"""A convolution as one matrix product of patches and kernel, and both of its gradients, at any strides: for CPUs.

    Y = patches(x) K,    dL/dK = patches(x)' g,    dL/dx = g K', each tap of it added where it lies,    g = dL/dY

XLA makes gradients of strided convolutions of dilated ones, which are mostly zeros; here there are none.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from linked_jax.arrays import wide_dtype
from linked_jax.convolution.geometry import Geometry, few


def convolve(x: Array, kernel: Array, at: Geometry) -> Array:
    """x * K."""

    def of_images(x: Array) -> Array:
        return jnp.matmul(_patches(x, at), kernel.reshape(-1, kernel.shape[-1]), precision=at.precision)

    return lax.map(of_images, few(x, at)).reshape(len(x), *at.outputs, kernel.shape[-1])


def image_gradient(g: Array, kernel: Array, at: Geometry) -> Array:
    """dL/dx from g = dL/dy.

    Along an axis with stride s, tap t of output o lies at pixel t + s o of the padded image. That is number
    o + floor(t / s) of the pixels p, p + s, ... with p = t mod s.
    """
    count = [
        max(m + (k - 1) // s, -(-(n + low) // s))
        for m, k, s, n, (low, _) in zip(at.outputs, at.window, at.strides, at.space, at.pads, strict=True)
    ]
    c, ndim = kernel.shape[-2], len(at.space)

    def of_images(g: Array) -> Array:
        products = _product(g, kernel.reshape(-1, kernel.shape[-1]).T, at)
        zeros = jnp.zeros((len(g), *count, c), products.dtype)
        sums = dict.fromkeys(itertools.product(*map(range, at.strides)), zeros)
        for tap, product in zip(_taps(at), jnp.split(products, math.prod(at.window), axis=-1), strict=True):
            number, phase = zip(*map(divmod, tap, at.strides), strict=True)
            around = [(i, r - m - i) for i, r, m in zip(number, count, at.outputs, strict=True)]
            sums[phase] += jnp.pad(product, [(0, 0), *around, (0, 0)])
        dx = jnp.stack(list(sums.values())).reshape(*at.strides, len(g), *count, c)
        side_by_side = [axis for i in range(ndim) for axis in (ndim + 1 + i, i)]
        dx = dx.transpose(ndim, *side_by_side, 2 * ndim + 1)
        dx = dx.reshape(len(g), *(r * s for r, s in zip(count, at.strides, strict=True)), c)
        dx = dx[:, *(slice(low, low + n) for n, (low, _) in zip(at.space, at.pads, strict=True))]
        return dx.astype(g.dtype)

    return lax.map(of_images, few(g, at)).reshape(len(g), *at.space, c)


def kernel_gradient(x: Array, g: Array, at: Geometry) -> Array:
    """dL/dK from g = dL/dy."""
    c, c_out = x.shape[-1], g.shape[-1]

    @jax.checkpoint  # or transposing would lay out the patches of all images
    def add(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
        patches, g = _patches(images[0], at), images[1].reshape(-1, c_out)
        return total + _product(patches.reshape(len(g), -1).T, g, at), None

    total = jnp.zeros((math.prod(at.window) * c, c_out), wide_dtype(x.dtype))
    total, _ = lax.scan(add, total, (few(x, at), few(g, at)))
    return total.reshape(*at.window, c, c_out).astype(x.dtype)


def _product(a: Array, b: Array, at: Geometry) -> Array:
    """A matrix product in float32 at least, of which more are added: sums in half precision are biased."""
    return jnp.matmul(a, b, precision=at.precision, preferred_element_type=wide_dtype(a.dtype))


def _patches(x: Array, at: Geometry) -> Array:
    """Of each output the pixels under the window, tap by tap: (N, *outputs, window * C)."""
    x = jnp.pad(x, [(0, 0), *at.pads, (0, 0)])
    seen = [
        [slice(t, t + s * (m - 1) + 1, s) for t, s, m in zip(tap, at.strides, at.outputs, strict=True)]
        for tap in _taps(at)
    ]
    return jnp.concatenate([x[:, *pixels] for pixels in seen], axis=-1)


def _taps(at: Geometry) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, at.window)))
