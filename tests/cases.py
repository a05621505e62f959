"""Cases of a law: the first one belongs to the fast suite, the others to the slow one."""

from collections.abc import Iterable
from typing import Any

import pytest


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
