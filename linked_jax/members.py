"""A member of a link: what it is equal to, how it is copied and saved, and its name in words.

Any elementwise function of z is a member. Two that are made alike are equal, so that links are, and jit compiles once.
"""

import dataclasses
import functools
import importlib
import operator
import re
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

Member = Callable[[Any], Any]


class Value:
    """What never changes: a copy is the thing itself."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, _memo: dict) -> Any:
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapped(Value):
    """A member made of another one, g; equal to one of its kind over an equal g."""

    g: Member

    def __eq__(self, other: object) -> bool:
        return member_key(self.g) == member_key(other.g) if isinstance(other, type(self)) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), member_key(self.g)))

    def __reduce__(self) -> tuple:
        return type(self), (Saved(self.g),)


class Mirrored(Wrapped):
    """The mirrored member z -> g(-z) of equation (6)."""

    def __call__(self, z: Any) -> Any:
        """g(-z)."""
        return self.g(-z)


@dataclasses.dataclass(frozen=True)
class Saved:
    """Pickled in place of a member: a public function comes back as the same object, by the name it is imported by.

    JAX' functions need it: pickle takes `jax.nn.relu` apart and then misses its name.
    """

    member: Any

    def __reduce__(self) -> tuple:
        if isinstance(self.member, functools.partial):
            arguments = [*map(Saved, self.member.args)], {key: Saved(v) for key, v in self.member.keywords.items()}
            return _partial, (type(self.member), Saved(self.member.func), *arguments)
        name = getattr(self.member, "__qualname__", "")
        for module in ("jax.nn", "jax.numpy", "jax.lax", getattr(self.member, "__module__", None)):
            if name and module and _imported(module, name) is self.member:
                return _imported, (module, name)
        return _itself, (self.member,)


def _partial(kind: type[functools.partial], g: Member, arguments: list, keywords: dict) -> functools.partial:
    return kind(g, *arguments, **keywords)


def _imported(module: str, name: str) -> Any:
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):  # a lambda, a function in a function, one of __main__
        return None


def _itself(member: Any) -> Any:
    return member


def member_key(member: Member) -> Hashable:
    """What makes two members equal: the object, or for a `functools.partial` its function and arguments.

    >>> import functools, jax
    >>> from linked_jax.members import member_key
    >>> a, b = (functools.partial(jax.nn.leaky_relu, negative_slope=0.1) for _ in range(2))
    >>> a == b, member_key(a) == member_key(b)
    (False, True)
    """
    if not isinstance(member, functools.partial):
        return member
    arguments = {**dict(enumerate(member.args)), **member.keywords}
    try:
        return member.func, frozenset((name, _argument_key(value)) for name, value in arguments.items())
    except TypeError:  # arrays as arguments: only the very same partial is equal
        return member


def _argument_key(value: Any) -> Hashable:
    """What makes two arguments equal, with types and signs: 1, 1.0 and True, or 0.0 and -0.0, are other arguments."""
    if isinstance(value, tuple):
        return type(value), tuple(map(_argument_key, value))
    signbit = bool(np.signbit(value)) if isinstance(value, float | np.floating) else None
    return type(value), signbit, member_key(value) if isinstance(value, functools.partial) else value


def member_name(member: Any) -> str:
    """A name that is the same in every process: the function's own, else its type's or its repr without the address.

    >>> import jax
    >>> from linked_jax.members import member_name
    >>> member_name(jax.nn.relu), member_name(object())
    ('relu', 'object')
    """
    if isinstance(name := getattr(member, "__name__", None), str):
        return name
    if type(member).__repr__ is object.__repr__:
        return type(member).__name__
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(member))


def formula(member: Member, z: str = "z") -> str:
    """The member applied to z, in words.

    >>> import functools, jax
    >>> from linked_jax.members import Mirrored, formula
    >>> formula(Mirrored(functools.partial(jax.nn.leaky_relu, negative_slope=0.1)))
    'leaky_relu(-z, negative_slope=0.1)'
    """
    if isinstance(member, Mirrored):
        return formula(member.g, "-z" if z == "z" else "z")
    if not isinstance(member, functools.partial):
        return f"{member_name(member)}({z})"
    named = (f"{key}={member_name(value)}" for key, value in member.keywords.items())
    return f"{member_name(member.func)}({', '.join([*map(member_name, member.args), z, *named])})"
