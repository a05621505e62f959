"""From the taps of a whole data set to a report."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linked_jax import diagnostics, signal_statistics
from linked_jax.probe.listen import Tap
from linked_jax.probe.report import LayerReport, Report


def make_report(taps: list[Tap], not_seen: list[str], tau: float) -> Report:
    """The report of all taps, in order; a scan's layers are numbered, and layers of one name too."""
    named = [pair for tap in taps for pair in _unstacked(tap)]
    times, seen = Counter(name for name, _ in named), Counter()
    layers = []
    for name, tap in named:
        seen[name] += 1
        layers.append(
            LayerReport(
                name=f"{name}#{seen[name]}" if times[name] > 1 else name,
                source=tap.source,
                activation=tap.activation,
                arity=tap.arity,
                units=tap.stats.mean.size,
                samples=int(tap.stats.count),
                **_in_numpy(_numbers(tap.stats, tap.gram, tap.heard, tau)),
            )
        )
    return Report(tuple(layers), float(tau), tuple(dict.fromkeys(not_seen)))


def _unstacked(tap: Tap) -> Iterator[tuple[str, Tap]]:
    """The layers of a tap with their names: one, or those of a scan."""
    name = tap.name or tap.source or tap.activation
    for index in np.ndindex(tap.stats.count.shape):
        parts = {field: jax.tree.map(lambda x, i=index: x[i], getattr(tap, field)) for field in _ARRAYS}
        yield name + "".join(f"[{i}]" for i in index), dataclasses.replace(tap, **parts)


_ARRAYS = ("stats", "gram", "heard")


@functools.partial(jax.jit, static_argnames="tau")
def _numbers(stats: diagnostics.UnitStatistics, gram: Any, heard: Any, tau: float) -> dict[str, Any]:
    shift, distance = signal_statistics.activation_shift(stats), signal_statistics.elimination(stats)
    return {
        "dead": diagnostics.dead_units(stats),
        "dead_link": diagnostics.dead_links(stats),
        "not_finite": diagnostics.not_finite_units(stats),
        "dormancy": diagnostics.dormancy(stats),
        "dormant": diagnostics.dormant_units(stats, tau),
        "linearised": diagnostics.linearised_units(stats),
        "saturated": diagnostics.saturated_units(stats),
        "mean": stats.mean,
        "std": jnp.sqrt(signal_statistics.variance(stats)),
        "active": distance.active,
        "activation_shift": shift.mean,
        "spread_of_mean": distance.spread_of_mean,
        "spread_of_std": distance.spread_of_std,
        "least_active": distance.least_active,
        "mean_square": signal_statistics.mean_square(stats),
        "gradient_mean_square": None if heard is None else heard / (stats.count * stats.mean.size),
        "effective_rank": None if gram is None else signal_statistics.effective_rank(gram),
    }


def _in_numpy(values: dict[str, Any]) -> dict[str, Any]:
    """Scalars as floats; arrays of booleans, or of float32 whatever the computation was in."""

    def plain(x: np.ndarray) -> Any:
        return float(x) if x.ndim == 0 else x.astype(bool if x.dtype == bool else np.float32)

    return jax.tree.map(plain, jax.device_get(values))
