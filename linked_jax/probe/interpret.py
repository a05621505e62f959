"""Evaluate a function by its jaxpr, and take the statistics of every activation on the way."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Float

from linked_jax.probe.models import merge, split
from linked_jax.probe.names import named_calls, scope_of, source_of
from linked_jax.probe.recognise import activation_at, has_activation, inner_jaxprs, open_jaxpr
from linked_jax.probe.taps import Env, Tap, all_times, evaluate_equations, is_tap, measure, read
from linked_jax.probe.variables import (
    CALLS,
    CUSTOM,
    REMATS,
    Origin,
    Path,
    Samples,
    Variable,
    describe,
    inputs_of,
    operands_of,
    sample_axes,
)

Taps = OrderedDict[Any, Any]
"""A `Tap` for each (pre-activation, activation), and a `NotSeen`: in order of execution. JAX keeps their order."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NotSeen:
    """An equation that holds activations and is not looked into."""

    what: str = dataclasses.field(metadata={"static": True})


def observe(f: Callable[[Any, Any], Any], parameters: Any, inputs: Any) -> tuple[Any, list[Tap]]:
    """The outputs of f(parameters, inputs), and what every activation did on the way.

        outputs, taps = observe(f, parameters, inputs)

    It may stand inside jit, vmap and shard_map. Of the statistics, compilation removes those that are not used.
    Only what depends on the inputs is data: an activation of parameters alone has no tap. An activation that is
    applied twice to one z is one layer. See `probe` for what an activation is, and a unit.

    Args:
      f: f(parameters, inputs) -> outputs, any pytree.
      parameters: any pytree, or an NNX module. f sees a copy of the module, and the taps have its paths for names.
      inputs: an array (N, ...), or a pytree of them. One more trace, for 2 N, tells which axes are of samples.

    Returns:
      The outputs, exactly those of f; and a list of `Tap`, in order of execution. The tap of a layer in a scan over
      layers has a leading axis: see `unstack`. The taps of two batches are combined by `together`.

    Raises:
      ValueError: if a link is laid along the axis of the samples.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe import observe
      >>> @jax.jit
      ... def dead_units(w, x):
      ...     outputs, (tap,) = observe(lambda w, x: jax.nn.relu(x @ w), w, x)
      ...     return outputs.shape, (~tap.stats.live).sum()
      >>> dead_units(jnp.array([[1.0, -1.0]]), jnp.ones((5, 1)))[1]
      Array(1, dtype=int32)
    """
    outputs, taps = Trace.of(f, parameters, inputs).evaluate()
    return outputs, [dataclasses.replace(tap, gradient_square_sum=None) for tap in taps.values() if is_tap(tap)]


@dataclasses.dataclass(frozen=True)
class Trace:
    """The jaxpr of a function, its arguments, and the axes of its samples; from `Trace.of`."""

    jaxpr: Any
    arguments: list[Any]
    from_data: list[bool]
    structure: Any
    samples: Samples

    @classmethod
    def of(cls, f: Callable[[Any, Any], Any], parameters: Any, inputs: Any) -> "Trace":
        """Trace f(parameters, inputs), and once more for twice the batch, which is never run."""
        static, arrays = split(parameters)

        def forward(arrays: Any, inputs: Any) -> Any:
            model = merge(static, arrays)
            with named_calls(model):
                return f(model, inputs)

        jaxpr, outputs = jax.make_jaxpr(forward, return_shape=True)(arrays, inputs)
        larger = jax.tree.map(_twice, inputs)
        try:
            samples = sample_axes(jaxpr, jax.make_jaxpr(forward)(arrays, larger))
        except Exception:  # whatever a model made for one size of batch raises: its samples are along the first axis
            samples = None
        parts = jax.tree.leaves(arrays), jax.tree.leaves(inputs)
        from_data = [False] * len(parts[0]) + [True] * len(parts[1])
        return cls(jaxpr, [*parts[0], *parts[1]], from_data, jax.tree.structure(outputs), samples)

    def evaluate(self, probes: Mapping[Origin, Any] | None = None) -> tuple[Any, Taps]:
        """The outputs and the taps.

        Args:
          probes: for pre-activations, by their origin, a zero of the shape of their `gradient_square_sum`; the
            gradient for it is that sum.
        """
        frame = _Frame((), "", self.samples, probes or {})
        inputs = inputs_of(self.jaxpr, self.from_data, (), self.samples)
        leaves, taps = _evaluate(self.jaxpr, self.arguments, inputs, frame)
        return jax.tree.unflatten(self.structure, leaves), taps


def _twice(x: Any) -> Any:
    aval = jax.typeof(x)
    return aval.update(shape=(2 * aval.shape[0], *aval.shape[1:])) if aval.shape else aval


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where a jaxpr stands in the calls around it, and what holds for it throughout."""

    path: Path
    scope: str
    samples: Samples
    probes: Mapping[Origin, Any]

    def inside(self, i: int, equation: JaxprEqn) -> "_Frame":
        return dataclasses.replace(self, path=(*self.path, i), scope=scope_of(equation, self.scope))

    def probed(self, variable: Variable, value: Any) -> Any:
        """The value, with its gradient measured if it has a probe and is defined here."""
        probe = self.probes.get(variable.origin) if variable.origin.path == self.path else None
        return value if probe is None else _measured(value, probe)


def _evaluate(jaxpr: Any, arguments: list[Any], inputs: list[Variable], frame: _Frame) -> tuple[list[Any], Taps]:
    """The outputs of a jaxpr and the taps inside.

    Calls and remat are looked into; so are scans, where each iteration is a layer, or, if the scan runs over the
    data, a recurrent layer that is one over all times. Of functions with a custom derivative the activations are
    seen and their gradients are not.
    """
    body, constants = open_jaxpr(jaxpr)
    known = describe(jaxpr, inputs, frame.path, frame.samples)
    env = dict(zip([*body.constvars, *body.invars], [*constants, *arguments], strict=True))
    env = {var: frame.probed(known[var], value) for var, value in env.items()}
    taps, i = Taps(), 0
    while i < len(body.eqns):
        equation, site, stop = body.eqns[i], activation_at(body.eqns, i), i + 1
        if site and known[site.z].from_data:
            stop = site.stop
            some = body.eqns[i:stop]
            values, tap = measure(body, some, site, known[site.z], env, frame.samples, frame.scope)
            taps.setdefault((known[site.z].origin, site.activation, _signature(some, known)), tap)
        elif any(has_activation(inner) for inner in inner_jaxprs(equation)):
            operands = operands_of(equation, known)
            outputs, inside = _enter(body, equation, env, operands, frame.inside(i, equation))
            values = dict(zip(equation.outvars, outputs, strict=True))
            for key, tap in inside.items():
                taps.setdefault(key, tap)
        else:
            values = evaluate_equations(body, [equation], env)
        env |= {var: frame.probed(known[var], value) for var, value in values.items()}
        i = stop
    return [read(atom, env) for atom in body.outvars], taps


def _signature(equations: Sequence[JaxprEqn], known: dict[Var, Variable]) -> Any:
    """Equal for equations that compute the same of the same variables; those defined on the way are not compared."""
    defined = {var for equation in equations for var in equation.outvars}

    def operand(atom: Any) -> Any:
        return str(atom) if isinstance(atom, Literal) else atom not in defined and atom in known and known[atom].origin

    return tuple(
        (
            equation.primitive.name,
            *map(operand, equation.invars),
            *(_signature(open_jaxpr(inner)[0].eqns, {}) for inner in inner_jaxprs(equation)),
        )
        for equation in equations
    )


def _enter(
    body: Jaxpr, equation: JaxprEqn, env: Env, operands: list[Variable], frame: _Frame
) -> tuple[list[Any], Taps]:
    """The outputs of an equation that holds jaxprs, and the taps inside."""
    kind, inner = equation.primitive.name, inner_jaxprs(equation)[0]
    arguments = [read(atom, env) for atom in equation.invars]
    if kind == "scan":
        return _scan(equation, arguments, [operand.from_data for operand in operands], frame)
    if kind in CALLS:
        return _evaluate(inner, arguments, operands, frame)
    if kind in REMATS:
        options = {name: equation.params[name] for name in ("policy", "prevent_cse")}
        return jax.checkpoint(lambda arguments: _evaluate(inner, arguments, operands, frame), **options)(arguments)
    outputs = list(evaluate_equations(body, [equation], env).values())
    if kind in CUSTOM:
        constant = dataclasses.replace(frame, probes={})
        taps = _evaluate(inner, jax.lax.stop_gradient(arguments), operands, constant)[1]
        return outputs, jax.tree.map(
            lambda tap: dataclasses.replace(tap, gradient_square_sum=None), taps, is_leaf=is_tap
        )
    not_seen = NotSeen(f"{kind} in {frame.scope or source_of(equation) or 'the model'}")
    return outputs, Taps({frame.path: not_seen})


def _scan(equation: JaxprEqn, arguments: list[Any], from_data: list[bool], frame: _Frame) -> tuple[list[Any], Taps]:
    """Where the scan goes over the data its iterations are times, else each is a layer."""
    jaxpr = equation.params["jaxpr"]
    body = open_jaxpr(jaxpr)[0]
    # What is scanned over has an axis more outside; parameters that tell have other names in other versions of JAX.
    n_xs, n_ys = (
        sum(len(outside.aval.shape) > len(inside.aval.shape) for outside, inside in zip(*pair, strict=True))  # type: ignore[reportAttributeAccessIssue]
        for pair in ((equation.invars, body.invars), (equation.outvars, body.outvars))
    )
    n_carry, first_x = len(body.outvars) - n_ys, len(arguments) - n_xs
    n_consts = first_x - n_carry
    over_time = any(from_data[first_x:])
    varies = [*from_data[:n_consts], *[any(from_data)] * n_carry, *from_data[first_x:]]
    inputs = inputs_of(jaxpr, varies, frame.path, frame.samples)
    own = {origin: probe for origin, probe in frame.probes.items() if origin.path[: len(frame.path)] == frame.path}

    def step(carry: list[Any], x: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        here = dataclasses.replace(frame, probes=own if over_time else x[1])
        outputs, taps = _evaluate(jaxpr, [*arguments[:n_consts], *carry, *x[0]], inputs, here)
        return outputs[:n_carry], (outputs[n_carry:], taps)

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    xs = arguments[first_x:], None if over_time else own
    carry, (ys, taps) = jax.lax.scan(step, arguments[n_consts:first_x], xs, **options)
    return [*carry, *ys], jax.tree.map(all_times, taps, is_leaf=is_tap) if over_time else taps


@jax.custom_vjp
def _measured(z: Array, probe: Float[Array, ""]) -> Array:
    """z. The gradient for the probe is not one, but the sum of squares of the gradient for z."""
    del probe
    return z


_measured.defvjp(lambda z, _probe: (z, None), lambda _, g: (g, jnp.square(g.astype(jnp.float32)).sum()))
