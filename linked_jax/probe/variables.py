"""What is known of a variable of a jaxpr before anything runs: whether it is data, which axes are samples, and units.

The axes of the samples are those that are longer for a larger batch. Where they are cannot be told from one jaxpr:
batching puts them anywhere, and a layer may have as many units as the batch has samples.

A unit is one channel of the operation that made the pre-activation z. Data movement between the two keeps that: after
a flatten (N, H, W, C) -> (N, H*W*C) there are C units, each with H*W positions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array

from linked_jax.probe.recognise import Site, inner_jaxprs, open_jaxpr

Samples = dict[Var, tuple[int, ...]] | None
"""For each variable of a jaxpr the axes that grow with the batch; None if that is not known."""

Path = tuple[int, ...]
"""The equations that hold a jaxpr, from the outermost one inwards, each by its number."""

CALLS = ("jit", "pjit", "closed_call", "core_call")
REMATS = ("remat2", "remat", "checkpoint")
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")

_SAME_AXES = {"convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint"}
_SAME_ORDER = {"reshape", "broadcast_in_dim"}
_INPUT, _CONSTANT = -1, -2


class Origin(NamedTuple):
    """Where a variable is defined: the jaxpr, the equation in it (or _INPUT, _CONSTANT), and which of its outputs."""

    path: Path
    equation: int
    output: int


class Factor(NamedTuple):
    """An axis of the array that was moved; several of them are merged into one axis by a flatten."""

    size: int
    is_channel: bool


@dataclasses.dataclass(frozen=True)
class Variable:
    """What is known of one variable.

    Attributes:
      origin: the same for a variable and the argument that it becomes inside a call.
      from_data: whether it depends on the inputs, and not on parameters alone.
      axes: the factors of each axis; those of one axis are merged, the last one varies fastest.
    """

    origin: Origin
    from_data: bool
    axes: tuple[tuple[Factor, ...], ...]


def sample_axes(jaxpr: Any, larger: Any) -> dict[Var, tuple[int, ...]]:
    """The axes of each variable that are longer in the jaxpr of the same model for a larger batch.

    Raises:
      ValueError: if the two jaxprs have other equations.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe.variables import sample_axes
      >>> small, large = (jax.make_jaxpr(lambda x: jnp.ones((3, 4)) @ x.T)(jnp.ones((n, 4))) for n in (3, 6))
      >>> list(sample_axes(small, large).values())[-1]
      (1,)
    """
    one, other = open_jaxpr(jaxpr)[0], open_jaxpr(larger)[0]
    axes = {}
    for equation, same in zip(one.eqns, other.eqns, strict=True):
        if equation.primitive != same.primitive:
            raise ValueError(f"one jaxpr has a {equation.primitive} and the other a {same.primitive}")
        for inner in zip(inner_jaxprs(equation), inner_jaxprs(same), strict=True):
            axes |= sample_axes(*inner)
    for var, grown in zip(_with_shapes(one), _with_shapes(other), strict=True):
        shapes = zip(var.aval.shape, grown.aval.shape, strict=True)
        axes[var] = tuple(k for k, (before, after) in enumerate(shapes) if before != after)
    return axes


def _with_shapes(body: Any) -> list[Any]:
    variables = [*body.invars, *(var for equation in body.eqns for var in equation.outvars)]
    return [var for var in variables if hasattr(var.aval, "shape")]


def inputs_of(jaxpr: Any, from_data: Sequence[bool], path: Path, samples: Samples) -> list[Variable]:
    """The variables that enter a jaxpr, where nothing is known of them but whether they are data."""
    invars = open_jaxpr(jaxpr)[0].invars
    origins = [Origin(path, _INPUT, k) for k in range(len(invars))]
    return [_new(*pair, data, samples) for *pair, data in zip(invars, origins, from_data, strict=True)]


def describe(jaxpr: Any, inputs: Sequence[Variable], path: Path, samples: Samples) -> dict[Var, Variable]:
    """What is known of every variable of a jaxpr, from what is known of its inputs."""
    body = open_jaxpr(jaxpr)[0]
    known = {var: _new(var, Origin(path, _CONSTANT, k), False, samples) for k, var in enumerate(body.constvars)}
    known |= dict(zip(body.invars, inputs, strict=True))
    for i, equation in enumerate(body.eqns):
        operands = operands_of(equation, known)
        from_data = any(operand.from_data for operand in operands)
        outputs = [_new(var, Origin(path, i, k), from_data, samples) for k, var in enumerate(equation.outvars)]
        if equation.primitive.name in (*CALLS, *REMATS, *CUSTOM):
            inner = inner_jaxprs(equation)[0]
            inside = describe(inner, operands, (*path, i), samples)
            returned = [_get(inside, atom) for atom in open_jaxpr(inner)[0].outvars]
            passed = {operand.origin for operand in operands}
            outputs = [
                dataclasses.replace(b, origin=b.origin if b.origin in passed else a.origin)
                for a, b in zip(outputs, returned, strict=True)
            ]
        elif len(operands) == 1 and (axes := _moved(equation, operands[0])):
            outputs = [dataclasses.replace(outputs[0], axes=axes)]
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return known


def operands_of(equation: JaxprEqn, known: dict[Var, Variable]) -> list[Variable]:
    """What is known of the operands of an equation."""
    return [_get(known, atom) for atom in equation.invars]


def _get(known: dict[Var, Variable], atom: Any) -> Variable:
    return _new(atom, Origin((), _CONSTANT, -1), False, None) if isinstance(atom, Literal) else known[atom]


def _new(var: Any, origin: Origin, from_data: bool, samples: Samples) -> Variable:
    """A variable that an operation made: its channels are along the last axis that is not of samples."""
    shape = getattr(var.aval, "shape", ())
    others = [k for k in range(len(shape)) if k not in _samples_of(var, samples)]
    return Variable(origin, from_data, tuple((Factor(n, [k] == others[-1:]),) for k, n in enumerate(shape)))


def _samples_of(var: Any, samples: Samples) -> tuple[int, ...]:
    return (0,) if samples is None else samples.get(var, ())


def _moved(equation: JaxprEqn, operand: Variable) -> tuple[tuple[Factor, ...], ...] | None:
    """The axes of the operand after pure data movement; None for any other operation."""
    kind, shape = equation.primitive.name, getattr(equation.outvars[0].aval, "shape", ())
    if kind in _SAME_AXES:
        return operand.axes
    if kind == "transpose":
        return tuple(operand.axes[k] for k in equation.params["permutation"])
    if kind == "squeeze" or (kind in _SAME_ORDER and equation.params.get("dimensions") is None):
        return _regrouped([factor for axis in operand.axes for factor in axis], shape)
    return None


def _regrouped(factors: list[Factor], shape: tuple[int, ...]) -> tuple[tuple[Factor, ...], ...] | None:
    """The factors in groups of the sizes of a shape; None if one of them would be split, or there are more of them."""
    left = [factor for factor in factors if factor.size > 1 or factor.is_channel]
    groups = []
    for size in shape:
        group = []
        while left and math.prod(factor.size for factor in [*group, left[0]]) <= size:
            group.append(left.pop(0))
        if math.prod(factor.size for factor in group) != size:
            return None
        groups.append(tuple(group))
    return None if left else tuple(groups)


def arrangement(site: Site, z: Variable, samples: Samples) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """How to bring z to (*samples and positions, C) and h to (*samples and positions, d*C), C being the units.

    The units are along a link's axis, else along the axis that has the channels. Of an axis that has more merged into
    it, those are positions. Batching may move the samples to one axis of z and to another one of h.

    Raises:
      ValueError: if the link's axis is that of the samples.
    """
    shape, outputs = site.z.aval.shape, site.h.aval.shape
    z_first, h_first = _samples_of(site.z, samples), _samples_of(site.h, samples)
    z_order, h_order = _to_front(z_first, len(shape)), _to_front(h_first, len(outputs))
    n, ndim, factors = len(z_first), len(shape), (Factor(1, True),)
    z_sizes, h_sizes = [shape[k] for k in z_order], [outputs[k] for k in h_order]
    alone = [[*z_sizes, site.arity]] + [z_sizes] * (site.arity == 1)  # a link stacks what it makes of a number
    if n < ndim or h_sizes not in alone:
        unit = _unit_axis(site, z, z_order, h_sizes, n, known=samples is not None)
        merged = z.axes[z_order[unit]]
        has_channel = any(factor.is_channel for factor in merged)
        factors = merged if has_channel else (Factor(shape[z_order[unit]], True),)
        z_order, h_order = ([*order[:unit], *order[unit + 1 :], order[unit]] for order in (z_order, h_order))
        n = ndim - 1
    arrange = functools.partial(_by_unit, lead=n, factors=factors, layout=site.layout)
    return (
        functools.partial(arrange, order=z_order, arity=1),
        functools.partial(arrange, order=h_order, arity=site.arity),
    )


def _unit_axis(site: Site, z: Variable, z_order: list[int], h_sizes: list[int], n: int, *, known: bool) -> int:
    """The axis of z's units, where the first n axes are of samples; those are guessed if they are not known."""
    ndim, z_sizes = len(z_order), [site.z.aval.shape[k] for k in z_order]
    if site.arity > 1:  # its axis is the one that the link made longer; it may be the first if no samples are known
        begin = n if known else 0
        longer = [k for k in range(begin, ndim) if len(h_sizes) == ndim and h_sizes[k] == site.arity * z_sizes[k]]
        if not longer:
            raise ValueError(
                f"the link {site.activation} is laid along the axis of the samples: it makes {site.h.aval.shape} of z "
                f"of shape {site.z.aval.shape}; give z an axis of units, as in link(z[..., None])"
            )
        return longer[0]
    channels = [k for k in range(n, ndim) if any(factor.is_channel for factor in z.axes[z_order[k]])]
    if site.axis == -1 and channels:
        return channels[0]
    before_batching = site.axis % ndim in z_order[:n]
    return n + site.axis % (ndim - n) if before_batching else z_order.index(site.axis % ndim)


def _by_unit(x: Array, *, order: list[int], lead: int, factors: tuple[Factor, ...], arity: int, layout: str) -> Array:
    """(..., d * positions * C) -> (..., positions, d*C), after a transposition; d and C laid out as the link does."""
    x = x.transpose(order)
    sizes = [factor.size for factor in factors]
    channel = lead + [factor.is_channel for factor in factors].index(True)
    if layout == "blocked":
        x = jnp.moveaxis(x.reshape(*x.shape[:lead], arity, *sizes), (lead, channel + 1), (-2, -1))
    else:
        x = jnp.moveaxis(x.reshape(*x.shape[:lead], *sizes, arity), (channel, -1), (-2, -1))
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _to_front(axes: tuple[int, ...], ndim: int) -> list[int]:
    return [*axes, *(k for k in range(ndim) if k not in axes)]
