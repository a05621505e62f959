"""A tap: what one activation did on one batch or more."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from linked_jax.diagnostics import combine, unit_statistics
from linked_jax.histograms import log_histogram
from linked_jax.probe.names import module_of
from linked_jax.probe.recognise import name_of
from linked_jax.probe.regions import Region
from linked_jax.probe.values import Factor, Value, inner_jaxprs, open_jaxpr
from linked_jax.signal_statistics import combine_features, feature_moments
from linked_jax.slopes import combine_slopes, slope_statistics

LARGEST_SCATTER = 4096
"""The effective rank is of layers with at most that many features: their scatter matrix takes 64 MB."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """What one activation did on one batch or more; under a scan over layers with a leading axis for them.

    Attributes:
      stats: the `linked_jax.diagnostics.UnitStatistics` of its C units.
      slopes: their `linked_jax.slopes.SlopeStatistics`.
      features: the `linked_jax.signal_statistics.FeatureMoments` of its d*C outputs; None for more than 4,096.
      histogram: of z, counts as of `linked_jax.histograms.log_histogram`.
      gradient_square_sum: the sum of squares of the gradient for z, (); None if nothing was differentiated, or where
        a function with a custom derivative hides it.
      gradient_histogram: of the gradient for z; None where the sum is.
      name: the scopes that it was found in, with [i] for the i-th layer of a scan after `unstack`.
      source: the file and line.
      activation: its name.
      arity: the link's number of members d.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax import lk_relu
      >>> from linked_jax.probe import observe
      >>> _, (tap,) = observe(lambda w, x: lk_relu(w * x), jnp.array([[1.0, 0.0]]), jnp.ones((5, 2)))
      >>> tap.activation, tap.stats.live.tolist(), tap.features.scatter.shape
      ('relu(z), relu(-z)', [True, False], (4, 4))
    """

    stats: Any  # JAX rebuilds pytrees with other things than arrays in them: no types here
    slopes: Any
    features: Any
    histogram: Any
    gradient_square_sum: Any
    gradient_histogram: Any
    name: str = dataclasses.field(metadata={"static": True})
    source: str = dataclasses.field(metadata={"static": True})
    activation: str = dataclasses.field(metadata={"static": True})
    arity: int = dataclasses.field(metadata={"static": True})


def is_tap(x: Any) -> bool:
    """For `jax.tree.map` over taps."""
    return isinstance(x, Tap)


def together(a: Tap, b: Tap) -> Tap:
    """One activation's taps of two batches, as one.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe import observe, together
      >>> batches = jnp.array([[1.0, -1.0]]), jnp.array([[-2.0, -2.0]])
      >>> taps = [observe(lambda w, x: jax.nn.relu(w * x), 1.0, x)[1][0] for x in batches]
      >>> together(*taps).stats.live.tolist(), together(*taps).stats.mean.tolist()
      ([True, False], [-0.5, -1.5])
    """
    merge, merge_features = combine, combine_features
    for _ in range(a.stats.count.ndim):
        merge, merge_features = jax.vmap(merge), jax.vmap(merge_features)
    return dataclasses.replace(
        a,
        stats=merge(a.stats, b.stats),
        slopes=combine_slopes(a.slopes, b.slopes),
        features=None if a.features is None else merge_features(a.features, b.features),
        histogram=a.histogram + b.histogram,
        gradient_square_sum=jax.tree.map(jnp.add, a.gradient_square_sum, b.gradient_square_sum),
        gradient_histogram=jax.tree.map(jnp.add, a.gradient_histogram, b.gradient_histogram),
    )


def unstack(taps: Iterable[Tap]) -> list[Tap]:
    """The same taps with one for each layer of a scan, in order of execution.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe import observe, unstack
      >>> def net(weights, x):
      ...     return jax.lax.scan(lambda z, w: (jnp.tanh(z * w), None), x, weights)[0]
      >>> _, taps = observe(net, jnp.ones((3, 1, 2)), jnp.ones((5, 2)))
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
    if not len(tap.stats.count):
        return nothing_yet(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tap))
    first, rest = jax.tree.map(lambda x: x[0], tap), jax.tree.map(lambda x: x[1:], tap)
    return jax.lax.scan(lambda a, b: (together(a, b), None), first, rest)[0]


def nothing_yet(tap: Any) -> Any:
    """The taps, or their shapes, of no data: all zeros, which `together` leaves out."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tap)


def measure(region: Region, env: dict[Value, Any], mask: Array | None = None) -> Tap:
    """The tap of an activation, from the values of its graph.

    The statistics need z, h = f(z) and f'(z); f is the operations of the region. See `kept` for the mask.
    """
    by_unit, where = rows_of(region.z), None
    if mask is not None:
        _check_samples(region, mask)
        where = by_unit(kept(region.z, mask))[:, 0]

    def f(z: Array) -> Array:
        inside = {region.z: z}
        for op in region.ops:
            operands = [x.val if isinstance(x, Literal) else inside.get(x, env.get(x)) for x in op.operands]
            inside |= zip(op.outputs, op.evaluate(operands), strict=True)
        pairs = zip(region.members, region.orders, strict=True)
        return jnp.stack([inside[member].transpose(order).astype(z.dtype) for member, order in pairs])

    z = jax.lax.stop_gradient(env[region.z])
    h, slopes = (
        jnp.concatenate([by_unit(x) for x in whole(xs)], axis=-1)
        for xs in jax.lax.stop_gradient(_with_slopes(f, z, region))
    )
    z, arity = by_unit(whole(z)), len(region.members)
    return Tap(
        stats=unit_statistics(z, h, slopes, arity=arity, where=where),
        slopes=slope_statistics(z, slopes, arity=arity, where=where),
        features=feature_moments(h, where=where) if h.shape[-1] <= LARGEST_SCATTER else None,
        histogram=log_histogram(z, where=None if where is None else where[:, None]),
        gradient_square_sum=None,
        gradient_histogram=None,
        name=module_of(region.ops[0].where.scope),
        source=region.ops[0].where.source,
        activation=name_of(region),
        arity=arity,
    )


def whole(x: Array) -> Array:
    """x, on all devices where it was split over an Explicit mesh: statistics are of the whole batch."""
    sharding: Any = getattr(jax.typeof(x), "sharding", None)
    split = bool(sharding and sharding.mesh.explicit_axes and any(sharding.spec))
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec())) if split else x


def rows_of(z: Value) -> Callable[[Array], Array]:
    """How to bring arrays of the shape of z to (samples and positions, units)."""
    factors, _ = _factors(z)
    units_last = sorted(range(len(factors)), key=lambda k: factors[k].is_unit)
    sizes = [factor.size for factor in factors]
    count = math.prod(factor.size for factor in factors if factor.is_unit)
    return lambda x: x.reshape(sizes).transpose(units_last).reshape(-1, count)


def _factors(z: Value, *, apart: bool = False) -> tuple[list[Factor], list[bool]]:
    """Of all axes, in order, and which are of samples; apart: with those merged with them, where these are known."""
    axes = []
    for k, n in enumerate(z.shape):
        known = math.prod(f.size for f in z.axes[k]) == n and not any(f.is_unit for f in z.axes[k])
        axes.append(z.axes[k] if k not in z.samples or (apart and known) else (Factor(n, False),))
    return [f for axis in axes for f in axis], [k in z.samples for k, axis in enumerate(axes) for _ in axis]


def kept(z: Value, mask: Array) -> Array:
    """A mask of samples and steps, (N, T), as one of the shape of z.

    Its axes are those of z that are no units and have their sizes, in order; those that a flatten has merged with the
    samples come before others. Where z has no axis of steps, for it was pooled over them, all of a sample count if one
    does.
    """
    factors, of_samples = _factors(z, apart=True)
    mask, merged = _as_merged(mask, factors, of_samples), sum(of_samples) > len(z.samples)
    places: list[int] = []
    for i, size in enumerate(mask.shape):
        free = [k for k, f in enumerate(factors) if f.size == size and not f.is_unit and k not in places]
        free.sort(key=lambda k: of_samples[k] == (i > 0 and not merged))  # N and T may be equal
        places.append(free[0] if free else -1)
    mask = mask.any(axis=tuple(k for k, place in enumerate(places) if place < 0))
    places = [place for place in places if place >= 0]
    sizes = [f.size for f in factors]
    shape = [size if k in places else 1 for k, size in enumerate(sizes)]
    return jnp.broadcast_to(mask.transpose(np.argsort(places)).reshape(shape), sizes).reshape(z.shape)


def _as_merged(mask: Array, factors: list[Factor], of_samples: list[bool]) -> Array:
    """The mask of an axis of samples that were merged with others, and no one knows how: they are taken to come first.

    It is that of samples and steps, or of samples alone where z has steps elsewhere; each is repeated for the others.
    """
    rows = [f.size for f, along in zip(factors, of_samples, strict=True) if along]
    if not mask.ndim or len(mask) in rows or not (rows := [size for size in rows if size % len(mask) == 0]):
        return mask
    elsewhere = [f.size for f, along in zip(factors, of_samples, strict=True) if not along and not f.is_unit]
    if rows[0] == mask.size or (rows[0] % mask.size == 0 and mask.shape[-1] not in elsewhere):
        mask = mask.reshape(-1)
    return jnp.repeat(mask, rows[0] // len(mask), axis=0)


def _check_samples(region: Region, mask: Array) -> None:
    rows = [n for k, n in enumerate(region.z.shape) if k in region.z.samples]
    if mask.ndim and rows and not any(n % len(mask) == 0 for n in rows):
        where = region.ops[0].where
        raise ValueError(
            f"mask is of {len(mask)} samples, and {module_of(where.scope) or where.source or name_of(region)} has "
            f"{rows[0]} rows, which are no multiple; pass mask=None, or call= a part of the model without that layer"
        )


def _with_slopes(f: Callable[[Array], Array], z: Array, region: Region) -> tuple[Array, Array]:
    """The members f(z), (d, *shape), and their derivatives. A custom_vjp has no jvp: then each is pulled back."""
    if not any(_has_custom_vjp(op.equation) for op in region.ops):
        return jax.jvp(f, (z,), (jnp.ones_like(z),))
    h, pull = jax.vjp(f, z)
    chosen = [jnp.zeros_like(h).at[i].set(1) for i in range(len(region.members))]
    return h, jnp.stack([pull(cotangent)[0] for cotangent in chosen])


def _has_custom_vjp(equation: JaxprEqn) -> bool:
    return "custom_vjp" in equation.primitive.name or any(
        _has_custom_vjp(inside) for inner in inner_jaxprs(equation) for inside in open_jaxpr(inner)[0].eqns
    )
