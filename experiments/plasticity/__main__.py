"""Does a net that learns one task after the other go on learning? ReLU, linked neurons and three remedies.

    python -m experiments.plasticity
    python -m experiments.plasticity --methods relu lk_relu --streams random_labels --tasks 20 --seeds 1

Two streams of tasks (`experiments/engine/tasks.py`): `permuted` permutes the pixels anew for each task, `random_labels`
draws the labels anew, to be memorised. A net of three hidden layers learns them with Adam at a constant rate; nothing
is reset between tasks. Each net tries three rates with seed 0 and takes the one with the best mean accuracy over all
tasks; the other seeds then run at that rate. Linked nets have twice the weights at equal width, so they also run
narrower, at equal parameters. The same command again goes on with what is there.

Expected: ReLU's units fall dormant, its accuracy falls from task to task, and it takes a small rate to delay that;
linked nets go on learning (Abbas et al. 2023 saw it for CReLU). See results/plasticity.

Reference: Dohare et al., Loss of plasticity in deep continual learning, 2024; Sokar et al., The dormant neuron
phenomenon in deep reinforcement learning, 2023; Abbas et al., Loss of plasticity in continual deep reinforcement
learning, 2023.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.engine import data as data_lib
from experiments.engine import records, tasks
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.run import public_arguments
from experiments.plasticity import continual
from experiments.plasticity import plots as plasticity_plots
from experiments.plasticity.net import HIDDEN_LAYERS, METHODS, TAU, parameters, width_for

UNITS = 64
"""Of each hidden layer, at equal width."""
RATES = (3e-4, 1e-3, 3e-3)
COLUMNS = ("equal_width", "equal_parameters")
IMAGES = {"permuted": 1500, "random_labels": 256}
"""The first training images, of those that there are."""
EPOCHS = {"permuted": 2, "random_labels": 20}
"""Of a round; a task has two rounds."""
_ROUNDS, _BATCH_SIZE = 2, 16
_MOST = {"tasks": (2, 10_000), "seeds": (1, 100)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Nets that learn one task after the other: do they go on learning."""

    dataset: str = "digits"
    """digits, which is embedded, or a prepared TensorFlow Datasets name such as cifar10."""
    streams: tuple[str, ...] = tuple(tasks.STREAMS)
    """permuted: pixels permuted anew for each task. random_labels: labels drawn anew."""
    methods: tuple[str, ...] = ("all",)
    """One or several rows; all: every one. A wrong name lists them."""
    widths: tuple[str, ...] = COLUMNS
    """equal_width: as many units as relu's net. equal_parameters: as many parameters."""
    tasks: int = 50
    """How many tasks a net learns, one after the other."""
    seeds: int = 5
    """How many seeds, from 0."""
    out: str = "runs/plasticity"
    """The folder of the record. One that is there is gone on with, if it was made alike."""
    data_dir: str | None = None
    """The folder of TensorFlow Datasets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def check(settings: Settings) -> Settings:
    """Refuse what cannot run; name all methods.

    Raises:
      UsageError: with what is wrong, what was received and what to do.
    """
    methods = tuple(METHODS) if "all" in settings.methods else settings.methods
    chosen = {"methods": (methods, METHODS), "streams": (settings.streams, tasks.STREAMS)}
    chosen["widths"] = (settings.widths, COLUMNS)
    for option, (given, known) in chosen.items():
        if not given:
            raise UsageError(f"--{option} takes at least one of {', '.join(known)}, got none")
        for name in given:
            if name not in known:
                raise UsageError(f"--{option}: there is no {name!r}; take of {', '.join(known)}")
    for name, (least, most) in _MOST.items():
        if not least <= getattr(settings, name) <= most:
            raise UsageError(f"--{name} is from {least} to {most:,}, got {getattr(settings, name):,}")
    return dataclasses.replace(
        settings, **{option: tuple(dict.fromkeys(given)) for option, (given, _) in chosen.items()}
    )


def main() -> None:
    """Run what is missing, then print the tables and draw the pictures."""
    settings = check(tyro.cli(Settings, prog="python -m experiments.plasticity"))
    data, console = data_lib.load(settings.dataset, settings.data_dir), Console()
    if data.classes != tasks.CLASSES:
        raise UsageError(f"--dataset takes a set of {tasks.CLASSES} classes, got {data}; use digits or cifar10")
    config = _config(settings, data, public_arguments(sys.argv[1:]))
    record = records.Record.open(Path(settings.out), config, same=("experiment", "protocol", "data", "nets"))
    try:
        with console.progress("tasks", _count(settings, record.config["nets"])) as advance:
            for stream in settings.streams:
                base = tasks.flat(data, IMAGES[stream])
                for row, width in dict.fromkeys((net["row"], net["width"]) for net in record.config["nets"]):
                    _one_net(settings, stream, row, width, base, record, console, advance)
    finally:
        record.close()
    leave(record.folder, record.config, record.lines, console)


def leave(folder: Path, config: dict[str, Any], lines: Sequence[dict[str, Any]], console: Console) -> None:
    """The tables and the pictures of a record, from its lines."""
    for stream in config["protocol"]["streams"]:
        for column in config["protocol"]["widths"]:
            console.table(
                f"{stream}, {column.replace('_', ' ')}: mean ± standard deviation over seeds of the mean over tasks",
                plasticity_plots.table(stream, column, config, lines),
            )
    (folder / "table.md").write_text(plasticity_plots.markdown(config, lines), encoding="utf-8")
    for column in config["protocol"]["widths"]:
        drawn = plasticity_plots.picture(column, config, lines, folder / f"plasticity_{column}.png")
        console.say(f"picture  {drawn}")
    console.say(f"record   {folder}")


def _config(settings: Settings, data: data_lib.Dataset, arguments: Sequence[str]) -> dict[str, Any]:
    features = tasks.flat(data, 1).images.shape[1]
    wanted = parameters(METHODS["relu"], features, UNITS, data.classes)
    nets = []
    for column in settings.widths:
        for row in settings.methods:
            method = METHODS[row]
            equal = column == "equal_width"
            width = UNITS if equal else width_for(method, features, wanted, data.classes)
            count = parameters(method, features, width, data.classes)
            nets.append({"row": row, "column": column, "says": method.says, "width": width, "parameters": count})
    return {
        "experiment": "plasticity",
        "command": shlex.join(["python", "-m", "experiments.plasticity", *arguments]),
        "protocol": {
            "streams": list(settings.streams),
            "widths": list(settings.widths),
            "tasks": settings.tasks,
            "images": {stream: min(IMAGES[stream], len(data.train_labels)) for stream in settings.streams},
            "epochs": {stream: _ROUNDS * EPOCHS[stream] for stream in settings.streams},
            "rounds": _ROUNDS,
            "batch_size": _BATCH_SIZE,
            "features": features,
            "hidden_layers": HIDDEN_LAYERS,
            "optimizer": "adam",
            "rates": list(RATES),
            "tau": TAU,
        },
        "data": {"name": data.name, "fingerprint": data.fingerprint, "description": str(data)},
        "nets": nets,
    }


def _count(settings: Settings, nets: Sequence[dict[str, Any]]) -> int:
    """Tasks of all groups of runs: the rates with seed 0, then the other seeds."""
    different = len({(net["row"], net["width"]) for net in nets})
    return settings.tasks * len(settings.streams) * different * (1 + (settings.seeds > 1))


def _one_net(
    settings: Settings, stream: str, row: str, width: int, base: tasks.Task, record: records.Record, console: Console,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """All runs of a net on a stream that the record does not have."""
    plan = continual.Plan(stream, settings.tasks, _ROUNDS, EPOCHS[stream], _BATCH_SIZE)

    def run(runs: Sequence[tuple[int, float]]) -> None:
        here = {(line["seed"], line["rate"]) for line in plasticity_plots.of_net(stream, row, width, record.lines)}
        missing = [run for run in runs if run not in here]
        if not missing:
            advance(settings.tasks)
            return
        began = time.perf_counter()
        found = continual.learn(METHODS[row], width, plan, base, missing, advance)
        seconds = round((time.perf_counter() - began) / len(missing), 1)
        for (seed, rate), measures in zip(missing, found, strict=True):
            key = {"stream": stream, "row": row, "width": width, "rate": rate, "seed": seed}
            record.add({**key, **measures, "seconds": seconds})
            first, last = (np.mean(part) for part in plasticity_plots.ends(measures["accuracy"]))
            console.say(f"{stream} {row} {width} units, rate {rate:g}, seed {seed}: {first:.3f} -> {last:.3f}")

    run([(0, rate) for rate in RATES])
    rate = plasticity_plots.best_rate(plasticity_plots.of_net(stream, row, width, record.lines))
    if settings.seeds > 1:
        run([(seed, rate) for seed in range(1, settings.seeds)])


if __name__ == "__main__":
    run_command(main)
