"""What a command line says, and what the options of a study may be."""

import dataclasses
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_origin

import tyro

from experiments.engine.errors import UsageError

S = TypeVar("S")


def command_line(
    kind: type[S], prog: str, arguments: Sequence[str] | None = None, *, before: Sequence[str] = (), **options: Any
) -> S:
    """The settings of a command line, which loses no value in silence: a list is given once.

    `--help` shows the first line of the class's docstring, and the commands at the top of its module.

    Args:
      kind: a dataclass of settings.
      prog: the command.
      arguments: by default this process's; they override those `before` them.
      before: further ones.
      **options: of `tyro.cli`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        name = option(field.name)
        if get_origin(field.type) is tuple and given.count(name) > 1:
            raise UsageError(f"{name} is given twice, and only the last would count; give it once: {name} A B")
    examples = re.findall(r"^ {4}python -m .*$", sys.modules[kind.__module__].__doc__ or "", re.MULTILINE)
    says = "\n".join([(kind.__doc__ or "").splitlines()[0] + " For example:" * bool(examples), *examples])
    return tyro.cli(kind, args=[*before, *arguments], prog=prog, description=says, **options)


def option(field: str) -> str:
    """The option of a field of settings: --time-steps of time_steps."""
    return "--" + field.replace("_", "-")


def in_range(settings: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a number outside its range.

    Args:
      settings: with a field of each name.
      ranges: name of a field -> the least and the most that it may be; the most may be `math.inf`.

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
            raise UsageError(f"{option(name)} is {wanted}, got {value:,}; try the default")


def known(field: str, given: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The values given for a field, each once; none, and one that is not known, is refused.

    >>> from experiments.engine.checks import known
    >>> known("methods", ["rleu"], ["relu", "lk_relu"])
    Traceback (most recent call last):
    experiments.engine.errors.UsageError: --methods: there is no 'rleu'; take of relu, lk_relu
    """
    names, all_known = tuple(dict.fromkeys(given)), list(known)
    if not names:
        raise UsageError(f"{option(field)} takes at least one of {', '.join(all_known)}, got none")
    for name in names:
        if name not in all_known:
            raise UsageError(f"{option(field)}: there is no {name!r}; take of {', '.join(all_known)}")
    return names
