"""What numbers tell of a member: its slopes, its derivative at 0, and how members sum to z.

    is_elementwise  g(z)_i depends on z_i alone
    slopes          (a, b) with g(z) = a max(z, 0) + b min(z, 0)
    weights_of_z    a_i with sum_i a_i g_i(z) = z

A member is any elementwise function of z, so answers come from g at many z, in float64. No other file measures a
member. What cannot be measured (see `_UNMEASURABLE`) gets the answer that is safe where it is not known.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from linked_jax.arguments import brief
from linked_jax.members import Member, formula, member_key

Answer = TypeVar("Answer")
_KEPT = 256
"""Members whose answers are kept, and with them what their closures hold; each takes a compile to measure again."""

_UNMEASURABLE = (
    TypeError,  # g is not hashable, closes over traced values (JAX' errors are TypeErrors), or has no forward mode
    ValueError, IndexError, AssertionError,  # g takes no scalar or no vector
    FloatingPointError,  # under jax.debug_nans
    NotImplementedError,  # g has no derivative rule, or no rule for float64
)  # fmt: skip


def evaluate(member: Member, z: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """g(z) in float64, also while JAX traces something else, and whether or not x64 is on; ValueError if it fails."""
    try:
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            # jit: a bare custom_jvp, as jax.nn.relu is, would still join a vmap around us
            return np.asarray(jax.jit(member)(jnp.asarray(z, jnp.float64)), np.float64)
    except _UNMEASURABLE as error:
        why, *_ = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{brief(member)} cannot be evaluated at any number of z ({why}); give it numbers alone, or the layer a "
            "kernel_init"
        ) from error


def _measured(otherwise: Any) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """A question that is asked once of each hashable member; `otherwise` answers for one that cannot be measured."""

    def decorate(question: Callable[..., Answer]) -> Callable[..., Answer]:
        cached = functools.lru_cache(maxsize=_KEPT)(question)

        @functools.wraps(question)
        def ask(member: Member) -> Answer:
            try:
                return cached(member)
            except _UNMEASURABLE:
                return otherwise

        return ask

    return decorate


@_measured(otherwise=True)
def is_elementwise(member: Member) -> bool:
    """Whether g keeps z's shape and every value depends on the z in its own place alone.

    Read off g's jaxpr; if that has more than elementwise operations, g is evaluated at pairs of z that share one value
    (`keeps_apart`).
    True if g cannot be measured, or has an array of its own, such as one slope a channel.

    >>> import jax
    >>> from linked_jax.measurements import is_elementwise
    >>> is_elementwise(jax.nn.silu), is_elementwise(jax.nn.softmax)
    (True, False)
    """
    traced = jax.make_jaxpr(member)(jax.ShapeDtypeStruct(_PLACES, jnp.float32))
    shapes = [value.shape for value in traced.out_avals]
    if any(isinstance(value, Tracer) or np.ndim(value) for value in traced.consts) or (
        len(shapes) == 1 and shapes[0] != _PLACES == shapes[0][-2:]
    ):
        raise TypeError(f"{member!r} has an array of its own, which may go with one shape of z")
    if shapes != [_PLACES]:
        return False
    if all(_is_elementwise(equation) for equation in equations(traced)):
        return True
    return keeps_apart(member, _PLACES, (1, 1))


_PLACES = (4, 6)
_MIXING = ("cum", "sort", "rev", "dot", "conv_", "gather", "scatter", "dynamic", "fft", "reduce", "triangular", "while",
           "top_k", "approx_top_k", "pad")  # fmt: skip


def keeps_apart(f: Member, shape: tuple[int, ...], here: Any) -> bool:
    """Whether f(z)[here] depends on z[here] alone; ValueError if f cannot be evaluated.

    It is tried at three sizes of z: some f mix at one only, as where a norm is clipped.
    """
    z = np.sin(np.arange(1.0, 1 + np.prod(shape))).reshape(shape)
    others = -3 * z
    others[here] = z[here]
    pairs = ((evaluate(f, size * z)[here], evaluate(f, size * others)[here]) for size in (1.0, 1e3, 1e6))
    return all(np.array_equal(one, other, equal_nan=True) for one, other in pairs)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a jaxpr and of all within it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            if hasattr(value, "eqns"):
                yield from equations(value)


def _is_elementwise(equation: Any) -> bool:
    """Surely so; none of `_MIXING` is, though they keep the shape."""
    given, made = ([value.aval.shape for value in values] for values in (equation.invars, equation.outvars))
    return not equation.primitive.name.startswith(_MIXING) and (set(made) == {_PLACES} or set(given) <= {()})


@_measured(otherwise=False)
def has_branches(member: Member) -> bool:
    """Whether it asks for the truth of z in Python, with an if or a while, which JAX cannot trace."""
    try:
        jax.eval_shape(member, jax.ShapeDtypeStruct((), jnp.float32))
    except jax.errors.TracerBoolConversionError:
        return True
    return False


def check_member(member: Any) -> None:
    """TypeError if it is no hashable function of JAX or has arrays of its own, ValueError if it is not elementwise."""
    if not callable(member) or isinstance(member, type):
        raise TypeError(f"every member of a link is a function of z, got {brief(member)}; pass e.g. jax.nn.relu")
    name = " ".join(formula(member).split())
    function = member.func if isinstance(member, functools.partial) else getattr(member, "g", member)
    if isinstance(function, np.ufunc) or (getattr(function, "__module__", None) or "").partition(".")[0] == "numpy":
        raise TypeError(f"every member of a link is built from jax.numpy, got NumPy's {name}; pass jax.numpy's")
    arrays = () if isinstance(member, functools.partial) else jax.tree.leaves(member)
    if any(isinstance(leaf, jax.Array | np.ndarray) for leaf in arrays):
        kind = type(member).__name__
        raise TypeError(
            f"a link does not train its members, got {kind} with arrays of its own; pass link={kind}(...) itself if it "
            f"has an arity, LinkedPReLU or ChannelPReLU for learned slopes, or a plain function"
        )
    try:
        hash(member_key(member))
    except TypeError:
        raise TypeError(
            f"every member of a link is hashable, got {name}; define __hash__, or make its dataclass frozen"
        ) from None
    if has_branches(member):
        raise TypeError(
            f"every member of a link is traced by JAX, got {name} with an if on z; write jnp.where(z > 0, ...)"
        )
    if not is_elementwise(member):
        raise ValueError(f"a link's members are elementwise and keep z's shape, got {name}; pass e.g. jax.nn.relu")


@_measured(otherwise=None)
def slopes(member: Member) -> tuple[float, float] | None:
    """(a, b) if g is linear on both sides of 0, as far as a thousand numbers up to 1e6 can tell.

        g(z) = a max(z, 0) + b min(z, 0)

    None if g has another form or cannot be measured.

    >>> import jax
    >>> from linked_jax.measurements import slopes
    >>> slopes(jax.nn.leaky_relu), slopes(jax.nn.silu)
    ((1.0, 0.01), None)
    """
    return _slopes(member, rtol=1e-12, atol=0.0)


@_measured(otherwise=False)
def is_homogeneous(member: Member) -> bool:
    """Whether g(a z) = a g(z) for every a > 0: `slopes` exist, here to a relative 1e-6. False if g cannot be measured.

    >>> import jax, jax.numpy as jnp
    >>> from linked_jax.measurements import is_homogeneous
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


@functools.lru_cache(maxsize=_KEPT)
def weights_of_z(members: tuple[Member, ...]) -> tuple[Float[np.ndarray, " d"], float]:
    """The weights that read z back from its members, and by how much the best weights miss z.

        sum_i a_i g_i(z) = z

    Minimum-norm least squares over |z| from 1e-3 to 1e3, so that members that saturate miss z. A member and its mirror
    image have weights (1, -1) / c where g(z) - g(-z) = c z. The largest deviation is absolute where |z| < 1, else
    relative; infinite if a member is not finite.

    >>> import jax
    >>> from linked_jax.measurements import weights_of_z
    >>> from linked_jax.members import Mirrored
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

    True if g cannot be measured: the limit is right for a jump, and for a smooth g it changes the derivative by less
    than rounding.

    >>> import jax
    >>> from linked_jax.measurements import jumps_at_zero
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
