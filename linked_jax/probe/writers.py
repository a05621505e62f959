"""Keep the reports of a run: writers are functions (step, report), for a `Monitor` or any loop of yours."""

import atexit
import csv
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from linked_jax.histograms import bin_edges
from linked_jax.probe.report import Report

Writer = Callable[[int, Report], None]
_HISTOGRAMS = ("histogram", "gradient_histogram")


def record_of(step: int, report: Report) -> dict[str, Any]:
    """A report as it is in `Monitor.history`, ready for JSON."""
    origin = None if report.not_finite_first is None else str(report.not_finite_first)
    layers = [{"name": layer.name} | layer.scalars() for layer in report.layers]
    return {"step": int(step), "not_finite_first": origin, "layers": layers}


def json_lines_writer(path: str | os.PathLike[str]) -> Writer:
    """A writer of one line of JSON for each report, at the end of a file.

    It is the entry of `Monitor.history`, with the source, the activation and the histograms of each layer: counts in
    the bins of `linked_jax.histograms.bin_edges`.

    Args:
      path: the file; its folder is made. A file that is there goes on.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, json, pathlib, tempfile
      >>> from linked_jax.probe import Monitor, json_lines_writer, overview
      >>> path = pathlib.Path(tempfile.mkdtemp(), "run.jsonl")
      >>> monitor = Monitor([jnp.ones((8, 2))], every=10, writers=[json_lines_writer(path)])
      >>> for step in range(11):
      ...     _ = monitor(step, functools.partial(lambda w, x: jax.nn.relu(x @ w), jnp.full((2, 3), 5.0 - step)))
      >>> history = [json.loads(line) for line in path.read_text().splitlines()]
      >>> [entry["layers"][0]["dead"] for entry in history]
      [0.0, 1.0]
      >>> print(overview(history).splitlines()[1])
      relu                 dead                         0         1       10         1
    """
    path = _made(path)

    def write(step: int, report: Report) -> None:
        record = record_of(step, report)
        for entry, layer in zip(record["layers"], report.layers, strict=True):
            entry |= {"source": layer.source, "activation": layer.activation}
            counts = {name: getattr(layer, name) for name in _HISTOGRAMS}
            entry |= {name: None if x is None else list(map(int, x)) for name, x in counts.items()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    return write


def csv_writer(path: str | os.PathLike[str]) -> Writer:
    """A writer of one row for each layer of a report, at the end of a file; what is None is empty.

    The columns are step, layer, source, activation and those of `LayerReport.scalars`.

    Args:
      path: the file; its folder is made. A file that is there goes on.

    Raises:
      ValueError: by the writer, if the file that is there has other columns.

    Examples:
      >>> import jax, jax.numpy as jnp, pathlib, tempfile
      >>> from linked_jax.probe import csv_writer, probe
      >>> path = pathlib.Path(tempfile.mkdtemp(), "run.csv")
      >>> csv_writer(path)(0, probe(jnp.tanh, [jnp.ones((8, 2))]))
      >>> path.read_text().splitlines()[0].split(",")[:6]
      ['step', 'layer', 'source', 'activation', 'dead', 'dormant']
    """
    path = _made(path)

    def write(step: int, report: Report) -> None:
        rows = [
            {"step": int(step), "layer": layer.name, "source": layer.source, "activation": layer.activation}
            | layer.scalars()
            for layer in report.layers
        ]
        columns = list(rows[0])
        is_new = not path.exists() or not path.stat().st_size
        if not is_new:
            with path.open(encoding="utf-8", newline="") as file:
                found = next(csv.reader(file))
            if found != columns:
                raise ValueError(f"{path} has the columns {found} and not {columns}; name another file")
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if is_new:
                writer.writeheader()
            writer.writerows(rows)

    return write


def tensorboard_writer(folder: str | os.PathLike[str]) -> "TensorBoard":
    """A writer of events for TensorBoard: scalars and histograms, diagnostic/layer.

    Events are on disk ten seconds later, and all of them at the end of the program or after `close()`.

    Args:
      folder: of the run, for `tensorboard --logdir`.

    Raises:
      ImportError: without tensorboardX (pip install tensorboardX); TensorFlow is not needed.

    Examples:
      >>> from linked_jax.probe import Monitor, tensorboard_writer
      >>> monitor = Monitor(batches, every=100, writers=[tensorboard_writer("runs/1")])  # doctest: +SKIP
    """
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("tensorboard_writer needs tensorboardX: pip install tensorboardX") from error
    return TensorBoard(SummaryWriter(str(folder), flush_secs=10))


class TensorBoard:
    """What `tensorboard_writer` makes: a writer that is closed at the end of the program, or before."""

    def __init__(self, events: Any):
        self.close = events.close
        self._events = events
        atexit.register(events.close)  # its own thread would leave the last events behind

    def __call__(self, step: int, report: Report) -> None:
        """Add a report."""
        for layer in report.layers:
            place = re.sub(r"[^-/\w.]", "_", layer.name)  # TensorBoard takes no others
            for name, x in layer.scalars().items():
                if x is not None:
                    self._events.add_scalar(f"{name}/{place}", x, int(step))
            for name in _HISTOGRAMS:
                counts = getattr(layer, name)
                if counts is not None and counts.sum():
                    self._events.add_histogram_raw(f"{name}/{place}", **_raw(counts), global_step=int(step))
        if report.not_finite_first is not None:
            self._events.add_text("not_finite_first", str(report.not_finite_first), int(step))


def _raw(counts: np.ndarray) -> dict[str, Any]:
    """A histogram as TensorBoard has it; the sums are those of the middles of the bins."""
    edges = bin_edges()
    middles = np.concatenate([edges[1:2], (edges[1:-2] + edges[2:-1]) / 2, edges[-2:-1]])
    some = np.flatnonzero(counts)
    return {
        "min": middles[some[0]],
        "max": middles[some[-1]],
        "num": counts.sum(),
        "sum": counts @ middles,
        "sum_squares": counts @ middles**2,
        "bucket_limits": np.where(np.isfinite(edges[1:]), edges[1:], sys.float_info.max).tolist(),
        "bucket_counts": counts.tolist(),
    }


def _made(path: str | os.PathLike[str]) -> Path:
    """A path in a folder that is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
