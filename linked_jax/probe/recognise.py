"""The name of an activation, from its values: a region is evaluated on a grid and compared with known functions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jaxtyping import Array

from linked_jax.probe.graph import params_of
from linked_jax.probe.names import link_of
from linked_jax.probe.regions import Region, find
from linked_jax.probe.values import Atom, Graph, Op, Value, inner_jaxprs, is_number, open_jaxpr

KNOWN: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gelu (exact)": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda z: z * jax.nn.sigmoid(1.702 * z),
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "log_sigmoid": jax.nn.log_sigmoid,
    "soft_sign": jax.nn.soft_sign,
    "squareplus": jax.nn.squareplus,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_silu": jax.nn.hard_silu,
    "hard_tanh": jax.nn.hard_tanh,
    "sparse_plus": jax.nn.sparse_plus,
    "sparse_sigmoid": jax.nn.sparse_sigmoid,
    "relu²": lambda z: jnp.square(jax.nn.relu(z)),
    "tanhshrink": lambda z: z - jnp.tanh(z),
    "erf": jax.scipy.special.erf,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "exp": jnp.exp,
    "abs": jnp.abs,
    "square": jnp.square,
}
"""Functions that have a name; those with slopes or bounds are recognised by their form."""

UNKNOWN = "unknown"
_GRID = np.array([-19, -8.5, *np.linspace(-6, 6, 97), 8.5, 19])  # odd ends: 20 would saturate in float16
_FAR = np.array([sign * size for size in (30, 100, 300, 1000) for sign in (-1, 1)])  # beyond it a clip is for safety
_POINTS = np.concatenate([_GRID, _FAR])
_PARAMETER = 0.3  # in the place of one: a slope, a scale


def activations(graph: Graph) -> tuple[list[Region], list[Op]]:
    """`regions.find`, once: each activation from where it has a plain name; those that are affine in fact are none."""
    if graph.found is None:
        regions, others = find(graph)
        graph.found = [_widest(region) for region in regions if not _judge(region)[1]], others
    return graph.found


def name_of(region: Region) -> str:
    """The name of a link, or of the function that its members are; "unknown" if no function that has one fits."""
    links = {link_of(op.where.scope) for op in region.ops}
    names = (links.pop() if len(links) == 1 else "") or _judge(region)[0]
    return names.removesuffix("(z)") if len(region.members) == 1 else names


def _widest(region: Region) -> Region:
    """The activation from where it has a plain name: hard_sigmoid(z) rather than relu6(z + 3) / 6.

    Where no step back gives one, the region itself.
    """
    candidate: Region | None = region
    while candidate is not None and name_of(candidate) not in KNOWN:
        candidate = candidate.wider
    return candidate or region


_judged: dict[Any, tuple[str, bool]] = {}


def _judge(region: Region) -> tuple[str, bool]:
    """The name, and whether all members are affine in fact; regions that compute the same are evaluated once."""
    key = _key(region)
    if key not in _judged:
        values = _values(region)
        names = UNKNOWN if values is None else ", ".join(map(_name, values))
        eps = float(jnp.finfo(region.z.aval.dtype).eps)
        _judged[key] = names, values is not None and all(_fits_a_line(member, eps) for member in values)
    return _judged[key]


def _fits_a_line(values: np.ndarray, eps: float) -> bool:
    """Whether a member at `_POINTS` is on one line, to a thousandth.

    Of its own size where that is small, as of 1e-4 tanh. Far out, where a clip may be, as far as it is finite.
    """
    near = values[: len(_GRID)]
    if not np.isfinite(near).all():
        return False
    slope, offset = np.polyfit(_GRID, near, 1)
    spread, rounding = np.abs(near - near.mean()).max(), 4 * eps * np.abs(near).max()
    sizes = min(1.0, spread) + np.abs(slope * _POINTS)
    off = np.abs(values - (slope * _POINTS + offset)) > max(1e-3, 4 * eps) * sizes + rounding
    return not off[np.isfinite(values)].any()


def _key(region: Region) -> Any:
    """Equal for regions that compute the same, whatever their values are."""
    numbers = {region.z: 0}

    def atom(x: Atom) -> Any:
        return str(x) if isinstance(x, Literal) else numbers.get(x, f"{_constant(x)}:{x.aval.dtype}")

    found: list[Any] = [str(region.z.aval.dtype)]
    for op in region.ops:
        found.append((*params_of(op.equation), *map(atom, op.operands)))
        numbers |= {output: len(numbers) + i for i, output in enumerate(op.outputs)}
    return (*found, *(numbers[v] for v in region.members))


def _values(region: Region) -> np.ndarray | None:
    """The members at `_POINTS`, (d, points), in float32 at least; None if they cannot be evaluated."""
    try:
        with jax.ensure_compile_time_eval():
            env: dict[Value, Any] = {region.z: _wide(jnp.asarray(_POINTS, region.z.aval.dtype))}
            for op in region.ops:
                operands = [_operand(x, env) for x in op.operands]
                env |= zip(op.outputs, _on_grid(op.equation, operands), strict=True)
            return np.stack([np.asarray(env[v], np.float64) for v in region.members])
    except Exception:  # an operation that asks for one shape, or has no rule here
        return None


def _wide(x: Any) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 else x


def _operand(x: Atom, env: dict[Value, Any]) -> Any:
    if isinstance(x, Literal):
        return _wide(x.val)
    if x in env:
        return env[x]
    value = _wide(jnp.asarray(_constant(x), x.aval.dtype))
    return jnp.broadcast_to(value, _POINTS.shape) if x.shape else value


def _on_grid(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    """The outputs of an elementwise equation where all arrays are grids."""
    if equation.primitive.name == "broadcast_in_dim":
        return [jnp.broadcast_to(operands[0], _POINTS.shape)]
    if equation.primitive.name == "transpose":
        return operands
    if inner := inner_jaxprs(equation):
        body, constants = open_jaxpr(inner[0])
        env = dict(zip([*body.constvars, *body.invars], [*constants, *operands], strict=True))
        for eqn in body.eqns:
            outputs = _on_grid(eqn, [_wide(x.val) if isinstance(x, Literal) else env[x] for x in eqn.invars])
            env |= zip(eqn.outvars, outputs, strict=True)
        return [x.val if isinstance(x, Literal) else env[x] for x in body.outvars]
    outputs = equation.primitive.bind(*operands, **equation.params)
    return list(map(_wide, outputs if equation.primitive.multiple_results else [outputs]))


def _constant(x: Value) -> Any:
    """A number in the place of what is no data: its own if it is one number throughout, else a parameter's."""
    if not is_number(x):
        return True if x.aval.dtype == bool else _PARAMETER
    if x.number is not None:
        return x.number
    assert x.op is not None
    operands = [o.val if isinstance(o, Literal) else _constant(o) for o in x.op.operands]
    if x.op.kind == "broadcast_in_dim":
        return operands[0]
    with jax.ensure_compile_time_eval():
        typed = zip(operands, x.op.operands, strict=True)
        arrays = [_wide(jnp.asarray(o, getattr(a.aval, "dtype", None))) for o, a in typed]
        return np.asarray(_on_grid(x.op.equation, arrays)[0]).ravel()[0]


def _name(values: np.ndarray) -> str:
    """Of one member, as a function of z, from its values at `_POINTS`."""
    near = values[: len(_GRID)]
    if not np.isfinite(near).all():
        return UNKNOWN
    if not values.any():
        return "0"  # relu(-relu(z)), of a linked relu behind a relu that was left in
    for name, known in _known().items():
        for z, wanted in (("z", known), ("-z", known[::-1])):
            scale = float(near @ wanted / (wanted @ wanted))
            if scale > 0 and _close(near, scale * wanted):
                factor = "" if abs(scale - 1) < 2e-2 else f"{scale:.3g} "
                return f"{factor}{name}({z})"
    return _by_form(values)


def _by_form(values: np.ndarray) -> str:
    """By slopes on both sides of 0, or bounds; far out too, as far as finite."""
    z, values = _POINTS[np.isfinite(values)], values[np.isfinite(values)]
    near = np.abs(z) < 20
    a, b = (float(values[side] @ z[side] / (z[side] @ z[side])) for side in (near & (z > 0), near & (z < 0)))
    if _close(values, np.where(z > 0, a, b) * z):
        if abs(a - b) < 2e-2 * abs(a):
            return "z" if abs(a - 1) < 2e-2 else f"{a:.3g} z"
        return "leaky_relu(-z)" if abs(b) > abs(a) else "leaky_relu(z)"
    if _close(values, np.clip(z, values.min(), values.max())):
        return "clip(z)"
    return UNKNOWN


def _close(values: np.ndarray, wanted: np.ndarray) -> bool:
    """By their own size where they are small, as those of 1e-4 tanh."""
    small = 0.05 * min(1.0, float(np.abs(values).max()))
    return bool(np.all(np.abs(values - wanted) <= 2e-2 * (small + np.abs(wanted))))


@functools.cache
def _known() -> dict[str, np.ndarray]:
    with jax.ensure_compile_time_eval():
        values = jax.jit(lambda z: [f(z) for f in KNOWN.values()])(jnp.asarray(_GRID, jnp.float32))
    return {name: np.asarray(x, np.float64) for name, x in zip(KNOWN, values, strict=True)}
