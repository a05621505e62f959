"""A run at a glance: the first, the worst and the last value of each diagnostic, layer by layer."""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def _high(x: float, _first: float) -> float:
    return x


def _far_from_one(x: float) -> float:
    return abs(math.log(x)) if x > 0 else math.inf


_SHARES = "dead", "dead_checks", "dead_share", "dormant", "not_finite", "linearised", "saturated", "dead_band"
_BADNESS: dict[str, Callable[[float, float], float]] = {
    **dict.fromkeys(_SHARES, _high),
    "negative_slope": lambda x, _: -abs(x),
    "activation_shift": lambda x, _: abs(x),
    "mean_square": lambda x, _: _far_from_one(x),
    "gradient_mean_square": lambda x, first: _far_from_one(x / first) if first > 0 else x,
    "effective_rank": lambda x, _: -x,
    "stable_rank": lambda x, _: -x,
    "drift": _high,
}
"""How bad a value is, beside the first one."""
_MAY_LACK = ("drift", "negative_slope")
"""None says that there was nothing to measure; of the others, that it was not finite."""


def overview(history: Iterable[Mapping[str, Any]]) -> str:
    """A table of a run, at most 80 columns wide: for each layer and diagnostic the first, worst and last value.

    The worst is the largest; of the ranks the least, of the negative slope the one nearest to 0, of the mean square of
    z the farthest from 1, of that of the gradient the farthest from the first. What stayed 0, and should, is left out.

    Args:
      history: of a `Monitor`, or the lines of its `json_lines_writer`.

    Examples:
      >>> import functools, jax, jax.numpy as jnp
      >>> from linked_jax.probe import Monitor, overview
      >>> monitor = Monitor([jnp.array([[1.0], [-1.0]])], every=1)
      >>> for step, bias in enumerate([0.0, -2.0, 0.0]):
      ...     _ = monitor(step, functools.partial(lambda b, x: jax.nn.relu(x + b), jnp.array([[bias]])))
      >>> print(*overview(monitor.history).splitlines()[:4], sep=chr(10))
      layer                diagnostic               first     worst  at step      last
      relu                 dead                         0         1        1         0
                           dead_checks                  0         1        1         0
                           dead_share                   0       0.5        1     0.333
    """
    entries = list(history)
    series: dict[tuple[str, str], list[tuple[int, float | None]]] = {}
    for entry in entries:
        for layer in entry["layers"]:
            for name in _BADNESS:
                series.setdefault((layer["name"], name), []).append((entry["step"], layer.get(name)))
    lines, shown = [_line("layer", "diagnostic", "first", "worst", "at step", "last")], ""
    for (layer, name), values in series.items():
        found = {x for _, x in values} - {None}
        if found and not (_BADNESS[name] is _high and found == {0}):
            lines.append(_line("" if layer == shown else layer, name, *_cells(name, values)))
            shown = layer
    for entry in entries:
        if entry.get("not_finite_first"):
            lines += textwrap.wrap(f"not finite at step {entry['step']}: {entry['not_finite_first']}", 80)
    return "\n".join(lines)


def _cells(name: str, values: list[tuple[int, float | None]]) -> tuple[str, str, str, str]:
    measured = [(step, x) for step, x in values if x is not None or name not in _MAY_LACK]
    first = next(x for _, x in measured if x is not None)
    step, worst = max(measured, key=lambda pair: math.inf if pair[1] is None else _BADNESS[name](pair[1], first))
    return _text(measured[0][1]), _text(worst), str(step), _text(measured[-1][1])


def _text(x: float | None) -> str:
    return "NaN" if x is None else f"{x:.3g}"


def _line(layer: str, name: str, first: str, worst: str, step: str, last: str) -> str:
    layer = layer if len(layer) <= 20 else f"…{layer[-19:]}"
    return f"{layer:20} {name:20} {first:>9} {worst:>9} {step:>8} {last:>9}"
