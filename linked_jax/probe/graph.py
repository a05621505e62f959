"""A jaxpr as one flat list of operations, with what is known of each value before anything runs.

Calls and remat are inlined, so a value is one object throughout, and equal operations on it are one. Scans,
conds, loops and custom rules keep a graph of their own inside.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from jax.core import Tracer
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from linked_jax.probe.axes import axes_of
from linked_jax.probe.names import scope_of, source_of
from linked_jax.probe.values import (
    CALLS,
    Atom,
    Factor,
    Graph,
    Op,
    Value,
    Where,
    inner_jaxprs,
    loop_parts,
    open_jaxpr,
    shape_of,
)


def graph_of(jaxpr: Any, larger: Any, from_data: Sequence[bool]) -> Graph:
    """The graph of a jaxpr.

    Args:
      jaxpr: closed.
      larger: the jaxpr of the same function for a larger batch, or None.
      from_data: for each input, whether it is data.

    Raises:
      ValueError: if the two jaxprs have other equations.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe.graph import graph_of
      >>> f = jax.jit(lambda w, x: jax.nn.relu(x @ w).reshape(-1))
      >>> small, large = (jax.make_jaxpr(f)(jnp.ones((4, 2)), jnp.ones((n, 4))) for n in (3, 6))
      >>> graph = graph_of(small, large, [False, True])
      >>> [op.kind for op in graph.ops], graph.ops[0].outputs[0].samples
      (['dot_general', 'custom_jvp_call', 'reshape'], (0,))
    """
    return _graph(jaxpr, larger, _inputs(jaxpr, larger, from_data), Where("", ""))


def _inputs(jaxpr: Any, larger: Any, from_data: Sequence[bool]) -> list[Value]:
    invars = open_jaxpr(jaxpr)[0].invars
    grown = open_jaxpr(larger)[0].invars if larger is not None else [None] * len(invars)
    return [_value(var, more, data) for var, more, data in zip(invars, grown, from_data, strict=True)]


def _graph(jaxpr: Any, larger: Any, inputs: list[Value], where: Where) -> Graph:
    graph = Graph(inputs, larger is not None and any(x.from_data and x.samples for x in inputs))
    graph.outputs = _inline(graph, jaxpr, larger, list(inputs), where, {})
    return graph


def _inline(
    graph: Graph, jaxpr: Any, larger: Any, operands: list[Atom], where: Where, seen: dict[Any, list[Value]]
) -> list[Atom]:
    """Add the operations of a jaxpr to a graph; its outputs."""
    body, constants = open_jaxpr(jaxpr)
    more = open_jaxpr(larger)[0].eqns if larger is not None else [None] * len(body.eqns)
    env: dict[Any, Atom] = dict(zip(body.invars, operands, strict=True))
    for var, array in zip(body.constvars, constants, strict=True):
        env[var] = value = _value(var, var if larger is not None else None, False)
        if not value.shape and not isinstance(array, Tracer):
            value.number = array
        graph.constants.append((value, array))
    for equation, same in zip(body.eqns, more, strict=True):
        if same is not None and same.primitive != equation.primitive:
            raise ValueError(f"one jaxpr has a {equation.primitive} and the other a {same.primitive}")
        args = [x if isinstance(x, Literal) else env[x] for x in equation.invars]
        here, inner = Where(scope_of(equation, where.scope), source_of(equation, where.source)), inner_jaxprs(equation)
        inner_more = inner_jaxprs(same) if same is not None else [None] * len(inner)
        if equation.primitive.name in CALLS:
            outputs = _inline(graph, inner[0], inner_more[0], args, here, seen)
        else:
            op = _op(body, equation, same, args, here)
            key = _key(equation, args) if not equation.effects and (op.is_elementwise or not inner) else op
            outputs = seen.get(key)
            if outputs is None:
                if not op.is_elementwise:
                    op.graphs = [_inner(op, *pair) for pair in zip(inner, inner_more, strict=True)]
                graph.ops.append(op)
                outputs = seen[key] = op.outputs
        env |= dict(zip(equation.outvars, outputs, strict=True))
    return [x if isinstance(x, Literal) else env[x] for x in body.outvars]


def _key(equation: JaxprEqn, operands: list[Atom]) -> Any:
    """Equal for equations that compute the same of the same values."""
    atoms = [str(x) if isinstance(x, Literal) else id(x) for x in operands]
    values = equation.params.values()
    wrapped = [value for value in values if hasattr(value, "call_wrapped")]  # rules of custom derivatives
    functions = [_function(value) for value in wrapped] or [value for value in values if callable(value)]
    return *params_of(equation), *atoms, *map(id, functions)


def _function(rule: Any) -> Any:
    """The function within what JAX wraps around it anew at each call; one of another closure is another function."""
    function = getattr(rule, "f", rule)
    is_wrapper = (getattr(function, "__module__", None) or "").startswith("jax._src")
    cells = (cell.cell_contents for cell in getattr(function, "__closure__", None) or ()) if is_wrapper else ()
    inside = [value for value in cells if inspect.isfunction(value) or hasattr(value, "call_wrapped")]
    return _function(inside[0]) if inside else function


def params_of(equation: JaxprEqn) -> tuple[str, ...]:
    """What an equation does, in words, without its operands."""
    inner = inner_jaxprs(equation)
    params = {} if inner else {k: v for k, v in equation.params.items() if not callable(v)}
    rules = [getattr(v, "debug_info", None) for v in equation.params.values() if callable(v)]
    rules = [info.func_src_info for info in rules if info]
    return equation.primitive.name, str(sorted(params.items())), str(inner), str(rules)


def _op(body: Jaxpr, equation: JaxprEqn, same: JaxprEqn | None, operands: list[Atom], where: Where) -> Op:
    from_data = any(isinstance(x, Value) and x.from_data for x in operands)
    invars = list(dict.fromkeys(x for x in equation.invars if not isinstance(x, Literal)))
    alone = body.replace(constvars=[], invars=invars, outvars=equation.outvars, eqns=[equation])
    grown = same.outvars if same is not None else [None] * len(equation.outvars)
    outputs = [_value(var, more, from_data) for var, more in zip(equation.outvars, grown, strict=True)]
    op = Op(equation, alone, operands, outputs, where)
    for output in outputs:
        output.op = op
    if len(outputs) == 1 and from_data and (axes := axes_of(op)) and len(axes) == len(outputs[0].shape):
        outputs[0].axes = axes
        if same is None and axes and any(f.is_unit for f in axes[0]):
            outputs[0].samples = ()  # else they are along the first axis
    return op


def _inner(op: Op, jaxpr: Any, larger: Any) -> Graph:
    """The graph inside an operation; what it knows of its inputs is what the operation knows of its operands."""
    first = len(op.operands) - len(open_jaxpr(jaxpr)[0].invars)
    operands = op.operands[first:]  # a cond has an index before them
    from_data = [isinstance(x, Value) and x.from_data for x in operands]
    if op.kind in ("scan", "while"):  # what is carried is data as soon as anything is
        n_consts, n_carry, _ = map(len, loop_parts(op, op.operands))
        from_data[n_consts : n_consts + n_carry] = [any(from_data)] * n_carry
    inputs = _inputs(jaxpr, larger, from_data)
    for value, operand in zip(inputs, operands, strict=True):
        if isinstance(operand, Value) and operand.shape == value.shape:
            value.axes = operand.axes
        elif isinstance(operand, Value) and operand.shape[1:] == value.shape and operand.from_data:
            value.axes = operand.axes[1:]  # what a scan runs over
    return _graph(jaxpr, larger, inputs, op.where)


def _value(var: Any, grown: Any, from_data: bool) -> Value:
    """A value whose channels are along the last axis that is not of samples."""
    shape = shape_of(var)
    larger = shape if grown is None else shape_of(grown)
    samples = tuple(k for k, (a, b) in enumerate(zip(shape, larger, strict=True)) if a != b)
    if grown is None and shape and from_data:
        samples = (0,)
    others = [k for k in range(len(shape)) if k not in samples]
    axes = tuple((Factor(n, [k] == others[-1:]),) for k, n in enumerate(shape))
    return Value(var.aval, from_data, samples, axes)
