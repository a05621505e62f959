"""See inside any model: the state of every unit behind every activation, in one pass over the data."""

from linked_jax.probe.interpret import observe
from linked_jax.probe.report import LayerReport, Report
from linked_jax.probe.run import Monitor, probe
from linked_jax.probe.taps import Tap, together, unstack

__all__ = ["LayerReport", "Monitor", "Report", "Tap", "observe", "probe", "together", "unstack"]
