"""The paper's learning-rate schedules, for Optax.

A schedule maps the number of optimiser updates done so far (0, 1, 2, ...) to a learning rate. Schedules multiply:
`lambda count: steps(count) * decay(count)` is what Keras did with a step schedule and a `decay` at once.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

# Riera and Pujol 2017, the All-CNN experiment: epochs from which the factors hold, of 3000.
ALL_CNN_BOUNDARIES = (0, 500, 2000, 2350, 2750)
ALL_CNN_FACTORS = (1.0, 0.75, 0.5, 0.1, 0.05)
ALL_CNN_EPOCHS = 3000


def inverse_time_decay(init_value: float, decay: float) -> optax.Schedule:
    """Keras' `decay`: the rate falls with the inverse of the number of updates.

        lr(count) = init_value / (1 + decay * count)

    Args:
      init_value: the rate at count 0, positive.
      decay: per optimiser update (not per epoch), at least 0; 0 keeps the rate. The paper: 1e-6.

    Returns:
      count (an integer or an array of them, in updates, from 0) -> rate, of count's shape.

    Raises:
      ValueError: if init_value is not positive and finite, or decay is negative or not finite.

    Example:
      >>> from linked_jax.schedules import inverse_time_decay
      >>> lr = inverse_time_decay(0.5, decay=0.25)
      >>> lr(0), lr(4)
      (0.5, 0.25)

    Reference: keras/optimizers.py, Keras 2.0 (2017).
    """
    _check_init_value(init_value)
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay is finite and at least 0, got {decay!r}; pass 0.0 for a constant rate")

    def schedule(count: Any) -> Any:
        return init_value / (1 + decay * count)

    return schedule


def step_schedule(boundaries: Sequence[int], factors: Sequence[float], *, init_value: float = 1.0) -> optax.Schedule:
    """A rate that is constant between boundaries.

        lr(count) = init_value * factors[i]   where boundaries[i] <= count < boundaries[i + 1]

    The factors are relative to init_value, not to each other (Optax' piecewise_constant_schedule multiplies them up).

    Args:
      boundaries: the first update of each step, in optimiser updates: 0, then strictly rising.
      factors: one for each boundary, finite and at least 0. The last one holds for ever.
      init_value: the rate that the factors multiply, positive.

    Returns:
      count (an integer or an array of them, in updates, from 0) -> rate, of count's shape.

    Raises:
      ValueError: if the boundaries are not integers that rise strictly from 0, if a factor is negative or not finite,
        if there is not one factor for each boundary, or if init_value is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax.schedules import step_schedule
      >>> lr = step_schedule((0, 10, 20), (1.0, 0.5, 0.125), init_value=2.0)
      >>> lr(jnp.array([0, 9, 10, 19, 20, 1000])).tolist()
      [2.0, 2.0, 1.0, 1.0, 0.25, 0.25]

    Reference: Riera and Pujol, Solving internal covariate shift in deep learning with linked neurons, 2017.
    """
    _check_init_value(init_value)
    boundaries, factors = tuple(boundaries), tuple(factors)
    if len(boundaries) != len(factors):
        raise ValueError(
            f"every boundary has one factor, got {len(boundaries)} boundaries and {len(factors)} factors; "
            "the first boundary is 0 and belongs to the first factor"
        )
    if any(boundary % 1 != 0 for boundary in boundaries):
        raise ValueError(f"boundaries are whole numbers of updates, got {boundaries}; multiply epochs, then round")
    if boundaries[:1] != (0,):
        raise ValueError(f"boundaries start at 0, got {boundaries}; put 0 first, with the factor for the start")
    if not all(left < right for left, right in itertools.pairwise(boundaries)):
        raise ValueError(f"boundaries rise strictly, got {boundaries}; sort them and drop repeated ones")
    if not all(0 <= factor < math.inf for factor in factors):
        raise ValueError(f"factors are finite and at least 0, got {factors}; they multiply init_value")

    def schedule(count: Any) -> Any:
        # Arrays are made here, not above, so that they take the precision in force where the schedule is used.
        rates = jnp.asarray([init_value * factor for factor in factors])
        changes = jnp.asarray([int(boundary) for boundary in boundaries[1:]], dtype=jnp.int32)
        return rates[jnp.searchsorted(changes, count, side="right")]

    return schedule


def all_cnn_schedule(init_value: float, *, epochs: int = ALL_CNN_EPOCHS, steps_per_epoch: int) -> optax.Schedule:
    """The paper's All-CNN steps, stretched over any number of epochs.

        lr(count) = init_value * (1, 0.75, 0.5, 0.1, 0.05)   from epoch 0, 500, 2000, 2350, 2750 of 3000

    Update `count` takes the factor that the paper has at the same fraction of training, so a step begins with the
    update ceil(boundary * epochs * steps_per_epoch / 3000). That is the start of an epoch whenever `epochs` is a
    multiple of 60; with other numbers a step may begin within an epoch, which keeps all five steps in short runs.

    Args:
      init_value: the rate at the start, positive. The paper: 0.01 or 0.001.
      epochs: passes over the data in the whole run, at least 1. The paper: 3000.
      steps_per_epoch: optimiser updates in an epoch, at least 1.

    Returns:
      count (an integer or an array of them, in updates, from 0) -> rate, of count's shape.

    Raises:
      ValueError: if init_value is not positive and finite, if epochs or steps_per_epoch is not a positive integer, or
        if the run has fewer than 12 updates: the last step takes a twelfth of the run and would never begin.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax.schedules import all_cnn_schedule
      >>> lr = all_cnn_schedule(1.0, epochs=60, steps_per_epoch=1)
      >>> [round(float(lr(count)), 2) for count in (0, 9, 10, 39, 40, 46, 47, 54, 55, 59)]
      [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.1, 0.1, 0.05, 0.05]

    Reference: Riera and Pujol, Solving internal covariate shift in deep learning with linked neurons, 2017.
    """
    for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if value < 1 or value % 1 != 0:
            raise ValueError(f"{name} is a whole number, at least 1, got {value!r}; round it")
    updates = int(epochs) * int(steps_per_epoch)
    boundaries = [-(-boundary * updates // ALL_CNN_EPOCHS) for boundary in ALL_CNN_BOUNDARIES]  # ceil, in integers
    if boundaries[-1] >= updates:
        raise ValueError(
            f"the five steps need at least 12 updates, got {updates} = {epochs} epochs * {steps_per_epoch} steps; "
            "train for longer or pass a constant rate"
        )
    return step_schedule(boundaries, ALL_CNN_FACTORS, init_value=init_value)


def _check_init_value(init_value: float) -> None:
    if not 0 < init_value < math.inf:
        raise ValueError(
            f"init_value is positive and finite, got {init_value!r}; pass the rate at the start, e.g. 0.01"
        )
