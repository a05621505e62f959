"""What can be asked of a member of a link: its name, its slopes, its derivative at 0, and how members sum to z.

    slopes          (a, b) with g(z) = a max(z, 0) + b min(z, 0)
    weights_of_z    a_i with sum_i a_i g_i(z) = z

A member is any elementwise function of z, so answers come from numbers: from g at many z, in float64. No other file
measures a member. What cannot be measured (see `_UNMEASURABLE`) gets the answer that is safe where it is not known.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Member = Callable[[Any], Any]
Answer = TypeVar("Answer")

_UNMEASURABLE = (
    TypeError,  # g is not hashable, closes over traced values (JAX' errors are TypeErrors), or has no forward mode
    ValueError, IndexError, AssertionError,  # g takes no scalar or no vector
    FloatingPointError,  # under jax.debug_nans
    NotImplementedError,  # g has no derivative rule, or no rule for float64
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Mirrored:
    """The mirrored member z -> g(-z) of equation (6); equal to another one over an equal g."""

    g: Member

    def __call__(self, z: Any) -> Any:
        """g(-z)."""
        return self.g(-z)

    def __eq__(self, other: object) -> bool:
        return member_key(self.g) == member_key(other.g) if isinstance(other, Mirrored) else NotImplemented

    def __hash__(self) -> int:
        return hash((Mirrored, member_key(self.g)))


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
    try:  # with types: 1, 1.0 and True are equal and yet other arguments
        return member.func, frozenset((name, type(value), value) for name, value in arguments.items())
    except TypeError:  # arrays as arguments: only the very same partial is equal
        return member


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


def formula(member: Member) -> str:
    """The member applied to z, in words.

    >>> import functools, jax
    >>> from linked_jax.members import Mirrored, formula
    >>> formula(Mirrored(functools.partial(jax.nn.leaky_relu, negative_slope=0.1)))
    'leaky_relu(-z, negative_slope=0.1)'
    """
    if isinstance(member, Mirrored):
        return formula(member.g).replace("(z", "(-z", 1)
    if not isinstance(member, functools.partial):
        return f"{member_name(member)}(z)"
    arguments = [*map(member_name, member.args), *(f"{key}={member_name(v)}" for key, v in member.keywords.items())]
    return f"{member_name(member.func)}({', '.join(['z', *arguments])})"


def evaluate(member: Member, z: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """g(z) in float64, also while JAX traces something else and whether or not x64 is enabled.

    Args:
      member: an elementwise function built from jax.numpy.
      z: any shape.

    Returns:
      A NumPy float64 array like z.
    """
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        # jit: a bare custom_jvp, as jax.nn.relu is, would still join a vmap around us
        return np.asarray(jax.jit(member)(jnp.asarray(z, jnp.float64)), np.float64)


def _measured(otherwise: Any) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """A question that is asked once of each hashable member; `otherwise` answers for one that cannot be measured."""

    def decorate(question: Callable[..., Answer]) -> Callable[..., Answer]:
        cached = functools.lru_cache(maxsize=4096)(question)

        @functools.wraps(question)
        def ask(member: Member) -> Answer:
            try:
                return cached(member)
            except _UNMEASURABLE:
                return otherwise

        return ask

    return decorate


@_measured(otherwise=None)
def slopes(member: Member) -> tuple[float, float] | None:
    """(a, b) if g is linear on both sides of 0, as far as a thousand numbers up to 1e6 can tell.

        g(z) = a max(z, 0) + b min(z, 0)

    Args:
      member: a function of z.

    Returns:
      (a, b), or None if g has another form or cannot be measured.

    Example:
      >>> import jax
      >>> from linked_jax.members import slopes
      >>> slopes(jax.nn.leaky_relu), slopes(jax.nn.silu)
      ((1.0, 0.01), None)
    """
    return _slopes(member, rtol=1e-12, atol=0.0)


@_measured(otherwise=False)
def is_homogeneous(member: Member) -> bool:
    """Whether g(a z) = a g(z) for every a > 0: `slopes` exist, here to a relative 1e-6.

    Args:
      member: a function of z.

    Returns:
      A boolean; False if g cannot be measured.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.members import is_homogeneous
      >>> is_homogeneous(jnp.abs), is_homogeneous(jax.nn.elu)
      (True, False)
    """
    return _slopes(member, rtol=1e-6, atol=1e-6) is not None


def _slopes(member: Member, *, rtol: float, atol: float) -> tuple[float, float] | None:
    z = np.concatenate([[1.0], np.linspace(0, 40, 501), np.logspace(-6, 6, 13)])
    positive, negative = evaluate(member, z), evaluate(member, -z)
    a, b = float(positive[0]), -float(negative[0])
    close = functools.partial(np.allclose, rtol=rtol, atol=atol)
    return (a, b) if close(positive, a * z) and close(negative, -b * z) else None


def weights_of_z(members: Sequence[Member]) -> tuple[Float[np.ndarray, " d"], float]:
    """The weights that read z back from its members, and by how much the best weights miss z.

        sum_i a_i g_i(z) = z

    Minimum-norm least squares over |z| from 1e-3 to 1e3, so that members that saturate miss z. A member and its mirror
    image have weights (1, -1) / c where g(z) - g(-z) = c z.

    Args:
      members: d functions of z.

    Returns:
      d weights, and the largest deviation: absolute where |z| < 1, else relative; infinite if a member is not finite.

    Example:
      >>> import jax
      >>> from linked_jax.members import Mirrored, weights_of_z
      >>> weights, deviation = weights_of_z((jax.nn.silu, Mirrored(jax.nn.silu)))
      >>> weights.round(6).tolist(), deviation < 1e-6
      ([1.0, -1.0], True)
    """
    size = np.geomspace(1e-3, 1e3, 601)
    z = np.concatenate([-size[::-1], size])
    scale = np.maximum(np.abs(z), 1)
    values = np.stack([evaluate(member, z) for member in members], axis=1) / scale[:, None]
    if not np.isfinite(values).all():
        return np.zeros(len(members)), np.inf
    weights = np.linalg.lstsq(values, z / scale, rcond=1e-9)[0]
    return weights, float(np.abs(values @ weights - z / scale).max())


@_measured(otherwise=True)
def jumps_at_zero(member: Member) -> bool:
    """Whether the limit z -> 0+ of the derivative differs, by more than rounding, from what JAX uses at 0.

    Args:
      member: a function of z.

    Returns:
      A boolean. True if g cannot be measured: the limit is right for a jump, and for a smooth g it changes the
      derivative by less than rounding.

    Example:
      >>> import jax
      >>> from linked_jax.members import jumps_at_zero
      >>> jumps_at_zero(jax.nn.relu), jumps_at_zero(jax.nn.silu)
      (True, False)
    """

    @jax.jit  # a bare custom_jvp, as jax.nn.relu is, would still join a vmap around us
    def derivative(z: Array) -> Array:
        return jax.jvp(member, (z,), (jnp.ones_like(z),))[1]

    tiny, eps = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).eps)
    with jax.ensure_compile_time_eval():
        # A true jump looks the same from 1e-38 and from 1e-32; z**2 and |z|**1.1 only tend to their value at 0.
        at_zero, near, further = (float(derivative(jnp.float32(z))) for z in (0.0, tiny, 2.0**20 * tiny))
    jump = abs(near - at_zero)
    return jump > 8 * eps * max(abs(near), abs(at_zero)) and abs(near - further) <= 0.01 * jump
