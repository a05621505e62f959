"""See the activations of a model again and again, during its training."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from linked_jax.probe.look import look_at_all, looker
from linked_jax.probe.report import LayerReport, Report
from linked_jax.signal_statistics import Drift


class Monitor:
    """Probe a model in any training loop, every so many steps; nothing is traced again for the second look.

    Args:
      model_fn: as for `probe`; None for an NNX module's own `__call__`.
      batches: the data to look at, a list: the same each time.
      every: look at steps 0, every, 2 * every, ...
      loss_fn: as for `probe`.
      tau: as for `probe`.

    Attributes:
      history: for each look {"step", "layers": [{"name", "dead", "dormant", "not_finite", "linearised", "saturated",
        "mean_square", "gradient_mean_square", "effective_rank", "drift"}]}, ready for JSON. The first are shares of
        the units; drift is the 2-Wasserstein distance to the look before, None at the first. Not a number is None.
      report: the last look's `Report`; None before the first.

    Raises:
      ValueError: if every is no integer or below 1, or batches is an iterator, which could be read only once.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe import Monitor
      >>> monitor = Monitor(lambda w, x: jax.nn.relu(x @ w), [jnp.ones((8, 2))], every=10)
      >>> for step in range(11):
      ...     _ = monitor(step, jnp.full((2, 3), 5.0 - step))
      >>> [(look["step"], look["layers"][0]["dead"]) for look in monitor.history]
      [(0, 0.0), (10, 1.0)]
    """

    def __init__(
        self,
        model_fn: Any,
        batches: Iterable[Any],
        *,
        every: int = 100,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        tau: float = 0.025,
    ):
        if isinstance(every, bool) or not hasattr(every, "__index__"):
            raise ValueError(f"every is an integer, got {every!r}; it is the number of steps from look to look")
        if every < 1:
            raise ValueError(f"every is at least 1, got {every}; it is the number of steps from look to look")
        if isinstance(batches, Iterator):
            raise ValueError(f"a monitor reads its batches many times, got {type(batches).__name__}; pass a list")
        self.batches, self.every, self.tau, self.has_loss = batches, every, tau, loss_fn is not None
        self.history: list[dict[str, Any]] = []
        self.report: Report | None = None
        self._look = looker(model_fn, loss_fn)

    def __call__(self, step: int, params_or_model: Any) -> Report | None:
        """Look if it is time: the report, or None."""
        if step % self.every:
            return None
        report = look_at_all(self._look, params_or_model, self.batches, self.has_loss, self.tau)
        drifts = self.report.drift(report) if self.report else [None] * len(report.layers)
        layers = [_compact(layer, drift) for layer, drift in zip(report.layers, drifts, strict=True)]
        self.history.append({"step": int(step), "layers": layers})
        self.report = report
        return report


def _compact(layer: LayerReport, drift: Drift | None) -> dict[str, Any]:
    shares = {
        name: getattr(layer, name).mean() for name in ("dead", "dormant", "not_finite", "linearised", "saturated")
    }
    scalars = {name: getattr(layer, name) for name in ("mean_square", "gradient_mean_square", "effective_rank")}
    values = shares | scalars | {"drift": drift and drift.wasserstein}
    finite = {name: float(x) if x is not None and math.isfinite(x) else None for name, x in values.items()}
    return {"name": layer.name} | finite
