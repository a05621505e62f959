"""A tap: what one activation did on one batch or more."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array

from linked_jax.diagnostics import combine, unit_statistics
from linked_jax.linking import join
from linked_jax.probe.names import scope_of, source_of
from linked_jax.probe.recognise import Site, inner_jaxprs, open_jaxpr
from linked_jax.probe.variables import Samples, Variable, arrangement

Env = dict[Var, Any]

LARGEST_GRAM = 4096
"""The effective rank is of layers with at most that many features: their Gram matrix takes 64 MB."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """What one activation did on one batch or more; under a scan over layers with a leading axis for them.

    Attributes:
      stats: the `linked_jax.diagnostics.UnitStatistics` of its C units.
      gram: the sum of h h^T over samples and positions, (d*C, d*C); None for more than 4,096 features.
      gradient_square_sum: the sum of squares of the gradient for z, (); None if nothing was differentiated, or where
        a function with a custom derivative hides it.
      name: the scopes that it was found in, with [i] for the i-th layer of a scan after `unstack`.
      source: the file and line.
      activation: its name.
      arity: the link's number of members d.
    """

    stats: Any  # JAX rebuilds pytrees with other things than arrays in them: no types here
    gram: Any
    gradient_square_sum: Any
    name: str = dataclasses.field(metadata={"static": True})
    source: str = dataclasses.field(metadata={"static": True})
    activation: str = dataclasses.field(metadata={"static": True})
    arity: int = dataclasses.field(metadata={"static": True})


def is_tap(x: Any) -> bool:
    """For `jax.tree.map` over taps."""
    return isinstance(x, Tap)


def together(a: Tap, b: Tap) -> Tap:
    """One activation's taps of two batches, as one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe import observe, together
      >>> batches = jnp.array([[1.0, -1.0]]), jnp.array([[-2.0, -2.0]])
      >>> taps = [observe(lambda w, x: jax.nn.relu(w * x), 1.0, x)[1][0] for x in batches]
      >>> together(*taps).stats.live.tolist(), together(*taps).stats.mean.tolist()
      ([True, False], [-0.5, -1.5])
    """
    merge = combine
    for _ in range(a.stats.count.ndim):
        merge = jax.vmap(merge)
    sums = jax.tree.map(jnp.add, (a.gram, a.gradient_square_sum), (b.gram, b.gradient_square_sum))
    return dataclasses.replace(a, stats=merge(a.stats, b.stats), gram=sums[0], gradient_square_sum=sums[1])


def unstack(taps: Iterable[Tap]) -> list[Tap]:
    """The same taps with one for each layer of a scan, in order of execution.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe import observe, unstack
      >>> def net(weights, x):
      ...     return jax.lax.scan(lambda z, w: (jnp.tanh(z * w), None), x, weights)[0]
      >>> _, taps = observe(net, jnp.ones((3, 2)), jnp.ones((5, 2)))
      >>> len(taps), [tap.stats.mean.shape for tap in unstack(taps)]
      (1, [(2,), (2,), (2,)])
    """
    layers = []
    for tap in taps:
        name = tap.name or tap.source or tap.activation
        for index in np.ndindex(tap.stats.count.shape):
            layer = jax.tree.map(lambda x, index=index: x[index], tap)
            layers.append(dataclasses.replace(layer, name=name + "".join(f"[{i}]" for i in index)))
    return layers


def all_times(tap: Tap) -> Tap:
    """The taps of one recurrent layer, stacked over all times, as one."""
    first, rest = jax.tree.map(lambda x: x[0], tap), jax.tree.map(lambda x: x[1:], tap)
    return jax.lax.scan(lambda a, b: (together(a, b), None), first, rest)[0]


def measure(
    body: Jaxpr, equations: list[JaxprEqn], site: Site, variable: Variable, env: Env, samples: Samples, scope: str
) -> tuple[Env, Tap]:
    """The values of an activation's equations, and its tap.

    The statistics need z, h = f(z) and f'(z); f is the equations between z and h.
    """
    values = evaluate_equations(body, equations, env)
    by_unit, by_feature = arrangement(site, variable, samples)

    def f(z: Array) -> Array:
        return by_feature(evaluate_equations(body, equations, env | {site.z: z})[site.h])

    z = jax.lax.stop_gradient(env[site.z])
    h, slopes = jax.lax.stop_gradient(_with_slopes(f, by_unit, z, site, equations))
    features = h.reshape(-1, h.shape[-1]).astype(jnp.promote_types(h.dtype, jnp.float32))
    small = features.shape[-1] <= LARGEST_GRAM
    return values, Tap(
        stats=unit_statistics(by_unit(z), h, slopes, arity=site.arity, layout=site.layout),
        gram=jnp.matmul(features.T, features, precision="highest") if small else None,
        gradient_square_sum=jnp.zeros(()),
        name=scope_of(equations[0], scope),
        source=source_of(equations[0]),
        activation=site.activation,
        arity=site.arity,
    )


def _with_slopes(
    f: Callable[[Array], Array], by_unit: Callable[[Array], Array], z: Array, site: Site, equations: list[JaxprEqn]
) -> tuple[Array, Array]:
    """f(z) and the members' derivatives. A member with a custom_vjp has no jvp: then each is pulled back."""
    if not any(_has_custom_vjp(equation) for equation in equations):
        return jax.jvp(f, (z,), (jnp.ones_like(z),))
    h, pull = jax.vjp(f, z)
    members, units = range(site.arity), by_unit(z)
    chosen = [join([jnp.full_like(units, i == k) for i in members], -1, site.layout) for k in members]
    return h, join([by_unit(pull(cotangent)[0]) for cotangent in chosen], -1, site.layout)


def _has_custom_vjp(equation: JaxprEqn) -> bool:
    return "custom_vjp" in equation.primitive.name or any(
        _has_custom_vjp(inside) for inner in inner_jaxprs(equation) for inside in open_jaxpr(inner)[0].eqns
    )


def evaluate_equations(body: Jaxpr, equations: list[JaxprEqn], env: Env) -> Env:
    """The values of all variables that these equations of a jaxpr define."""
    defined = [var for equation in equations for var in equation.outvars]
    used = dict.fromkeys(atom for equation in equations for atom in equation.invars if not isinstance(atom, Literal))
    needed = [var for var in used if var not in set(defined)]
    part = body.replace(constvars=[], invars=needed, outvars=defined, eqns=equations)
    return dict(zip(defined, eval_jaxpr(part, (), *[env[var] for var in needed]), strict=True))


def read(atom: Any, env: Env) -> Any:
    """The value of a variable or a literal."""
    return atom.val if isinstance(atom, Literal) else env[atom]
