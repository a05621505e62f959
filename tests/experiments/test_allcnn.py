import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.allcnn import EPOCHS, FACTORS, step_factors
from experiments.engine.errors import UsageError
from tests.cases import first_fast

# "we keep the initial learning rate for 500 epochs, then 0.75lr until epoch 2000, 0.5lr until epoch 2350, 0.1lr until
# epoch 2750, and, finally, 0.05lr until epoch 3000"
PAPER = {0: 1.0, 499: 1.0, 500: 0.75, 1999: 0.75, 2000: 0.5, 2349: 0.5, 2350: 0.1, 2749: 0.1, 2750: 0.05, 2999: 0.05}


def paper_factor(fraction):
    """The paper's factor after this fraction of training, in exact arithmetic."""
    last = {500: 1.0, 2000: 0.75, 2350: 0.5, 2750: 0.1, math.inf: 0.05}
    return next(factor for end, factor in last.items() if fraction * 3000 < end)


def test_the_constants_are_the_papers():
    assert FACTORS == {0: 1.0, 500: 0.75, 2000: 0.5, 2350: 0.1, 2750: 0.05}
    assert EPOCHS == 3000


@pytest.mark.parametrize("steps_per_epoch", [1, 391, 1563])
def test_each_factor_begins_at_its_boundary_and_not_before(steps_per_epoch):
    for scale in (1, 5, 50):
        schedule = step_factors(3000 // scale * steps_per_epoch)
        changes = zip(list(FACTORS)[1:], FACTORS.values(), list(FACTORS.values())[1:], strict=False)
        for boundary, before, after in changes:
            count = boundary // scale * steps_per_epoch
            assert [float(schedule(c)) for c in (count - 1, count)] == [np.float32(before), np.float32(after)]


def test_the_steps_in_whole_epochs_are_as_the_paper_tells_them():
    schedule = step_factors(3000)
    expected = np.float32(list(PAPER.values()))
    assert [float(schedule(epoch)) for epoch in PAPER] == expected.tolist()
    assert [float(jax.jit(schedule)(jnp.int32(epoch))) for epoch in PAPER] == expected.tolist()
    epochs = jnp.array(list(PAPER))
    assert schedule(epochs).tolist() == jax.vmap(schedule)(epochs).tolist() == expected.tolist()
    assert float(schedule(2**31 - 1)) == np.float32(0.05)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(updates=st.integers(12, 8_000_000))
def test_a_stretched_schedule_has_the_papers_factor_at_the_same_fraction_of_training(updates):
    changes = {-(-b * updates // 3000) for b in (500, 2000, 2350, 2750)}
    counts = sorted({0, updates - 1, *changes, *(c - 1 for c in changes), *(c + 1 for c in changes)})
    counts = [count for count in counts if count < updates]
    counts += [updates - 1] * (14 - len(counts))
    values = np.asarray(step_factors(updates)(jnp.array(counts)))
    np.testing.assert_array_equal(values, np.float32([paper_factor(Fraction(count, updates)) for count in counts]))
    assert np.all(np.diff(values) <= 0)


@pytest.mark.slow
def test_all_five_steps_are_seen_from_twelve_updates_on():
    for updates in range(12, 200):
        rates = np.asarray(step_factors(updates)(jnp.arange(200)))
        np.testing.assert_array_equal(np.unique(rates[:updates]), np.float32(sorted(FACTORS.values())))


@pytest.mark.parametrize("updates", first_fast([11, 10, 1, 0, -3]))
def test_a_run_too_short_for_the_steps_is_refused(updates):
    with pytest.raises(UsageError, match=re.escape(f"at least 12 updates, got {updates}; train for longer")):
        step_factors(updates)


def test_the_schedule_takes_the_precision_in_force_where_it_is_used():
    schedule = step_factors(6000)
    for enable, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(enable):
            assert jax.jit(schedule)(jnp.int32(3)).dtype == dtype
