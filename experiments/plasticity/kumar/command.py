"""`python -m experiments.plasticity --protocol kumar`: the field's own problems, rows and scores.

    python -m experiments.plasticity --protocol kumar --problems cifar_5plus1 --methods relu lk_relu_ours

Each row tries the rates with three seeds; ten other seeds at the better one are the result. A run is added to the
record when it ends, and one that is cut off goes on at its last task: the same command again makes what is missing.
Problems, nets, starts and methods have a file each beside this one.

Expected: on two cores minutes a run, but hours for Random-label CIFAR. results/plasticity has 5+1. MLPs of all seeds
are one program; conv nets run one by one on a CPU, where several at once are slower.

Reference: Kumar et al., Maintaining plasticity in continual learning via regenerative regularization, 2023; Lillo and
Cheney, Activation function design sustains plasticity in continual learning, 2026, whose numbers stand beside ours.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import jax
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine.checks import command_line, in_range, known
from experiments.engine.console import Console
from experiments.engine.errors import UsageError
from experiments.engine.files import write_whole
from experiments.engine.records import Record
from experiments.engine.study import open_record
from experiments.engine.tfds import how_to_prepare
from experiments.plasticity.kumar import table
from experiments.plasticity.kumar.methods import METHODS
from experiments.plasticity.kumar.problems import PROBLEMS, Problem
from experiments.plasticity.kumar.runs import Work, learn
from experiments.plasticity.kumar.table import FIRST_SEED

Run = tuple[int, float]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The four problems of Kumar et al., and whether a net that is scored online goes on learning."""

    protocol: Literal["kumar"] = "kumar"
    """These problems; streams: those of `python -m experiments.plasticity` without this option."""
    problems: tuple[str, ...] = ("all",)
    """One or several; all: all four. A wrong name lists them."""
    methods: tuple[str, ...] = ("all",)
    """One or several rows; all: every one. A wrong name lists them."""
    rates: tuple[float, ...] = (1e-3, 1e-4)
    """Of Adam. The best one is chosen by seeds 0, 1, 2; with a single one there is no choice."""
    tuning_seeds: int = FIRST_SEED
    """How many of these three seeds choose the rate. 0 chooses none: the first rate is taken."""
    seeds: int = 10
    """How many seeds are the result, from 3. 0: only the rates are tried, a single one too."""
    tasks: int = 0
    """How many tasks of each problem; 0: its own number."""
    out: str = "runs/plasticity_kumar"
    """The folder of the record. One that is there and was made alike is resumed."""
    data_dir: str | None = None
    """The folder of TensorFlow Datasets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, with a UsageError; name all problems and methods."""
    ranges = {"tasks": (0, 500), "seeds": (0, 1000), "tuning_seeds": (0, FIRST_SEED)}
    in_range(settings, ranges)  # pyright: ignore[reportArgumentType]
    for rate in settings.rates:
        if not 0 < rate < math.inf:
            raise UsageError(f"--rates are positive numbers, got {rate}; try 1e-3")
    if not settings.rates or not settings.seeds + settings.tuning_seeds:
        raise UsageError("there is nothing to run; give --rates at least one, and --seeds or --tuning-seeds")
    problems = known("problems", PROBLEMS if "all" in settings.problems else settings.problems, PROBLEMS)
    most = {name: PROBLEMS[name].tasks for name in problems if settings.tasks > PROBLEMS[name].tasks}
    if most:
        has = ", ".join(f"{name} has {tasks}" for name, tasks in most.items())
        raise UsageError(f"--tasks {settings.tasks} is more than there are: {has}; pass fewer, or 0 for each one's own")
    return dataclasses.replace(
        settings,
        problems=problems,
        rates=tuple(dict.fromkeys(settings.rates)),
        methods=known("methods", METHODS if "all" in settings.methods else settings.methods, METHODS),
    )


def main() -> None:
    """Run what is missing, then print the tables and draw the pictures."""
    settings, console = check(command_line(Settings, "python -m experiments.plasticity --protocol kumar")), Console()
    sets = {name: _load(name, settings) for name in dict.fromkeys(PROBLEMS[p].dataset for p in settings.problems)}
    of_method = len(_tuning(settings)) + settings.seeds
    total = sum(_tasks(settings, PROBLEMS[name]) for name in settings.problems) * of_method * len(settings.methods)
    told = {name: {"fingerprint": half.fingerprint, "description": str(half)} for name, half in sets.items()}
    data = SimpleNamespace(identity=told)  # of the command that began the record; each line names its own set
    facts = {name: dataclasses.asdict(problem) for name, problem in PROBLEMS.items()}  # which are run, the lines say
    protocol, same = {"kumar": json.loads(json.dumps(facts))}, ("experiment", "protocol")  # as JSON values
    with (
        open_record("plasticity", settings.out, protocol=protocol, data=data, same=same) as record,
        console.progress("tasks", total) as advance,
    ):
        for name in settings.problems:
            _same_data(record, name, sets[PROBLEMS[name].dataset])
        for name in settings.problems:
            for row in settings.methods:
                problem = PROBLEMS[name]
                work = Work(problem, METHODS[row], sets[problem.dataset], _tasks(settings, problem))
                _of_row(record, name, row, work, settings, console.say, advance)
                jax.clear_caches()
        for name, tasks in table.groups(record.lines):
            title = f"{PROBLEMS[name].says}, {tasks} tasks: online accuracy, %"
            console.table(title, table.table(name, tasks, record.lines))
            suffix = "" if tasks == PROBLEMS[name].tasks else f"_{tasks}"
            drawn = table.picture(name, tasks, record.lines, record.folder / f"{name}{suffix}.png")
            console.say(f"picture  {drawn}")
        write_whole(record.folder / "table.md", table.markdown(record.config, record.lines))
        console.say(f"record   {record.folder}")


def _said(data: data_lib.Split) -> str:
    return f"{data}, fingerprint {data.fingerprint}"


def _same_data(record: Record, name: str, data: data_lib.Split) -> None:
    """Refuse to add runs of a problem to those on other images."""
    there = record.find({"problem": name})
    if there is not None and there["data"] != _said(data):
        raise UsageError(
            f"the runs of {name} in {record.folder} are on {there['data']}, this is {_said(data)}; pass another --out"
        )


def _of_row(
    record: Record, name: str, row: str, work: Work, settings: Settings, say: Callable[[str], None],
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Add the runs of a row that the record lacks: the rates, then the result at the best."""
    told = {"problem": name, "row": row, "tasks": work.tasks}
    shape = work.method.shape(work.problem)
    facts = {"units": list(shape.sizes), "parameters": _parameters(work), "data": _said(work.data)}

    def once(runs: Sequence[Run]) -> None:
        keys = [{**told, "rate": rate, "seed": seed} for seed, rate in runs]
        new = [run for run, key in zip(runs, keys, strict=True) if record.find(key) is None]
        which = f"{name}-{row}-{work.tasks}-{work.data.fingerprint[:8]}-" + "-".join(
            f"{seed}at{rate:g}" for seed, rate in new
        )
        unfinished = record.checkpoints(which)

        def make(_missing: Sequence[int]) -> list[dict[str, Any]]:
            found = learn(work, new, unfinished=unfinished, on_task=lambda done: advance(done * len(new)))
            for (seed, rate), line in zip(new, found, strict=True):
                say(f"{name} {row}, rate {rate:g}, seed {seed}: {100 * line['score']:.2f}")
            return [{**facts, **line} for line in found]

        advance(work.tasks * sum(record.find(key) is not None for key in keys))
        record.once_each(keys, make)
        unfinished.clear()

    tuning = _tuning(settings)
    for group in _groups(tuning, work.problem):
        once(group)
    rate = table.best_rate([line for line in record.lines if told.items() <= line.items()])
    rate = settings.rates[0] if rate is None or not tuning else rate
    for group in _groups([(FIRST_SEED + i, rate) for i in range(settings.seeds)], work.problem):
        once(group)


def _tuning(settings: Settings) -> list[Run]:
    """The runs that choose the rate; those that are all there is, with --seeds 0."""
    needed = len(settings.rates) > 1 or not settings.seeds
    return [(seed, rate) for rate in settings.rates for seed in range(settings.tuning_seeds)] if needed else []


def _groups(runs: Sequence[Run], problem: Problem) -> list[Sequence[Run]]:
    """Which runs are one program: all, but on a CPU each conv net is its own, where several at once are slower."""
    size = 1 if problem.is_conv and jax.default_backend() == "cpu" else max(1, len(runs))
    return [runs[i : i + size] for i in range(0, len(runs), size)]


def _tasks(settings: Settings, problem: Problem) -> int:
    return settings.tasks or problem.tasks


def _parameters(work: Work) -> int:
    """How many the net has after the last task, those of norms too."""
    net = nnx.eval_shape(lambda: work.method.net(work.problem, jax.random.key(0), work.method.at_end))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param)))


def _load(name: str, settings: Settings) -> data_lib.Split:
    try:
        return data_lib.load_split(name, settings.data_dir)
    except UsageError as error:
        of = [p for p in settings.problems if PROBLEMS[p].dataset == name]
        what = str(error).split("; ")[0]
        raise UsageError(
            f"{', '.join(of)} needs {name}: {what}; {how_to_prepare(name)} with --data-dir, or choose other --problems"
        ) from error
