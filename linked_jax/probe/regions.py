"""An activation is the largest elementwise region between one pre-activation and what is not elementwise.

A region begins at a value that a linear operation, a sum, a norm or another operation made of more than one element,
and has all that is computed of it element by element. Its affine beginning (a bias, a scale) still belongs to the
pre-activation z. What leaves it and is not affine in z is an activation; a link leaves several members.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from linked_jax.probe.uses import MOVEMENT, Uses
from linked_jax.probe.values import Graph, Op, Value, is_float, is_number

_AFFINE = {"add", "add_any", "sub", "neg", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint",
           "stop_gradient", "optimization_barrier", "transpose"}  # fmt: skip
_BOUNDS = {"max", "min", "clamp", "abs"}


@dataclasses.dataclass(eq=False)
class Region:
    """An activation: from z to its members.

    Attributes:
      z: the pre-activation.
      members: each of the shape of z, but for the order of its axes.
      orders: of the axes of each member, to have those of z. A vmap transposes where it likes.
      ops: between the two, in order of execution.
      place: the number of the last of them in its graph.
      wider: the same activation from a value before z, where the step between is a number: z + 3, say, or -z.
    """

    z: Value
    members: list[Value]
    orders: list[tuple[int, ...]]
    ops: list[Op]
    place: int
    wider: "Region | None" = None


def find(graph: Graph) -> tuple[list[Region], list[Op]]:
    """The activations of a graph, and the operations that may be some and are not of one region; both in order.

    The latter choose between values by what else was computed of them: the k largest of a layer, `jnp.piecewise`.
    What is inside of operations has graphs of its own.
    """
    finder = _Finder(graph)
    every = [region for values in finder.values.values() for region in finder.regions(values[0], values)]
    return sorted(every, key=lambda region: region.place), list(filter(finder.chooses_by_itself, graph.ops))


class _Finder:
    """Attributes, of each value.

    root: the first value of its region.
    core: the last value before it that is not affine in others of its region.
    order: of its axes, where it is a transpose of the root.
    values: those of the region of a root, in order.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.uses = Uses(graph)
        self.root: dict[Value, Value] = {}
        self.core: dict[Value, Value] = {}
        self.values: dict[Value, list[Value]] = {}
        self.order: dict[Value, tuple[int, ...]] = {}
        for value in [*graph.inputs, *(value for value, _ in graph.constants)]:
            self._begin(value)
        for op in graph.ops:
            for output in op.outputs:
                self._place(op, output)

    def chooses_by_itself(self, op: Op) -> bool:
        """Whether the predicate of a select is computed from what it chooses from, and not elementwise."""
        if op.kind != "select_n" or op.operands[0] not in op.data:
            return False
        which, *cases = op.data
        roots = [self._unmoved(self.root[x]) for x in cases]
        own = self._unmoved(self.root[which])
        return any(root is not own and self.uses.derives(which, root) for root in roots)

    def _unmoved(self, root: Value) -> Value:
        while root.op is not None and root.op.kind in MOVEMENT and root.op.data:
            root = self.root[root.op.data[0]]
        return root

    def _begin(self, value: Value) -> None:
        self.root[value] = self.core[value] = value
        self.values[value] = [value]
        self.order[value] = tuple(range(len(value.shape)))

    def _place(self, op: Op, output: Value) -> None:
        """Put an output into the region of its operands, or let a new one begin."""
        data = op.data
        roots, orders = {self.root[x] for x in data}, {self.order[x] for x in data}
        moves = op.kind == "transpose" or (op.is_elementwise and all(x.shape == output.shape for x in data))
        if not moves or len(roots) != 1 or len(orders) != 1:
            self._begin(output)
            return
        (root,), (order,) = roots, orders
        if _kind(output) not in (None, _kind(root)):  # pixels, labels; quantised, or to be transformed by Fourier
            self._begin(output)
            return
        permutation = op.equation.params["permutation"] if op.kind == "transpose" else range(len(order))
        self.order[output] = tuple(order[k] for k in permutation)
        cores = {self.core[x] for x in data}
        self.root[output] = root
        self.core[output] = cores.pop() if len(cores) == 1 and _is_affine(op) else output
        self.values[root].append(output)

    def regions(self, root: Value, values: list[Value]) -> Iterable[Region]:
        if not root.from_data or len(values) == 1:
            return
        exits = [v for v in values if is_float(v) and any(True for _ in self._outside(v))]
        curved = [v for v in exits if self.core[v] is not root and not self._is_summed(v)]
        for group in self._links(curved):
            members = list(dict.fromkeys(map(self._member, group)))
            by_core: dict[Value, list[Value]] = {}
            for v in members:
                by_core.setdefault(self.core[v], []).append(v)
            members = [same[0] if len(same) == 1 else core for core, same in by_core.items()]
            region = self._region(root, values, [*members, *self._linear_members(exits, group)])
            if region is not None:
                yield region

    def _region(self, root: Value, values: list[Value], members: list[Value]) -> Region | None:
        members.sort(key=lambda v: self.uses.number.get(v.op, -1))
        region = None
        for z in self._pre_activations(root, values, [v for v in members if self.core[v] is not root]):
            ops = _between(z, members, values)
            step = _between(region.z, [z], values) if region is not None else []
            wider = region if all(_adds_numbers(op) for op in step) else None
            orders = [tuple(self.order[v].index(k) for k in self.order[z]) for v in members]
            region = Region(z, members, orders, ops, self.uses.number[ops[-1]], wider)
        if region is None:
            return None
        first = [op for op in region.ops if self._is_nearly_affine(op.data[-1])]
        last = [op for v in members if (op := self.core[v].op)]
        return None if self.uses.is_statistic(root, region.z, first, last, members) else region

    def _is_nearly_affine(self, value: Value) -> bool:
        core = self.core[value]
        return core is self.root[value] or (core.op is not None and core.op.kind in _BOUNDS)

    def _outside(self, value: Value) -> Iterable[Op | None]:
        """What reads the value and is not of its region."""
        for user in self.uses.of(value):
            if user is None or all(self.root[x] is not self.root[value] for x in user.outputs):
                yield user

    def _is_summed(self, value: Value) -> bool:
        core = self.core[value]
        return self._divides(core) or self.uses.is_of_a_sum(value, core, self._outside(value))

    def _divides(self, value: Value) -> bool:
        """Whether it is 1 / z, to multiply others with: a division by z."""
        op = value.op
        if op is None or op.kind != "div" or op.operands[0] in op.data or not self._is_nearly_affine(op.data[0]):
            return False
        return all(user is not None and user.kind in ("mul", "dot_general") for user in self._outside(value))

    def _links(self, curved: list[Value]) -> list[list[Value]]:
        """Those of one link are concatenated, or affine in the same value; the others are alone."""
        groups: list[tuple[set[Value | Op], list[Value]]] = []
        for v in curved:
            marks = {self.core[v], *self.uses.joins(v)}
            same = [group for group in groups if group[0] & marks]
            groups = [group for group in groups if group not in same]
            groups.append((marks.union(*(group[0] for group in same)), [x for group in same for x in group[1]] + [v]))
        return [values for _, values in groups]

    def _linear_members(self, exits: list[Value], group: list[Value]) -> list[Value]:
        """What is affine and is concatenated with what is not: a member of the same link."""
        joined = {op for v in group for op in self.uses.joins(v)}
        affine = [v for v in exits if self.core[v] is self.root[v]]
        return [v for v in affine if joined & set(self.uses.joins(v))]

    def _member(self, value: Value) -> Value:
        """The last value from the core on that is made with numbers alone: before a dropout, a scale for each unit."""
        core, member, x = self.core[value], value, value
        while x is not core:
            assert x.op is not None
            x, op = x.op.data[0], x.op
            if not _adds_numbers(op):
                member = x
                if op.kind == "select_n" and x is not core and x.op is not None and x.op.kind in ("mul", "div"):
                    member = x.op.data[0]  # a dropout divides by the share that it keeps
        return member

    def _pre_activations(self, root: Value, values: list[Value], curved: list[Value]) -> list[Value]:
        """The values that are affine in the root and on every way to what is not; the last one is z."""
        on_all_ways: dict[Value, set[Value]] = {root: {root}}
        for v in values[1:]:
            assert v.op is not None
            on_all_ways[v] = set.intersection(*(on_all_ways[x] for x in v.op.data)) | {v}
        common = set.intersection(*(on_all_ways[v] for v in curved))
        return [v for v in values if v in common and self.core[v] is root and is_float(v)]


def _kind(value: Value) -> Any:
    """Of numbers; None of truth values, which belong to the numbers that they are made of."""
    dtype = getattr(value.aval, "dtype", bool)
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), None)


def _is_affine(op: Op) -> bool:
    """Whether the output is affine in the operands that are data."""
    kind, data = op.kind, op.data
    if kind == "convert_element_type":
        return is_float(op.outputs[0]) and is_float(data[0])
    if kind == "mul":
        return len(data) == 1
    if kind == "div":
        return op.operands[1] not in data
    if kind == "select_n":
        return op.operands[0] not in data
    return kind in _AFFINE


def _adds_numbers(op: Op) -> bool:
    """Whether an affine operation has numbers for its other operands, and no parameters or masks."""
    same_dtype = op.outputs[0].aval.dtype == op.data[0].aval.dtype
    return same_dtype and all(x in op.data or is_number(x) for x in op.operands)


def _between(z: Value, members: list[Value], values: list[Value]) -> list[Op]:
    """The operations that make the members of z."""
    needed = set(members)
    ops = []
    for v in reversed(values[values.index(z) + 1 :]):
        if v in needed and v.op is not None:
            ops.append(v.op)
            needed |= {x for x in v.op.data if x is not z}
    return ops[::-1]
