"""Random flips and shifts, inside jit, as Keras' ImageDataGenerator does them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

SHIFT = 0.1  # of the height and of the width, at most; the paper's All-CNN and ResNet


def flip_and_shift(
    key: Key[Array, ""], images: UInt8[Array, "n h w c"], shift: float | Float[Array, ""] = SHIFT
) -> UInt8[Array, "n h w c"]:
    """Flip each image left to right with probability 1/2, and move it by up to `shift` of its size.

    Shifts are uniform in [-shift, shift] of the height and of the width, rounded to whole pixels; pixels that come in
    from outside repeat the edge (Keras' fill_mode="nearest").

    >>> import jax, jax.numpy as jnp
    >>> from experiments.engine.augment import flip_and_shift
    >>> image = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 4, 1)
    >>> flip_and_shift(jax.random.key(1), image, shift=0.0).ravel().tolist() in ([0, 1, 2, 3], [3, 2, 1, 0])
    True
    """
    n, height, width, _ = images.shape
    flip_key, row_key, column_key = jax.random.split(key, 3)
    flip = jax.random.bernoulli(flip_key, shape=(n, 1))

    def source(key: Array, size: int) -> Array:
        moved = jnp.round(jax.random.uniform(key, (n, 1), minval=-shift, maxval=shift) * size).astype(jnp.int32)
        return jnp.clip(jnp.arange(size) + moved, 0, size - 1)

    rows, columns = source(row_key, height), source(column_key, width)
    columns = jnp.where(flip, width - 1 - columns, columns)
    return images[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
