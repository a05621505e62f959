"""Where the first NaN or infinity was made. Operation by operation and slow: for a model that is known to have some."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array, Bool

from linked_jax.probe.interpret import Trace, has_activation, scanned_data, step_masks
from linked_jax.probe.names import module_of
from linked_jax.probe.recognise import activations, name_of
from linked_jax.probe.regions import Region
from linked_jax.probe.taps import kept
from linked_jax.probe.values import (
    CUSTOM,
    Atom,
    Graph,
    Op,
    Value,
    goes_on,
    inner_jaxprs,
    loop_parts,
    open_jaxpr,
    where_on,
)

OUTPUTS = "the outputs of the model"
_GRAVEST = ("NaN", "inf", "-inf")  # first: -inf may be a mask


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the values come from by which an activation, or else the model's outputs, were the first to be not finite.

    Attributes:
      kind: "operation", which made them from finite values; or "input", "parameter" and "constant", which had them; or
        "unknown": no operation makes them by itself, as when a sum over all data overflows.
      name: of the operation; the path of the input or parameter, and the shape of the constant; what is known else.
      layer: of an operation, the module that it is in.
      source: of an operation, the file and line.
      value: "NaN", "inf" or "-inf", the gravest of them.
      seen_by: the first activation that had them, and its file and line; or the outputs.
    """

    kind: str
    name: str
    layer: str
    source: str
    value: str
    seen_by: str = ""

    def __str__(self) -> str:
        what = f"the {self.kind} {self.name} has {self.value}".replace("  ", " ")
        if self.kind == "operation":
            place = " at ".join(filter(None, (self.layer, self.source)))
            what = f"{self.name} in {place or 'the model'} makes {self.value} of finite values"
        if self.kind == "unknown":
            what = self.name
        return f"{what}, first seen by {self.seen_by}" if self.seen_by else what


Marked = tuple[Any, Origin | None]
"""A value, and where what is not finite in it comes from."""


class _Seen(Exception):
    """An activation is not finite."""

    def __init__(self, origin: Origin):
        self.origin = origin


def origin_of(trace: Trace, names: list[tuple[str, str]], mask: Array | None) -> Origin | None:
    """What the first activation that is not finite has that from, else an output of the model; None if all are finite.

    Every operation is evaluated by itself, loops one iteration after the other. What is not finite is followed from
    where it was made, and forgotten where it ends: exp(-inf) is 0.

    Args:
      trace: of the model and its inputs.
      names: kind and name of each argument of the trace.
      mask: as for `observe`; the others may be not finite, and so may outputs, which can have any shape.
    """
    with jax.debug_nans(False), jax.debug_infs(False):
        triples = zip(trace.arguments, names, trace.graph.inputs, strict=True)
        arguments = [_marked(x, value, mask, (*name, "", "")) for x, name, value in triples]
        try:
            outputs = _walk(trace.graph, arguments, mask, "")
        except _Seen as seen:
            return seen.origin
    made = next((origin for x, origin in outputs if origin and mask is None and not is_sound(x)), None)
    return made and dataclasses.replace(made, seen_by=OUTPUTS)


def is_sound(x: Any) -> Bool[Array, ""]:
    """No NaN and no inf; -inf is how logits are masked."""
    return ~(jnp.isnan(x) | jnp.isposinf(jnp.real(x))).any()


def _marked(
    x: Any, value: Value, mask: Array | None, made: tuple[str, str, str, str], passed: Origin | None = None
) -> Marked:
    """With its origin if it is not finite: the one that was passed on, or else one with these first fields."""
    bad = _not_finite(x, value, mask)
    return x, (passed or Origin(*made, bad)) if bad else None


def _not_finite(x: Any, value: Value | None = None, mask: Array | None = None) -> str:
    """The gravest value that is not finite; empty if there is none."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return ""
    if mask is not None and value and value.from_data:
        x = jnp.where(kept(value, mask), x, 0)
    if bool(jnp.isfinite(x).all()):
        return ""
    return "NaN" if bool(jnp.isnan(x).any()) else "inf" if bool(jnp.isposinf(jnp.real(x)).any()) else "-inf"


def _walk(graph: Graph, arguments: list[Marked], mask: Array | None, index: str) -> list[Marked]:
    """The outputs of a graph.

    Raises:
      _Seen: at the first activation that is not finite.
    """
    readers: dict[Value, Region] = {}
    for region in activations(graph)[0]:
        for value in (region.z, *region.members):
            readers.setdefault(value, region)
    env: dict[Value, Marked] = {}

    def define(value: Value, marked: Marked) -> None:
        env[value] = marked
        if marked[1] and value in readers:
            region = readers[value]
            where = region.ops[0].where
            place = " at ".join(filter(None, (_module(where.scope, index), where.source)))
            raise _Seen(dataclasses.replace(marked[1], seen_by=f"{name_of(region)} in {place or 'the model'}"))

    for value, marked in zip(graph.inputs, arguments, strict=True):
        define(value, marked)
    for value, x in graph.constants:
        define(value, _marked(x, value, mask, ("constant", f"of shape {jnp.shape(x)}", "", "")))
    for op in graph.ops:
        operands = [_read(x, env) for x in op.operands]
        for value, marked in zip(op.outputs, _apply(op, operands, mask, index), strict=True):
            define(value, marked)
    return [_read(x, env) for x in graph.outputs]


def _read(x: Atom, env: dict[Value, Marked]) -> Marked:
    return (x.val, None) if isinstance(x, Literal) else env[x]


def _module(scope: str, index: str) -> str:
    return f"{module_of(scope)}{index}" if module_of(scope) else ""


def _apply(op: Op, operands: list[Marked], mask: Array | None, index: str) -> list[Marked]:
    """The outputs of an operation, entered where it has activations inside."""
    if any(map(has_activation, op.graphs)):
        if op.kind == "scan":
            return _scan(op, operands, mask, index)
        if op.kind == "while":
            return _while(op, operands, mask, index)
        if op.kind == "cond":
            taken = int(np.clip(operands[0][0], 0, len(op.graphs) - 1))
            return _walk(op.graphs[taken], operands[1:], mask, index)
        if op.kind in CUSTOM:
            return _walk(op.graphs[0], operands, mask, index)
    passed = min((origin for _, origin in operands if origin), key=lambda one: _GRAVEST.index(one.value), default=None)
    made = "operation", _operation(op), _module(op.where.scope, index), op.where.source
    outputs = op.evaluate([x for x, _ in operands])
    return [_marked(x, value, mask, made, passed) for value, x in zip(op.outputs, outputs, strict=True)]


def _operation(op: Op) -> str:
    """Its name; that of the function, if it has a custom derivative."""
    if op.kind not in CUSTOM:
        return op.kind
    inner = next(iter(inner_jaxprs(op.equation)), None)
    return getattr(getattr(open_jaxpr(inner)[0], "debug_info", None), "func_name", op.kind)


def _scan(op: Op, operands: list[Marked], mask: Array | None, index: str) -> list[Marked]:
    params, graph = op.equation.params, op.graphs[0]
    consts, carry, xs = loop_parts(op, operands)
    over_data = bool(scanned_data(op))
    masks = step_masks(op, mask)
    ys: list[list[Marked]] = [[] for _ in range(len(graph.outputs) - len(carry))]
    times = range(params["length"])
    for i in reversed(times) if params["reverse"] else times:
        step = [(x[i], origin if origin and _not_finite(x[i]) else None) for x, origin in xs]
        inside = mask if masks is None else masks[i]
        outputs = _walk(graph, [*consts, *carry, *step], inside, index if over_data else f"{index}[{i}]")
        carry = outputs[: len(carry)]
        for y, output in zip(ys, outputs[len(carry) :], strict=True):
            y.append(output)
    return [*carry, *(_stack(value, y, params) for value, y in zip(op.outputs[len(carry) :], ys, strict=True))]


def _stack(value: Value, steps: list[Marked], params: dict[str, Any]) -> Marked:
    if not steps:
        return jnp.zeros(value.shape, value.aval.dtype), None
    origin = next((origin for _, origin in steps if origin), None)
    arrays = [x for x, _ in steps]
    return jnp.stack(arrays[::-1] if params["reverse"] else arrays), origin


def _while(op: Op, operands: list[Marked], mask: Array | None, index: str) -> list[Marked]:
    consts, carry, _ = loop_parts(op, operands)
    while (on := goes_on(op, [x for x, _ in operands], [x for x, _ in carry])).any():
        new = _walk(op.graphs[0], [*consts, *carry], mask, index)
        values = where_on(on, [x for x, _ in new], [x for x, _ in carry])
        origins = [a or b for (_, a), (_, b) in zip(new, carry, strict=True)]
        carry = [(x, made if made and _not_finite(x) else None) for x, made in zip(values, origins, strict=True)]
    return carry
