"""How a recurrent net is trained on windows of a series, and what it forecasts; and the forecasts without a net."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.engine.console import Console
from experiments.engine.errors import NonFiniteLossError
from experiments.engine.loop import Loop, advance
from experiments.engine.parallel import Placement
from experiments.engine.tasks import LossOf
from experiments.load_forecast.net import RecurrentNet
from experiments.load_forecast.series import HISTORY, HORIZON, Series, Windows, mape_by_hour

BATCH_SIZE = 64
BASELINES = {"last week": 168, "yesterday": 24}
"""Forecasts without a net -> how many hours back they look."""

Line = dict[str, Any]


def baseline(name: str, series: Series, cut: Windows) -> Line:
    """The line of a forecast without a net: the load of the same hour, one week or one day before."""
    starts = cut.starts["test"]
    return score(None, targets(series, starts - BASELINES[name]), targets(series, starts))


def targets(series: Series, starts: np.ndarray) -> np.ndarray:
    """The loads (N, 24) that windows are to forecast."""
    return series.load[starts[:, None] + np.arange(HORIZON)]


def score(seed: int | None, forecast: np.ndarray, load: np.ndarray) -> Line:
    """The line of a forecast on the test part."""
    by_hour = mape_by_hour(forecast, load)
    return {"seed": seed, "test_mape": float(by_hour.mean()), "test_mape_by_hour": by_hour.tolist()}


def absolute_error(
    model: RecurrentNet, features: Float[Array, "t features"], starts: Int[Array, " n"], _key: Any
) -> Float[Array, ""]:
    """The mean absolute error of the standardised forecasts of windows that start at these hours."""
    wanted = features[starts[:, None] + jnp.arange(HORIZON), 0]
    return jnp.abs(model(_inputs(features, starts)) - wanted).mean()


def train(
    cell: str, units: int, series: Series, cut: Windows, *, seeds: int, epochs: int, lr: float, console: Console
) -> list[Line]:
    """Train a net with all seeds together, and test the epoch with the least validation error.

    Adam's rate starts at lr and falls to 0 as a cosine.

    Returns:
      A line for each epoch and seed, then one for the test of each seed.

    Raises:
      NonFiniteLossError: as soon as an epoch shows it.
    """
    training, validation, test = (cut.starts[part] for part in ("train", "validation", "test"))
    rate = optax.cosine_decay_schedule(lr, -(-len(training) // BATCH_SIZE) * epochs)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    models = [RecurrentNet(cell, units, rngs=nnx.Rngs(seed)) for seed in range(seeds)]
    graph = nnx.graphdef(models[0])
    loop = Loop(LossOf(graph, absolute_error), optimizer, Placement(stacked=True), scanned=True)
    carry, features, unused = loop.start(models), jnp.asarray(cut.features), jax.random.split(jax.random.key(0), seeds)
    best, best_epoch = np.full(seeds, np.inf), np.zeros(seeds, int)
    best_parameters = jax.tree.map(jnp.copy, carry.parameters)  # an update uses up its carry
    orders, lines = [np.random.default_rng(seed) for seed in range(seeds)], []
    with console.progress(cell, epochs) as on_epoch:
        for epoch in range(1, epochs + 1):
            shuffled = np.stack([batched(order.permutation(training)) for order in orders])
            carry, losses = advance(loop, carry, features, shuffled, unused)
            forecasts = forecast(graph, carry.parameters, cut, validation)
            mapes = np.array([mape_by_hour(y, targets(series, validation)).mean() for y in forecasts])
            for seed, (loss, mape) in enumerate(zip(losses.mean(axis=1).tolist(), mapes.tolist(), strict=True)):
                if not np.isfinite([loss, mape]).all():
                    where = f"{cell}, seed {seed}, epoch {epoch}"
                    raise NonFiniteLossError(f"the loss or the forecast is not finite ({where}); try a smaller --lr")
                lines.append({"seed": seed, "epoch": epoch, "train_loss": loss, "validation_mape": mape})
            better = mapes < best
            best, best_epoch = np.where(better, mapes, best), np.where(better, epoch, best_epoch)
            best_parameters = _choose(better, carry.parameters, best_parameters)
            on_epoch(1)
    for seed, y in enumerate(forecast(graph, best_parameters, cut, test)):
        lines.append(score(seed, y, targets(series, test)) | {"best_epoch": int(best_epoch[seed])})
        console.say(f"{cell} seed {seed}  best epoch {best_epoch[seed]}  test MAPE {lines[-1]['test_mape']:.3f} %")
    return lines


_choose = jax.vmap(lambda better, new, old: jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old))


def batched(starts: np.ndarray) -> np.ndarray:
    """In rows of 64; the last row is filled from the beginning.

    >>> import numpy as np
    >>> from experiments.load_forecast.forecast import batched
    >>> batched(np.arange(65)).shape
    (2, 64)
    """
    return np.resize(starts, (-(-len(starts) // BATCH_SIZE), BATCH_SIZE))


def forecast(graph: Any, parameters: Any, cut: Windows, starts: np.ndarray) -> np.ndarray:
    """The forecasts (seeds, N, 24) of the windows that start at these N hours, as loads; parameters: over seeds."""
    y = np.asarray(_forecast(graph, parameters, cut.features, batched(starts)), np.float64)
    return y.reshape(len(y), -1, HORIZON)[:, : len(starts)] * cut.deviation + cut.mean


@functools.partial(jax.jit, static_argnums=0)
def _forecast(graph, parameters, features, starts) -> Float[Array, "seeds batches n horizon"]:
    def of_one_seed(parameters):
        return jax.lax.map(lambda starts: nnx.merge(graph, parameters)(_inputs(features, starts)), starts)

    return jax.vmap(of_one_seed)(parameters)


def _inputs(features: Float[Array, "t features"], starts: Int[Array, " n"]) -> Float[Array, "n history features"]:
    """Only hours before the starts."""
    return features[starts[:, None] + jnp.arange(-HISTORY, 0)]
