"""From what `probe` saw of the activations, the numbers of its report."""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linked_jax import diagnostics, signal_statistics, slopes
from linked_jax.diagnostics import UnitStatistics
from linked_jax.probe.origin import Origin
from linked_jax.probe.report import LayerReport, Report
from linked_jax.probe.taps import Tap, unstack


def make_report(taps: list[Tap], not_seen: list[str], tau: float, origin: Origin | None = None) -> Report:
    """The report of the taps of a whole data set, in order; layers of one name are numbered."""
    layers = unstack(taps)
    times, seen = Counter(tap.name for tap in layers), Counter()
    reports = []
    for tap in layers:
        seen[tap.name] += 1
        with jax.debug_nans(False), jax.debug_infs(False):  # NaN says that there was nothing to measure
            numbers = jax.device_get(_numbers(tap.stats, tap.slopes, tap.features, tap.gradient_square_sum, tau))
        histograms = jax.device_get((tap.histogram, tap.gradient_histogram))
        reports.append(
            LayerReport(
                name=f"{tap.name}#{seen[tap.name]}" if times[tap.name] > 1 else tap.name,
                source=tap.source,
                activation=tap.activation,
                arity=tap.arity,
                units=tap.stats.mean.size,
                samples=int(tap.stats.count),
                **jax.tree.map(_in_numpy, numbers),
                histogram=histograms[0],
                gradient_histogram=histograms[1],
            )
        )
    return Report(tuple(reports), tau, tuple(dict.fromkeys(not_seen)), origin)


@functools.partial(jax.jit, static_argnames="tau")
def _numbers(
    stats: UnitStatistics, steepness: slopes.SlopeStatistics, features: Any, gradient_square_sum: Any, tau: float
) -> dict[str, Any]:
    shift, distance = signal_statistics.activation_shift(stats), signal_statistics.elimination(stats)
    n = stats.count * stats.mean.size
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
        "gradient_mean_square": None if gradient_square_sum is None else gradient_square_sum / n,
        "effective_rank": None if features is None else signal_statistics.effective_rank(features),
        "stable_rank": None if features is None else signal_statistics.stable_rank(features),
        "negative_slope": slopes.effective_negative_slope(steepness),
        "dead_band": slopes.dead_band(steepness),
    }


def _in_numpy(x: np.ndarray) -> Any:
    """A scalar as a float; an array of booleans, or of float32 whatever the computation was in."""
    return float(x) if x.ndim == 0 else x.astype(bool if x.dtype == bool else np.float32)
