"""All remedies on the same work, beside linked neurons: two networks, one data pipeline, one budget.

    python -m experiments.remedies
    python -m experiments.remedies --methods relu lk_relu normprop --nets depth --seeds 1

Rates: each method tries three with seed 0 and takes the one with the least training loss of the last epoch; the test
set has no say. The other seeds then run at that rate. Methods that learn are stressed: batches of 2, raw pixels
instead of standardised ones, ten times the rate. The same command again goes on with what is there.

Expected: the table and the verdicts of results/remedies, from three seeds in about an hour and a half on two cores.
"""

import dataclasses
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments.covariate_shift import inputs as scaled_inputs
from experiments.engine import data as data_lib
from experiments.engine import records, training
from experiments.engine.console import Console
from experiments.engine.costs import costs
from experiments.engine.errors import UsageError, run_command
from experiments.engine.run import public_arguments
from experiments.engine.timing import step_times
from experiments.remedies.methods import METHODS
from experiments.remedies.net import NETS
from experiments.remedies.table import STRESSES, learners, markdown, picture, table

_BATCH = 32
_MICRO_BATCH = 2
_MICRO_EPOCHS = 5  # times fewer epochs with batches of 2, which are still more updates


@dataclasses.dataclass(frozen=True)
class Settings:
    """All remedies on the same work, beside linked neurons, on embedded digits."""

    methods: tuple[str, ...] = ("all",)
    """One or several rows; all: every one. A wrong name lists them."""
    nets: tuple[str, ...] = ("depth", "four_conv")
    """depth: table 2's network with 30 layers of 8 units. four_conv: table 3's."""
    seeds: int = 3
    """How many seeds, from 0."""
    epochs: int = 10
    """Passes over the training set, in batches of 32."""
    stress: bool = True
    """Also run batches of 2, raw pixels and ten times the rate, for the methods that learn."""
    time_steps: int = 100
    """Time that many training steps of each method, in turns; 0 does not."""
    out: str = "runs/remedies"
    """The folder of the record. One that is there is gone on with, if it was made alike."""


def check(settings: Settings) -> Settings:
    """Refuse what cannot run; name all methods.

    Raises:
      UsageError: with what is wrong, what was received and what to do.
    """
    methods = tuple(METHODS) if "all" in settings.methods else tuple(dict.fromkeys(settings.methods))
    for option, given, known in (("--methods", methods, METHODS), ("--nets", settings.nets, NETS)):
        if not given:
            raise UsageError(f"{option} takes at least one of {', '.join(known)}, got none")
        for name in given:
            if name not in known:
                raise UsageError(f"{option}: there is no {name!r}; take of {', '.join(known)}")
    for name, least in (("seeds", 1), ("epochs", 1), ("time_steps", 0)):
        if getattr(settings, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is at least {least}, got {getattr(settings, name)}")
    return dataclasses.replace(settings, methods=methods)


def main() -> None:
    """Run what is missing, then print the table and draw the picture."""
    settings = check(tyro.cli(Settings, prog="python -m experiments.remedies"))
    data, console = data_lib.load("digits", None), Console()
    record = records.Record.open(
        Path(settings.out),
        _config(settings, data, public_arguments(sys.argv[1:])),
        same=("experiment", "protocol", "data"),
    )
    try:
        run = _Run(settings, data, record, console)
        with console.progress("runs", run.count()) as advance:
            for net in settings.nets:
                for method in settings.methods:
                    run.method(net, method, advance)
                    jax.clear_caches()
        if settings.time_steps and records.read_times(record.folder) is None:
            run.time()
    finally:
        record.close()
    times = records.read_times(record.folder)
    for net in settings.nets:
        rows = table(net, record.lines, record.config["nets"], times)
        console.table(
            f"{net}: digits, {settings.epochs} epochs, last epoch, mean ± standard deviation over seeds", rows
        )
    (record.folder / "table.md").write_text(markdown(record.config, record.lines, times), encoding="utf-8")
    drawn = picture(record.config, record.lines, times, record.folder / "remedies.png")
    console.say(f"record   {record.folder}\npicture  {drawn}")


def _config(settings: Settings, data: data_lib.Dataset, arguments: Sequence[str]) -> dict[str, Any]:
    nets = []
    for net in settings.nets:
        for name in settings.methods:
            method = METHODS[name]
            counted = costs(
                lambda m=method, n=net: m.build(n, data.train_images.shape[1:], data.classes, 0),
                data.train_images.shape[1:],
            )
            nets.append({"net": net, "row": name, "says": method.says, "batch_one": method.batch_one, **counted})
    return {
        "experiment": "remedies",
        "command": shlex.join(["python", "-m", "experiments.remedies", *arguments]),
        "protocol": {
            "epochs": settings.epochs,
            "batch_size": _BATCH,
            "micro_batch_size": _MICRO_BATCH,
            "micro_epochs": max(1, settings.epochs // _MICRO_EPOCHS),
            "rates": {name: list(METHODS[name].rates) for name in settings.methods},
            "inputs": "standardised",
        },
        "data": {"name": data.name, "fingerprint": data.fingerprint, "description": str(data)},
        "nets": nets,
    }  # fmt: skip


class _Run:
    """The runs of one record; those that it has are not made again."""

    def __init__(self, settings: Settings, data: data_lib.Dataset, record: records.Record, console: Console):
        self.settings, self.data, self.record, self.console = settings, data, record, console
        self.inputs = {
            "none": scaled_inputs({"inputs": "standardised"}, data),
            "raw": scaled_inputs({"inputs": "raw"}, data),
        }

    def count(self) -> int:
        """How many runs there are at most."""
        one = max(len(METHODS[name].rates) for name in self.settings.methods) + self.settings.seeds - 1
        stressed = len(STRESSES) * self.settings.seeds if self.settings.stress else 0
        return len(self.settings.nets) * len(self.settings.methods) * (one + stressed)

    def method(self, net: str, name: str, advance: Any) -> None:
        """All runs of a method in a network."""
        rates = METHODS[name].rates
        tried = [self.one(net, name, "none", rate, 0, advance) for rate in rates]
        rate = min(tried, key=lambda line: line.get("train_loss", math.inf))["rate"]
        for seed in range(1, self.settings.seeds):
            self.one(net, name, "none", rate, seed, advance)
        for stress in STRESSES:
            if self.settings.stress and name in learners(net, self.record.lines):
                for seed in range(self.settings.seeds):
                    self.one(net, name, stress, rate * (10 if stress == "rate x10" else 1), seed, advance)
            else:
                advance(self.settings.seeds)

    def one(self, net: str, name: str, stress: str, rate: float, seed: int, advance: Any) -> dict[str, Any]:
        """One run, or the line that it left."""
        key = {"net": net, "row": name, "stress": stress, "rate": rate, "seed": seed}
        advance(1)
        for line in self.record.lines:
            if key.items() <= line.items():
                return line
        began = time.perf_counter()
        plan = self.plan(net, name, stress, rate)
        model, lines = training.train(self.build(net, name, seed), self.data, plan, seed)
        last = lines[-1]
        kept = ("diverged",) if "diverged" in last else ("test_accuracy", "train_loss", "units", "dead_units")
        result = {**key, **{measure: last[measure] for measure in kept}}
        if "diverged" not in last:
            result["shift"] = activation_shift(model, self.data, plan.inputs)
        result["seconds"] = round(time.perf_counter() - began, 1)
        self.record.add(result)
        said = last.get("diverged") or f"test {last['test_accuracy']:.4f}  loss {last['train_loss']:.4f}"
        self.console.say(f"{net} {name} {stress if stress != 'none' else ''} rate {rate:g} seed {seed}  {said}")
        return result

    def build(self, net: str, name: str, seed: int) -> nnx.Module:
        return METHODS[name].build(net, self.data.train_images.shape[1:], self.data.classes, seed)

    def plan(self, net: str, name: str, stress: str, rate: float) -> training.Plan:
        optimizer, factor = METHODS[name].rule(net, rate)
        micro = stress == "batch 2"
        epochs = max(1, self.settings.epochs // _MICRO_EPOCHS) if micro else self.settings.epochs
        return training.Plan(
            optimizer, epochs, _MICRO_BATCH if micro else _BATCH, lr=factor,
            inputs=self.inputs["raw" if stress == "raw" else "none"],
        )  # fmt: skip

    def time(self) -> None:
        """Median seconds of a step of every method, in turns, a network at a time."""
        lines = []
        for net in self.settings.nets:
            started = []
            for name in self.settings.methods:
                plan = self.plan(net, name, "none", METHODS[name].rates[0])
                started.append((*training.start([self.build(net, name, 0)], plan), plan))
            with self.console.progress(f"timing {net}", self.settings.time_steps) as advance:
                seconds = step_times(started, self.data, self.settings.time_steps, advance)
            lines += [
                {"net": net, "row": name, "step_seconds": median}
                for name, median in zip(self.settings.methods, seconds, strict=True)
            ]
        self.record.write_times({"steps": self.settings.time_steps, "medians": lines})


def activation_shift(model: nnx.Module, data: data_lib.Dataset, inputs: data_lib.Affine) -> float:
    """How far units of a layer differ in what they see, on the test set; 0 where all have the same mean.

    std over units of E[z] / sqrt(mean over units of var z), averaged over the layers
    """
    graph, state = nnx.split(model)

    def of_layer(_link: Any, z: jax.Array, units: int) -> jax.Array:
        z = z.astype(jnp.float32).reshape(len(z), -1, units)
        return z.mean(axis=(0, 1)).std() / jnp.sqrt(z.var(axis=(0, 1)).mean() + np.finfo(np.float32).tiny)

    def shifts(state: Any, images: jax.Array, inputs: data_lib.Affine) -> list[jax.Array]:
        return nnx.merge(graph, state)(data_lib.scale(images, inputs), train=False, tap=of_layer)[1]

    return statistics.fmean(float(layer[0]) for layer in jax.jit(shifts)(state, data.test_images, inputs))


if __name__ == "__main__":
    run_command(main)
