"""Which equations of a jaxpr are an activation: z -> h.

Three kinds are known. A link of this library marks its two ends. Most activations of jax.nn are one equation, a call
that bears their name. Others are inlined, and are found by comparing with the jaxpr of the function itself.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from linked_jax.linking import Layout
from linked_jax.probe.names import is_normalisation

CALLS = {
    "celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh", "leaky_relu", "log_sigmoid", "mish",
    "prelu", "relu", "relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "sparse_plus", "sparse_sigmoid",
    "squareplus", "swish",
}  # fmt: skip
"""The names of calls that are activations if they map one array to one of its shape."""

INLINED: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("gelu", lambda z, a: 0.5 * z * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (z + a * z**3)))),  # as GPT-2 writes it
    ("gelu", lambda z, a, b: 0.5 * z * (1 + jnp.tanh(b * (z + a * z**3)))),
    ("gelu", lambda z, a, b: 0.5 * z * (1 + jnp.tanh(z * b * (1 + a * z * z)))),
    ("gelu", lambda z, a, b: 0.5 * z * (1 + jnp.tanh(b * z * (1 + a * z**2)))),
    ("gelu", lambda z, a, b: z * (0.5 * (1 + jnp.tanh(b * (z + a * z**3))))),
    ("gelu", lambda z: 0.5 * z * (1 + jax.lax.erf(z / jnp.sqrt(2.0)))),
    ("gelu", lambda z, a: 0.5 * z * (1 + jax.lax.erf(z / a))),
    ("gelu", functools.partial(jax.nn.gelu, approximate=False)),
    ("quick_gelu", lambda z, a: z * jax.nn.sigmoid(a * z)),
    ("mish", lambda z: z * jnp.tanh(jax.nn.softplus(z))),
    ("prelu", lambda z, a: jnp.where(z >= 0, z, a * z)),  # as Flax writes it
    ("leaky_relu", lambda z, a: jnp.where(z > 0, z, a * z)),
    ("leaky_relu", lambda z, a: jnp.maximum(z, a * z)),
    ("relu", lambda z: jnp.where(z > 0, z, jnp.zeros_like(z))),
    ("clip", lambda z, a: jnp.minimum(jax.nn.relu(z), a)),
    ("clip", lambda z, a: jnp.minimum(jnp.maximum(z, 0), a)),
    ("relu", lambda z: jnp.maximum(z, jnp.zeros_like(z))),
    ("relu", lambda z: jnp.where(z > 0, z, 0)),
    ("relu", lambda z: jnp.where(z >= 0, z, 0)),
    ("relu", lambda z: jnp.where(z < 0, 0, z)),
    ("relu", lambda z: jnp.where(z <= 0, 0, z)),
    ("silu", lambda z: z * jax.nn.sigmoid(z)),
    ("relu", lambda z: jnp.maximum(z, 0)),
    ("clip", lambda z, a: jnp.clip(z, 0, a)),
    ("clip", lambda z, a: jnp.clip(z, min=0, max=a)),
    ("relu", lambda z: jnp.clip(z, 0)),
    ("tanh", jnp.tanh),
    ("sigmoid", jax.nn.sigmoid),
)
"""Activations that leave no call in a jaxpr, of z and of scalars that may have any value; the longer first."""

COMMUTATIVE = {"add", "mul", "max", "min"}
AFFINE = {"add", "broadcast_in_dim", "convert_element_type", "copy", "div", "mul", "name", "neg", "reshape", "sub"}
"""Operations that are affine in each operand; of a product and a quotient, in the first one alone or the other."""


@dataclasses.dataclass(frozen=True)
class Site:
    """An activation in a list of equations: those from the one it was found at, up to stop, make h of z."""

    stop: int
    z: Var
    h: Var
    activation: str
    arity: int = 1
    layout: Layout = "blocked"
    axis: int = -1


def activation_at(equations: Sequence[JaxprEqn], i: int) -> Site | None:
    """The activation that begins at the i-th equation; None if none does.

    >>> import jax
    >>> from linked_jax.probe.recognise import activation_at
    >>> jaxpr = jax.make_jaxpr(lambda z: jax.nn.gelu(2 * z))(jax.numpy.ones((4, 3))).jaxpr
    >>> activation_at(jaxpr.eqns, 0) is None, activation_at(jaxpr.eqns, 1).activation
    (True, 'gelu')
    """
    site = _link_at(equations, i) or _inlined_at(equations, i) or _call_at(equations, i)
    return site if site and _is_layer(site) else None


def has_activation(jaxpr: Any) -> bool:
    """Whether there is an activation in a jaxpr or in one inside it."""
    equations = open_jaxpr(jaxpr)[0].eqns
    return any(activation_at(equations, i) for i in range(len(equations))) or any(
        has_activation(inner) for equation in equations for inner in inner_jaxprs(equation)
    )


def inner_jaxprs(equation: JaxprEqn) -> list[Any]:
    """The jaxprs among an equation's parameters: a call's body, the branches of a cond."""
    values = [value if isinstance(value, tuple) else (value,) for value in equation.params.values()]
    return [x for value in values for x in value if hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")]


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, list[Any]]:
    """A jaxpr, closed or not, and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def _is_layer(site: Site) -> bool:
    if isinstance(site.z, Literal):
        return False
    z, h = _aval(site.z), _aval(site.h)
    return z.ndim > 0 and z.size > 0 and jnp.issubdtype(z.dtype, jnp.floating) and h.size == site.arity * z.size


def _link_at(equations: Sequence[JaxprEqn], i: int) -> Site | None:
    prefix, label = "linked_jax.z:", _mark(equations[i])
    if not label.startswith(prefix):
        return None
    label = label.removeprefix(prefix)
    for stop, last in enumerate(equations[i + 1 :], i + 2):
        if _mark(last) == f"linked_jax.h:{label}":
            arity, layout, axis, name = label.split(":", 3)
            name = name[5:-1] if name.startswith("Link(") else name
            name = name.removesuffix("(z)") if arity == "1" else name
            if arity == "1" and _is_affine(equations[i:stop], equations[i].invars[:1], last.outvars[0]):
                return None
            z, h = cast(Var, equations[i].invars[0]), last.outvars[0]
            return Site(stop, z, h, name, int(arity), cast(Layout, layout), int(axis))
    return None


def _is_affine(equations: Sequence[JaxprEqn], variables: Sequence[Any], result: Any) -> bool:
    """Whether the result is an affine function of these variables, as far as its equations tell."""
    affine = set(variables)
    for equation in equations:
        operands = [not isinstance(atom, Literal) and atom in affine for atom in equation.invars]
        if not any(operands):
            continue
        inner, name = inner_jaxprs(equation), equation.primitive.name
        if name in ("jit", "pjit"):
            body = open_jaxpr(inner[0])[0]
            changing = [var for var, operand in zip(body.invars, operands, strict=True) if operand]
            if not all(_is_affine(body.eqns, changing, out) for out in body.outvars):
                return False
        elif name not in AFFINE or (name == "mul" and all(operands)) or (name == "div" and operands[1]):
            return False
        affine |= set(equation.outvars)
    return result in affine or isinstance(result, Literal)


def _mark(equation: JaxprEqn) -> str:
    return equation.params["name"] if equation.primitive.name == "name" else ""


def _call_at(equations: Sequence[JaxprEqn], i: int) -> Site | None:
    call, arrays = equations[i], _arrays(equations[i])
    name = _call_name(call)
    if name not in CALLS or len(arrays) != 1 or [_aval(v).shape for v in call.outvars] != [_aval(arrays[0]).shape]:
        return None
    return Site(i + 1, arrays[0], call.outvars[0], name)


def _call_name(call: JaxprEqn) -> str:
    """The called function's name; a custom rule bears none, but what it wraps does."""
    if call.primitive.name in ("jit", "pjit"):
        return call.params["name"]
    bodies = [open_jaxpr(jaxpr)[0].eqns for jaxpr in inner_jaxprs(call)] if "custom" in call.primitive.name else []
    return _call_name(bodies[0][0]) if len(bodies) == 1 and len(bodies[0]) == 1 else ""


def _inlined_at(equations: Sequence[JaxprEqn], i: int) -> Site | None:
    array = _aval([*_arrays(equations[i]), *equations[i].outvars][0])
    if not jnp.issubdtype(getattr(array, "dtype", bool), jnp.floating):
        return None
    for k, (name, _) in enumerate(INLINED):
        primitives = [equation.primitive for equation in _template(k, (2,), jnp.dtype(jnp.float32)).eqns]
        some = equations[i : i + len(primitives)]
        if [equation.primitive for equation in some] != primitives:
            continue  # before a template of this shape is made
        template = _template(k, array.shape, array.dtype)
        found = _match(template, some)
        if found and not (len(some) == 1 and is_normalisation(equations[i])):
            return Site(i + len(some), found[template.invars[0]], found[template.outvars[0]], name)
    return None


def _arrays(equation: JaxprEqn) -> list[Any]:
    """The operands with an axis or more."""
    return [atom for atom in equation.invars if getattr(atom.aval, "ndim", 0) > 0]


def _aval(atom: Any) -> Any:
    return atom.aval


@functools.lru_cache(maxsize=4096)
def _template(k: int, shape: tuple[int, ...], dtype: Any) -> Jaxpr:
    function = INLINED[k][1]
    scalars = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty][1:]
    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, dtype) for s in [shape, *[()] * len(scalars)])).jaxpr


def _match(template: Jaxpr, equations: Sequence[JaxprEqn]) -> dict[Any, Any] | None:
    """What stands for each variable of the template, if these equations are the template's but for names."""
    if [e.primitive for e in equations] != [e.primitive for e in template.eqns]:
        return None
    found: dict[Any, Any] = {}
    for wanted, equation in zip(template.eqns, equations, strict=True):
        if _options(wanted) != _options(equation) or len(wanted.invars) != len(equation.invars):
            return None
        orders = [equation.invars, equation.invars[::-1]] if wanted.primitive.name in COMMUTATIVE else [equation.invars]
        ways = [_same([*wanted.invars, *wanted.outvars], [*order, *equation.outvars], found) for order in orders]
        found = next((way for way in ways if way is not None), {})
        if not found:
            return None
    return found


def _same(wanted: list[Any], atoms: list[Any], found: dict[Any, Any]) -> dict[Any, Any] | None:
    """What was found and what these atoms add to it; None if they are others."""
    found = dict(found)
    for a, b in zip(wanted, atoms, strict=True):
        if isinstance(a, Literal):
            if not isinstance(b, Literal) or a.val != b.val:
                return None
        elif _aval(a).shape != _aval(b).shape or found.setdefault(a, b) is not b:
            return None
    return found


def _options(equation: JaxprEqn) -> str:
    """The parameters; of a call, whose body may be batched, the name."""
    return _call_name(equation) if inner_jaxprs(equation) else str(sorted(equation.params.items()))
