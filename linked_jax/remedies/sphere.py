"""The unit sphere of kernels whose columns have norm 1: tangents, geodesics, and the way there."""

import math
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from linked_jax.arrays import Number, is_number, like, wide

Kernel = Float[Array, "... rows c_out"]


def tangent(y: Kernel, g: Kernel, *, clip: Number = math.inf) -> Kernel:
    """The part of a gradient that is tangent to the sphere, shortened to at most `clip` in each column.

        h = g - (y.g) y,   h <- h min(1, clip / ||h||)

    >>> import jax.numpy as jnp
    >>> from linked_jax.remedies.sphere import tangent
    >>> tangent(jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [3.0]])).ravel()
    Array([0., 3.], dtype=float32)
    """
    h = g - column_dot(y, g) * y
    h = h - column_dot(y, h) * y  # again: where g is almost parallel to y, the first h is mostly rounding
    if is_number(clip) and clip == math.inf:
        return h
    norm = column_norm(h)
    return jnp.where(norm > clip, clip * h / jnp.where(norm > clip, norm, 1), h)


def geodesic(y: Kernel, delta: Kernel) -> tuple[Kernel, Kernel]:
    """The exponential map: the end of the geodesic from y along delta, and delta in parallel transport to there.

        Exp_y(delta) = y cos||delta|| + u sin||delta||,   delta <- ||delta|| (u cos||delta|| - y sin||delta||)

    with u = delta / ||delta||; delta = 0 changes nothing. A geodesic is a great circle, and the way is ||delta|| long.
    Columns of y have norm 1, and those of delta are tangent there; the same holds for the two that are returned.

    >>> import jax.numpy as jnp
    >>> from linked_jax.remedies.sphere import geodesic
    >>> y, _ = geodesic(jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [jnp.pi / 6]]))
    >>> [round(float(each), 4) for each in y[:, 0]]
    [0.866, 0.5]
    """
    n = column_norm(delta)
    cos, sin_over_n = jnp.cos(n), jnp.sinc(n / jnp.pi)
    return y * cos + delta * sin_over_n, delta * cos - y * n * jnp.sin(n)


def column_dot(a: Array, b: Array) -> Array:
    """The inner product of each column, (1, ..., c_out)."""
    return (wide(a) * b).sum(tuple(range(a.ndim - 1)), keepdims=True)


def column_norm(a: Array) -> Array:
    """The norm of each column, (1, ..., c_out); its derivative at a column of zeros is 0."""
    return like(optax.safe_norm(a.reshape(-1, a.shape[-1]), 0.0, axis=0), a)


def unit_columns(p: Any) -> Array:
    """Columns of norm 1, of float32 at least; one of zeros stays."""
    p = wide(p)
    norm = column_norm(p)
    return p / jnp.where(norm > 0, norm, 1)
