"""Amplitude-phase recombination (APR): images with the phase of one picture and the amplitude of another.

What is to be recognised lies mostly in the phase. Training on such images makes nets look there, and not at the
amplitude, which blur and noise change. It is an augmentation: the net stays as it is. Pure functions, for inside jit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from linked_jax.arrays import wide

Augmentation = Callable[[Array, Array], Array]
"""(key, images (N, H, W, C)) -> images of the same shape."""

_AXES = (-3, -2, -1)  # space and channels together


def recombine(
    amplitude_of: Float[Array, "... h w c"], phase_of: Float[Array, "... h w c"]
) -> Float[Array, "... h w c"]:
    """The amplitude of one image with the phase of another; the Fourier transform is over space and channels.

        x' = Re ifft(|fft(amplitude_of)| exp(i angle(fft(phase_of))))

    The inverse transform of real images is real up to rounding. Where a frequency of phase_of is exactly 0, it has
    phase 0, and derivative 0. Values may leave the range of the images.

    Args:
      amplitude_of: (..., H, W, C). The computation is in float32 at least.
      phase_of: of the same shape.

    Returns:
      An array like phase_of.

    Raises:
      TypeError: for integers, in which the result would be cut off.

    Reference: Chen et al., Amplitude-phase recombination, 2021.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.remedies.apr import recombine
      >>> x = jax.random.uniform(jax.random.key(0), (8, 8, 3))
      >>> bool(jnp.allclose(recombine(x, x), x, atol=1e-5)), bool(jnp.allclose(recombine(2 * x, x), 2 * x, atol=1e-5))
      (True, True)
    """
    for x in (amplitude_of, phase_of):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"images of floating-point numbers are recombined, got {x.dtype}; scale them first: x / 255"
            )
    spectrum_1, spectrum_2 = (jnp.fft.fftn(wide(x), axes=_AXES) for x in (amplitude_of, phase_of))
    one = jnp.ones((), spectrum_2.dtype)
    present = spectrum_2 != 0
    safe = jnp.where(present, spectrum_2, one)
    phase = jnp.where(present, safe / jnp.abs(safe).astype(safe.dtype), one)  # exp(i angle)
    return jnp.fft.ifftn(jnp.abs(spectrum_1).astype(phase.dtype) * phase, axes=_AXES).real.astype(phase_of.dtype)


def apr_p(key: Key[Array, ""], images: Float[Array, "n h w c"], *, probability: float = 0.6) -> Float[Array, "n h w c"]:
    """APR of pairs: each image keeps its phase and gets the amplitude of another image of the batch.

        x' = recombine(amplitude_of=x_perm, phase_of=x)   with the probability, for the whole batch; else x

    Labels stay those of x: they follow the phase. The paper trains on cross_entropy(x) + cross_entropy(x').

    Args:
      key: a PRNG key, for one coin and one permutation.
      images: (N, H, W, C). With N = 1 they come back as they are, but for rounding.
      probability: of mixing this batch.

    Returns:
      Mixed images like images. They are not clipped, so that they have exactly the amplitudes of others.

    Raises:
      ValueError: if the probability is not in [0, 1].

    Reference: Chen et al., Amplitude-phase recombination, 2021. An image may be its own partner, as in the authors'
    code.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.remedies.apr import apr_p
      >>> images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
      >>> mixed = jax.jit(apr_p)(jax.random.key(1), images)
      >>> mixed.shape
      (4, 8, 8, 1)
    """
    _check(probability)
    coin_key, order_key = jax.random.split(key)
    mixed = recombine(images[jax.random.permutation(order_key, len(images))], images)
    return jnp.where(jax.random.bernoulli(coin_key, probability), mixed, images)


def apr_s(
    key: Key[Array, ""],
    images: Float[Array, "n h w c"],
    augment_a: Augmentation,
    augment_b: Augmentation | None = None,
    *,
    probability: float = 0.5,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Float[Array, "n h w c"]:
    """APR of a single image: two random augmentations of it, the amplitude of one with the phase of the other.

        x_a, x_b = augment_a(x), augment_b(x)
        x' = clip(recombine(x_a, x_b)) or clip(recombine(x_b, x_a)), evenly,   with the probability, for each image
        x' = x_a   else

    Args:
      key: a PRNG key, for both augmentations and for the coins.
      images: (N, H, W, C) within value_range.
      augment_a: (key, images) -> images of the same shape; draws for each image by itself.
      augment_b: likewise, for the second of the two; if None augment_a draws twice.
      probability: of recombining an image.
      value_range: the least and the largest value of an image; recombined images are clipped to it.

    Returns:
      Augmented images like images.

    Raises:
      ValueError: if the probability is not in [0, 1], or the range is empty.

    Reference: Chen et al., Amplitude-phase recombination, 2021. In the authors' code x_b is an augmentation of x_a, and
    values out of range wrap around in uint8; here both are augmentations of x, and values are clipped.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.remedies.apr import apr_s
      >>> def gain(key, images):
      ...     return images * jax.random.uniform(key, (len(images), 1, 1, 1))
      >>> images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
      >>> apr_s(jax.random.key(1), images, gain).shape
      (4, 8, 8, 1)
    """
    _check(probability)
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range is the least and the largest value, got {value_range}; pass e.g. (0.0, 1.0)")
    a_key, b_key, coin_key, swap_key = jax.random.split(key, 4)
    a, b = augment_a(a_key, images), (augment_b or augment_a)(b_key, images)
    each = (len(images), 1, 1, 1)
    swap = jax.random.bernoulli(swap_key, shape=each)
    mixed = recombine(jnp.where(swap, b, a), jnp.where(swap, a, b))
    return jnp.where(jax.random.bernoulli(coin_key, probability, each), jnp.clip(mixed, low, high), a)


def _check(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is between 0 and 1, got {probability}; the paper has 0.6 for APR-P")
