"""Recurrent nets that forecast the next 24 hours of an hourly load: tanh, ReLU, LK-ReLU and DReLU cells.

    python -m experiments.load_forecast
    python -m experiments.load_forecast --csv load.csv --time-column time --load-column load

A simple recurrent net sees the last 168 hours, their load, hour of the day and weekday, and gives 24 loads at once:

    h_t = f(W x_t + U h_{t-1} + b),   forecast = V h_T + c

    tanh, relu    f(z)
    lk_relu       f(z) = (max(0, z), max(0, -z)): the state has both
    drelu         f(a, b) = max(0, a) - max(0, b): two pre-activations

All cells have about the same number of parameters, the same optimiser and the same rate. Without --csv the series is
made here, two years with the cycles of a town's load (`experiments/load_forecast/series.py`). The hours are split by
time: 70 % train, 15 % validate, 15 % test. The epoch with the best validation error is tested. The measure is the mean
absolute percentage error (MAPE) of each hour ahead, beside two forecasts without a net: the same hours of last week and
of yesterday. Over all hours, 3 seeds, on the series made here:

    last week    yesterday    tanh     relu     lk_relu    drelu
    6.41         5.21         2.99     3.04     3.00       3.08       --lr 0.01 (the default); two minutes on 2 cores
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Float

from experiments.engine import records, tables
from experiments.engine.console import Console
from experiments.engine.errors import NonFiniteLossError, UsageError, run_command
from experiments.load_forecast import net as recurrent_net
from experiments.load_forecast import series as load_series
from experiments.load_forecast.series import FEATURES, HISTORY, HORIZON, Series, Windows

BATCH_SIZE = 64
BASELINES = {"last week": 168, "yesterday": 24}
"""Forecasts without a net -> how many hours back they look."""
_MOST = {"seeds": 100, "epochs": 100_000, "parameters": 1_000_000}
_SHOWN_HOURS = (1, 6, 12, 24)

Line = dict[str, Any]
CellName = Literal["tanh", "relu", "lk_relu", "drelu"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Recurrent nets that forecast the next 24 hours of an hourly load."""

    preset: Literal["quick"] = "quick"
    """There is no other: the paper has no such experiment."""
    csv: str | None = None
    """A CSV file with a header and a row for each hour; by default a series made here."""
    time_column: str = "time"
    """The file's column of times, such as 2024-01-31 23:00."""
    load_column: str = "load"
    """The file's column of loads, positive numbers in any unit."""
    cells: tuple[CellName, ...] = ("tanh", "relu", "lk_relu", "drelu")
    """One or several cells."""
    parameters: int = 2580
    """About how many parameters each net has; at 2580 they differ by less than a per cent."""
    epochs: int = 30
    """Passes over the windows that train."""
    lr: float = 0.01
    """Adam's learning rate, the same for all cells; it falls to 0 as a cosine."""
    seeds: int = 3
    """How many seeds, from 0."""
    out: str | None = None
    """The folder for the record; by default a new one in runs/."""


def main() -> None:
    """Read the command line, train every net, and leave a record, a table and a picture."""
    console = Console()
    settings = check(tyro.cli(Settings, args=sys.argv[1:], prog="python -m experiments.load_forecast"))
    folder = records.new_folder(settings.out, "load_forecast")
    if settings.csv is None:
        series = load_series.made()
    else:
        series = load_series.read_csv(settings.csv, settings.time_column, settings.load_column)
    cut = load_series.windows(series)
    counts = ", ".join(f"{len(starts):,} {part}" for part, starts in cut.starts.items())
    units = {cell: units_of(cell, settings.parameters) for cell in settings.cells}
    console.say(f"data     {series} (fingerprint {series.fingerprint})\nwindows  {counts}")
    console.say(f"device   {jax.devices()[0].device_kind}, jax {jax.__version__}")
    nets = [
        {"cell": cell, "units": number, "parameters": parameters_of(cell, number)} for cell, number in units.items()
    ]
    console.say(
        "\n".join(f"net      {net['cell']}: {net['units']} units, {net['parameters']:,} parameters" for net in nets)
    )
    values = dataclasses.asdict(settings)
    del values["out"]
    values["csv"] = settings.csv and Path(settings.csv).name
    about = {"name": series.name, "fingerprint": series.fingerprint, "description": str(series)}
    config = {"experiment": "load_forecast", "settings": values, "data": about, "nets": nets}
    record = records.Record.create(folder, config)
    try:
        for line in baselines(series, cut):
            record.add(line)
        for cell in settings.cells:
            for line in train(settings, cell, units[cell], series, cut, console):
                record.add(line)
    finally:
        record.close()
    console.table(
        f"Test MAPE in per cent, over all {HORIZON} hours and at some hours ahead; mean ± sample standard deviation of "
        f"{settings.seeds} seed{'s' * (settings.seeds > 1)}.",
        table(record.lines, nets),
    )
    sheet = picture(record.lines, folder / "load_forecast.png", title=str(series))
    console.say(f"record   {folder}\npicture  {sheet}")


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, before anything is written; name each cell once.

    Raises:
      UsageError: with what is wrong, what was received and what to do.
    """
    for name, most in _MOST.items():
        if not 1 <= getattr(settings, name) <= most:
            raise UsageError(f"--{name} is from 1 to {most:,}, got {getattr(settings, name):,}")
    if not 0 < settings.lr <= 1:  # nor nan
        raise UsageError(f"--lr is a positive number up to 1, got {settings.lr}; try 0.01")
    if not settings.cells:
        raise UsageError("--cells takes at least one of tanh, relu, lk_relu and drelu, got none")
    return dataclasses.replace(settings, cells=tuple(dict.fromkeys(settings.cells)))


units_of = functools.partial(recurrent_net.units_for, features=FEATURES, horizon=HORIZON)
parameters_of = functools.partial(recurrent_net.parameters, features=FEATURES, horizon=HORIZON)
start = functools.partial(recurrent_net.start, features=FEATURES, horizon=HORIZON)


def targets(series: Series, starts: np.ndarray) -> np.ndarray:
    """The loads (N, 24) that windows are to forecast."""
    return series.load[starts[:, None] + np.arange(HORIZON)]


def score(cell: str, seed: int | None, forecast: np.ndarray, load: np.ndarray) -> Line:
    """The line of a forecast on the test part."""
    by_hour = load_series.mape_by_hour(forecast, load)
    return {"cell": cell, "seed": seed, "test_mape": float(by_hour.mean()), "test_mape_by_hour": by_hour.tolist()}


def baselines(series: Series, cut: Windows) -> Iterator[Line]:
    """A line for each forecast without a net: the load of the same hour, one week or one day before."""
    starts = cut.starts["test"]
    for name, hours in BASELINES.items():
        yield score(name, None, targets(series, starts - hours), targets(series, starts))


def train(settings: Settings, cell: str, units: int, series: Series, cut: Windows, console: Console) -> Iterator[Line]:
    """Train one net with all seeds together; yields a line for each epoch and seed, and one for each test.

    Raises:
      NonFiniteLossError: as soon as an epoch shows it.
    """
    training, validation, test = (cut.starts[part] for part in ("train", "validation", "test"))
    updates = -(-len(training) // BATCH_SIZE) * settings.epochs
    rate = optax.cosine_decay_schedule(settings.lr, updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    graph, state = start(cell, units, settings.seeds)
    best_state, carry = state, (state, jax.vmap(optimizer.init)(state))
    orders = [np.random.default_rng(seed) for seed in range(settings.seeds)]
    best = np.full(settings.seeds, np.inf)
    best_epoch = np.zeros(settings.seeds, int)
    with console.progress(cell, settings.epochs) as advance:
        for epoch in range(1, settings.epochs + 1):
            shuffled = np.stack([batched(order.permutation(training)) for order in orders])
            carry, losses = _epoch(graph, optimizer, carry, cut.features, shuffled)
            forecasts = forecast(graph, carry[0], cut, validation)
            mapes = np.array([load_series.mape_by_hour(y, targets(series, validation)).mean() for y in forecasts])
            for seed, (loss, mape) in enumerate(zip(losses.tolist(), mapes.tolist(), strict=True)):
                if not np.isfinite([loss, mape]).all():
                    where = f"{cell}, seed {seed}, epoch {epoch}"
                    raise NonFiniteLossError(f"the loss or the forecast is not finite ({where}); try a smaller --lr")
                yield {"cell": cell, "seed": seed, "epoch": epoch, "train_loss": loss, "validation_mape": mape}
            better = mapes < best
            best, best_epoch = np.where(better, mapes, best), np.where(better, epoch, best_epoch)
            best_state = _choose(better, carry[0], best_state)
            advance(1)
    for seed, y in enumerate(forecast(graph, best_state, cut, test)):
        line = score(cell, seed, y, targets(series, test)) | {"best_epoch": int(best_epoch[seed])}
        console.say(f"{cell} seed {seed}  best epoch {line['best_epoch']}  test MAPE {line['test_mape']:.3f} %")
        yield line


def batched(starts: np.ndarray) -> np.ndarray:
    """In rows of 64; the last row is filled from the beginning.

    >>> import numpy as np
    >>> from experiments.load_forecast.__main__ import batched
    >>> batched(np.arange(65)).shape
    (2, 64)
    """
    return np.resize(starts, (-(-len(starts) // BATCH_SIZE), BATCH_SIZE))


def forecast(graph: Any, state: Any, cut: Windows, starts: np.ndarray) -> np.ndarray:
    """The forecasts (seeds, N, 24) of windows, as loads."""
    y = np.asarray(_forecast(graph, state, cut.features, batched(starts)), np.float64)
    return y.reshape(len(y), -1, HORIZON)[:, : len(starts)] * cut.deviation + cut.mean


def _inputs(features: Array, starts: Array) -> Array:
    """(N, 168, 10): only hours before the starts."""
    return features[starts[:, None] + jnp.arange(-HISTORY, 0)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _epoch(graph, optimizer, carry, features, starts) -> tuple[Any, Float[Array, " seeds"]]:
    """An update for each batch of starts (seeds, batches, 64); the loss is the mean absolute error."""
    features = jnp.asarray(features)

    def loss_of(state, starts):
        wanted = features[starts[:, None] + jnp.arange(HORIZON), 0]
        return jnp.abs(nnx.merge(graph, state)(_inputs(features, starts)) - wanted).mean()

    def step(carry, starts):
        state, opt_state = carry
        loss, gradients = jax.value_and_grad(loss_of)(state, starts)
        updates, opt_state = optimizer.update(gradients, opt_state, state)
        return (optax.apply_updates(state, updates), opt_state), loss

    carry, losses = jax.vmap(lambda carry, starts: jax.lax.scan(step, carry, starts))(carry, starts)
    return carry, losses.mean(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _forecast(graph, state, features, starts) -> Float[Array, "seeds batches n horizon"]:
    features = jnp.asarray(features)
    return jax.vmap(
        lambda state: jax.lax.map(lambda starts: nnx.merge(graph, state)(_inputs(features, starts)), starts)
    )(state)


_choose = jax.vmap(lambda better, new, old: jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old))


def table(lines: Sequence[Line], nets: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each forecast, from its test lines."""
    known = {net["cell"]: net for net in nets}
    rows = []
    for cell, errors in _by_cell(lines).items():
        net = known.get(cell)
        row = {"forecast": cell, "units": str(net["units"]) if net else "-"}
        row["parameters"] = f"{net['parameters']:,}" if net else "-"
        row["MAPE"] = tables.spread(errors.mean(axis=1).tolist())
        rows.append(row | {f"hour {hour}": f"{errors[:, hour - 1].mean():.3f}" for hour in _SHOWN_HOURS})
    return rows


def picture(lines: Sequence[Line], path: Path, *, title: str) -> Path:
    """MAPE by the hour ahead: a line for the mean over seeds, and a band from the least to the greatest seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, hours = figure.subplots(), np.arange(1, HORIZON + 1)
    for cell, errors in _by_cell(lines).items():
        style = ("--", "-.")[list(BASELINES).index(cell)] if cell in BASELINES else "-"
        (drawn,) = axes.plot(hours, errors.mean(axis=0), style, label=cell, color="0.4" if cell in BASELINES else None)
        axes.fill_between(hours, errors.min(axis=0), errors.max(axis=0), alpha=0.2, color=drawn.get_color(), lw=0)
    axes.set(xlabel="hours ahead", ylabel="test MAPE, per cent", xlim=(1, HORIZON), ylim=(0, None))
    axes.set_title(title, fontsize=8)
    axes.set_xticks([1, *range(3, HORIZON + 1, 3)])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _by_cell(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """Forecast -> its test errors (seeds, 24)."""
    found: dict[str, list[list[float]]] = {}
    for line in lines:
        if "test_mape_by_hour" in line:
            found.setdefault(line["cell"], []).append(line["test_mape_by_hour"])
    return {cell: np.array(errors) for cell, errors in found.items()}


if __name__ == "__main__":
    run_command(main)
