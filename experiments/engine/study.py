"""What studies share beside the tables' engine: their record, and the choice of a rate."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.engine.interrupts import Ended
from experiments.engine.records import Record

Line = Mapping[str, Any]
_PRIVATE = ("--out", "--data-dir", "--resume", "--coordinator", "--process-id")  # paths and places of this machine


def command(experiment: str, arguments: Sequence[str] | None = None) -> str:
    """The command line of an experiment as records show it: without the options that name this machine's folders.

    >>> from experiments.engine.study import command
    >>> command("depth", ["--act", "relu", "--out", "somewhere"])
    'python -m experiments.depth --act relu'
    """
    kept, skip = [], False
    for argument in sys.argv[1:] if arguments is None else arguments:
        option, has_value, _ = argument.partition("=")
        if option.replace("_", "-") in _PRIVATE:  # tyro takes both
            skip = not has_value
        elif skip:
            skip = False
        else:
            kept.append(argument)
    return shlex.join(["python", "-m", f"experiments.{experiment}", *kept])


@contextlib.contextmanager
def open_record(
    experiment: str,
    folder: str | Path,
    *,
    protocol: Mapping[str, Any],
    data: Any,
    same: Sequence[str] = ("experiment", "protocol", "data"),
    **more: Any,
) -> Iterator[Record]:
    """The record of a study: a new one, or the one that is there and was made alike. `Record.once` resumes its runs.

    Within it SIGTERM and Ctrl-C end the process with the line that says how to go on.

    Args:
      experiment: the study's name; of one with parts "name.part", and the command is that of the name.
      folder: of the record.
      protocol: what determines the runs, as JSON values.
      data: with an `identity`, such as a `Dataset`.
      same: the entries of the config that must be those of a record that is there.
      more: further entries of the config.
    """
    made_by = {"experiment": experiment, "command": command(experiment)}
    config = {**made_by, **more, "protocol": protocol, "data": data.identity}
    again = shlex.join(["python", "-m", f"experiments.{experiment.partition('.')[0]}", *sys.argv[1:]])
    with (
        Record.open(Path(folder), config, same=same) as record,
        Ended(f"What was done is saved in {record.folder}; go on with the same command: {again}"),
    ):
        record.made_by(config["command"])
        yield record


def at_best_rate(runs: Sequence[Line], loss: Callable[[Line], float]) -> list[Line]:
    """The runs at the rate that has the least loss with seed 0; none if seed 0 has not run.

    >>> from experiments.engine.study import at_best_rate
    >>> runs = [{"seed": 0, "rate": 0.1, "loss": 2.0}, {"seed": 0, "rate": 0.2, "loss": 1.0}]
    >>> at_best_rate(runs, lambda run: run["loss"])
    [{'seed': 0, 'rate': 0.2, 'loss': 1.0}]
    """
    tried = [run for run in runs if run["seed"] == 0]
    if not tried:
        return []
    rate = min(tried, key=loss)["rate"]
    return [run for run in runs if run["rate"] == rate]
