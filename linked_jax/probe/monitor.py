"""Observe a model again and again during its training."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from linked_jax.probe.models import kind_of
from linked_jax.probe.origin import Origin
from linked_jax.probe.report import LayerReport, Report
from linked_jax.probe.run import Probe
from linked_jax.probe.writers import Writer, record_of


class Monitor:
    """Probe a model in any training loop, every so many steps; nothing is traced again the second time.

    Args:
      batches: the data to probe on, a list: the same each time.
      every: probe at steps 0, every, 2 * every, ...
      call: as for `probe`.
      loss_fn: as for `probe`.
      tau: as for `probe`.
      mask: as for `probe`.
      writers: functions (step, report), each called with every report: see `linked_jax.probe.json_lines_writer`.

    Attributes:
      history: for each report {"step", "not_finite_first", "layers": [{"name", "dead", "drift", ...}]}, ready for JSON;
        of a layer it has its name and `LayerReport.scalars`. `linked_jax.probe.overview` makes a table of it.
      report: the last `Report`; None before the first. Its layers have a `drift` and the times for which units were
        dead, `dead_checks` and `dead_share`; these begin anew where a model has other layers than before.
      not_finite_first: the step of the first report with NaN or infinity in an activation, or NaN or inf in the outputs
        of the model, and where they come from, an `Origin`. It is sought once, when they appear, and slowly: operation
        by operation. None while all are finite.

    Raises:
      ValueError: if every is no integer or below 1, batches is an iterator, which could be read only once, or writers
        are no functions.

    Examples:
      >>> import functools, jax, jax.numpy as jnp
      >>> from linked_jax.probe import Monitor
      >>> def net(w, x):
      ...     return jax.nn.relu(x @ w)
      >>> monitor = Monitor([jnp.ones((8, 2))], every=10)
      >>> for step in range(11):
      ...     _ = monitor(step, functools.partial(net, jnp.full((2, 3), 5.0 - step)))
      >>> [(entry["step"], entry["layers"][0]["dead"]) for entry in monitor.history]
      [(0, 0.0), (10, 1.0)]
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        every: int,
        call: Callable[[Any, Any], Any] | None = None,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        tau: float = 0.025,
        mask: Callable[[Any], Any] | None = None,
        writers: Iterable[Writer] = (),
    ):
        if isinstance(every, bool) or not hasattr(every, "__index__"):
            raise ValueError(f"every is an integer, got {every!r}; it is the number of steps from report to report")
        if every < 1:
            raise ValueError(f"every is at least 1, got {every}; it is the number of steps from report to report")
        if isinstance(batches, Iterator):
            raise ValueError(f"a monitor reads its batches many times, got {type(batches).__name__}; pass a list")
        if not isinstance(writers, Iterable) or not all(map(callable, writers := list(writers))):
            raise ValueError(f"writers is a list of functions (step, report), got {kind_of(writers)}")
        self.batches, self.every, self.writers = batches, every, writers
        self.history: list[dict[str, Any]] = []
        self.report: Report | None = None
        self.not_finite_first: tuple[int, Origin] | None = None
        self._checks = 0  # of these layers
        self._probe = Probe(call, loss_fn, tau, mask)

    def __call__(self, step: int, model: Any) -> Report | None:
        """Probe if it is time: the report, or None."""
        if step % self.every:
            return None
        report = self._probe(model, self.batches, explain=self.not_finite_first is None)
        if self.report is None or _widths(self.report) != _widths(report):
            self.report, self._checks = None, 0  # the first, or of a model that has changed its layers
        report = _after(self.report, report, self._checks)
        self._checks += 1
        if report.not_finite_first is not None:
            self.not_finite_first = int(step), report.not_finite_first
        self.history.append(record_of(step, report))
        self.report = report
        for writer in self.writers:
            writer(int(step), report)
        return report


def _widths(report: Report) -> list[tuple[str, int]]:
    return [(layer.name, layer.units) for layer in report.layers]


def _after(before: Report | None, report: Report, checks: int) -> Report:
    """A report with what has changed since the one before, that of so many checks."""
    drifts = before.drift(report) if before else [None] * len(report.layers)
    pairs = zip(before.layers if before else [None] * len(report.layers), report.layers, drifts, strict=True)
    layers = [
        dataclasses.replace(layer, drift=drift and drift.wasserstein, **_dead_time(old, layer, checks))
        for old, layer, drift in pairs
    ]
    return dataclasses.replace(report, layers=tuple(layers))


def _dead_time(before: LayerReport | None, layer: LayerReport, checks: int) -> dict[str, np.ndarray]:
    """For how many checks each unit has been dead without a break, and at which share of all of them it was dead.

    A check without a sample of the layer, such as a branch that was not taken, changes neither.
    """
    so_far, share = getattr(before, "dead_checks", 0), np.float64(getattr(before, "dead_share", 0))
    if not layer.samples:
        return {
            "dead_checks": np.broadcast_to(so_far, layer.units).astype(np.int32),
            "dead_share": np.broadcast_to(share, layer.units).astype(np.float32),
        }
    dead = np.rint(checks * share) + layer.dead
    return {
        "dead_checks": np.where(layer.dead, so_far + 1, 0).astype(np.int32),
        "dead_share": (dead / (checks + 1)).astype(np.float32),
    }
