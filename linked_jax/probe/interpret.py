"""Evaluate a function by its graph, and take the statistics of every activation on the way."""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array, Bool

from linked_jax.histograms import BINS, log_histogram
from linked_jax.probe.graph import graph_of
from linked_jax.probe.models import is_key, merge, split
from linked_jax.probe.names import module_of, named_calls
from linked_jax.probe.recognise import activations
from linked_jax.probe.regions import Region
from linked_jax.probe.taps import Tap, all_times, is_tap, kept, measure, nothing_yet, together, whole
from linked_jax.probe.values import CUSTOM, Atom, Graph, Op, Value, goes_on, has_steps, is_float, loop_parts, where_on

Key = tuple[int, ...]
"""Where an activation begins: the number of the operation, after those of the operations that it is inside."""
Taps = OrderedDict[Key, Any]
"""A `Tap` for each activation, and a `NotSeen`: in order of execution. JAX keeps their order."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NotSeen:
    """An operation that holds activations and is not looked into."""

    what: str = dataclasses.field(metadata={"static": True})


def observe(
    f: Callable[[Any, Any], Any], parameters: Any, inputs: Any, *, mask: Array | None = None
) -> tuple[Any, list[Tap]]:
    """The outputs of f(parameters, inputs), and what every activation did on the way.

        outputs, taps = observe(f, parameters, inputs)

    It may stand inside jit, vmap and shard_map. Of the statistics, compilation removes those that are not used.
    Only what depends on the inputs is data: an activation of parameters alone has no tap. An activation that is
    applied twice to one z is one layer, unless it has a custom derivative that is made anew at each call. See
    `probe` for what an activation is, and a unit.

    Args:
      f: f(parameters, inputs) -> outputs, any pytree.
      parameters: any pytree, or an NNX module. f sees a copy of the module, and the taps have its paths for names.
      inputs: an array (N, ...), or a pytree of them, with PRNG keys and None in it or without. One more trace, for
        2 N, tells which axes are of samples.
      mask: which samples and steps count, (N, T) or (N,); padded steps are left out of all statistics.

    Returns:
      The outputs, exactly those of f; and a list of `Tap`, in order of execution. The tap of a layer in a scan over
      layers has a leading axis: see `unstack`. The taps of two batches are combined by `together`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe import observe
      >>> @jax.jit
      ... def dead_units(w, x):
      ...     outputs, (tap,) = observe(lambda w, x: jax.nn.relu(x @ w), w, x)
      ...     return outputs.shape, (~tap.stats.live).sum()
      >>> dead_units(jnp.array([[1.0, -1.0]]), jnp.ones((5, 1)))[1]
      Array(1, dtype=int32)
    """
    outputs, taps = Trace.of(f, parameters, inputs).evaluate(Watch(mask))
    return outputs, [tap for tap in taps.values() if is_tap(tap)]


@dataclasses.dataclass(frozen=True)
class Trace:
    """The graph of a function, its arguments, and the structure of its outputs; from `Trace.of`."""

    graph: Graph
    arguments: list[Any]
    structure: Any

    @classmethod
    def of(cls, f: Callable[[Any, Any], Any], parameters: Any, inputs: Any) -> "Trace":
        """Trace f(parameters, inputs), and once more for twice the batch, which is never run."""
        static, arrays = split(parameters)

        def forward(arrays: Any, inputs: Any) -> Any:
            model = merge(static, arrays)
            with named_calls(model):
                return f(model, inputs)

        jaxpr, outputs = jax.make_jaxpr(forward, return_shape=True)(arrays, inputs)
        parts = jax.tree.leaves(arrays), jax.tree.leaves(inputs)
        from_data = [False] * len(parts[0]) + [not is_key(x) for x in parts[1]]
        try:
            larger = jax.make_jaxpr(forward)(arrays, jax.tree.map(_twice, inputs))
        except Exception:  # whatever a model made for one size of batch raises: its samples are along the first axis
            larger = None
        try:
            graph = graph_of(jaxpr, larger, from_data)
        except ValueError:  # it does other things for another size
            graph = graph_of(jaxpr, None, from_data)
        return cls(graph, [*parts[0], *parts[1]], jax.tree.structure(outputs))

    def evaluate(self, watch: "Watch") -> tuple[Any, Taps]:
        """The outputs and the taps; ValueError if the mask has steps that the model has not."""
        if watch.mask is not None and watch.mask.ndim > 1 and not has_steps(self.graph, *watch.mask.shape[:2]):
            n, steps = watch.mask.shape[:2]
            raise ValueError(
                f"mask has {steps} steps, and no array in the model has an axis of {steps}; pass booleans ({n}, T), T "
                "as the model's"
            )
        leaves, taps = _evaluate(self.graph, self.arguments, watch)
        return jax.tree.unflatten(self.structure, leaves), taps


class Watch(NamedTuple):
    """What is asked for of a graph.

    Attributes:
      mask: as for `observe`.
      scale: what the gradient for z is multiplied with. If None, the taps have no place for its statistics.
      probes: for activations, by their keys, the `Gradients` of their taps, zeros: the "gradients" for them are the
        statistics of the gradient for z.
    """

    mask: Array | None = None
    scale: int | None = None
    probes: Mapping[Key, Any] = {}

    def inside(self, i: int) -> "Watch":
        """Of the graph inside an operation, by its number."""
        probes = {key[1:]: probe for key, probe in self.probes.items() if key[0] == i and len(key) > 1}
        return self._replace(probes=probes)


class Gradients(NamedTuple):
    """The statistics of the gradient for a z, of its tap."""

    gradient_square_sum: Any
    gradient_histogram: Any


def with_gradients(taps: Taps, gradients: Mapping[Key, Gradients]) -> Taps:
    """The taps with these statistics, by their keys."""
    return Taps(taps | {key: dataclasses.replace(taps[key], **found._asdict()) for key, found in gradients.items()})


def _twice(x: Any) -> Any:
    aval = jax.typeof(x)
    return aval.update(shape=(2 * aval.shape[0], *aval.shape[1:])) if aval.shape else aval


def _evaluate(graph: Graph, arguments: list[Any], watch: Watch) -> tuple[list[Any], Taps]:
    """The outputs of a graph and the taps inside."""
    found, unseen = activations(graph)
    env: dict[Value, Any] = {}
    customs = [(i, op) for i, op in enumerate(graph.ops) if op.kind in CUSTOM and op.graphs]
    watched = [((region.place,), region.z) for region in found]
    watched += [((i, region.place), x) for i, op in customs for region, x in _of_arguments(op)]

    def define(value: Value, x: Any) -> None:
        for key, z in watched:
            if z is value and key in watch.probes:
                where = jnp.ones((), bool) if watch.mask is None else kept(value, watch.mask)
                x = _measured(watch.scale, x, where, watch.probes[key])
        env[value] = x

    for value, x in [*zip(graph.inputs, arguments, strict=True), *graph.constants]:
        define(value, x)
    taps: dict[Key, Any] = {}
    for i, op in enumerate(graph.ops):
        operands = [read(x, env) for x in op.operands]
        if any(map(has_activation, op.graphs)) and op.data:
            outputs, inside = _enter(op, operands, watch.inside(i))
            taps |= {(i, *key): tap for key, tap in inside.items()}
        else:
            outputs = op.evaluate(operands)
            taps |= {(i,): _not_seen(op)} if op in unseen else {}
        for value, x in zip(op.outputs, outputs, strict=True):
            define(value, x)
    taps |= {(region.place,): measure(region, env, watch.mask) for region in found}
    taps = Taps(sorted(taps.items()))
    if watch.scale is not None:
        taps = with_gradients(taps, {(region.place,): _no_sums() for region in found})
    return [read(x, env) for x in graph.outputs], taps


def read(x: Atom, env: dict[Value, Any]) -> Any:
    """The value of an operand."""
    return x.val if isinstance(x, Literal) else env[x]


def has_activation(graph: Graph) -> bool:
    """Whether there is one, or what may be one, in a graph or in those inside."""
    return any(activations(graph)) or any(has_activation(inner) for op in graph.ops for inner in op.graphs)


def _enter(op: Op, operands: list[Any], watch: Watch) -> tuple[list[Any], dict[Key, Any]]:
    """The outputs of an operation that has graphs inside, and the taps there."""
    loops = {"scan": _scan, "cond": _cond, "while": _while}
    if op.kind in loops:
        return loops[op.kind](op, operands, watch)
    outputs = op.evaluate(operands)
    if op.kind in CUSTOM:  # its own derivative hides what is inside, but not the gradient for its arguments
        inside = _evaluate(op.graphs[0], jax.lax.stop_gradient(operands), Watch(watch.mask))[1]
        shown = [] if watch.scale is None else [(region.place,) for region, _ in _of_arguments(op)]
        return outputs, with_gradients(inside, {key: _no_sums() for key in shown})
    return outputs, {(0,): _not_seen(op)}


def _no_sums() -> Gradients:
    return Gradients(jnp.zeros((), jnp.float32), jnp.zeros(BINS, jnp.float32))


def _not_seen(op: Op) -> NotSeen:
    return NotSeen(f"{op.kind} in {module_of(op.where.scope) or op.where.source or 'the model'}")


def _of_arguments(op: Op) -> list[tuple[Region, Atom]]:
    """The activations of a function's own arguments, with the operands that these are."""
    inner = op.graphs[0]
    pairs = list(zip(inner.inputs, op.operands, strict=True))
    return [(region, x) for region in activations(inner)[0] for z, x in pairs if region.z is z]


def _scan(op: Op, operands: list[Any], watch: Watch) -> tuple[list[Any], Taps]:
    """Where the scan goes over the data its iterations are times of one layer, else each is a layer."""
    params, graph = op.equation.params, op.graphs[0]
    consts, carry, xs = loop_parts(op, operands)
    data = scanned_data(op)
    probes, masks = {} if data else dict(watch.probes), step_masks(op, watch.mask)

    def step(carry: list[Any], x: tuple[list[Any], Any, Any]) -> tuple[list[Any], Any]:
        mask = watch.mask if x[2] is None else x[2]
        inside = watch._replace(probes=watch.probes if data else x[1], mask=mask)
        outputs, taps = _evaluate(graph, [*consts, *carry, *x[0]], inside)
        return outputs[: len(carry)], (outputs[len(carry) :], taps)

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, taps) = jax.lax.scan(step, carry, (xs, probes, masks), **options)
    return [*carry, *ys], jax.tree.map(all_times, taps, is_leaf=is_tap) if data else taps


def scanned_data(op: Op) -> list[Value]:
    """The data that a scan goes over; none where it goes over kernels too, for these are layers with data for each."""
    values = [x for x in loop_parts(op, op.operands)[2] if isinstance(x, Value)]
    has_kernels = any(len(x.shape) > 2 and not x.from_data and is_float(x) for x in values)
    return [] if has_kernels else [x for x in values if x.from_data]


def step_masks(op: Op, mask: Array | None) -> Array | None:
    """The mask of each iteration of a scan, if it goes over the samples one by one, or over their steps."""
    data = scanned_data(op)
    if mask is None or not data:
        return None
    by_sample = any(0 in x.samples for x in data)
    if by_sample or (mask.ndim > 1 and mask.shape[1] == op.equation.params["length"]):
        return jnp.moveaxis(mask, 0 if by_sample else 1, 0)
    return None


def _cond(op: Op, operands: list[Any], watch: Watch) -> tuple[list[Any], dict[Key, Any]]:
    """Each branch is a layer of its own; one that was not taken has seen nothing."""
    index, arguments, probes = operands[0], operands[1:], dict(watch.probes)

    def evaluated(i: int, arguments: list[Any], probes: Any) -> tuple[list[Any], Taps]:
        return _evaluate(op.graphs[i], arguments, watch._replace(probes=probes).inside(i))

    each = range(len(op.graphs))
    shapes = [jax.eval_shape(functools.partial(evaluated, i), arguments, probes)[1] for i in each]

    def branch(i: int) -> Callable[..., Any]:
        def taken(arguments: list[Any], probes: Any) -> Any:
            outputs, taps = evaluated(i, arguments, probes)
            return outputs, [taps if i == k else nothing_yet(shape) for k, shape in enumerate(shapes)]

        return taken

    outputs, taps = jax.lax.switch(index, [branch(i) for i in each], arguments, probes)
    return outputs, {(i, *key): tap for i, inside in enumerate(taps) for key, tap in inside.items()}


def _while(op: Op, operands: list[Any], watch: Watch) -> tuple[list[Any], dict[Key, Any]]:
    """The iterations of a loop are times of one layer; the gradient of an unbounded loop does not exist.

    Where a vmap over samples lets it end at other times for each, those that have ended do not count.
    """
    consts, carry, _ = loop_parts(op, operands)
    by_sample = any(isinstance(x, Value) and x.from_data and 0 in x.samples for x in loop_parts(op, op.operands)[1])

    def body(carry: list[Any]) -> tuple[list[Any], Taps]:
        on, mask = goes_on(op, operands, carry), watch.mask
        if on.ndim and by_sample:
            mask = on if mask is None else mask & on.reshape(on.shape + (1,) * (mask.ndim - on.ndim))
        outputs, taps = _evaluate(op.graphs[0], [*consts, *carry], Watch(mask))
        return where_on(on, outputs, carry), taps

    def step(state: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        carry, taps = body(state[0])
        return carry, jax.tree.map(together, state[1], taps, is_leaf=is_tap)

    start = nothing_yet(jax.eval_shape(body, carry)[1])
    carry, taps = jax.lax.while_loop(lambda state: goes_on(op, operands, state[0]).any(), step, (carry, start))
    return carry, taps


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _measured(scale: int, z: Array, where: Bool[Array, "..."], probe: Gradients) -> Array:
    """z. The gradients for the probe are none, but the statistics of that for z, times the scale, where it counts."""
    del scale, where, probe
    return z


def _backward(scale: int, where: Any, g: Array) -> tuple[Array, None, Gradients]:
    wide = whole(g).astype(jnp.float32)
    square_sum = float(scale) ** 2 * jnp.square(jnp.where(where, wide, 0)).sum()
    return g, None, Gradients(square_sum, log_histogram(scale * wide, where=jnp.asarray(where)))


_measured.defvjp(lambda _scale, z, where, _probe: (z, where), _backward)
