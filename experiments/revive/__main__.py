"""Train a ReLU net into death, then bring it back by linking its neurons.

    python -m experiments.revive

An MLP of three hidden layers learns the digits with Adam on standardised pixels plus 5, at two rates that are too high:
at 0.01 more than half of its units die (partly), at 0.03 nearly all of them, and it knows nothing (wholly). From there
it goes on at a sane rate, on the same inputs, in three ways: as it is (continued), with ReDo before each epoch (redo),
and linked (revived): each relu becomes (relu(z), relu(-z)) and each next kernel W becomes [W; 0], so that nothing
changes at that moment; Adam's moments are kept. Beside them two new nets learn at the sane rate, on the same inputs:
one with relu (fresh) and one with its link (fresh_linked).

The same command again goes on with what is there. Expected: see results/revive; a minute or two on two cores.
"""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import records, tasks
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.run import public_arguments
from experiments.plasticity import continual
from experiments.plasticity.net import METHODS, RULE, TAU, Moment, build, hidden, redo_dormant
from experiments.revive import plots as revive_plots
from linked_jax import lk_relu
from linked_jax.diagnostics import dead_units
from linked_jax.revive import link_sequential_opt_state, link_sequential

UNITS = 64
OFFSET = 5.0
"""Added to the standardised pixels."""
HARMS = {"partly": 0.01, "wholly": 0.03}
"""How much dies -> Adam's rate."""
RATE = 1e-3
_BATCH_SIZE = 32
_MOST = {"seeds": 100, "harmful_epochs": 1000, "epochs": 1000}
Net = tuple[nnx.Sequential, Any]
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train a ReLU net into death, then bring it back by linking its neurons."""

    seeds: int = 5
    """How many seeds, from 0."""
    harmful_epochs: int = 10
    """Passes over the digits at the rate that kills units."""
    epochs: int = 20
    """Passes over the digits after that, at a sane rate."""
    out: str = "runs/revive"
    """The folder of the record. One that is there is gone on with, if it was made alike."""


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
      UsageError: with what is wrong, what was received and what to do.
    """
    for name, most in _MOST.items():
        if not 1 <= getattr(settings, name) <= most:
            raise UsageError(
                f"--{name.replace('_', '-')} is from 1 to {most:,}, got {getattr(settings, name):,}; try the default"
            )
    return settings


def main() -> None:
    """Run the seeds that are missing, then print the table and draw the picture."""
    settings = check(tyro.cli(Settings, prog="python -m experiments.revive"))
    data, console = data_lib.load("digits", None), Console()
    config = _config(settings, data, public_arguments(sys.argv[1:]))
    record = records.Record.open(Path(settings.out), config, same=("experiment", "protocol", "data"))
    try:
        task = shifted(data)
        with console.progress("nets", len(HARMS) * settings.seeds * (1 + len(WAYS))) as advance:
            for harm in HARMS:
                for seed in range(settings.seeds):
                    _one_seed(settings, task, harm, seed, record, console, advance)
    finally:
        record.close()
    for harm in HARMS:
        console.table(f"{harm}: {revive_plots.LEGEND}", revive_plots.table(harm, record.lines))
    (record.folder / "table.md").write_text(revive_plots.markdown(record.config, record.lines), encoding="utf-8")
    drawn = revive_plots.picture(record.config, record.lines, record.folder / "revive.png")
    console.say(f"record   {record.folder}\npicture  {drawn}")


def _config(settings: Settings, data: data_lib.Dataset, arguments: Sequence[str]) -> dict[str, Any]:
    return {
        "experiment": "revive",
        "command": shlex.join(["python", "-m", "experiments.revive", *arguments]),
        "protocol": {
            "harmful_epochs": settings.harmful_epochs,
            "epochs": settings.epochs,
            "units": UNITS,
            "offset": OFFSET,
            "harmful_rates": HARMS,
            "rate": RATE,
            "batch_size": _BATCH_SIZE,
            "optimizer": "adam",
            "tau": TAU,
        },
        "data": {"name": data.name, "fingerprint": data.fingerprint, "description": str(data)},
    }


def shifted(data: data_lib.Dataset) -> tasks.Task:
    """The standardised images plus the offset."""
    task = tasks.flat(data, len(data.train_labels))
    return task._replace(images=task.images + OFFSET, test_images=task.test_images + OFFSET)


def _fresh(name: str, seed: int, features: int) -> Net:
    net = build(METHODS[name], features, UNITS, tasks.CLASSES, seed)
    return net, RULE.init(nnx.state(net, nnx.Param))


def _linked(net: Net) -> Net:
    return link_sequential(net[0], lk_relu), link_sequential_opt_state(net[1], net[0], lk_relu)


def _redone(net: Net, task: tasks.Task, key: Any) -> Net:
    return redo_dormant(*net, Moment(0, 1, 0, task.images, key))


WAYS: dict[str, Callable[[Net, tasks.Task, int], Net]] = {
    "continued": lambda harmed, _task, _seed: harmed,
    "redo": lambda harmed, task, seed: _redone(harmed, task, jax.random.key(seed)),
    "revived": lambda harmed, _task, _seed: _linked(harmed),
    "fresh": lambda _harmed, task, seed: _fresh("relu", seed, task.images.shape[1]),
    "fresh_linked": lambda _harmed, task, seed: _fresh("lk_relu", seed, task.images.shape[1]),
}
"""How a net goes on: (harmed, task, seed) -> the net at that moment."""


def _one_seed(
    settings: Settings, task: tasks.Task, harm: str, seed: int, record: records.Record, console: Console,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """All nets of a seed that the record does not have."""
    here = {"harm": harm, "seed": seed}
    done = {line["way"] for line in record.lines if here.items() <= line.items()}
    if done == {"harmed", *WAYS}:
        advance(1 + len(WAYS))
        return
    key = jax.random.key(seed)
    harmed, lines = _fit(_fresh("relu", seed, task.images.shape[1]), task, key, settings.harmful_epochs, HARMS[harm])
    if "harmed" not in done:
        record.add({**here, "way": "harmed", **lines})
    advance(1)
    logits = harmed[0](task.test_images)
    for way, start in WAYS.items():
        if way not in done:
            net = start(harmed, task, seed)
            difference = float(jnp.abs(net[0](task.test_images) - logits).max())
            _, lines = _fit(net, task, jax.random.fold_in(key, 1), settings.epochs, RATE, redo=way == "redo")
            compared = {"difference": difference, "largest_logit": float(jnp.abs(logits).max())}
            record.add({**here, "way": way, **lines, **compared})
            accuracy, dead = lines["accuracy"], lines["dead"]
            console.say(
                f"{harm} seed {seed}  {way:<12} accuracy {accuracy[0]:.4f} -> {accuracy[-1]:.4f}, dead units "
                f"{dead[0]} -> {dead[-1]}"
            )
        advance(1)


def _fit(net: Net, task: tasks.Task, key: Any, epochs: int, rate: float, *, redo: bool = False) -> tuple[Net, Line]:
    """Train, and measure before the first epoch and after each; with ReDo before each but the first."""
    found = [measure(net[0], task)]
    for epoch in range(1, epochs + 1):
        own = jax.random.fold_in(key, epoch)
        if redo and epoch > 1:
            net = _redone(net, task, own)
        graph, state = nnx.split(net[0])
        state, opt_state = _epoch(graph, task, own, rate, state, net[1])
        net = nnx.merge(graph, state), opt_state
        found.append(measure(net[0], task))
    return net, {name: [after[name] for after in found] for name in found[0]}


@functools.partial(jax.jit, static_argnums=0)
def _epoch(graph, task, key, rate, state, opt_state) -> tuple[Any, Any]:
    return continual.train(graph, task, key, 1, _BATCH_SIZE, rate, state, opt_state)


def measure(model: nnx.Sequential, task: tasks.Task) -> Line:
    """The test accuracy, and each layer's units that are zero on all training images, a unit being a whole link."""
    accuracy, dead = _measure(*nnx.split(model), task)
    return {"accuracy": round(float(accuracy), 5), "dead": [int(count) for count in dead]}


@functools.partial(jax.jit, static_argnums=0)
def _measure(graph, state, task) -> tuple[Any, list[Any]]:
    model = nnx.merge(graph, state)
    _, seen = hidden(model, task.images)
    stats = [at.statistics for at in seen]
    right = model(task.test_images).argmax(axis=1) == task.test_labels
    return right.mean(), [dead_units(layer).sum() for layer in stats]


if __name__ == "__main__":
    run_command(main)
