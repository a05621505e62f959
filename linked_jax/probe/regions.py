"""An activation is the largest elementwise region between one pre-activation and what is not elementwise.

A region begins at a value that a linear operation, a sum, a norm or another operation made of more than one element,
and has all that is computed of it element by element. Its affine beginning (a bias, a scale) still belongs to the
pre-activation z. What leaves it and is not affine in z is an activation; a link leaves several members.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax.numpy as jnp
from jax.extend.core import Literal

from linked_jax.probe.graph import ELEMENTWISE, REDUCTIONS, Atom, Graph, Op, Value, is_number

_AFFINE = {"add", "add_any", "sub", "neg", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint",
           "stop_gradient", "optimization_barrier", "transpose"}  # fmt: skip
_MOVEMENT = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "convert_element_type"}
_TERMS = {"square", "integer_pow", "abs", "exp", "exp2"}


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

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe.graph import graph_of
      >>> from linked_jax.probe.regions import find
      >>> def f(x):
      ...     z = x @ jnp.ones((4, 2)) + 1
      ...     return jnp.maximum(z, 0) + 0.2 * jnp.minimum(z, 0)  # a leaky relu, however it is written
      >>> (region,), _ = find(graph_of(jax.make_jaxpr(f)(jnp.ones((3, 4))), None, [True]))
      >>> [op.kind for op in region.ops], len(region.members)
      (['max', 'min', 'mul', 'add'], 1)
    """
    finder = _Finder(graph)
    every = [region for values in finder.values.values() for region in finder.regions(values[0], values)]
    return sorted(every, key=lambda region: region.place), list(filter(finder.chooses_by_itself, graph.ops))


class _Finder:
    """Attributes, by the `id` of a value.

    users: the operations that read it; None where it leaves the graph.
    root: the first value of its region.
    core: the last value before it that is not affine in others of its region.
    order: of its axes, where it is a transpose of the root.
    values: those of the region of a root, in order.
    averaged: whether all that is made of it ends in a sum over samples.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.number = {id(op): i for i, op in enumerate(graph.ops)}
        self.users: dict[int, list[Op | None]] = {}
        self.root: dict[int, Value] = {}
        self.core: dict[int, Value] = {}
        self.values: dict[int, list[Value]] = {}
        self.order: dict[int, tuple[int, ...]] = {}
        self.averaged: dict[int, bool] = {}
        for value in [*graph.inputs, *(value for value, _ in graph.constants)]:
            self._begin(value)
        for op in graph.ops:
            for x in op.operands:
                self._use(x, op)
            for output in op.outputs:
                self._place(op, output)
        for x in graph.outputs:
            self._use(x, None)

    def chooses_by_itself(self, op: Op) -> bool:
        """Whether the predicate of a select is computed from what it chooses from, and not elementwise."""
        if op.kind != "select_n" or op.operands[0] not in op.data:
            return False
        which, *cases = op.data
        roots = [self._unmoved(self.root[id(x)]) for x in cases]
        return any(root is not self.root[id(which)] and self._derives(which, root) for root in roots)

    def _unmoved(self, root: Value) -> Value:
        while root.op is not None and root.op.kind in _MOVEMENT and root.op.data:
            root = self.root[id(root.op.data[0])]
        return root

    def _use(self, x: Atom, op: Op | None) -> None:
        if isinstance(x, Value):
            self.users.setdefault(id(x), []).append(op)

    def _begin(self, value: Value) -> None:
        self.root[id(value)] = self.core[id(value)] = value
        self.values[id(value)] = [value]
        self.order[id(value)] = tuple(range(len(value.shape)))

    def _place(self, op: Op, output: Value) -> None:
        """Put an output into the region of its operands, or let a new one begin."""
        data = op.data
        roots, orders = {id(self.root[id(x)]) for x in data}, {self.order[id(x)] for x in data}
        moves = op.kind == "transpose" or (op.is_elementwise and all(x.shape == output.shape for x in data))
        if not moves or len(roots) != 1 or len(orders) != 1:
            self._begin(output)
            return
        root, (order,) = self.root[id(data[0])], orders
        if _is_float(output) and not _is_float(root):  # pixels, labels
            self._begin(output)
            return
        self.order[id(output)] = (
            tuple(order[k] for k in op.equation.params["permutation"]) if op.kind == "transpose" else order
        )
        cores = {id(self.core[id(x)]): self.core[id(x)] for x in data}
        self.root[id(output)] = root
        self.core[id(output)] = next(iter(cores.values())) if len(cores) == 1 and _is_affine(op) else output
        self.values[id(root)].append(output)

    def regions(self, root: Value, values: list[Value]) -> Iterable[Region]:
        if not root.from_data or len(values) == 1:
            return
        exits = [v for v in values if _is_float(v) and any(True for _ in self._outside(v))]
        curved = [v for v in exits if self.core[id(v)] is not root and not self._is_of_a_sum(v)]
        for group in self._links(curved):
            members = list(dict.fromkeys(map(self._member, group)))
            by_core: dict[int, list[Value]] = {}
            for v in members:
                by_core.setdefault(id(self.core[id(v)]), []).append(v)
            members = [same[0] if len(same) == 1 else self.core[id(same[0])] for same in by_core.values()]
            region = self._region(root, values, [*members, *self._linear_members(exits, group)])
            if region is not None:
                yield region

    def _region(self, root: Value, values: list[Value], members: list[Value]) -> Region | None:
        members.sort(key=lambda v: self.number.get(id(v.op), -1))
        region = None
        for z in self._pre_activations(root, values, [v for v in members if self.core[id(v)] is not root]):
            ops = _between(z, members, values)
            step = _between(region.z, [z], values) if region is not None else []
            wider = region if all(_adds_numbers(op) for op in step) else None
            orders = [tuple(self.order[id(v)].index(k) for k in self.order[id(z)]) for v in members]
            region = Region(z, members, orders, ops, self.number[id(ops[-1])], wider)
        return None if region is None or self._is_statistic(region) else region

    def _outside(self, value: Value) -> Iterable[Op | None]:
        """What reads the value and is not of its region."""
        for user in self.users.get(id(value), []):
            if user is None or all(self.root[id(x)] is not self.root[id(value)] for x in user.outputs):
                yield user

    def _links(self, curved: list[Value]) -> list[list[Value]]:
        """Those of one link are concatenated, or affine in the same value; the others are alone."""
        groups: list[tuple[set[int], list[Value]]] = []
        for v in curved:
            marks = {id(self.core[id(v)]), *map(id, self._concatenations(v))}
            same = [group for group in groups if group[0] & marks]
            groups = [group for group in groups if group not in same]
            groups.append((marks.union(*(group[0] for group in same)), [x for group in same for x in group[1]] + [v]))
        return [values for _, values in groups]

    def _linear_members(self, exits: list[Value], group: list[Value]) -> list[Value]:
        """What is affine and is concatenated with what is not: a member of the same link."""
        joined = {id(op) for v in group for op in self._concatenations(v)}
        affine = [v for v in exits if self.core[id(v)] is self.root[id(v)]]
        return [v for v in affine if joined & set(map(id, self._concatenations(v)))]

    def _concatenations(self, value: Value) -> Iterable[Op]:
        for user in self.users.get(id(value), []):
            if user is not None and user.kind in ("concatenate", "stack"):
                yield user
            elif user is not None and user.kind in _MOVEMENT:
                yield from self._concatenations(user.outputs[0])

    def _member(self, value: Value) -> Value:
        """The last value from the core on that is made with numbers alone: before a dropout, a scale for each unit."""
        core, member, x = self.core[id(value)], value, value
        while x is not core:
            assert x.op is not None
            x, op = x.op.data[0], x.op
            if not _adds_numbers(op):
                is_dropout = (
                    op.kind == "select_n" and x is not core and x.op is not None and x.op.kind in ("mul", "div")
                )
                member = x.op.data[0] if is_dropout and x.op is not None else x  # it divides by the share that it keeps
        return member

    def _pre_activations(self, root: Value, values: list[Value], curved: list[Value]) -> list[Value]:
        """The values that are affine in the root and on every way to what is not; the last one is z."""
        on_all_ways: dict[int, set[int]] = {id(root): {id(root)}}
        for v in values[1:]:
            assert v.op is not None
            on_all_ways[id(v)] = set.intersection(*(on_all_ways[id(x)] for x in v.op.data)) | {id(v)}
        common = set.intersection(*(on_all_ways[id(v)] for v in curved))
        return [v for v in values if id(v) in common and self.core[id(v)] is root and _is_float(v)]

    def _is_of_a_sum(self, value: Value) -> bool:
        """Whether it is a part of a loss, or the terms of a norm or a softmax."""
        if self._is_averaged(value):
            return True
        if not _is_term(self.core[id(value)].op):
            return False
        return all(user is not None and self._is_normed(user, value) for user in self._outside(value))

    def _is_averaged(self, value: Value) -> bool:
        """Whether every way from it leads to a sum over samples, by elementwise operations and other sums."""
        if id(value) not in self.averaged:
            users = self.users.get(id(value), [None])
            self.averaged[id(value)] = all(user is not None and self._averages(user, value) for user in users)
        return self.averaged[id(value)]

    def _averages(self, user: Op, value: Value) -> bool:
        if user.kind in REDUCTIONS and set(value.samples) & _reduced_axes(user):
            return True
        passes = user.is_elementwise or user.kind in REDUCTIONS | _MOVEMENT
        return passes and bool(user.outputs) and all(map(self._is_averaged, user.outputs))

    def _is_normed(self, user: Op, value: Value) -> bool:
        """Whether the values are summed over units or samples, or divided by such a sum of themselves."""
        if user.kind in REDUCTIONS:
            units = {k for k, axis in enumerate(value.axes) if any(f.is_unit for f in axis)}
            return bool(_reduced_axes(user) & (units | set(value.samples)))
        others = [x for x in user.data if x is not value]
        return user.is_elementwise and bool(others) and all(self._derives(x, value) for x in others)

    def _derives(self, x: Value, value: Value) -> bool:
        """Whether x is computed from the value."""
        first, seen, left = self.number.get(id(value.op), -1), set(), [x]
        while left:
            v = left.pop()
            if v is value:
                return True
            if id(v) not in seen and self.number.get(id(v.op), -1) > first:
                seen.add(id(v))
                left += v.op.data if v.op else []
        return False

    def _is_statistic(self, region: Region) -> bool:
        """Whether z is one: of all samples, or a sum that is rooted or squared, or broadcast back along its units."""
        z, root = region.z, self.root[id(region.z)]
        if not z.shape or (self.graph.has_samples and not z.samples):
            return True
        if not _is_sum(root):
            return False
        if any(map(_is_of_positives, region.ops)) or any(_is_term(self.core[id(v)].op) for v in region.members):
            return True
        if any(map(self._is_rooted, region.members)):
            return True
        units = [k for k, axis in enumerate(z.axes) if any(f.is_unit for f in axis) and k not in z.samples]
        return all(z.shape[k] == 1 for k in units) and any(map(self._is_broadcast, region.members))

    def _is_rooted(self, value: Value) -> bool:
        """Whether an activation of a sum is no more than its guard: there comes a root after it."""
        passed = [op for op in self.users.get(id(value), []) if op and (op.is_elementwise or op.kind in _MOVEMENT)]
        return any(_is_of_positives(op) or (len(op.data) == 1 and self._is_rooted(op.outputs[0])) for op in passed)

    def _is_broadcast(self, value: Value) -> bool:
        for user in self.users.get(id(value), []):
            if user is None or not user.outputs:
                continue
            grows = math.prod(user.outputs[0].shape) > math.prod(value.shape)
            if grows and (user.kind == "broadcast_in_dim" or user.kind in ELEMENTWISE):
                return True
            if user.kind in _MOVEMENT and self._is_broadcast(user.outputs[0]):
                return True
        return False


def _is_float(value: Value) -> bool:
    return jnp.issubdtype(getattr(value.aval, "dtype", bool), jnp.floating)


def _is_affine(op: Op) -> bool:
    """Whether the output is affine in the operands that are data."""
    kind, data = op.kind, op.data
    if kind == "convert_element_type":
        return _is_float(op.outputs[0]) and _is_float(data[0])
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
    needed = {id(v) for v in members}
    ops = []
    for v in reversed(values[values.index(z) + 1 :]):
        if id(v) in needed and v.op is not None:
            ops.append(v.op)
            needed |= {id(x) for x in v.op.data if x is not z}
    return ops[::-1]


def _reduced_axes(op: Op) -> set[int]:
    axes = op.equation.params.get("axes", (op.equation.params.get("axis", -1),))
    return {k % len(op.data[0].shape) for k in axes}


def _is_term(op: Op | None) -> bool:
    """Whether its outputs are what norms and softmaxes add up: |x|, x^2, exp(x)."""
    return op is not None and (op.kind in _TERMS or (op.kind == "mul" and op.operands[0] is op.operands[1]))


def _is_of_positives(op: Op) -> bool:
    """Whether it is a root, a logarithm or a fraction of data."""
    if op.kind == "integer_pow":
        return op.equation.params["y"] < 0
    if op.kind == "pow":
        exponent = float(op.operands[1].val) if isinstance(op.operands[1], Literal) else 0.5
        return not (exponent > 0 and exponent.is_integer())
    return op.kind in ("sqrt", "rsqrt", "log") or (op.kind == "div" and not isinstance(op.operands[1], Literal))


def _is_sum(root: Value) -> bool:
    """Whether it is a reduction, or elementwise of reductions alone: a variance, say."""
    if root.op is None or not root.op.data:
        return False
    if root.op.kind in REDUCTIONS:
        return True
    moved = root.op.kind in _MOVEMENT or root.op.kind in ELEMENTWISE
    return moved and all(_is_sum(x) for x in root.op.data)
