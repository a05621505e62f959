"""What every table can be told on its command line, and the grid of nets that it means."""

import dataclasses
import itertools
import math
from typing import Any, Literal, TypeVar

from experiments.engine import data as data_lib
from experiments.engine.checks import option
from experiments.engine.errors import UsageError
from experiments.engine.rows import InitName, Norm, Row, check_init

SMALL_SET = 10_000  # training images; the rules for batch size and epochs change there
Preset = Literal["auto", "quick", "paper"]
SeedsMode = Literal["auto", "sequential", "vmap", "spread"]
Cell = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options that all tables share; a table's own Settings adds to them and changes defaults."""

    preset: Preset = "auto"
    """quick: minutes, digits. paper: as printed, hours. auto: quick, CIFAR-10 if prepared. Other options override."""
    act: tuple[str, ...] = ("lk_relu",)
    """Rows: relu, lk_relu (linked), relu_sqrt2 (wider by sqrt(2)), relu_bn (batch norm); all. Wrong names list them."""
    norm: Norm = "none"
    """batch: batch norm before every activation, as if each row ended in _bn."""
    match_params: bool = False
    """Use int(width * sqrt(2)) units, as if each row ended in _sqrt2."""
    init: tuple[InitName, ...] = ("auto",)
    """One or several. auto: looks_linear where the link allows it, else orthogonal at its gain. glorot: the paper's."""
    lr: tuple[float, ...] = ()
    """One or several learning rates; where none is given, the table's."""
    dataset: str = "auto"
    """digits (embedded), or a TFDS name such as cifar10. auto: cifar10 where it is prepared, else digits."""
    data_dir: str | None = None
    """The TFDS folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    train_size: int | None = None
    """Train on the first that many images only; by default on all."""
    held_out: int | None = None
    """Hold the last that many training images out, and evaluate on them, not on the test set: to choose rates."""
    epochs: int | None = None
    """Passes over the training set; by default 30 for up to 10,000 images, else 6."""
    batch_size: int | None = None
    """By default 32 for up to 10,000 training images, else 128."""
    decay: float = 0.0
    """Keras' decay: the rate of update t is lr / (1 + decay * t)."""
    optimizer: Literal["adam", "rmsprop", "sgd", "nesterov"] = "adam"
    """With Keras' update rules."""
    augment: bool = False
    """Flip images at random and shift them by up to 10 %."""
    shuffle: bool = True
    """Draw a new order of the examples for each epoch; the paper did not."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Where a loss, gradient or parameter is NaN or infinite: stop the net and say where, or skip and count updates."""
    seed: int = 0
    """The first seed."""
    seeds: int = 1
    """How many consecutive seeds to run."""
    seeds_mode: SeedsMode = "auto"
    """sequential: one after another. vmap: all in one program. spread: over the devices. auto: sequential."""
    devices: int = 1
    """Split batches over that many; on a CPU they are virtual. With --distributed: of all processes, by default all."""
    time_steps: int = 0
    """After the training, time that many steps of each net, in turns; 0 does not."""
    out: str | None = None
    """The folder for the record; by default a new one in runs/."""
    resume: str | None = None
    """Go on with this record and its settings; takes --data-dir, --checkpoint-every and those of --distributed."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints."""
    distributed: bool = False
    """Be one of several processes that train together, each started with this command; see docs/scaling.md."""
    coordinator: str | None = None
    """HOST:PORT of process 0; by default the cluster's (SLURM, Cloud TPU, Open MPI, Kubernetes)."""
    process_id: int | None = None
    """Which process this is, from 0; by default as the cluster says."""
    process_count: int | None = None
    """How many processes there are; by default as the cluster says."""
    start_timeout: int = 120
    """Seconds that the processes wait for each other at the start and at the end."""


AXES = ("act", "init", "lr")
"""The options whose values are combined in every table. A table names its own axes beside them."""
_OF_PROCESSES = ("distributed", "coordinator", "process_id", "process_count", "start_timeout")
NOT_PROTOCOL = (
    "preset", "norm", "match_params", "seed", "seeds", "seeds_mode", "devices", "data_dir", "out", "resume",
    "checkpoint_every", "time_steps", *_OF_PROCESSES,
)  # fmt: skip
"""What says where and how a run was made, or is part of a row's name, and not what was computed."""
_NOT_RECORDED = ("norm", "match_params", "data_dir", "out", "resume", "checkpoint_every", *_OF_PROCESSES)
OF_THIS_COMMAND = ("data_dir", "checkpoint_every", *_OF_PROCESSES)
"""What a command that resumes a record may say anew."""
_MOST_SEEDS = 2**31
_MOST = 1_000_000  # of anything that is counted

AnySettings = TypeVar("AnySettings", bound=Settings)


def resumes(settings: Settings, default: Settings) -> bool:
    """Whether a record is to be resumed; options that it has already fixed are refused."""
    if settings.resume is None:
        return False
    for name, value in vars(settings).items():
        if name not in ("resume", *OF_THIS_COMMAND) and value != getattr(default, name):
            given = option(name)
            raise UsageError(f"--resume takes the settings of its record, got {given} too; leave {given} out")
    return True


def named_rows(settings: Settings, all_rows: tuple[str, ...]) -> tuple[str, ...]:
    """The rows by their full names, each once; a name that says what --norm or --match-params says is refused."""
    rows = []
    for name in itertools.chain.from_iterable(all_rows if act == "all" else (act,) for act in settings.act):
        row = Row.parse(name)
        twice = (row.sqrt2 and settings.match_params) or (row.norm == "batch" and settings.norm == "batch")
        if twice and name in settings.act:
            raise UsageError(f"--act {name} says what --match-params or --norm says again; leave one out")
        norm = "batch" if settings.norm == "batch" else row.norm
        rows.append(dataclasses.replace(row, sqrt2=row.sqrt2 or settings.match_params, norm=norm).name)
    return tuple(dict.fromkeys(rows))


def check(settings: AnySettings, all_rows: tuple[str, ...], axes: tuple[str, ...] = ()) -> AnySettings:
    """Refuse what cannot run, before anything is loaded or written; name the rows in full.

    Axes are the table's own options with several values; their numbers are at least 1.
    """
    for name in (*axes, "width", "seeds", "epochs", "batch_size", "devices", "train_size", "held_out"):
        value = getattr(settings, name, None)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and number < 1:
                raise UsageError(f"{option(name)} is at least 1, got {number}")
            if isinstance(number, int) and number > _MOST:
                raise UsageError(f"{option(name)} is at most {_MOST:,}, got {number:,}")
    for name in ("act", "init", *axes):
        if getattr(settings, name) == ():
            raise UsageError(f"{option(name)} takes at least one value, got none")
    for lr in settings.lr:
        if not 0 < lr < math.inf:
            raise UsageError(f"--lr is a positive number, got {lr}; try 1e-3")
    for name in ("decay", "checkpoint_every"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise UsageError(f"{option(name)} is 0 or more, got {getattr(settings, name)}")
    if settings.time_steps < 0:
        raise UsageError(f"--time-steps is 0 or more, got {settings.time_steps}")
    if not 0 <= settings.seed <= _MOST_SEEDS - settings.seeds:
        raise UsageError(f"all seeds are between 0 and 2^31, got {settings.seeds} from {settings.seed}; lower --seed")
    check_spread(settings)
    rows = named_rows(settings, all_rows)
    for act, init in itertools.product(rows, settings.init):
        check_init(init, Row.parse(act))
    return dataclasses.replace(settings, act=rows, norm="none", match_params=False)


def check_spread(settings: Settings) -> None:
    """Refuse seeds that the devices do not divide."""
    if settings.seeds_mode == "spread" and settings.seeds % settings.devices:
        raise UsageError(
            f"--seeds-mode spread gives every device as many seeds, got {settings.seeds} seeds for {settings.devices} "
            "devices; make --seeds a multiple of --devices"
        )


def check_processes(settings: Settings) -> None:
    """Refuse options of processes that come without --distributed, or are out of range."""
    given = [name for name in ("coordinator", "process_id", "process_count") if getattr(settings, name) is not None]
    if given and not settings.distributed:
        raise UsageError(f"{option(given[0])} goes with --distributed, which is not there; add it")
    for name in ("process_count", "start_timeout"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"{option(name)} is at least 1, got {value}")
    count = settings.process_count or 1
    if settings.distributed and settings.devices > 1 and settings.devices % count:
        raise UsageError(
            f"--devices counts those of all processes, got {settings.devices} devices for {count} processes; make it a "
            "multiple of --process-count, or leave it out"
        )


LEFT_TO_THE_DATA = ("dataset", "epochs", "batch_size")
"""The settings that `settle` may fill in."""


def settle(settings: AnySettings, data: data_lib.Dataset) -> AnySettings:
    """Fill in the defaults that depend on the data, by the rules that --help states."""
    size = len(data.train_labels)
    small = size <= SMALL_SET
    batch_size = settings.batch_size or min(32 if small else 128, size)
    if batch_size > size:
        raise UsageError(f"--batch-size is at most the {size:,} training images of {data.name}, got {batch_size:,}")
    if settings.seeds_mode != "spread" and batch_size % settings.devices:
        raise UsageError(
            f"each device takes an equal part of a batch, got --batch-size {batch_size:,} for {settings.devices} "
            "devices; make it a multiple of them"
        )
    epochs = settings.epochs or (30 if small else 6)
    return dataclasses.replace(settings, dataset=data.name, batch_size=batch_size, epochs=epochs)


def recorded(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values, without this machine's paths."""
    kept = {name: value for name, value in vars(settings).items() if name not in _NOT_RECORDED}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
