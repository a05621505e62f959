"""See inside any model: the state of every unit behind every activation, in one pass over the data."""

from linked_jax.probe.interpret import observe
from linked_jax.probe.monitor import Monitor
from linked_jax.probe.origin import Origin
from linked_jax.probe.overview import overview
from linked_jax.probe.report import LayerReport, Report
from linked_jax.probe.run import probe
from linked_jax.probe.taps import Tap, together, unstack
from linked_jax.probe.writers import csv_writer, json_lines_writer, tensorboard_writer

__all__ = [
    "LayerReport",
    "Monitor",
    "Origin",
    "Report",
    "Tap",
    "csv_writer",
    "json_lines_writer",
    "observe",
    "overview",
    "probe",
    "tensorboard_writer",
    "together",
    "unstack",
]
