"""See inside any model: the state of every unit behind every activation, in one pass over the data."""

from linked_jax.probe.look import probe
from linked_jax.probe.monitor import Monitor
from linked_jax.probe.report import LayerReport, Report

__all__ = ["LayerReport", "Monitor", "Report", "probe"]
