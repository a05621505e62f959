"""The name of an activation, from its values: a region is evaluated on a grid and compared with known functions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Literal

from linked_jax.probe.graph import Atom, Op, Value, inner_jaxprs
from linked_jax.probe.names import link_of
from linked_jax.probe.regions import Region

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
_GRID = np.concatenate([np.linspace(-6, 6, 97), [-19.0, -8.5, 8.5, 19.0]])  # odd ends: 20 would saturate in float16
_PARAMETER = 0.3  # in the place of one: a slope, a scale


def name_of(region: Region) -> str:
    """The name of a link, or of the function that its members are; "unknown" if no function that has one fits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe.graph import graph_of
      >>> from linked_jax.probe.recognise import name_of
      >>> from linked_jax.probe.regions import regions
      >>> z = jnp.ones((3, 4))
      >>> forms = jax.nn.silu, lambda z: z / (1 + jnp.exp(-z)), lambda z: jnp.where(z < 0, 0.2 * z, z)
      >>> [name_of(regions(graph_of(jax.make_jaxpr(f)(z), None, [True]))[0]) for f in forms]
      ['silu', 'silu', 'leaky_relu']
    """
    links = {link_of(op.scope) for op in region.ops}
    if len(links) == 1 and (link := links.pop()):
        return link
    key = _key(region)
    if key not in _names:
        values = _values(region)
        _names[key] = UNKNOWN if values is None else ", ".join(map(_name, values))
    names = _names[key]
    return names.removesuffix("(z)") if len(region.members) == 1 else names


def widest(region: Region) -> Region:
    """The activation from where it has a plain name: hard_sigmoid(z) rather than relu6(z + 3) / 6.

    Where no step back gives one, the region itself.
    """
    candidate: Region | None = region
    while candidate is not None:
        if name_of(candidate) in KNOWN:
            return candidate
        candidate = candidate.wider
    return region


_names: dict[Any, str] = {}


def is_affine(region: Region) -> bool:
    """Whether all members are affine, as far as numbers can tell; such a region is no activation."""
    values = _values(region)
    if values is None:
        return False
    slope, offset = np.polyfit(_GRID, values.T, 1)
    fitted = slope[:, None] * _GRID + offset[:, None]
    return bool(np.allclose(values, fitted, rtol=1e-3, atol=1e-3, equal_nan=False))


def _key(region: Region) -> Any:
    """Equal for regions that compute the same, whatever their values are."""
    numbers = {id(region.z): 0}

    def atom(x: Atom) -> Any:
        if isinstance(x, Literal):
            return str(x)
        constant = _constant(x)
        return numbers.get(id(x), f"{constant}:{x.aval.dtype}")

    found = [str(region.z.aval.dtype)]
    for op in region.ops:
        inner = inner_jaxprs(op.equation)
        params = {k: v for k, v in op.equation.params.items() if not callable(v) and not inner and k != "shape"}
        found.append((op.kind, str(sorted(params.items())), str(inner), *map(atom, op.operands)))
        for output in op.outputs:
            numbers[id(output)] = len(numbers)
    return (*found, *(numbers[id(v)] for v in region.members))


def _values(region: Region) -> np.ndarray | None:
    """The members on the grid, (d, grid); None if they cannot be evaluated."""
    for shape in ((len(_GRID),), region.z.shape):
        try:
            return _evaluated(region, shape)
        except Exception:  # an operation that asks for one shape, or has no rule here
            continue
    return None


def _evaluated(region: Region, shape: tuple[int, ...]) -> np.ndarray:
    size = max(1, int(np.prod(shape)))
    rounds = -(-len(_GRID) // size)
    flat = np.resize(_GRID, rounds * size).reshape(rounds, *shape)

    def members(z: Any) -> list[Any]:
        env: dict[int, Any] = {id(region.z): z}
        for op in region.ops:
            operands = [_operand(x, env, shape) for x in op.operands]
            env |= zip(map(id, op.outputs), evaluate_op(op, operands), strict=True)
        return [jnp.broadcast_to(env[id(v)], shape) for v in region.members]

    with jax.ensure_compile_time_eval():
        one = jax.jit(members)  # jit: a bare custom_jvp, as jax.nn.relu is, would still join a vmap around us
        found = [one(jnp.asarray(z, region.z.aval.dtype)) for z in flat]
    return np.stack(
        [np.concatenate([np.asarray(x, np.float64).ravel() for x in member]) for member in zip(*found, strict=True)]
    )[:, : len(_GRID)]


def _operand(x: Atom, env: dict[int, Any], shape: tuple[int, ...]) -> Any:
    if isinstance(x, Literal):
        return x.val
    if id(x) in env:
        return env[id(x)]
    value = np.asarray(_constant(x), x.aval.dtype)
    return np.broadcast_to(value, shape) if x.shape and len(shape) == len(x.shape) else value


def _constant(x: Value) -> Any:
    """A number in the place of what is no data: its own if it is one number throughout, else a parameter's."""
    if x.op is None or x.from_data:
        return True if x.aval.dtype == bool else _PARAMETER
    operands = [o.val if isinstance(o, Literal) else _constant(o) for o in x.op.operands]
    if x.op.kind == "broadcast_in_dim" and isinstance(x.op.operands[0], Literal):
        return operands[0]
    if x.op.is_elementwise and all(map(_is_known, x.op.operands)):
        op, arrays = x.op, [np.asarray(o, a.aval.dtype) for o, a in zip(operands, x.op.operands, strict=True)]
        with jax.ensure_compile_time_eval():
            return np.asarray(jax.jit(lambda arrays: evaluate_op(op, arrays)[0])(arrays))
    return True if x.aval.dtype == bool else _PARAMETER


def _is_known(x: Atom) -> bool:
    if isinstance(x, Literal):
        return True
    made = x.op is not None and not x.from_data and (x.op.is_elementwise or x.op.kind == "broadcast_in_dim")
    return made and x.op is not None and all(map(_is_known, x.op.operands))


def evaluate_op(op: Op, operands: list[Any]) -> list[Any]:
    """The outputs of an operation."""
    pairs = zip(op.equation.invars, operands, strict=True)
    given = {var: x for var, x in pairs if not isinstance(var, Literal)}
    return list(eval_jaxpr(op.jaxpr, (), *(given[var] for var in op.jaxpr.invars)))


def _name(values: np.ndarray) -> str:
    """Of one member, as a function of z."""
    for name, known in _known().items():
        for mirrored, wanted in ((False, known), (True, known[_mirror()])):
            scale = float(values @ wanted / (wanted @ wanted))
            if scale > 0 and _close(values, scale * wanted):
                factor = "" if abs(scale - 1) < 2e-2 else f"{scale:.3g} "
                return f"{factor}{name}({'-' if mirrored else ''}z)"
    return _by_form(values)


def _by_form(values: np.ndarray) -> str:
    positive, negative = _GRID > 0, _GRID < 0
    a, b = (float(values[side] @ _GRID[side] / (_GRID[side] @ _GRID[side])) for side in (positive, negative))
    if _close(values, np.where(positive, a, b) * _GRID):
        mirrored = abs(b) > abs(a)
        return f"leaky_relu({'-' if mirrored else ''}z)"
    if _close(values, np.clip(_GRID, values.min(), values.max())):
        return "clip(z)"
    return UNKNOWN


def _close(values: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.all(np.abs(values - wanted) <= 2e-2 * (0.05 + np.abs(wanted))))


@functools.cache
def _known() -> dict[str, np.ndarray]:
    with jax.ensure_compile_time_eval():
        return {name: np.asarray(jax.jit(f)(jnp.asarray(_GRID, jnp.float32)), np.float64) for name, f in KNOWN.items()}


@functools.cache
def _mirror() -> np.ndarray:
    return np.array([int(np.flatnonzero(-z == _GRID)[0]) for z in _GRID])
