import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linked_jax.schedules import (
    ALL_CNN_BOUNDARIES,
    ALL_CNN_EPOCHS,
    ALL_CNN_FACTORS,
    all_cnn_schedule,
    inverse_time_decay,
    step_schedule,
)

# "we keep the initial learning rate for 500 epochs, then 0.75lr until epoch 2000, 0.5lr until epoch 2350, 0.1lr until
# epoch 2750, and, finally, 0.05lr until epoch 3000"
PAPER = {0: 1.0, 499: 1.0, 500: 0.75, 1999: 0.75, 2000: 0.5, 2349: 0.5, 2350: 0.1, 2749: 0.1, 2750: 0.05, 2999: 0.05}

few = settings(max_examples=30, deadline=None)
positive = st.floats(1e-6, 10.0)


def paper_factor(fraction):
    """The paper's factor after this fraction of training, in exact arithmetic."""
    last = {500: 1.0, 2000: 0.75, 2350: 0.5, 2750: 0.1, math.inf: 0.05}
    return next(factor for end, factor in last.items() if fraction * 3000 < end)


@pytest.mark.parametrize("decay", [0.0, 1e-6, 1e-3, 0.5])
def test_inverse_time_decay_is_keras_formula(decay):
    schedule = inverse_time_decay(0.01, decay)
    for count in (0, 1, 7, 1000, 4_689_000):
        expected = 0.01 * (1.0 / (1.0 + decay * count))
        np.testing.assert_allclose(schedule(count), expected, rtol=1e-14)
        np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(count)), expected, rtol=1e-6)
        with jax.enable_x64(True):
            np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(count)), expected, rtol=1e-14)


@few
@given(init_value=positive, decay=st.floats(0.0, 1.0))
def test_inverse_time_decay_starts_at_init_value_and_never_rises(init_value, decay):
    values = np.asarray(inverse_time_decay(init_value, decay)(jnp.arange(100) ** 3))
    assert values[0] == np.float32(init_value)
    assert np.all(np.diff(values) <= 0)
    assert np.all(values > 0)


@pytest.mark.slow
def test_step_schedule_changes_at_the_boundary_and_not_before():
    schedule = step_schedule((0, 3, 10), (1.0, 2.0, 0.25), init_value=0.5)
    expected = [0.5] * 3 + [1.0] * 7 + [0.125] * 3
    assert [float(schedule(count)) for count in range(13)] == expected
    assert [float(jax.jit(schedule)(jnp.int32(count))) for count in range(13)] == expected
    assert schedule(jnp.arange(13)).tolist() == expected
    assert jax.vmap(schedule)(jnp.arange(13)).tolist() == expected
    assert float(schedule(2**31 - 1)) == 0.125


def test_a_single_step_is_constant():
    assert float(jax.jit(step_schedule((0,), (0.5,), init_value=3.0))(17)) == 1.5
    assert float(step_schedule([0], [0.5])(0)) == 0.5


@few
@given(
    gaps=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
    factors=st.lists(st.floats(0.0, 2.0, width=32), min_size=5, max_size=5),
    init_value=positive,
)
def test_step_schedule_against_a_loop(gaps, factors, init_value):
    boundaries = [0, *np.cumsum(gaps).tolist()]
    counts = sorted({*boundaries, *(b - 1 for b in boundaries[1:])})
    counts += [counts[-1] + 1] * (10 - len(counts))
    expected = [
        next(init_value * f for b, f in zip(boundaries[::-1], factors[::-1], strict=True) if b <= c) for c in counts
    ]
    values = step_schedule(boundaries, factors, init_value=init_value)(jnp.array(counts))
    np.testing.assert_array_equal(values, np.float32(expected))


@pytest.mark.parametrize("enable", [False, True])
def test_schedules_take_the_precision_in_force_where_they_are_used(enable):
    schedules = [
        step_schedule((0, 5), (1.0, 0.1)),
        inverse_time_decay(0.1, 0.1),
        all_cnn_schedule(0.1, steps_per_epoch=2),
    ]
    with jax.enable_x64(enable):
        for schedule in schedules:
            assert jax.jit(schedule)(jnp.int32(3)).dtype == (jnp.float64 if enable else jnp.float32)


def test_the_constants_are_the_papers():
    assert ALL_CNN_BOUNDARIES == (0, 500, 2000, 2350, 2750)
    assert ALL_CNN_FACTORS == (1.0, 0.75, 0.5, 0.1, 0.05)
    assert ALL_CNN_EPOCHS == 3000


@pytest.mark.parametrize("steps_per_epoch", [1, 391, 1563])
@pytest.mark.parametrize("scale", [1, 5, 50])
def test_all_cnn_factors_at_each_boundary_and_one_step_before(steps_per_epoch, scale):
    schedule = all_cnn_schedule(0.01, epochs=3000 // scale, steps_per_epoch=steps_per_epoch)
    for boundary, before, after in zip(ALL_CNN_BOUNDARIES[1:], ALL_CNN_FACTORS, ALL_CNN_FACTORS[1:], strict=False):
        count = boundary // scale * steps_per_epoch
        values = [float(schedule(c)) for c in (count - 1, count)]
        np.testing.assert_allclose(values, [0.01 * before, 0.01 * after], rtol=1e-6)


def test_all_cnn_schedule_in_whole_epochs_as_the_paper_tells_it():
    schedule = all_cnn_schedule(1.0, steps_per_epoch=1)
    for epoch, factor in PAPER.items():
        assert float(schedule(epoch)) == np.float32(factor)


@few
@given(init_value=positive, epochs=st.integers(1, 4000), steps_per_epoch=st.integers(12, 2000))
def test_a_scaled_all_cnn_schedule_has_the_papers_factor_at_the_same_fraction_of_training(
    init_value, epochs, steps_per_epoch
):
    updates = epochs * steps_per_epoch
    changes = {-(-b * updates // 3000) for b in (500, 2000, 2350, 2750)}
    counts = sorted({0, updates - 1, *changes, *(c - 1 for c in changes), *(c + 1 for c in changes)})
    counts = [count for count in counts if count < updates]
    counts += [updates - 1] * (14 - len(counts))
    values = np.asarray(all_cnn_schedule(init_value, epochs=epochs, steps_per_epoch=steps_per_epoch)(jnp.array(counts)))
    expected = [init_value * paper_factor(Fraction(count, updates)) for count in counts]
    np.testing.assert_array_equal(values, np.float32(expected))
    assert np.all(np.diff(values) <= 0)


@pytest.mark.slow
def test_all_five_steps_are_seen_from_twelve_updates_on():
    for updates in range(12, 200):
        rates = np.asarray(all_cnn_schedule(1.0, epochs=updates, steps_per_epoch=1)(jnp.arange(200)))
        np.testing.assert_array_equal(np.unique(rates[:updates]), np.float32(sorted(ALL_CNN_FACTORS)))


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(1, 11), (11, 1), (1, 1), (5, 2)])
def test_a_run_too_short_for_the_steps_is_refused(epochs, steps_per_epoch):
    with pytest.raises(ValueError, match=rf"at least 12 updates, got {epochs * steps_per_epoch} .*train for longer"):
        all_cnn_schedule(0.1, epochs=epochs, steps_per_epoch=steps_per_epoch)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inverse_time_decay(0.0, 0.1), r"init_value is positive and finite, got 0\.0; pass"),
        (lambda: inverse_time_decay(-1.0, 0.1), "init_value is positive"),
        (lambda: inverse_time_decay(math.nan, 0.1), "init_value is positive"),
        (lambda: inverse_time_decay(math.inf, 0.1), "init_value is positive"),
        (lambda: inverse_time_decay(0.1, -1e-6), r"decay is finite and at least 0, got -1e-06; pass"),
        (lambda: inverse_time_decay(0.1, math.nan), "decay is finite"),
        (lambda: step_schedule((0, 5), (1.0,)), "every boundary has one factor, got 2 boundaries and 1 factors"),
        (lambda: step_schedule((), ()), r"boundaries start at 0, got \(\)"),
        (lambda: step_schedule((1, 5), (1.0, 0.5)), r"boundaries start at 0, got \(1, 5\); put 0 first"),
        (lambda: step_schedule((0, 5, 5), (1.0, 0.5, 0.1)), r"rise strictly, got \(0, 5, 5\); sort"),
        (lambda: step_schedule((0, 5, 4), (1.0, 0.5, 0.1)), "rise strictly"),
        (lambda: step_schedule((0, 2.5), (1.0, 0.5)), "whole numbers of updates"),
        (lambda: step_schedule((0, math.inf), (1.0, 0.5)), "whole numbers of updates"),
        (lambda: step_schedule((0, 5), (1.0, -0.5)), "factors are finite and at least 0"),
        (lambda: step_schedule((0, 5), (1.0, math.nan)), "factors are finite and at least 0"),
        (lambda: step_schedule((0,), (1.0,), init_value=0.0), "init_value is positive"),
        (lambda: all_cnn_schedule(0.0, epochs=60, steps_per_epoch=10), "init_value is positive"),
        (lambda: all_cnn_schedule(0.1, epochs=0, steps_per_epoch=10), "epochs is a whole number, at least 1, got 0"),
        (lambda: all_cnn_schedule(0.1, epochs=60, steps_per_epoch=0), "steps_per_epoch is a whole number"),
        (lambda: all_cnn_schedule(0.1, epochs=60, steps_per_epoch=-3), "steps_per_epoch is a whole number"),
        (lambda: all_cnn_schedule(0.1, epochs=60, steps_per_epoch=1.5), "steps_per_epoch is a whole number"),
    ],
)
def test_bad_settings_are_refused_when_the_schedule_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_does_not_retrace():
    traces = []
    schedule = all_cnn_schedule(0.1, steps_per_epoch=7)

    @jax.jit
    def rate(count):
        traces.append(count)
        return schedule(count)

    for count in (0, 1, 20_000):
        rate(jnp.int32(count))
    assert len(traces) == 1


def test_schedules_drive_an_optax_optimiser_from_count_zero():
    schedule = step_schedule((0, 1, 2), (1.0, 0.5, 0.25))
    optimizer = optax.sgd(schedule)
    state, updates = optimizer.init(jnp.zeros(())), []
    for _ in range(4):
        update, state = jax.jit(optimizer.update)(jnp.ones(()), state)
        updates.append(float(update))
    assert updates == [-1.0, -0.5, -0.25, -0.25]
