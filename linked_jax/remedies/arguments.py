"""What the remedies ask of arguments: sizes of 1 at least, shares below 1, and names that exist."""

import difflib
from collections.abc import Sequence
from typing import Any

import jax

from linked_jax.arguments import brief, whole_numbers
from linked_jax.arrays import Number, is_number
from linked_jax.linking import Link


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Raise TypeError if a number of features or a kernel size is no integer, ValueError if it is below 1."""
    for name, size in sizes.items():
        if min(whole_numbers(name, size), default=1) < 1:
            raise ValueError(f"{name} is at least 1, got {size}")


def check_shares(**shares: Number) -> None:
    """Raise ValueError if a share that is kept, such as a momentum, is outside [0, 1)."""
    for name, share in shares.items():
        if is_number(share) and not 0 <= share < 1:
            raise ValueError(f"{name} is at least 0 and below 1, got {share}")


def require_link(link: Link) -> Link:
    """The link; TypeError if it is none."""
    if not isinstance(link, Link):
        raise TypeError(f"link is a Link, got {brief(link)}; pass e.g. linked(jax.nn.relu) or Link((jax.nn.relu,))")
    return link


def dotted(path: Any) -> str:
    """The names of a path in a tree, joined by dots, without NNX' `.value`."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def nearest(name: str, names: Sequence[str]) -> str:
    """The three names that are most like a wrong one, for an error.

    >>> from linked_jax.remedies.arguments import nearest
    >>> nearest("conv_1", ["dense", "conv1"])
    'conv1, dense'
    """
    return ", ".join(difflib.get_close_matches(name, names, 3, 0)) or "none"
