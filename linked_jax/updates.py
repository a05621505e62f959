"""How large a step is beside the weights that it changes."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from linked_jax.arrays import wide


def update_ratios(updates: Any, weights: Any) -> Any:
    """The update-to-weight ratio of every parameter: about 1e-3 in a net that learns well.

        ||u|| / ||w||,   Euclidean norms over all elements of a leaf

    0 where nothing is updated, weights that are all 0 included; infinity where weights that are all 0 are updated.
    Leaves of half precision are measured in float32, and no square overflows or underflows.

    Args:
      updates: what is added to the weights: that of `optax.GradientTransformation.update`, or the difference of the
        weights of two steps.
      weights: a pytree of the same structure.

    Returns:
      The same pytree with a scalar for each leaf.

    Raises:
      ValueError: if the trees or the shapes of their leaves differ, or a leaf is not of floats.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.updates import update_ratios
      >>> update_ratios({"w": jnp.array([0.03, 0.04])}, {"w": jnp.array([3.0, 4.0])})
      {'w': Array(0.01, dtype=float32)}

    Reference: Karpathy, CS231n, Neural networks 3: learning and evaluation, 2015; You et al., Large batch training of
    convolutional networks, 2017, whose trust ratio is its inverse but for the learning rate.
    """
    structures = jax.tree.structure(updates), jax.tree.structure(weights)
    if structures[0] != structures[1]:
        raise ValueError(f"updates and weights are trees of one structure, got {structures[0]} and {structures[1]}")
    return jax.tree.map(_ratio, updates, weights)


def _ratio(update: Array, weight: Array) -> Float[Array, ""]:
    floats = all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in (update, weight))
    if jnp.shape(update) != jnp.shape(weight) or not floats:
        kinds = " and ".join(f"{jnp.result_type(x)} of shape {jnp.shape(x)}" for x in (update, weight))
        raise ValueError(f"an update and its weight are floats of one shape, got {kinds}; pass the trees of one step")
    step, size = _norm(update), _norm(weight)
    ratio = step / jnp.where(size == 0, 1, size)
    return jnp.where((size == 0) & (step > 0), jnp.inf, ratio)


def _norm(x: Array) -> Float[Array, ""]:
    x = wide(jnp.abs(x))
    largest = x.max(initial=0)
    most = jnp.finfo(x.dtype).max / 8  # of more the reciprocal, by which XLA may divide, is denormal
    unit = jnp.where((largest == 0) | ~jnp.isfinite(largest), 1, jnp.minimum(largest, most))
    return unit * jnp.sqrt(jnp.square(x / unit).sum())
