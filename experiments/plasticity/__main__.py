"""Does a net that learns one task after the other go on learning? ReLU, linked neurons and three remedies.

    python -m experiments.plasticity
    python -m experiments.plasticity --methods relu lk_relu --streams random_labels --seeds 1 --out runs/short
    python -m experiments.plasticity --protocol kumar        # the field's own problems: experiments/plasticity/kumar
    python -m experiments.plasticity --protocol regression   # slowly changing: experiments/plasticity/regression.py

Two streams of tasks (`experiments/engine/tasks.py`): `permuted` permutes the pixels anew for each task, `random_labels`
draws the labels anew, to be memorised. A net of three hidden layers learns them with Adam at a constant rate; nothing
is reset between tasks. Each net tries three rates with seed 0 and takes the one with the best mean accuracy over all
tasks; the other seeds then run at that rate. Linked nets have twice the weights at equal width, so they also run
narrower, at equal parameters. The same command again resumes: it makes the runs that the record lacks.

Expected: ReLU's units fall dormant, its accuracy falls from task to task, and it takes a small rate to delay that;
linked nets go on learning (Abbas et al. 2023 saw it for CReLU). See results/plasticity.

Reference: Dohare et al., Loss of plasticity in deep continual learning, 2024; Sokar et al., The dormant neuron
phenomenon in deep reinforcement learning, 2023; Abbas et al., Loss of plasticity in continual deep reinforcement
learning, 2023.
"""

import argparse
import dataclasses
from typing import Any, Literal

from experiments.engine import data as data_lib
from experiments.engine import tasks
from experiments.engine.checks import command_line, in_range, known
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.files import write_whole
from experiments.engine.study import open_record
from experiments.plasticity import plots, regression
from experiments.plasticity.continual import RATES, Plan, run_net
from experiments.plasticity.kumar import command as kumar
from experiments.plasticity.net import HIDDEN_LAYERS, METHODS, TAU, parameters, width_for

UNITS = 64
"""Of each hidden layer, at equal width."""
COLUMNS = ("equal_width", "equal_parameters")
IMAGES = {"permuted": 1500, "random_labels": 256}
"""The first training images, of those that there are."""
EPOCHS = {"permuted": 2, "random_labels": 20}
"""Of a round; a task has two rounds."""
_ROUNDS, _BATCH_SIZE = 2, 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """Nets that learn one task after the other, and whether they go on learning."""

    protocol: Literal["streams"] = "streams"
    """streams: what this help is about. kumar, regression: other problems and options, see --protocol kumar --help."""
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
    """The folder of the record. One that is there and was made alike is resumed."""
    data_dir: str | None = None
    """The folder of TensorFlow Datasets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, with a UsageError; name all methods."""
    in_range(settings, {"tasks": (2, 10_000), "seeds": (1, 100)})
    return dataclasses.replace(
        settings,
        methods=known("methods", METHODS if "all" in settings.methods else settings.methods, METHODS),
        streams=known("streams", settings.streams, tasks.STREAMS),
        widths=known("widths", settings.widths, COLUMNS),
    )


def main() -> None:
    """Run the protocol that --protocol names."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--protocol", default="streams")
    name = asked.parse_known_args()[0].protocol
    (protocol,) = known("protocol", [name], PROTOCOLS)
    PROTOCOLS[protocol]()


def streams() -> None:
    """Run what is missing, then print the tables and draw the pictures."""
    settings = check(command_line(Settings, "python -m experiments.plasticity"))
    data, console = data_lib.load(settings.dataset, settings.data_dir), Console()
    if data.classes != tasks.CLASSES:
        raise UsageError(f"--dataset takes a set of {tasks.CLASSES} classes, got {data}; use digits or cifar10")
    nets = _nets(settings, data)
    different = dict.fromkeys((net["row"], net["width"]) for net in nets)
    groups = len(settings.streams) * len(different) * (1 + (settings.seeds > 1))  # the rates, then the other seeds
    like = {"same": ("experiment", "protocol", "data", "nets"), "nets": nets}
    protocol = {
        "streams": list(settings.streams),
        "widths": list(settings.widths),
        "tasks": settings.tasks,
        "images": {stream: min(IMAGES[stream], len(data.train_labels)) for stream in settings.streams},
        "epochs": {stream: _ROUNDS * EPOCHS[stream] for stream in settings.streams},
        "rounds": _ROUNDS,
        "batch_size": _BATCH_SIZE,
        "features": tasks.flat(data, 1).images.shape[1],
        "hidden_layers": HIDDEN_LAYERS,
        "optimizer": "adam",
        "rates": list(RATES),
        "tau": TAU,
    }
    with (
        open_record("plasticity", settings.out, protocol=protocol, data=data, **like) as record,
        console.progress("tasks", settings.tasks * groups) as advance,
    ):
        for stream in settings.streams:
            base = tasks.flat(data, IMAGES[stream])
            plan = Plan(stream, settings.tasks, _ROUNDS, EPOCHS[stream], _BATCH_SIZE)
            for row, width in different:
                run_net(record, plan, base, row, width, seeds=settings.seeds, say=console.say, on_task=advance)
    config, lines = record.config, record.lines
    for stream in settings.streams:
        for column in settings.widths:
            console.table(
                f"{stream}, {column.replace('_', ' ')}: mean ± standard deviation over seeds of the mean over tasks",
                plots.table(stream, column, config, lines),
            )
    write_whole(record.folder / "table.md", plots.markdown(config, lines))
    for column in settings.widths:
        drawn = plots.picture(column, config, lines, record.folder / f"plasticity_{column}.png")
        console.say(f"picture  {drawn}")
    console.say(f"record   {record.folder}")


def _nets(settings: Settings, data: data_lib.Dataset) -> list[dict[str, Any]]:
    """The nets of each column: their widths and parameters."""
    features = tasks.flat(data, 1).images.shape[1]
    wanted = parameters(METHODS["relu"], features, UNITS, data.classes)
    nets = []
    for column in settings.widths:
        for row in settings.methods:
            method = METHODS[row]
            width = UNITS if column == "equal_width" else width_for(method, features, wanted, data.classes)
            count = parameters(method, features, width, data.classes)
            nets.append({"row": row, "column": column, "says": method.says, "width": width, "parameters": count})
    return nets


PROTOCOLS = {"streams": streams, "kumar": kumar.main, "regression": regression.main}


if __name__ == "__main__":
    run_command(main)
