"""Which axes of an array are units, and which are samples and positions, from operation to operation."""

import math

from linked_jax.probe.values import ELEMENTWISE, REDUCTIONS, Axes, Factor, Op, Value, shape_of

_SAME_RANK = {
    "concatenate", "conv_general_dilated", "cumsum", "dynamic_slice", "dynamic_update_slice", "gather", "pad",
    "reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum", "rev", "scatter", "scatter_add",
    "select_and_gather_add", "slice",
}  # fmt: skip


def axes_of(op: Op) -> Axes | None:
    """The axes of the output where the operation says which of them are units; None if it does not."""
    kind, params, output, data = op.kind, op.equation.params, op.outputs[0], op.data
    shape, first = output.shape, data[0]
    if op.is_elementwise or kind in ELEMENTWISE:
        return _of_broadcast([x for x in data if len(x.shape) == len(shape)], shape)
    if kind == "dot_general" and len(data) == 1:
        return _of_product(op)
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


def _of_broadcast(data: list[Value], shape: tuple[int, ...]) -> Axes | None:
    """The axes of the data; those that parameters alone have (a vmap over them broadcasts axes of size 1) are units."""
    if not data:
        return None
    data = sorted(data, key=lambda x: -math.prod(f.size for axis in x.axes for f in axis if f.is_unit))  # masks last
    return tuple(next((x.axes[k] for x in data if x.shape[k] == n), (Factor(n, True),)) for k, n in enumerate(shape))


def _of_product(op: Op) -> Axes:
    """Units are the free axes of the parameters, and the axes that a vmap over parameters has put on both."""
    (contracting, batch), (left, right) = op.equation.params["dimension_numbers"], op.operands
    free = []
    for operand, gone, both in zip((left, right), contracting, batch, strict=True):
        own = isinstance(operand, Value) and operand.from_data
        axes = operand.axes if isinstance(operand, Value) else ()
        for k, n in enumerate(shape_of(operand)):
            if k not in gone and k not in both:
                free.append(tuple(Factor(f.size, False) for f in axes[k]) if own else (Factor(n, True),))
    data, places = (left, batch[0]) if isinstance(left, Value) and left.from_data else (right, batch[1])
    shared = [(Factor(shape_of(data)[k], True),) for k in places]
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
