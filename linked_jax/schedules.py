"""Learning-rate schedules that Optax lacks.

A schedule maps the number of optimiser updates done so far (0, 1, 2, ...) to a learning rate. Schedules multiply:
`lambda count: steps(count) * decay(count)` is what Keras did with a step schedule and a `decay` at once.
"""

import math
from typing import Any

import optax

from linked_jax.arrays import Number, is_number


def inverse_time_decay(init_value: Number, decay: Number) -> optax.Schedule:
    """Keras' `decay`: the rate falls with the inverse of the number of updates.

        lr(count) = init_value / (1 + decay * count)

    Args:
      init_value: the rate at count 0, positive.
      decay: per optimiser update (not per epoch), at least 0; 0 keeps the rate. The paper: 1e-6.

    Returns:
      count (an integer or an array of them, in updates, from 0) -> rate, of count's shape.

    Raises:
      ValueError: if init_value is not positive and finite, or decay is negative or not finite.
      TypeError: if one is no number.

    Examples:
      >>> from linked_jax.schedules import inverse_time_decay
      >>> lr = inverse_time_decay(0.5, decay=0.25)
      >>> lr(0), lr(4)
      (0.5, 0.25)

    Reference: keras/optimizers.py, Keras 2.0 (2017).
    """
    for name, value in {"init_value": init_value, "decay": decay}.items():
        if not is_number(value) and not hasattr(value, "dtype"):
            raise TypeError(f"{name} is a number, got {value!r}; pass e.g. 0.01")
    if is_number(init_value) and not 0 < init_value < math.inf:
        raise ValueError(
            f"init_value is positive and finite, got {init_value!r}; pass the rate at the start, e.g. 0.01"
        )
    if is_number(decay) and not 0 <= decay < math.inf:
        raise ValueError(f"decay is finite and at least 0, got {decay!r}; pass 0.0 for a constant rate")

    def schedule(count: Any) -> Any:
        return init_value / (1 + decay * count)

    return schedule
