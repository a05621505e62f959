"""What formulas over channels need of arrays: float32 at least, and a number for each channel beside the data."""

from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def wide_dtype(dtype: Any) -> Any:
    """The dtype, or float32 if that has more precision.

    >>> from linked_jax.arrays import wide_dtype
    >>> wide_dtype("bfloat16"), wide_dtype("float64")
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 4 else jnp.dtype(jnp.float32)


def like(values: Any, x: Any) -> Any:
    """Values for each channel, or each output of a kernel, with as many axes as x has: in front, of size 1."""
    return jnp.expand_dims(values, range(x.ndim - values.ndim))


def wide(x: Any) -> Any:
    """x in float32 at least: sums of many numbers of half precision are wrong."""
    return x.astype(wide_dtype(x.dtype))


Number = float | Array
"""A number, or a scalar array, which may be traced: of `optax.inject_hyperparams`, or of a vmap over strengths."""


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a `Number` is a plain one, which can be checked."""
    return isinstance(value, int | float | np.number)
