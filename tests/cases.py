"""Cases of a law: the first one belongs to the fast suite, the others to the slow one. And JAX' strict switches."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import pytest

SWITCHES = {
    "rank promotion": functools.partial(jax.numpy_rank_promotion, "raise"),
    "dtype promotion": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "debug_nans": functools.partial(jax.debug_nans, True),
    "debug_infs": functools.partial(jax.debug_infs, True),
    "x64": functools.partial(jax.enable_x64, True),
    "disable_jit": jax.disable_jit,
    "leaks": jax.checking_leaks,
}


def first_fast(values: Iterable[Any]) -> list[Any]:
    """The cases of `pytest.mark.parametrize`, all but the first marked slow. Marks that a case has stay.

    A tuple is a case of several arguments, as for pytest; give one argument that is a tuple as pytest.param(it).

    >>> [[mark.name for mark in case.marks] for case in first_fast(["a", "b"])]
    [[], ['slow']]
    """
    first, *others = (value if hasattr(value, "marks") else _param(value) for value in values)
    return [first, *(pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow], id=case.id) for case in others)]


def _param(value: Any) -> Any:
    return pytest.param(*value) if isinstance(value, tuple) else pytest.param(value)
