"""The idea: several activation functions on one pre-activation.

    f(z) = (g_1(z), ..., g_d(z)),   for every z some g_i'(z) != 0.

Every activation of this library is a `Link`: a tuple of members that all see the same z.
A plain activation is a link with one member, so no other file asks "linked or plain?".
"""

import dataclasses
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from linked_jax.arguments import as_array, brief
from linked_jax.measurements import check_member, jumps_at_zero
from linked_jax.members import Member, Mirrored, Saved, Value, formula, member_key

Layout = Literal["blocked", "interleaved"]


@runtime_checkable
class Activation(Protocol):
    """What a layer needs of a link: a `Link`, or a module with parameters such as `LinkedPReLU`."""

    @property
    def arity(self) -> int:
        """The number of members d."""
        ...

    def __call__(self, z: Any) -> Any:
        """z (..., C) -> (..., d*C)."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Link(Value):
    """Members that share one pre-activation: z -> (g_1(z), ..., g_d(z)).

    Values are exactly those of the members. Derivatives are those of the members too, except at a kink at z = 0
    (and -0.0): there a link of two or more members takes the limit z -> 0+ of its Jacobian, where that differs from
    what JAX would use. So relu mirrored has the Jacobian (1, 0) at 0 and not (0, 0). A link with one member keeps its
    function's own derivative everywhere. So does a member without a finite derivative near 0, such as sqrt(z^2), whose
    square underflows there: write jnp.abs.

    A link is frozen and hashable: it can be a static argument of `jax.jit`, a closure or a dictionary key. Two links
    with equal members, axis and layout are equal; `functools.partial`s are compared by function and arguments. A
    copy is the link itself, and one that was pickled is equal if its members can be imported by their names. What a
    member is gets measured once: an object whose attributes change later is taken for what it was.

    Args:
      members: the functions g_i. Each is elementwise: shape in, shape out.
      axis: the channel axis of z; members are laid along it.
      layout: "blocked" puts all of member 1 before all of member 2: (d, C) flattened. "interleaved" puts a unit's
        members side by side: (C, d) flattened, which keeps a link on its shard when channels are sharded.

    Raises:
      TypeError: if a member is not callable, of NumPy, not hashable or a module with arrays, or the axis is no integer.
      ValueError: if there is no member, one is not elementwise, or the layout is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax import Link
      >>> link = Link((jax.nn.relu, jnp.sin), layout="interleaved")
      >>> link.arity, link(jnp.zeros((8, 3))).shape
      (2, (8, 6))
    """

    members: tuple[Member, ...]
    axis: int = -1
    layout: Layout = "blocked"

    def __post_init__(self):
        if not isinstance(self.members, Sequence) or isinstance(self.members, str):
            raise TypeError(
                f"members are a tuple of functions, got {brief(self.members)}; pass e.g. Link((jax.nn.relu,))"
            )
        object.__setattr__(self, "members", tuple(self.members))
        if not self.members:
            raise ValueError("a link needs at least one member, got none; pass a function such as jax.nn.relu")
        for member in self.members:
            check_member(member)
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise TypeError(f"axis is an integer, got {brief(self.axis)}; channels are last by default (axis=-1)")
        if self.layout not in ("blocked", "interleaved"):
            raise ValueError(f"layout is 'blocked' or 'interleaved', got {brief(self.layout)}")

    @property
    def arity(self) -> int:
        """The number of members d."""
        return len(self.members)

    @property
    def link(self) -> "Link":
        """The link itself: an activation with parameters has the link that it starts as under this name."""
        return self

    def __call__(self, z: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Apply every member to z: (..., C) -> (..., d*C), and () -> (d,). The dtype stays."""
        z = floating(z)
        with scope(", ".join(map(formula, self.members))):
            return join([self._apply(g, z) for g in self.members], self.axis, self.layout)

    def _apply(self, member: Member, z: Array) -> Array:
        g = from_the_right(member) if self.arity > 1 and jumps_at_zero(member) else member
        value = jnp.asarray(g(z))
        if value.shape != z.shape:
            raise ValueError(f"a member maps shape {z.shape} to itself, got {value.shape} from {member!r}")
        return value.astype(z.dtype)

    def _key(self) -> Hashable:
        return tuple(map(member_key, self.members)), self.axis, self.layout

    def __repr__(self) -> str:
        options = [f"axis={self.axis}"] * (self.axis != -1) + [f"layout={self.layout!r}"] * (self.layout != "blocked")
        return f"Link({', '.join([*map(formula, self.members), *options])})"

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Link) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple:
        return Link, (tuple(map(Saved, self.members)), self.axis, self.layout)


def linked(*members: Member, axis: int = -1, layout: Layout = "blocked") -> Link:
    """Link activation functions; a single function is linked with its mirror image.

        linked(g)           f(z) = (g(z), g(-z))             equation (6)
        linked(g_1, g_2)    f(z) = (g_1(z), g_2(z))          the general form

    At z = 0 the derivative is the limit z -> 0+: for the mirror g'(0+) and -g'(0-). See `Link`. A link made here need
    not keep its promise: linked(jnp.tanh) is flat on both sides. `linked_jax.certify` tells.

    Args:
      members: one or more elementwise functions.
      axis: the channel axis of z.
      layout: "blocked" or "interleaved", see `Link`.

    Returns:
      A `Link`: z of shape (..., C) to (..., d*C).

    Raises:
      TypeError, ValueError: if a member or an option is none, see `Link`, or a member is a link of two or more or along
        another axis.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax import linked
      >>> crelu = linked(jax.nn.relu)
      >>> crelu(jnp.array([-2.0, 3.0]))
      Array([0., 3., 2., 0.], dtype=float32)
      >>> jax.jacobian(crelu)(0.0)  # jax.nn.relu's own derivative here is 0, twice
      Array([1., 0.], dtype=float32, weak_type=True)

    Reference: Riera and Pujol, Solving internal covariate shift in deep learning with linked neurons, 2017.
    """
    for member in members:
        if isinstance(member, Link) and member.arity > 1:
            raise ValueError(f"a link's members are plain functions, got a link of {member.arity}; pass its members")
        if isinstance(member, Link) and member.axis != axis:
            raise ValueError(f"{member!r} lies along axis {member.axis}, got axis={axis}; pass axis={member.axis}")
    members = tuple(member.members[0] if isinstance(member, Link) else member for member in members)
    if len(members) == 1:
        members = (members[0], Mirrored(members[0]))
    return Link(members, axis=axis, layout=layout)


def link_of(activation: Activation) -> Link:
    """The link that an activation is, or that it is before training; TypeError if it does not say."""
    link = getattr(activation, "link", None)
    if not isinstance(link, Link):
        raise TypeError(
            f"an initialiser needs a Link or a module with a .link, got {brief(activation)}; pass a Link, e.g. "
            f"linked(jax.nn.relu) or Link((jax.nn.relu,)), or to a layer: pass kernel_init"
        )
    return link


def floating(z: ArrayLike) -> Array:
    """The array z; TypeError if it is none of floating-point numbers."""
    array = as_array(z)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"a link needs a floating-point z, got {array.dtype}; pass z.astype(jnp.float32)")
    return array


def join(parts: Sequence[Array], axis: int, layout: Layout) -> Array:
    """Lay equal arrays along one axis, in blocks or interleaved; scalars are stacked.

    >>> import jax.numpy as jnp
    >>> from linked_jax.linking import join
    >>> a, b = jnp.array([1, 2]), jnp.array([3, 4])
    >>> join([a, b], -1, "blocked").tolist(), join([a, b], -1, "interleaved").tolist()
    ([1, 2, 3, 4], [1, 3, 2, 4])
    """
    ndim = parts[0].ndim
    if ndim == 0:
        return jnp.stack(parts)
    if not -ndim <= axis < ndim:
        raise ValueError(f"the link's axis {axis} is outside z with {ndim} axes, shape {parts[0].shape}")
    if len(parts) == 1:
        return parts[0]
    if layout == "blocked":
        return jnp.concatenate(parts, axis=axis)
    axis %= ndim
    shape = parts[0].shape
    return jnp.stack(parts, axis=axis + 1).reshape(*shape[:axis], len(parts) * shape[axis], *shape[axis + 1 :])


def scope(members: str) -> AbstractContextManager[Any]:
    """A `jax.named_scope` that tells `linked_jax.probe` the names of a link's members. It computes nothing."""
    return jax.named_scope(f"linked_jax:{members.replace('/', '|')}")


def from_the_right(g: Member) -> Member:
    """The function g with the same values, whose derivatives at z = 0 are the limits z -> 0+.

    The derivative is taken at z + 2 tiny [z == 0]. The shift is added, not substituted, so that the chain
    rule still sees z and second derivatives survive. Denormals count as zero, since compilers may flush them to zero
    in g and not here; not those of float16 and float8, which are computed as ordinary float32 numbers: there tiny is
    the least of them, for 2 tiny of the normal ones, 1.2e-4, would show in sums of g's derivatives for parameters.
    """

    def shifted(z: Array) -> Array:
        is_small, numbers = z.dtype == jnp.float16 or z.dtype.itemsize == 1, jnp.finfo(z.dtype)
        tiny = numbers.smallest_subnormal if is_small else numbers.tiny
        is_zero = jnp.abs(z) < tiny
        return _value_of_derivative_of(g(z), g(z + 2 * float(tiny) * is_zero.astype(z.dtype)))

    return shifted


@jax.custom_jvp
def _value_of_derivative_of(value: Array, carrier: Array) -> Array:
    """The first argument's value with the second one's derivative."""
    del carrier
    return value


_value_of_derivative_of.defjvps(None, lambda tangent, _out, _value, _carrier: tangent)


def _positive_part(z: Array) -> Array:
    return jnp.maximum(z, 0)


def _negative_part(z: Array) -> Array:
    return jnp.minimum(z, 0)


min_max = linked(_positive_part, _negative_part)
"""(max(z, 0), min(z, 0)): figure 1a of the paper. Jacobian (1, 0) at 0. The members sum to z."""

fourier = linked(jnp.sin, jnp.cos)
"""(sin z, cos z): never both flat, since sin^2 + cos^2 = 1."""
