import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from linked_jax.remedies.apr import apr_p, apr_s, recombine
from tests.cases import first_fast

AXES = (-3, -2, -1)


def images(n=4, height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).random((n, height, width, channels))


def by_hand(amplitude_of, phase_of):
    """The formula as it stands, and the imaginary part that it drops."""
    amplitude, angle = np.abs(np.fft.fftn(amplitude_of, axes=AXES)), np.angle(np.fft.fftn(phase_of, axes=AXES))
    complete = np.fft.ifftn(amplitude * np.exp(1j * angle), axes=AXES)
    return complete.real, complete.imag


def darken(key, x):
    return x * jax.random.uniform(key, (len(x), 1, 1, 1), x.dtype)


def gained(key, x, gain):
    del key
    return gain * x


# --- recombination


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 8, 3), (7, 5, 1), (1, 1, 1), (2, 3, 4)]))
def test_recombination_is_the_formula(seed, shape):
    a, p = images(2, *shape, seed=seed), images(2, *shape, seed=seed + 1)
    wanted, dropped = by_hand(a, p)
    assert np.abs(dropped).max() < 1e-12
    with jax.enable_x64(True):
        x = recombine(jnp.asarray(a), jnp.asarray(p))
    np.testing.assert_allclose(x, wanted, atol=1e-12)
    np.testing.assert_allclose(np.abs(np.fft.fftn(x, axes=AXES)), np.abs(np.fft.fftn(a, axes=AXES)), atol=1e-10)


def test_the_phase_is_that_of_the_second_image():
    a, p = images(2, seed=1), images(2, seed=2)
    with jax.enable_x64(True):
        x = np.asarray(recombine(jnp.asarray(a), jnp.asarray(p)))
    found, wanted = np.fft.fftn(x, axes=AXES), np.fft.fftn(p, axes=AXES)
    np.testing.assert_allclose(found / np.abs(found), wanted / np.abs(wanted), atol=1e-8)


def test_an_image_with_itself_is_itself_in_float32():
    x = jnp.asarray(images(6, 32, 32, 3), jnp.float32)
    np.testing.assert_allclose(recombine(x, x), x, atol=1e-5)


@pytest.mark.slow
def test_an_image_without_any_phase_gets_phase_zero_and_no_nan():
    a, zeros = jnp.asarray(images(1), jnp.float32), jnp.zeros((1, 8, 8, 3))
    value, pull = jax.vjp(recombine, a, zeros)
    np.testing.assert_allclose(value, by_hand(np.asarray(a), np.asarray(zeros))[0], atol=1e-5)
    assert all(np.isfinite(by).all() for by in pull(jnp.ones_like(value)))
    value, pull = jax.vjp(recombine, zeros, a)
    np.testing.assert_array_equal(value, zeros)
    assert all(np.isfinite(by).all() for by in pull(jnp.ones_like(value)))


@pytest.mark.slow
def test_gradients_against_differences():
    with jax.enable_x64(True):
        pair = jnp.asarray(images(1, 3, 4, 2)), jnp.asarray(images(1, 3, 4, 2, 1))
        check_grads(jax.jit(recombine), pair, order=1, modes=["rev"], rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_computed_in_float32():
    a, p = (jnp.asarray(images(2, seed=seed), jnp.bfloat16) for seed in (0, 1))
    x = recombine(a, p)
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, recombine(a.astype(jnp.float32), p.astype(jnp.float32)).astype(jnp.bfloat16))


# --- APR of pairs


@functools.partial(jax.jit, static_argnames="probability")
def pairs(key, x, probability):
    return apr_p(key, x, probability=probability)


@pytest.mark.slow
@pytest.mark.parametrize("seed", first_fast(range(4)))
def test_a_mixed_batch_has_the_amplitudes_of_a_permutation_and_its_own_phases(seed):
    x = images(5, seed=seed)
    with jax.enable_x64(True):
        mixed = np.asarray(pairs(jax.random.key(seed), jnp.asarray(x), 1.0))
    amplitude, amplitudes = (np.abs(np.fft.fftn(y, axes=AXES)) for y in (mixed, x))
    distance = np.abs(amplitude[:, None] - amplitudes[None]).max(axis=(2, 3, 4))
    partner = distance.argmin(axis=1)
    assert sorted(partner) == list(range(5))
    np.testing.assert_allclose(mixed, by_hand(x[partner], x)[0], atol=1e-10)


@pytest.mark.slow
def test_one_coin_for_a_batch_at_the_probability():
    x, keys = jnp.asarray(images(3), jnp.float32), jax.random.split(jax.random.key(0), 2000)
    mixed = jax.jit(jax.vmap(lambda key: apr_p(key, x)))(keys)
    plain = np.asarray((mixed == x).all(axis=(2, 3, 4)))
    all_plain = plain.all(axis=1)
    # a mixed batch differs by rounding at least, even where an image is its own partner
    assert abs((1 - all_plain.mean()) - 0.6) < 5 * np.sqrt(0.24 / 2000)
    assert not plain[~all_plain].any()


def test_probability_zero_and_a_batch_of_one_give_the_images_back():
    x = jnp.asarray(images(4), jnp.float32)
    np.testing.assert_array_equal(pairs(jax.random.key(0), x, 0.0), x)
    np.testing.assert_allclose(pairs(jax.random.key(0), x[:1], 1.0), x[:1], atol=1e-5)


@pytest.mark.slow
def test_jit_equals_eager_and_the_key_decides():
    x = jnp.asarray(images(4), jnp.float32)
    one = apr_p(jax.random.key(3), x, probability=1.0)
    np.testing.assert_allclose(pairs(jax.random.key(3), x, 1.0), one, atol=1e-5)
    assert np.abs(np.asarray(apr_p(jax.random.key(4), x, probability=1.0)) - one).max() > 0.05


# --- APR of a single image


@pytest.mark.slow
def test_recombined_images_are_clipped_and_the_others_are_the_first_augmentation():
    x = jnp.asarray(images(400, 6, 6, 1), jnp.float32)
    bright, dark = (functools.partial(gained, gain=gain) for gain in (1.0, 0.5))
    y = np.asarray(apr_s(jax.random.key(0), x, bright, dark))
    # the phases are equal, so a recombined image is x or x / 2; others are x
    halved = np.abs(y - 0.5 * x).max(axis=(1, 2, 3)) < 1e-5
    whole = np.abs(y - x).max(axis=(1, 2, 3)) < 1e-5
    assert (halved ^ whole).all()
    assert abs(halved.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)


@pytest.mark.slow
def test_values_out_of_range_are_clipped_not_wrapped():
    x = images(50, 6, 6, 1)
    inverted = functools.partial(lambda _, x: 1 - x)
    with jax.enable_x64(True):
        y = np.asarray(apr_s(jax.random.key(1), jnp.asarray(x), gained_by_2, inverted, probability=1.0))
        wide = np.asarray(
            apr_s(jax.random.key(1), jnp.asarray(x), gained_by_2, inverted, probability=1.0, value_range=(-1e9, 1e9))
        )
    choices = [by_hand(2 * x, 1 - x)[0], by_hand(1 - x, 2 * x)[0]]
    nearest = np.min([np.abs(wide - choice).max(axis=(1, 2, 3)) for choice in choices], axis=0)
    assert nearest.max() < 1e-10
    assert wide.max() > 1.2
    assert wide.min() < -0.2
    np.testing.assert_array_equal(y, np.clip(wide, 0, 1))


def gained_by_2(key, x):
    return gained(key, x, 2.0)


@pytest.mark.slow
def test_one_augmentation_draws_twice_and_probability_zero_is_plain_augmentation():
    x = jnp.asarray(images(20), jnp.float32)
    plain = np.asarray(apr_s(jax.random.key(2), x, darken, probability=0.0))
    mixed = np.asarray(jax.jit(lambda key, x: apr_s(key, x, darken, probability=1.0))(jax.random.key(2), x))
    gains = [(y / x).mean(axis=(1, 2, 3)) for y in (plain, mixed)]
    assert all(np.all((gain > 0) & (gain < 1)) for gain in gains)
    # a recombination of two darkened images is x, darkened as one of the two
    np.testing.assert_allclose(mixed, gains[1][:, None, None, None] * x, atol=1e-5)
    as_a = np.abs(gains[0] - gains[1]) < 1e-4
    assert 3 <= as_a.sum() <= 17


@pytest.mark.parametrize("probability", first_fast([-0.1, 1.1, float("nan")]))
def test_a_wrong_probability_is_named(probability):
    x = jnp.ones((2, 4, 4, 1))
    for call in (apr_p, functools.partial(apr_s, augment_a=darken)):
        with pytest.raises(ValueError, match=f"probability is between 0 and 1, got {probability}"):
            call(jax.random.key(0), x, probability=probability)


def test_an_empty_range_is_named():
    with pytest.raises(ValueError, match="value_range is the least and the largest value, got"):
        apr_s(jax.random.key(0), jnp.ones((2, 4, 4, 1)), darken, value_range=(1.0, 0.0))


def test_integers_are_refused(unchecked):
    whole = jnp.asarray(255 * images(), jnp.uint8)
    with pytest.raises(TypeError, match="floating-point numbers are recombined, got uint8; scale them first: x / 255"):
        recombine(whole, whole)
    with pytest.raises(TypeError, match="got uint8"):
        apr_s(jax.random.key(0), whole, lambda _, x: x)
