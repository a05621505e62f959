import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linked_jax.schedules import inverse_time_decay
from tests.cases import first_fast


@pytest.mark.parametrize("decay", first_fast([1e-3, 0.0, 1e-6, 0.5]))
def test_inverse_time_decay_is_keras_formula(decay):
    schedule = inverse_time_decay(0.01, decay)
    for count in (0, 1, 7, 1000, 4_689_000):
        expected = 0.01 * (1.0 / (1.0 + decay * count))
        np.testing.assert_allclose(schedule(count), expected, rtol=1e-14)
        np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(count)), expected, rtol=1e-6)
        with jax.enable_x64(True):
            np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(count)), expected, rtol=1e-14)


@settings(max_examples=30, deadline=None)
@given(init_value=st.floats(1e-6, 10.0), decay=st.floats(0.0, 1.0))
def test_inverse_time_decay_starts_at_init_value_and_never_rises(init_value, decay):
    values = np.asarray(inverse_time_decay(init_value, decay)(jnp.arange(100) ** 3))
    assert values[0] == np.float32(init_value)
    assert np.all(np.diff(values) <= 0)
    assert np.all(values > 0)


def test_a_schedule_takes_the_precision_in_force_where_it_is_used():
    schedule = inverse_time_decay(0.1, 0.1)
    for enable, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(enable):
            assert jax.jit(schedule)(jnp.int32(3)).dtype == dtype


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("init_value", "decay", "message"),
    [
        (0.0, 0.1, r"init_value is positive and finite, got 0\.0; pass"),
        (-1.0, 0.1, "init_value is positive"),
        (math.nan, 0.1, "init_value is positive"),
        (math.inf, 0.1, "init_value is positive"),
        (0.1, -1e-6, r"decay is finite and at least 0, got -1e-06; pass"),
        (0.1, math.nan, "decay is finite"),
    ],
)
def test_bad_settings_are_refused_when_the_schedule_is_built(init_value, decay, message):
    with pytest.raises(ValueError, match=message):
        inverse_time_decay(init_value, decay)


@pytest.mark.parametrize(("init_value", "decay"), [(None, 1.0), ("0.1", 0.1), (0.1, None)])
def test_numbers_are_numbers(init_value, decay, unchecked):
    with pytest.raises(TypeError, match=r"(init_value|decay) is a number, got (None|'0.1'); pass"):
        inverse_time_decay(init_value, decay)


def test_the_rate_may_be_traced():
    np.testing.assert_allclose(jax.jit(lambda lr: inverse_time_decay(lr, 0.5)(2))(1.0), 0.5)


def test_a_schedule_does_not_retrace():
    traces = []
    schedule = inverse_time_decay(0.1, 1e-3)

    @jax.jit
    def rate(count):
        traces.append(count)
        return schedule(count)

    for count in (0, 1, 20_000):
        rate(jnp.int32(count))
    assert len(traces) == 1


def test_a_schedule_drives_an_optax_optimiser_from_count_zero():
    optimizer = optax.sgd(inverse_time_decay(1.0, 1.0))
    state, updates = optimizer.init(jnp.zeros(())), []
    for _ in range(4):
        update, state = jax.jit(optimizer.update)(jnp.ones(()), state)
        updates.append(float(update))
    assert updates == pytest.approx([-1, -1 / 2, -1 / 3, -1 / 4])
