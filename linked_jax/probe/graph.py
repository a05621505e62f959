"""A jaxpr as one flat list of operations, with what is known of each value before anything runs.

Calls and remat are inlined, so a value is one object throughout, and equal operations on it are one. Scans,
conds, loops and custom rules keep a graph of their own inside.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.core import Tracer, eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from linked_jax.probe.names import scope_of, source_of

CALLS = {"jit", "pjit", "closed_call", "core_call", "core_closed_call", "remat2", "remat", "checkpoint"}
CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin", "cumsum",
    "cummax", "cumlogsumexp", "cumprod", "sort", "top_k", "reduce",
}  # fmt: skip
ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt",
    "max", "min", "mul", "name", "ne", "neg", "nextafter", "not", "optimization_barrier", "or", "pow",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "sharding_constraint", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip
_SAME_RANK = {
    "concatenate", "conv_general_dilated", "cumsum", "dynamic_slice", "dynamic_update_slice", "gather", "pad",
    "reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum", "rev", "scatter", "scatter_add",
    "select_and_gather_add", "slice",
}  # fmt: skip


class Factor(NamedTuple):
    """An axis of the array that was moved; several of them are merged into one axis by a flatten."""

    size: int
    is_unit: bool


Axes = tuple[tuple[Factor, ...], ...]


@dataclasses.dataclass(eq=False)
class Value:
    """What an operation makes, or what enters a graph.

    Attributes:
      aval: shape and dtype.
      from_data: whether it depends on the inputs, and not on parameters alone.
      samples: the axes that grow with the batch.
      axes: the factors of each axis; those of one axis are merged, the last one varies fastest. Units are the channels
        of the operation that made the array, and the members of a vmap over parameters; all else are positions.
      op: the operation that made it.
      number: of a constant that is one; else None.
    """

    aval: Any
    from_data: bool
    samples: tuple[int, ...]
    axes: Axes
    op: "Op | None" = None
    number: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return _shape(self)


Atom = Value | Literal


class Where(NamedTuple):
    """The names of the modules and calls around an operation; and the file and line, of the user's own code."""

    scope: str
    source: str


@dataclasses.dataclass(eq=False)
class Op:
    """One equation, with the values of its operands and outputs.

    Attributes:
      equation: of a jaxpr, whose own variables name the operands and the outputs.
      jaxpr: that equation alone.
      operands: values, and literals.
      outputs: values.
      where: it was written.
      graphs: of the jaxprs inside: the body of a scan, the branches of a cond.
    """

    equation: JaxprEqn
    jaxpr: Jaxpr
    operands: list[Atom]
    outputs: list[Value]
    where: Where
    graphs: "list[Graph]" = dataclasses.field(default_factory=list)

    @property
    def kind(self) -> str:
        """The primitive's name."""
        return self.equation.primitive.name

    @property
    def data(self) -> list[Value]:
        """The operands that are data."""
        return [x for x in self.operands if isinstance(x, Value) and x.from_data]

    @functools.cached_property
    def is_elementwise(self) -> bool:
        """Whether each element of the output depends on the same element of the operands alone."""
        return is_elementwise(self.equation)

    def evaluate(self, operands: list[Any]) -> list[Any]:
        """The outputs, of other operands."""
        pairs = zip(self.equation.invars, operands, strict=True)
        given = {var: x for var, x in pairs if not isinstance(var, Literal)}
        return list(eval_jaxpr(self.jaxpr, (), *(given[var] for var in self.jaxpr.invars)))


@dataclasses.dataclass(eq=False)
class Graph:
    """Operations in order of execution.

    Attributes:
      inputs: of the jaxpr.
      found: what `recognise.activations` found in it, once it was asked.
      constants: values with their arrays.
      ops: the operations.
      outputs: values, and literals.
      has_samples: whether some data has an axis of samples, as a trace of a larger batch tells. Else it is not known,
        or they come one by one.
    """

    inputs: list[Value]
    has_samples: bool
    found: Any = None
    constants: list[tuple[Value, Any]] = dataclasses.field(default_factory=list)
    ops: list[Op] = dataclasses.field(default_factory=list)
    outputs: list[Atom] = dataclasses.field(default_factory=list)


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


def _shape(x: Any) -> tuple[int, ...]:
    """Of a value, a literal or a variable; of a token too."""
    return getattr(x.aval, "shape", ())


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, list[Any]]:
    """A jaxpr, closed or not, and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def inner_jaxprs(equation: JaxprEqn) -> list[Any]:
    """The jaxprs among an equation's parameters: a call's body, the branches of a cond."""
    if equation.primitive.name == "while":
        return [equation.params["body_jaxpr"]]
    values = [value if isinstance(value, tuple) else (value,) for value in equation.params.values()]
    return [x for value in values for x in value if hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")]


def is_elementwise(equation: JaxprEqn) -> bool:
    """Whether an equation, or the function with a custom derivative in it, is elementwise; scalars may be broadcast."""
    shapes = set(map(_shape, [*equation.invars, *equation.outvars])) - {()}
    kind = equation.primitive.name
    if kind == "broadcast_in_dim":
        return not _shape(equation.invars[0])
    if kind in CALLS | CUSTOM:
        bodies = [open_jaxpr(inner)[0] for inner in inner_jaxprs(equation)[:1]]
        inside = [eqn for body in bodies for eqn in body.eqns]
        return len(shapes) <= 1 and len(equation.outvars) == 1 and all(map(is_elementwise, inside))
    return kind in ELEMENTWISE and len(equation.outvars) == 1


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
    if len(outputs) == 1 and from_data and (axes := _axes(op)) and len(axes) == len(outputs[0].shape):
        outputs[0].axes = axes
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


def loop_parts(op: Op, operands: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The operands of a loop's body: its constants, what it carries, and what a scan goes over.

    Those of a scan are told by their shapes, for JAX' names for them change: what it goes over loses its leading axis
    on the way in, and what is stacked gains one on the way out.
    """
    params = op.equation.params
    if op.kind == "while":
        operands, carry = operands[params["cond_nconsts"] :], params["body_nconsts"]
        return operands[:carry], operands[carry:], []
    body = open_jaxpr(params["jaxpr"])[0]
    over = _of_equal_rank(op.equation.invars, body.invars)
    carry = over - _of_equal_rank(op.equation.outvars, body.outvars)
    return operands[:carry], operands[carry:over], operands[over:]


def _of_equal_rank(outer: list[Any], inner: list[Any]) -> int:
    return sum(len(_shape(a)) == len(_shape(b)) for a, b in zip(outer, inner, strict=True))


def goes_on(op: Op, operands: list[Any], carry: list[Any]) -> Any:
    """Whether a while loop takes another step."""
    cond, consts = op.equation.params["cond_jaxpr"], operands[: op.equation.params["cond_nconsts"]]
    return eval_jaxpr(cond.jaxpr, cond.consts, *consts, *carry)[0]


def _value(var: Any, grown: Any, from_data: bool) -> Value:
    """A value whose channels are along the last axis that is not of samples."""
    shape = _shape(var)
    larger = shape if grown is None else _shape(grown)
    samples = tuple(k for k, (a, b) in enumerate(zip(shape, larger, strict=True)) if a != b)
    if grown is None and shape and from_data:
        samples = (0,)
    others = [k for k in range(len(shape)) if k not in samples]
    axes = tuple((Factor(n, [k] == others[-1:]),) for k, n in enumerate(shape))
    return Value(var.aval, from_data, samples, axes)


def _axes(op: Op) -> Axes | None:
    """The axes of the output where the operation says which of them are units; None if it does not."""
    kind, params, output, data = op.kind, op.equation.params, op.outputs[0], op.data
    shape, first = output.shape, data[0]
    if op.is_elementwise or kind in ELEMENTWISE:
        return _axes_of_broadcast([x for x in data if len(x.shape) == len(shape)], shape)
    if kind == "dot_general" and len(data) == 1:
        return _axes_of_product(op)
    if kind == "conv_general_dilated" and len(data) == 1:
        channel = params["dimension_numbers"].out_spec[1]
        return tuple((Factor(n, k == channel),) for k, n in enumerate(shape))
    if kind == "gather" and op.operands[0] is not first:  # an embedding
        return tuple((Factor(n, k in params["dimension_numbers"].offset_dims),) for k, n in enumerate(shape))
    if kind == "transpose":
        return tuple(first.axes[k] for k in params["permutation"])
    if kind == "stack":
        place = params["axis"]
        return (*first.axes[:place], (Factor(len(op.operands), False),), *first.axes[place:])
    if kind in ("reshape", "squeeze", "expand_dims"):
        return _regrouped([factor for axis in first.axes for factor in axis], shape)
    if kind == "broadcast_in_dim":
        places = dict(zip(params["broadcast_dimensions"], first.axes, strict=True))
        return tuple(
            places[k] if k in places and math.prod(f.size for f in places[k]) == n else (Factor(n, k in places),)
            for k, n in enumerate(shape)
        )
    if kind in REDUCTIONS and len(shape) < len(first.shape):
        gone = params.get("axes", ())
        return tuple(axis for k, axis in enumerate(first.axes) if k not in gone)
    if kind in _SAME_RANK and len(shape) == len(first.shape):
        pairs = zip(first.axes, first.shape, shape, strict=True)
        return tuple(axis if n == m else (Factor(m, any(f.is_unit for f in axis)),) for axis, n, m in pairs)
    return None


def _axes_of_broadcast(data: list[Value], shape: tuple[int, ...]) -> Axes | None:
    """The axes of the data; those that parameters alone have (a vmap over them broadcasts axes of size 1) are units."""
    if not data:
        return None
    data = sorted(data, key=lambda x: -math.prod(f.size for axis in x.axes for f in axis if f.is_unit))  # masks last
    return tuple(next((x.axes[k] for x in data if x.shape[k] == n), (Factor(n, True),)) for k, n in enumerate(shape))


def _axes_of_product(op: Op) -> Axes:
    """Units are the free axes of the parameters, and the axes that a vmap over parameters has put on both."""
    (contracting, batch), (left, right) = op.equation.params["dimension_numbers"], op.operands
    free = []
    for operand, gone, both in zip((left, right), contracting, batch, strict=True):
        own = isinstance(operand, Value) and operand.from_data
        axes = operand.axes if isinstance(operand, Value) else ()
        for k, n in enumerate(_shape(operand)):
            if k not in gone and k not in both:
                free.append(tuple(Factor(f.size, False) for f in axes[k]) if own else (Factor(n, True),))
    data, places = (left, batch[0]) if isinstance(left, Value) and left.from_data else (right, batch[1])
    shared = [(Factor(_shape(data)[k], True),) for k in places]
    return (*shared, *free)


def _regrouped(factors: list[Factor], shape: tuple[int, ...]) -> Axes | None:
    """The factors in groups of the sizes of a shape, split where they must be; None if they do not fit."""
    left = [factor for factor in factors if factor.size > 1 or factor.is_unit]
    groups = []
    for need in shape:
        group: list[Factor] = []
        while left and need and (need > 1 or left[0].size == 1):
            factor = left.pop(0)
            if factor.size > need:  # it goes on in the next axis
                factor, rest = factor._replace(size=need), factor._replace(size=factor.size // need)
                left.insert(0, rest)
            need //= factor.size
            group.append(factor)
        groups.append(tuple(group))
    fits = not left and all(math.prod(f.size for f in group) == n for group, n in zip(groups, shape, strict=True))
    return tuple(groups) if fits else None


def is_number(x: Atom) -> bool:
    """Whether it is made of numbers alone, and the same for each element."""
    if isinstance(x, Literal) or x.number is not None:
        return True
    if x.op is None or x.from_data or not (x.op.is_elementwise or x.op.kind == "broadcast_in_dim"):
        return False
    return all(map(is_number, x.op.operands))
