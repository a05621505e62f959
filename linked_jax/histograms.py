"""Histograms over many orders of magnitude, in fixed bins; those of two batches are added. Pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from linked_jax.arguments import as_array
from linked_jax.arrays import wide

LOWEST, HIGHEST = -40, 23
"""The exponents k of the bins 2^k <= |x| < 2^(k+1): gradients vanish in the first, pre-activations explode in the last.
"""
_PER_SIGN = HIGHEST - LOWEST + 1
BINS = 2 * _PER_SIGN + 1


def bin_edges() -> Float[np.ndarray, " edges"]:
    """The BINS + 1 edges of the bins, in rising order.

        -inf, -2^23, ..., -2^-40, 2^-40, ..., 2^23, inf

    The bin in the middle has zeros and what is smaller than 2^-40; the outermost ones have infinity too. A bin holds
    its edge on the side of 0, and not the other.

    Examples:
      >>> from linked_jax.histograms import BINS, bin_edges
      >>> bin_edges()[BINS // 2 : BINS // 2 + 3] == [-(2**-40), 2**-40, 2**-39]
      array([ True,  True,  True])
    """
    powers = 2.0 ** np.arange(LOWEST, HIGHEST + 1)
    return np.concatenate([[-np.inf], -powers[::-1], powers, [np.inf]])


def log_histogram(x: Float[Array, "*n"], *, where: Bool[Array, "..."] | None = None) -> Float[Array, " bins"]:
    """How many elements lie in each bin: the exponent of a float is read off its bits, so that no bin is missed.

    Counts are exact for one batch; a sum of them, in float32, is exact up to 2^24 and correct to 6e-8 a batch beyond.

    Args:
      x: of any shape.
      where: which elements count, broadcast to x; all if None.

    Returns:
      Counts, (BINS,), float32. NaN is in no bin.

    Raises:
      ValueError: if where has no booleans, or a shape that does not broadcast to that of x.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.histograms import BINS, bin_edges, log_histogram
      >>> counts = log_histogram(jnp.array([1.0, 1.5, -3.0, 0.0, jnp.nan]))
      >>> [(float(edge), int(n)) for edge, n in zip(bin_edges()[1:], counts) if n]
      [(-2.0, 1), (9.094947017729282e-13, 1), (2.0, 2)]
    """
    x = wide(as_array(x))
    where = jnp.ones((), bool) if where is None else as_array(where)
    pairs = zip(reversed(where.shape), reversed(x.shape), strict=False)
    if where.dtype != bool or where.ndim > x.ndim or any(n not in (1, m) for n, m in pairs):
        raise ValueError(f"where has booleans that broadcast to {x.shape}, got {where.dtype} of shape {where.shape}")
    kept = ~jnp.isnan(x) & where
    info = jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), f"int{info.bits}")
    exponents = (bits >> info.nmant) - (info.maxexp - 1)  # of what is denormal the lowest of all
    distance = jnp.clip(exponents - (LOWEST - 1), 0, _PER_SIGN).astype(jnp.int32)
    index = _PER_SIGN + jnp.where(x < 0, -distance, distance)
    counts = jnp.zeros(BINS, jnp.int32).at[jnp.where(kept, index, BINS).ravel()].add(1, mode="drop")
    return counts.astype(jnp.float32)
