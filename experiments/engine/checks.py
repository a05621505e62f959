"""What the options of a study may be."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.engine.errors import UsageError


def in_range(settings: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a number outside its range.

    Args:
      settings: with a field of each name.
      ranges: name of a field -> the least and the most that it may be; the most may be `math.inf`.

    Raises:
      UsageError: with the range and what was received.

    Example:
      >>> from types import SimpleNamespace
      >>> from experiments.engine.checks import in_range
      >>> in_range(SimpleNamespace(time_steps=0), {"time_steps": (1, 10_000)})
      Traceback (most recent call last):
      experiments.engine.errors.UsageError: --time-steps is from 1 to 10,000, got 0; try the default
    """
    for name, (least, most) in ranges.items():
        value = getattr(settings, name)
        if not least <= value <= most:  # nor nan
            wanted = f"at least {least:,}" if most == math.inf else f"from {least:,} to {most:,}"
            raise UsageError(f"{_option(name)} is {wanted}, got {value:,}; try the default")


def known(option: str, given: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The values of an option, each once; none, and one that there is not, is refused.

    Args:
      option: the name of its field.
      given: its values.
      known: those that there are.

    Raises:
      UsageError: with what there is.

    Example:
      >>> from experiments.engine.checks import known
      >>> known("methods", ["rleu"], ["relu", "lk_relu"])
      Traceback (most recent call last):
      experiments.engine.errors.UsageError: --methods: there is no 'rleu'; take of relu, lk_relu
    """
    names, all_known = tuple(dict.fromkeys(given)), list(known)
    if not names:
        raise UsageError(f"{_option(option)} takes at least one of {', '.join(all_known)}, got none")
    for name in names:
        if name not in all_known:
            raise UsageError(f"{_option(option)}: there is no {name!r}; take of {', '.join(all_known)}")
    return names


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
