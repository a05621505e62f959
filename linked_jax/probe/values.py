"""What a graph of a jaxpr is made of: values, operations, and what is asked of a single equation."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal

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
        return shape_of(self)


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


def shape_of(x: Any) -> tuple[int, ...]:
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
    shapes = set(map(shape_of, [*equation.invars, *equation.outvars])) - {()}
    kind = equation.primitive.name
    if kind == "broadcast_in_dim":
        return not shape_of(equation.invars[0])
    if kind in CALLS | CUSTOM:
        bodies = [open_jaxpr(inner)[0] for inner in inner_jaxprs(equation)[:1]]
        inside = [eqn for body in bodies for eqn in body.eqns]
        return len(shapes) <= 1 and len(equation.outvars) == 1 and all(map(is_elementwise, inside))
    return kind in ELEMENTWISE and len(equation.outvars) == 1


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
    return sum(len(shape_of(a)) == len(shape_of(b)) for a, b in zip(outer, inner, strict=True))


def goes_on(op: Op, operands: list[Any], carry: list[Any]) -> Any:
    """Whether a while loop takes another step, (); (B,) in a vmap over B, where it may go on for some alone."""
    cond, consts = op.equation.params["cond_jaxpr"], operands[: op.equation.params["cond_nconsts"]]
    return eval_jaxpr(cond.jaxpr, cond.consts, *consts, *carry)[0]


def where_on(on: Any, new: list[Any], old: list[Any]) -> list[Any]:
    """What a loop carries after a step: of those for which it has ended, what it carried before."""
    if not on.ndim:
        return new
    return [jnp.where(on.reshape(on.shape + (1,) * (x.ndim - on.ndim)), x, y) for x, y in zip(new, old, strict=True)]


def has_steps(graph: Graph, n: int, steps: int) -> bool:
    """Whether some value has an axis of the steps, or of n samples and steps; else a mask would leave nothing out."""
    values = [*graph.inputs, *(x for op in graph.ops for x in op.outputs)]
    if any({steps, n * steps} & {*shape_of(x)} for x in values):
        return True
    return any(has_steps(inner, n, steps) for op in graph.ops for inner in op.graphs)


def is_float(value: Value) -> bool:
    """Whether its elements are real floating-point numbers."""
    return jnp.issubdtype(getattr(value.aval, "dtype", bool), jnp.floating)


def is_number(x: Atom) -> bool:
    """Whether it is made of numbers alone, and the same for each element."""
    if isinstance(x, Literal) or x.number is not None:
        return True
    if x.op is None or x.from_data or not (x.op.is_elementwise or x.op.kind == "broadcast_in_dim"):
        return False
    return all(map(is_number, x.op.operands))
