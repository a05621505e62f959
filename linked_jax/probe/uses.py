"""Where values go: what is only summed up is a part of a loss, a norm or a softmax, and no activation."""

import math
from collections.abc import Iterable

from jax.extend.core import Literal

from linked_jax.probe.values import ELEMENTWISE, REDUCTIONS, Graph, Op, Value

MOVEMENT = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "convert_element_type"}
_POWERS = {"square", "integer_pow", "abs"}


class Uses:
    """What reads each value of a graph.

    Attributes:
      number: of each operation, in order.
    """

    def __init__(self, graph: Graph):
        self._has_samples = graph.has_samples
        self.number: dict[Op | None, int] = {op: i for i, op in enumerate(graph.ops)}
        self._of: dict[Value, list[Op | None]] = {}
        for op, operands in [*((op, op.operands) for op in graph.ops), (None, graph.outputs)]:
            for x in operands:
                if isinstance(x, Value):
                    self._of.setdefault(x, []).append(op)
        self._sums: set[Value] = set()  # reductions, and what is elementwise of reductions alone: a variance, say
        for op in graph.ops:
            passes = op.kind in MOVEMENT | ELEMENTWISE and self._sums.issuperset(op.data)
            if op.data and (op.kind in REDUCTIONS or passes):
                self._sums.update(op.outputs)
        self._averaged: dict[Value, bool] = {}
        self._summed: dict[Value, bool] = {}
        for op in reversed(graph.ops):
            for v in op.outputs:
                self._averaged[v] = all(user is not None and self._averages(user, v) for user in self.of(v))
                self._summed[v] = all(user is not None and self._sums_up(user) for user in self.of(v))

    def of(self, value: Value) -> list[Op | None]:
        """The operations that read it; None where it leaves the graph."""
        return self._of.get(value, [])

    def joins(self, value: Value) -> Iterable[Op]:
        """The operations that lay it beside others, as the members of a link."""
        for user in self.of(value):
            if user is not None and user.kind in ("concatenate", "stack"):
                yield user
            elif user is not None and user.kind in MOVEMENT:
                yield from self.joins(user.outputs[0])

    def derives(self, x: Value, value: Value) -> bool:
        """Whether x is computed from the value."""
        first, seen, left = self.number.get(value.op, -1), set(), [x]
        while left:
            v = left.pop()
            if v is value:
                return True
            if v not in seen and self.number.get(v.op, -1) > first:
                seen.add(v)
                left += v.op.data if v.op else []
        return False

    def is_of_a_sum(self, value: Value, core: Value, users: Iterable[Op | None]) -> bool:
        """Whether it is a part of a loss, which is averaged over samples, or the terms |x|, x^2, exp(x) of a norm.

        Args:
          value: of an elementwise function.
          core: the last value before it that is not affine in others.
          users: of the value, outside of its region.
        """
        if self._averaged[value]:
            return True
        is_term = core.op is not None and (_is_power(core.op) or core.op.kind in ("exp", "exp2"))
        return is_term and all(user is not None and self._norms(user, value) for user in users)

    def is_statistic(self, root: Value, z: Value, first: list[Op], last: list[Op], members: list[Value]) -> bool:
        """Whether z is a sum of all samples, or one that is rooted or squared, or broadcast back along its units.

        Args:
          root: that z is affine in.
          z: a pre-activation.
          first: the operations on z, or on a bounded z.
          last: those that are not followed by others but affine ones.
          members: what is computed of z.
        """
        if root not in self._sums:
            return False
        if (self._has_samples and not z.samples) or any(map(_is_power, last)):
            return True
        if any(_is_of_positives(op, op.data[-1]) for op in first) or any(map(self._is_rooted, members)):
            return True
        units = [k for k, axis in enumerate(z.axes) if any(f.is_unit for f in axis) and k not in z.samples]
        return all(z.shape[k] == 1 for k in units) and any(map(self._is_broadcast, members))

    def _averages(self, user: Op, value: Value) -> bool:
        """Whether all that it makes of a value ends in sums over samples: by elementwise operations and other sums."""
        if user.kind in REDUCTIONS and set(value.samples) & _reduced_axes(user, value):
            return not any(map(self._has_weights, user.outputs))  # a sum of points or nodes may be a feature
        passes = user.is_elementwise or user.kind in REDUCTIONS | MOVEMENT
        return passes and all(self._averaged[x] for x in user.outputs)

    def _has_weights(self, total: Value) -> bool:
        """Whether a sum over samples goes into a linear layer, and not back to the samples, as a norm's does."""
        for op in self.of(total):
            if op is None or any(x.samples for x in op.outputs):
                continue
            if op.kind in ("dot_general", "conv_general_dilated") and len(op.data) == 1:
                return True
            if (op.is_elementwise or op.kind in MOVEMENT) and any(map(self._has_weights, op.outputs)):
                return True
        return False

    def _sums_up(self, user: Op) -> bool:
        """The same of any sums."""
        return user.kind in REDUCTIONS or (user.is_elementwise and all(self._summed[x] for x in user.outputs))

    def _norms(self, user: Op, value: Value) -> bool:
        """Whether it sums a value up, or divides it by a sum of itself."""
        others = [x for x in user.data if x is not value]
        is_by_itself = user.is_elementwise and bool(others) and all(self.derives(x, value) for x in others)
        return is_by_itself or self._sums_up(user)

    def _is_rooted(self, value: Value) -> bool:
        """Whether an activation of a sum is no more than its guard: there comes a root or a fraction after it."""
        passed = [op for op in self.of(value) if op and op.kind in ELEMENTWISE | MOVEMENT]
        return any(
            _is_of_positives(op, value) or (len(op.data) == 1 and self._is_rooted(op.outputs[0])) for op in passed
        )

    def _is_broadcast(self, value: Value) -> bool:
        for op in self.of(value):
            if op is None or not op.outputs:
                continue
            grows = math.prod(op.outputs[0].shape) > math.prod(value.shape)
            if grows and (op.kind == "broadcast_in_dim" or op.kind in ELEMENTWISE):
                return True
            if op.kind in MOVEMENT and self._is_broadcast(op.outputs[0]):
                return True
        return False


def _reduced_axes(op: Op, x: Value) -> set[int]:
    axes = op.equation.params.get("axes", (op.equation.params.get("axis", -1),))
    return {int(k) % len(x.shape) for k in axes}


def _is_power(op: Op) -> bool:
    return op.kind in _POWERS or (op.kind == "mul" and op.operands[0] is op.operands[1])


def _is_of_positives(op: Op, x: Value) -> bool:
    """Whether it is a root or a logarithm of x, or a fraction with x below."""
    if op.kind == "integer_pow":
        return op.equation.params["y"] < 0
    if op.kind == "pow":
        exponent = float(op.operands[1].val) if isinstance(op.operands[1], Literal) else 0.5
        return not (exponent > 0 and exponent.is_integer())
    return op.kind in ("sqrt", "rsqrt", "log") or (op.kind == "div" and op.operands[1] is x)
