"""Pixels behind a link become features."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def flatten(h: Float[Array, "n *space linked_c"], arity: int) -> Float[Array, "n features"]:
    """(N, *space, d*C) -> (N, d*P*C): all P pixels of the first member, then those of the next.

    So it is the output of a blocked link of P*C units, which is what an initialiser of the next kernel takes it for.

    >>> import jax.numpy as jnp
    >>> from experiments.engine.flatten import flatten
    >>> flatten(jnp.array([[[1, -1], [2, -2]]]), 2)
    Array([[ 1,  2, -1, -2]], dtype=int32)
    """
    return jnp.moveaxis(h.reshape(len(h), -1, arity, h.shape[-1] // arity), 2, 1).reshape(len(h), -1)
