"""Arrays for tests: random ones, members side by side, and a comparison of trees."""

import jax
import jax.numpy as jnp
import numpy as np


def white(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def laid_out(parts, layout):
    """The members' outputs along the last axis, written without the library's own join."""
    if layout == "blocked":
        return jnp.concatenate(parts, -1)
    return jnp.stack(parts, -1).reshape(*parts[0].shape[:-1], -1)


def close(actual, desired, tolerance):
    def leaf(a, b):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(jnp.abs(b).max())), rtol=0)

    jax.tree.map(leaf, actual, desired)
