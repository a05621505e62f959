"""Run a jaxpr and take the statistics of every activation on the way.

An activation's statistics need z, h = f(z) and f'(z), and f is the equations between z and h. The mean square of the
gradient needs an ear: an identity on z with a second argument, a zero, whose gradient is the sum of squares of z's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Float

from linked_jax.diagnostics import combine, unit_statistics
from linked_jax.linking import join
from linked_jax.probe.axes import Samples, units_last
from linked_jax.probe.names import scope_of, source_of
from linked_jax.probe.recognise import Site, activation_at, has_activation, inner_jaxprs, opened

Env = dict[Var, Any]

LARGEST_GRAM = 4096
"""The effective rank is of layers with at most that many features: their Gram matrix takes 64 MB."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """What one activation did on one batch or more; under a scan over layers with a leading axis for them.

    Attributes:
      stats: the `UnitStatistics`.
      gram: the sum of h h^T, (d*C, d*C); None for too many features.
      heard: the sum of squares of the gradient for z: 0 until it is known, None where it cannot be.
      name: the scopes and the call it was found in.
      source: the file and line.
      activation: its name.
      arity: the link's number of members d.
    """

    stats: Any  # JAX rebuilds pytrees with other things than arrays in them: no types here
    gram: Any
    heard: Any
    name: str = dataclasses.field(metadata={"static": True})
    source: str = dataclasses.field(metadata={"static": True})
    activation: str = dataclasses.field(metadata={"static": True})
    arity: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NotSeen:
    """An equation with activations inside that are not looked at."""

    what: str = dataclasses.field(metadata={"static": True})


def is_tap(x: Any) -> bool:
    """For `jax.tree.map` over taps."""
    return isinstance(x, Tap)


def look_into(
    jaxpr: Any, args: Sequence[Any], varies: Sequence[bool], samples: Samples, ears: Any = None, scope: str = ""
) -> tuple[list[Any], list[Any]]:
    """Evaluate a jaxpr with its activations observed.

    Calls and remat are looked into; so are scans, where each iteration is a layer, or, if the scan runs over the
    data, a recurrent layer that is one over all times. Of functions with a custom derivative the activations are
    seen and their gradients are not.

    Args:
      jaxpr: closed or open.
      args: its arguments.
      varies: for each argument, whether it comes from the data: an activation of parameters alone is no layer.
      samples: the axes of the samples, of `sample_axes`.
      ears: the `heard` of the taps of a first call, in their structure, to be differentiated for; or None.
      scope: the names of the callers.

    Returns:
      The outputs; and the taps, a tree of `Tap` and `NotSeen`.
    """
    body, consts = opened(jaxpr)
    env = dict(zip([*body.constvars, *body.invars], [*consts, *args], strict=True))
    data = {var for var, varying in zip(body.invars, varies, strict=True) if varying}
    taps: list[Any] = []
    i = 0
    while i < len(body.eqns):
        equation, site = body.eqns[i], activation_at(body.eqns, i)
        stop = i + 1
        ear = None if ears is None or len(taps) == len(ears) else ears[len(taps)]
        if site and site.z in data:
            stop = site.stop
            outputs, tap = _tap(body, body.eqns[i:stop], site, env, samples, ear, scope)
            taps.append(tap)
        elif any(has_activation(inner) for inner in inner_jaxprs(equation)):
            from_data = [not isinstance(atom, Literal) and atom in data for atom in equation.invars]
            values, inside = _enter(body, equation, env, from_data, samples, ear, scope)
            outputs = dict(zip(equation.outvars, values, strict=True))
            taps.append(inside)
        else:
            outputs = _evaluate(body, [equation], env)
        env |= outputs
        for done in body.eqns[i:stop]:
            if any(not isinstance(atom, Literal) and atom in data for atom in done.invars):
                data |= set(done.outvars)
        i = stop
    return [_read(atom, env) for atom in body.outvars], taps


def _enter(
    body: Jaxpr, equation: JaxprEqn, env: Env, from_data: list[bool], samples: Samples, ear: Any, scope: str
) -> tuple[list[Any], Any]:
    """The outputs of an equation that holds jaxprs, and the taps inside."""
    kind, params = equation.primitive.name, equation.params
    inputs, inner = [_read(atom, env) for atom in equation.invars], inner_jaxprs(equation)[0]
    scope = scope_of(equation, scope)
    if kind == "scan":
        return _scan(equation, inputs, from_data, samples, ear, scope)
    if kind in ("jit", "pjit", "closed_call", "core_call"):
        return look_into(inner, inputs, from_data, samples, ear, scope)
    if kind in ("remat2", "remat", "checkpoint"):
        options = {name: params[name] for name in ("policy", "prevent_cse")}
        look = jax.checkpoint(lambda x, ear: look_into(inner, x, from_data, samples, ear, scope), **options)
        return look(inputs, ear)
    values = list(_evaluate(body, [equation], env).values())
    if kind.startswith(("custom_jvp_call", "custom_vjp_call")):
        taps = look_into(inner, jax.lax.stop_gradient(inputs), from_data, samples, None, scope)[1]
        return values, jax.tree.map(lambda tap: dataclasses.replace(tap, heard=None), taps, is_leaf=is_tap)
    return values, NotSeen(f"{kind} in {scope or source_of(equation) or 'the model'}")


def _scan(
    equation: JaxprEqn, inputs: list[Any], from_data: list[bool], samples: Samples, ear: Any, scope: str
) -> tuple[list[Any], Any]:
    """Where the scan goes over the data its iterations are times, else each is a layer."""
    jaxpr = equation.params["jaxpr"]
    body = opened(jaxpr)[0]
    # What is scanned over has an axis more outside; parameters that tell have other names in other versions of JAX.
    n_xs, n_ys = (
        sum(len(outside.aval.shape) > len(inside.aval.shape) for outside, inside in zip(*pair, strict=True))  # type: ignore[reportAttributeAccessIssue]
        for pair in ((equation.invars, body.invars), (equation.outvars, body.outvars))
    )
    n_carry, first_x = len(body.outvars) - n_ys, len(inputs) - n_xs
    n_consts = first_x - n_carry
    over_time = any(from_data[first_x:])
    varies = [*from_data[:n_consts], *[any(from_data)] * n_carry, *from_data[first_x:]]

    def step(carry: list[Any], x: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        arguments = [*inputs[:n_consts], *carry, *x[0]]
        outputs, taps = look_into(jaxpr, arguments, varies, samples, ear if over_time else x[1], scope)
        return outputs[:n_carry], (outputs[n_carry:], taps)

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, taps) = jax.lax.scan(
        step, inputs[n_consts:first_x], (inputs[first_x:], None if over_time else ear), **options
    )
    return [*carry, *ys], jax.tree.map(_all_times, taps, is_leaf=is_tap) if over_time else taps


def _tap(
    body: Jaxpr, equations: list[JaxprEqn], site: Site, env: Env, samples: Samples, ear: Any, scope: str
) -> tuple[dict[Any, Any], Tap]:
    """The values of an activation's equations, and its statistics."""
    z = _read(site.z, env)
    if ear is not None:
        z = _listened(z, ear)
    values = _evaluate(body, equations, env | {site.z: z})
    z_order, h_order, one_unit = units_last(site, z.shape, values[site.h].shape, samples)

    def f(z: Array) -> Array:
        z = (z[..., 0] if one_unit else z).transpose(np.argsort(z_order))
        h = _evaluate(body, equations, env | {site.z: z})[site.h].transpose(h_order)
        return h[..., None] if h.ndim < len(z_order) + one_unit else h

    z = z.transpose(z_order)
    z = jax.lax.stop_gradient(z[..., None] if one_unit else z)
    h, slopes = (jax.lax.stop_gradient(x) for x in _with_slopes(f, z, site, equations))
    features = h.reshape(-1, h.shape[-1]).astype(jnp.promote_types(h.dtype, jnp.float32))
    small = features.shape[-1] <= LARGEST_GRAM
    return values, Tap(
        stats=unit_statistics(z, h, slopes, arity=site.arity, layout=site.layout),
        gram=jnp.matmul(features.T, features, precision="highest") if small else None,
        heard=jnp.zeros(()),
        name=scope_of(equations[0], scope),
        source=source_of(equations[0]),
        activation=site.activation,
        arity=site.arity,
    )


def _with_slopes(f: Callable[[Array], Array], z: Array, site: Site, equations: list[JaxprEqn]) -> tuple[Array, Array]:
    """f(z) and the members' derivatives. A member with a custom_vjp has no jvp: then each is pulled back."""
    if not any(_has_custom_vjp(equation) for equation in equations):
        return jax.jvp(f, (z,), (jnp.ones_like(z),))
    h, pull = jax.vjp(f, z)
    members = range(site.arity)
    chosen = [join([jnp.full_like(z, i == k) for i in members], -1, site.layout) for k in members]
    return h, join([pull(cotangent)[0] for cotangent in chosen], -1, site.layout)


def _has_custom_vjp(equation: JaxprEqn) -> bool:
    return "custom_vjp" in equation.primitive.name or any(
        _has_custom_vjp(inside) for inner in inner_jaxprs(equation) for inside in opened(inner)[0].eqns
    )


def _all_times(tap: Tap) -> Tap:
    """The taps of one recurrent layer at all times, as one."""
    first, rest = jax.tree.map(lambda x: x[0], tap), jax.tree.map(lambda x: x[1:], tap)
    return jax.lax.scan(lambda a, b: (together(a, b), None), first, rest)[0]


def together(a: Tap, b: Tap) -> Tap:
    """One activation's taps of two batches, as one."""
    merge = combine
    for _ in range(a.stats.count.ndim):
        merge = jax.vmap(merge)
    sums = jax.tree.map(jnp.add, (a.gram, a.heard), (b.gram, b.heard))
    return dataclasses.replace(a, stats=merge(a.stats, b.stats), gram=sums[0], heard=sums[1])


@jax.custom_vjp
def _listened(z: Array, ear: Float[Array, ""]) -> Array:
    """z. The gradient for the ear is not one, but the sum of squares of the gradient for z."""
    del ear
    return z


_listened.defvjp(lambda z, _ear: (z, None), lambda _, g: (g, jnp.square(g.astype(jnp.float32)).sum()))


def _evaluate(body: Jaxpr, equations: list[JaxprEqn], env: Env) -> dict[Any, Any]:
    """The values of all variables that these equations define."""
    defined = [var for equation in equations for var in equation.outvars]
    used = dict.fromkeys(atom for equation in equations for atom in equation.invars if not isinstance(atom, Literal))
    needed = [var for var in used if var not in set(defined)]
    part = body.replace(constvars=[], invars=needed, outvars=defined, eqns=equations)
    return dict(zip(defined, eval_jaxpr(part, (), *[env[var] for var in needed]), strict=True))


def _read(atom: Any, env: Env) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]
