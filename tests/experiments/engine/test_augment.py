"""Flips and shifts against the same written out pixel by pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.engine.augment import flip_and_shift


def images(n, height=20, width=30, channels=3):
    return jax.random.randint(jax.random.key(7), (n, height, width, channels), 0, 256).astype(jnp.uint8)


def shifts_of(moved, original, largest=(2, 3)):
    """All (flip, rows, columns) that explain an image, edges repeated."""
    height, width, _ = original.shape
    found = []
    for flip in (False, True):
        for down in range(-largest[0], largest[0] + 1):
            for right in range(-largest[1], largest[1] + 1):
                expected = np.empty_like(original)
                for row in range(height):
                    for column in range(width):
                        from_column = min(max(column + right, 0), width - 1)
                        if flip:
                            from_column = width - 1 - from_column
                        expected[row, column] = original[min(max(row + down, 0), height - 1), from_column]
                if np.array_equal(expected, moved):
                    found.append((flip, down, right))
    return found


@pytest.mark.slow
def test_every_image_is_flipped_and_shifted_as_a_whole_by_at_most_a_tenth():
    before = images(12)
    after = np.asarray(jax.jit(flip_and_shift)(jax.random.key(0), before))
    assert after.dtype == np.uint8
    found = [shifts_of(moved, original) for moved, original in zip(after, np.asarray(before), strict=True)]
    assert all(len(explanations) == 1 for explanations in found)
    assert len({explanations[0] for explanations in found}) > 6


@pytest.mark.slow
def test_flips_are_as_likely_as_not_and_shifts_are_uniform():
    """The pixels are their own coordinates, so that the middle one says where it came from."""
    n, height, width = 4000, 21, 41
    rows, columns = np.mgrid[:height, :width]
    grid = np.broadcast_to(np.stack([rows, columns], axis=-1), (n, height, width, 2))
    after = np.asarray(flip_and_shift(jax.random.key(1), jnp.asarray(grid, jnp.int32)))
    flipped = after[:, 0, 10, 1] > after[:, 0, 30, 1]
    assert flipped.mean() == pytest.approx(0.5, abs=0.03)
    down = after[:, 10, 20, 0] - 10
    right = np.where(flipped, -1, 1) * (after[:, 10, 20, 1] - 20)
    for shift, largest in ((down, 2), (right, 4)):  # round(0.1 * 21), round(0.1 * 41)
        assert (shift.min(), shift.max()) == (-largest, largest)
        counts = np.bincount(shift + largest) / n
        assert counts[1:-1] == pytest.approx(1 / (0.2 * (height if largest == 2 else width)), abs=0.03)


@pytest.mark.slow
def test_the_key_decides():
    before = images(8)
    first, again, other = (flip_and_shift(jax.random.key(key), before) for key in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.slow
def test_no_shift_leaves_the_image_or_its_mirror():
    before = np.asarray(images(16))
    after = np.asarray(flip_and_shift(jax.random.key(4), jnp.asarray(before), shift=0.0))
    same = (after == before).all(axis=(1, 2, 3))
    mirrored = (after == before[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 0 < same.sum() < 16
