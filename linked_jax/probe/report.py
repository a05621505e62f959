"""What `probe` measured, as a table, a JSON file and a picture."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from linked_jax import signal_statistics
from linked_jax.diagnostics import UnitStatistics
from linked_jax.probe.origin import Origin


@dataclasses.dataclass(frozen=True, eq=False)
class LayerReport:
    """One activation. A unit is one channel of its pre-activation z, scored over its whole link.

    Attributes:
      name: the module's path or scope, else the line of the source; with [i] for the i-th iteration of a scan, and #k
        for the k-th activation of that name.
      source: file and line.
      activation: the function's name, or the link's members.
      arity: the link's number of members.
      units: the number C of channels of z.
      samples: samples times positions.
      dead: every output 0 for every sample, (C,).
      dead_link: no member has a gradient for any sample, (C,).
      not_finite: NaN or infinity in z or in an output, (C,).
      dormancy: the mean output, relative to the mean over the layer's finite units, (C,).
      dormant: dormancy at most tau, (C,).
      linearised: alive, and z never changes sign, (C,). A relu or its link is then linear; a smooth activation is
        evaluated on one side only.
      saturated: no member is steeper than 0.01 for any sample, (C,).
      mean: of z, (C,).
      std: of z, (C,).
      active: Phi(mean / std), our proxy of the distance to elimination: see `signal_statistics.elimination`, (C,).
      activation_shift: the mean over units of their mean.
      spread_of_mean: the standard deviation over units of their mean.
      spread_of_std: that of their std.
      least_active: the least of `active`.
      mean_square: of z.
      gradient_mean_square: of the gradient of one sample's loss for z, by all that is computed from z; None without a
        loss, or inside a function with a custom derivative.
      effective_rank: of the outputs h; None for more than 4,096 features.
      stable_rank: of the outputs h; None for more than 4,096 features.
      negative_slope: of each member, the mean derivative below 0: see `slopes.effective_negative_slope`, (d,).
      dead_band: the share of the data where no member is steeper than 0.001, (C,).
      histogram: of z over all units, counts in the bins of `histograms.bin_edges`.
      gradient_histogram: of the gradient of one sample's loss for z; None where `gradient_mean_square` is.
      drift: of a `Monitor`, the 2-Wasserstein distance to the report before: see `signal_statistics.covariate_drift`.
        None at the first.
      dead_checks: of a `Monitor`, for how many reports the unit has been dead without a break, (C,).
      dead_share: of a `Monitor`, the share of all reports so far at which the unit was dead, (C,).
    """

    name: str
    source: str
    activation: str
    arity: int
    units: int
    samples: int
    dead: Bool[np.ndarray, " c"]
    dead_link: Bool[np.ndarray, " c"]
    not_finite: Bool[np.ndarray, " c"]
    dormancy: Float[np.ndarray, " c"]
    dormant: Bool[np.ndarray, " c"]
    linearised: Bool[np.ndarray, " c"]
    saturated: Bool[np.ndarray, " c"]
    mean: Float[np.ndarray, " c"]
    std: Float[np.ndarray, " c"]
    active: Float[np.ndarray, " c"]
    activation_shift: float
    spread_of_mean: float
    spread_of_std: float
    least_active: float
    mean_square: float
    gradient_mean_square: float | None
    effective_rank: float | None
    stable_rank: float | None = None
    negative_slope: Float[np.ndarray, " d"] | None = None
    dead_band: Float[np.ndarray, " c"] | None = None
    histogram: Float[np.ndarray, " bins"] | None = None
    gradient_histogram: Float[np.ndarray, " bins"] | None = None
    drift: float | None = None
    dead_checks: Int[np.ndarray, " c"] | None = None
    dead_share: Float[np.ndarray, " c"] | None = None

    def scalars(self) -> dict[str, float | None]:
        """One number for each diagnostic, ready for JSON: of units the share or the mean; None if it is not finite.

        None too where there was no sample: in a branch that was not taken, or behind a mask.
        Of the negative slopes it is the steepest member's, of `dead_checks` that of the unit that is longest dead.
        """
        shares = ("dead", "dormant", "not_finite", "linearised", "saturated", "dead_band")
        seen = {name: getattr(self, name) if self.samples else None for name in shares}
        found = {name: None if x is None else x.mean() for name, x in seen.items()}
        found |= {name: getattr(self, name) for name in _SCALARS}
        found["negative_slope"] = None if self.negative_slope is None else max(self.negative_slope, key=abs)
        found["dead_checks"] = None if self.dead_checks is None else self.dead_checks.max()
        found["dead_share"] = None if self.dead_share is None else self.dead_share.mean()
        return {name: float(x) if x is not None and math.isfinite(x) else None for name, x in found.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What `probe` measured, layer by layer in order of execution. `str(report)` is a table.

    Its columns count units that are dead, have no gradient (no grad: `dead_link`), are dormant, never change the sign
    of z (linear: `linearised`) and are saturated (satur.), or had NaN or infinity (NaN/inf, where a unit had); and show
    the shift (`activation_shift`), the mean squares of z (z^2) and of the gradient for it (grad^2, with a loss) and the
    effective rank of the outputs (rank). An activation that is a lambda has no better name: make a `Link` of a function
    with a name.

    Attributes:
      layers: the activations.
      tau: the threshold of dormancy.
      not_seen: operations with activations inside that were not looked into, and where they are.
      not_finite_first: where the first NaN or infinity in an activation comes from, else NaN or inf in the outputs: see
        `Origin`. None if there is none, or the batches could be read only once.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax import linked
      >>> from linked_jax.probe import probe
      >>> batches = [jax.random.normal(jax.random.key(0), (64, 2))]
      >>> report = probe(lambda x: linked(jax.nn.relu)(x @ jnp.eye(2)), batches)
      >>> layer, = report.layers
      >>> layer.activation, layer.units, layer.dead.tolist()
      ('relu(z), relu(-z)', 2, [False, False])
    """

    layers: tuple[LayerReport, ...]
    tau: float
    not_seen: tuple[str, ...] = ()
    not_finite_first: Origin | None = None

    def __str__(self) -> str:
        columns = self._columns()
        adjusts = [str.ljust] * 2 + [str.rjust] * (len(columns) - 2)
        widths = [max(map(len, column)) for column in columns]
        cells = [[f(x, n) for x in column] for f, column, n in zip(adjusts, columns, widths, strict=True)]
        return "\n".join([*map("  ".join, zip(*cells, strict=True)), *self._remarks()])

    def _columns(self) -> list[tuple[str, ...]]:
        """The columns of the table, each with its head; without gradients, ranks and NaN where there are none."""
        columns = zip(_COLUMNS, *map(_row, self.layers), strict=True)
        nothing = {"NaN/inf": "0"}  # an empty cell, else
        return [(head, *cells) for head, *cells in columns if not cells or set(cells) != {nothing.get(head, "")}]

    def _remarks(self) -> list[str]:
        first = [] if self.not_finite_first is None else [f"not finite: {self.not_finite_first}"]
        return [*_LEGEND, *first, *(f"not seen: {what}" for what in self.not_seen)]

    def print(self) -> None:
        """The table in colours; needs rich (pip install rich)."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError as error:
            raise ImportError("Report.print needs rich: pip install rich, or print(report)") from error
        table = Table(box=None)
        columns = self._columns()
        heads, *rows = zip(*columns, strict=True)
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i < 2 else "right", no_wrap=True)
        for layer, row in zip(self.layers, rows, strict=True):
            sick = (layer.dead | layer.dead_link | layer.not_finite).any()
            table.add_row(*row, style="red" if sick else "yellow" if layer.dormant.any() else None)
        needed = sum(max(map(len, column)) + 2 for column in columns)
        console = Console(width=max(needed, Console().width))  # rich would cut names to fit
        console.print(table)
        for remark in self._remarks():
            console.print(remark, markup=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all. Numbers that are not finite are strings."""
        origin = self.not_finite_first and dataclasses.asdict(self.not_finite_first)
        content: dict[str, Any] = {"tau": self.tau, "not_seen": self.not_seen, "not_finite_first": origin}
        content["layers"] = [_encoded(layer) for layer in self.layers]
        path = Path(path)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """Read what `save` wrote; the same to the last bit."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        layers = tuple(LayerReport(**{name: _decoded(name, x) for name, x in one.items()}) for one in content["layers"])
        origin = content.get("not_finite_first")
        return cls(layers, content["tau"], tuple(content["not_seen"]), origin and Origin(**origin))

    def drift(self, later: "Report") -> tuple[signal_statistics.Drift, ...]:
        """How far each layer's pre-activations moved, as `signal_statistics.covariate_drift`; three floats for each.

        Args:
          later: a report of the same model on the same batches, at another training step.

        Raises:
          ValueError: if the two have other layers.
        """
        mine, other = ([(layer.name, layer.units) for layer in report.layers] for report in (self, later))
        if mine != other:
            raise ValueError(f"drift compares a model with itself, got the layers {mine} and {other}")
        pairs = zip(self.layers, later.layers, strict=True)
        drifts = [signal_statistics.covariate_drift(_moments(a), _moments(b)) for a, b in pairs]
        return tuple(signal_statistics.Drift(*map(float, drift)) for drift in drifts)  # type: ignore[arg-type]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the state of every unit and the signal by depth; needs matplotlib (pip install matplotlib)."""
        from linked_jax.probe.plot import draw

        draw(self, path)


_COLUMNS = (
    "name", "activation", "units", "dead", "no grad", "NaN/inf", "dormant", "linear", "satur.", "shift", "z^2",
    "grad^2", "rank",
)  # fmt: skip
_LEGEND = (
    "units that are dead, have no gradient, are dormant, never change the sign of z, are saturated",
    "shift: mean of z; z^2 and grad^2: mean squares of z and of its gradient; rank: effective, of outputs",
)
_SCALARS = ("activation_shift", "mean_square", "gradient_mean_square", "effective_rank", "stable_rank", "drift")


def _row(layer: LayerReport) -> tuple[str, ...]:
    counts = (layer.dead, layer.dead_link, layer.not_finite, layer.dormant, layer.linearised, layer.saturated)
    shown = (layer.activation_shift, layer.mean_square, layer.gradient_mean_square, layer.effective_rank)
    cells = ("" if x is None else f"{x:.3g}" for x in shown)
    return (layer.name, layer.activation, str(layer.units), *(str(int(x.sum())) for x in counts), *cells)


def _encoded(layer: LayerReport) -> dict[str, Any]:
    """Fields ready for JSON, float32 and not finite ones included."""

    def plain(x: Any) -> Any:
        if isinstance(x, list):
            return [plain(y) for y in x]
        return str(x) if isinstance(x, float) and not math.isfinite(x) else x

    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return {name: plain(x.tolist() if isinstance(x, np.ndarray) else x) for name, x in fields.items()}


def _decoded(name: str, x: Any) -> Any:
    if isinstance(x, list):
        kinds = {bool: bool, int: np.int32}
        return np.asarray(x, kinds.get(type(x[0]), np.float32))
    return float(x) if isinstance(x, str) and name not in ("name", "source", "activation") else x


def _moments(layer: LayerReport) -> UnitStatistics:
    """Statistics with the mean and variance of a layer, and nothing else true."""
    false, zero = jnp.zeros(layer.units, bool), jnp.zeros(layer.units)
    mean, variance = jnp.asarray(layer.mean), jnp.square(jnp.asarray(layer.std))
    return UnitStatistics(jnp.float32(1), false, zero, false, zero, mean, variance, zero)
