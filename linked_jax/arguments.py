"""What arguments must be, and what an error shows of one that is not."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from linked_jax.members import member_name


def brief(value: Any) -> str:
    """What an error shows of a value: a function's name, else its repr on one line, cut at 100 characters.

    >>> import jax
    >>> from linked_jax.arguments import brief
    >>> brief(jax.nn.relu), len(brief("a" * 1000))
    ('relu', 100)
    """
    line = " ".join((repr(value) if isinstance(value, type) else member_name(value)).split())
    return line if len(line) <= 100 else f"{line[:97]}..."


def whole_number(name: str, value: Any) -> int:
    """The value; TypeError if it is no integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is an integer, got {brief(value)}; pass e.g. 3")
    return int(value)


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """The value, an integer or several, as a tuple; TypeError if it is neither."""
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(isinstance(number, bool) or not isinstance(number, int | np.integer) for number in numbers):
        raise TypeError(f"{name} is an integer or a tuple of integers, got {brief(value)}; pass e.g. 3")
    return numbers


def as_array(value: Any) -> Array:
    """The value as an array; TypeError if it is none."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"an array is needed, got {brief(value)}; pass e.g. jnp.ones((8, 3))") from error
