"""An activation is the largest elementwise region between one pre-activation and what is not elementwise.

A region begins at a value that a linear operation, a sum, a norm or another operation made of more than one element,
and has all that is computed of it element by element. Its affine beginning (a bias, a scale) still belongs to the
pre-activation z; what leaves it and is not affine in z is a member of the activation. A link leaves several members.
"""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp

from linked_jax.probe.graph import REDUCTIONS, Atom, Graph, Op, Value

_AFFINE = {"add", "add_any", "sub", "neg", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint",
           "stop_gradient", "optimization_barrier"}  # fmt: skip
_MOVEMENT = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "convert_element_type"}
_STATISTICS = {"sqrt", "rsqrt", "log", "log1p", "pow", "integer_pow", "square", "exp2"}


@dataclasses.dataclass(eq=False)
class Region:
    """An activation: from z to its members.

    Attributes:
      z: the pre-activation.
      members: each of the shape of z.
      ops: between the two, in order of execution.
      place: the number of the first of them in its graph.
      wider: the same activation from a value before z, where the step between is a number: z + 3, say, or -z.
    """

    z: Value
    members: list[Value]
    ops: list[Op]
    place: int
    wider: "Region | None" = None


def regions(graph: Graph) -> list[Region]:
    """The activations of a graph, in order of execution; those inside its operations have graphs of their own.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe.graph import graph_of
      >>> from linked_jax.probe.regions import regions
      >>> def f(x):
      ...     z = x @ jnp.ones((4, 2)) + 1
      ...     return jnp.maximum(z, 0) + 0.2 * jnp.minimum(z, 0)  # a leaky relu, however it is written
      >>> region, = regions(graph_of(jax.make_jaxpr(f)(jnp.ones((3, 4))), None, [True]))
      >>> [op.kind for op in region.ops], len(region.members)
      (['max', 'min', 'mul', 'add'], 1)
    """
    return _Finder(graph).found()


class _Finder:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.number = {id(op): i for i, op in enumerate(graph.ops)}
        self.users: dict[int, list[Op | None]] = {}  # None: it leaves the graph
        self.root: dict[int, Value] = {}
        self.core: dict[int, Value] = {}  # the last value that is not affine in the ones before it
        self.grown: dict[int, list[Value]] = {}  # by root, in order
        for value in [*graph.inputs, *(value for value, _ in graph.constants)]:
            self._begin(value)
        for op in graph.ops:
            for x in op.operands:
                self._use(x, op)
            for output in op.outputs:
                self._place(op, output)
        for x in graph.outputs:
            self._use(x, None)

    def found(self) -> list[Region]:
        all_of_them = [self._region(values[0], values) for values in self.grown.values() if len(values) > 1]
        return sorted((region for region in all_of_them if region), key=lambda region: region.place)

    def _use(self, x: Atom, op: Op | None) -> None:
        if isinstance(x, Value):
            self.users.setdefault(id(x), []).append(op)

    def _begin(self, value: Value) -> None:
        self.root[id(value)] = self.core[id(value)] = value
        self.grown[id(value)] = [value]

    def _place(self, op: Op, output: Value) -> None:
        """Put an output into the region of its operands, or let a new one begin."""
        data = op.data
        roots = {id(self.root[id(x)]) for x in data}
        if not op.is_elementwise or len(roots) != 1 or any(x.shape != output.shape for x in data):
            self._begin(output)
            return
        root = self.root[id(data[0])]
        cores = {id(self.core[id(x)]): self.core[id(x)] for x in data}
        self.root[id(output)] = root
        self.core[id(output)] = next(iter(cores.values())) if len(cores) == 1 and _is_affine(op) else output
        self.grown[id(root)].append(output)

    def _region(self, root: Value, values: list[Value]) -> Region | None:
        if not root.from_data:
            return None
        exits = [v for v in values if any(self._is_outside(user, root) for user in self.users.get(id(v), []))]
        curved = [v for v in exits if self.core[id(v)] is not root and _is_float(v)]
        curved = [v for v in curved if not self._is_statistic(v, root)]
        if not curved:
            return None
        ways = self._pre_activations(root, values, curved)
        z = ways[-1]
        by_core: dict[int, list[Value]] = {}
        for v in curved:
            by_core.setdefault(id(self.core[id(v)]), []).append(v)
        members = [same[0] if len(same) == 1 else self.core[id(same[0])] for same in by_core.values()]
        members += self._linear_members(exits, curved)
        members.sort(key=lambda v: self.number.get(id(v.op), -1))
        if self._is_reduced(z, members, root):
            return None
        region = None
        for z in ways:
            ops = _between(z, members, values)
            step_is_number = region is not None and all(_is_number(op, z) for op in _between(region.z, [z], values))
            region = Region(z, members, ops, self.number[id(ops[0])], region if step_is_number else None)
        return region

    def _is_outside(self, user: Op | None, root: Value) -> bool:
        return user is None or all(self.root[id(x)] is not root for x in user.outputs)

    def _pre_activations(self, root: Value, values: list[Value], curved: list[Value]) -> list[Value]:
        """The values that are affine in the root and on every way to what is not; the last one is z."""
        on_all_ways: dict[int, set[int]] = {id(root): {id(root)}}
        for v in values[1:]:
            assert v.op is not None
            ways = [on_all_ways[id(x)] for x in v.op.data]
            on_all_ways[id(v)] = set.intersection(*ways) | {id(v)}
        common = set.intersection(*(on_all_ways[id(v)] for v in curved))
        return [v for v in values if id(v) in common and self.core[id(v)] is root and _is_float(v)]

    def _linear_members(self, exits: list[Value], curved: list[Value]) -> list[Value]:
        """What is affine and is concatenated with what is not: a member of the same link."""
        joined = {id(op) for v in curved for op in self._after_movement(v) if op and op.kind == "concatenate"}
        others = [v for v in exits if v not in curved and _is_float(v)]
        return [v for v in others if any(id(op) in joined for op in self._after_movement(v))]

    def _after_movement(self, value: Value) -> Iterable[Op | None]:
        for user in self.users.get(id(value), []):
            if user is not None and user.kind in _MOVEMENT:
                yield from self._after_movement(user.outputs[0])
            else:
                yield user

    def _is_statistic(self, value: Value, root: Value) -> bool:
        """Whether it is only summed up over units or samples, or divided by such a sum of itself, as in a softmax."""
        users = [user for user in self.users[id(value)] if self._is_outside(user, root)]
        return all(user is not None and (_sums_up(user, value) or self._is_by_itself(user, value)) for user in users)

    def _is_by_itself(self, user: Op, value: Value) -> bool:
        others = [x for x in user.data if x is not value]
        return user.is_elementwise and bool(others) and all(_derives(x, value, self.number) for x in others)

    def _is_reduced(self, z: Value, members: list[Value], root: Value) -> bool:
        """Whether z is a statistic: of all samples, broadcast back along its units, or a sum under a root or a log."""
        if self.graph.knows_samples and z.shape and not z.samples:
            return True
        if not z.shape:
            return True
        kinds = {op.kind for op in _between(root, members, self.grown[id(root)])}
        if kinds & _STATISTICS and _is_sum(root):
            return True
        units = [k for k, axis in enumerate(z.axes) if any(f.is_unit for f in axis) and k not in z.samples]
        alone = all(z.shape[k] == 1 for k in units)
        return alone and any(self._is_broadcast(v) for v in members)

    def _is_broadcast(self, value: Value) -> bool:
        for user in self.users.get(id(value), []):
            if user is None or not user.outputs:
                continue
            grows = len(user.outputs[0].shape) > 0 and _size(user.outputs[0]) > _size(value)
            if (user.kind == "broadcast_in_dim" or user.is_elementwise) and grows:
                return True
            if user.kind in _MOVEMENT and self._is_broadcast(user.outputs[0]):
                return True
        return False


def _is_affine(op: Op) -> bool:
    """Whether the output is affine in the operands that are data."""
    kind, data = op.kind, op.data
    if kind in _AFFINE:
        return True
    if kind == "convert_element_type":
        return _is_float(op.outputs[0]) and _is_float(data[0])
    if kind == "mul":
        return sum(x in data for x in op.operands if isinstance(x, Value)) == 1
    if kind == "div":
        return op.operands[1] not in data
    if kind == "select_n":
        return op.operands[0] not in data
    return kind == "integer_pow" and op.equation.params["y"] == 1


def _is_float(value: Value) -> bool:
    return jnp.issubdtype(getattr(value.aval, "dtype", bool), jnp.floating)


def _between(z: Value, members: list[Value], values: list[Value]) -> list[Op]:
    """The operations that make the members of z."""
    needed = {id(v) for v in members}
    ops = []
    for v in reversed(values[values.index(z) + 1 :]):
        if id(v) in needed and v.op is not None:
            ops.append(v.op)
            needed |= {id(x) for x in v.op.data if x is not z}
    return ops[::-1]


def _is_number(op: Op, z: Value) -> bool:
    """Whether an affine operation has numbers for its other operands, and no parameters."""
    others = [x for x in op.operands if isinstance(x, Value) and x not in op.data]
    return not others and op.outputs[0].aval.dtype == z.aval.dtype


def _sums_up(user: Op, value: Value) -> bool:
    if user.kind not in REDUCTIONS:
        return False
    gone = user.equation.params.get("axes", (user.equation.params.get("axis", -1),))
    axes = {k % len(value.shape) for k in gone}
    units = {k for k, axis in enumerate(value.axes) if any(f.is_unit for f in axis)}
    return bool(axes & (units | set(value.samples)))


def _derives(x: Value, value: Value, number: dict[int, int]) -> bool:
    """Whether x is computed from the value."""
    first, seen, open_ = number.get(id(value.op), -1), set(), [x]
    while open_:
        v = open_.pop()
        if v is value:
            return True
        if id(v) in seen or v.op is None or number.get(id(v.op), -1) <= first:
            continue
        seen.add(id(v))
        open_ += v.op.data
    return False


def _is_sum(root: Value) -> bool:
    """Whether it is a reduction, or elementwise of reductions alone: a variance, say."""
    if root.op is None or not root.op.data:
        return False
    if root.op.kind in REDUCTIONS:
        return True
    moved = root.op.kind in _MOVEMENT or root.op.is_elementwise
    return moved and all(_is_sum(x) for x in root.op.data)


def _size(value: Value) -> int:
    size = 1
    for n in value.shape:
        size *= n
    return size
