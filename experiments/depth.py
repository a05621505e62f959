"""Table 2: a very deep, very narrow network, with each activation and its link.

    python -m experiments.depth --act relu lk_relu --dataset digits

Expected, test accuracy of the last epoch, digits, 50 layers of 4 units, 30 epochs, 3 seeds: see results/README.md.
The paper (CIFAR-10, 200 epochs, best epoch, one run): relu 0.1000, lk_relu 0.2014 (later edition: 0.5667).
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
import tyro
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import plots, records, tables, training
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.optimizers import OPTIMIZERS
from experiments.models.depth_net import DepthNet, at_start, identity
from linked_jax import (
    Link,
    default_kernel_init,
    get_activation,
    inverse_time_decay,
    looks_linear,
    variance_preserving,
)

_SMALL_SET = 10_000  # training images; the rules for batch size and epochs change there
_UNROLL_UP_TO = 100  # layers; beyond it, and on small sets, compile time rules and layers are scanned


@dataclasses.dataclass(frozen=True)
class Settings:
    """A very deep, very narrow network, with each activation and its link (table 2 of the paper)."""

    preset: Literal["quick", "paper"] = "quick"
    """quick: minutes on 2 cores. paper: the paper's protocol on CIFAR-10 (hours). Explicit options win over it."""
    act: tuple[str, ...] = ("lk_relu",)
    """One or several activations, such as relu or lk_relu; a wrong name lists them all."""
    depth: tuple[int, ...] = (50,)
    """One or several numbers of 3x3 layers."""
    width: int = 4
    """Units in every layer."""
    match_params: bool = False
    """Use int(width * sqrt(2)) units: a plain net with about the parameters of a linked one."""
    norm: Literal["none", "batch"] = "none"
    """batch: batch norm before every activation."""
    init: Literal["auto", "glorot", "he", "looks_linear"] = "auto"
    """auto: looks_linear where the link allows it, else orthogonal at its gain. glorot is the paper's."""
    dataset: str = "auto"
    """digits (embedded), or a TFDS name such as cifar10. auto: cifar10 where it is prepared, else digits."""
    data_dir: str | None = None
    """The TFDS folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    epochs: int | None = None
    """Passes over the training set; by default 30 for up to 10,000 images, else 6."""
    batch_size: int | None = None
    """By default 32 for up to 10,000 training images, else 128."""
    lr: float | None = None
    """Learning rate; by default 1e-3 up to 50 layers, then 0.05 / depth."""
    decay: float = 0.0
    """Keras' decay: the rate of update t is lr / (1 + decay * t)."""
    optimizer: Literal["adam", "rmsprop", "sgd", "nesterov"] = "adam"
    """With Keras' update rules."""
    shuffle: bool = True
    """Draw a new order of the examples for each epoch; the paper did not."""
    seed: int = 0
    """The first seed."""
    seeds: int = 1
    """How many consecutive seeds to run."""
    scan_layers: Literal["auto", "yes", "no"] = "auto"
    """Loop over the layers: fast to compile. auto: no for up to 100 layers and more than 10,000 images, else yes."""
    out: str | None = None
    """The folder for the record; by default a new one in runs/."""


PRESETS = {
    "quick": Settings(),
    "paper": Settings(
        preset="paper",
        dataset="cifar10",
        init="glorot",
        epochs=200,
        batch_size=32,
        lr=1e-3,
        decay=1e-6,
        shuffle=False,
        seed=100,
    ),
}

KernelInit = Callable[..., Any]
INITS: dict[str, KernelInit] = {
    "auto": default_kernel_init,
    "looks_linear": looks_linear,
    "glorot": lambda _link, **_: jax.nn.initializers.glorot_uniform(),
    "he": lambda _link, **_: jax.nn.initializers.he_normal(),
}


def main() -> None:
    """Read the command line, train every net, and leave a record, a table and a picture."""
    console = Console()
    settings = check(parse(sys.argv[1:]))
    folder = records.new_folder(settings.out, f"depth-{'-'.join(settings.act)}")
    data = data_lib.load(settings.dataset, settings.data_dir)
    settings = settle(settings, data)
    nets = list(dict.fromkeys((act, depth) for act in settings.act for depth in settings.depth))
    console.say(f"data     {data} (fingerprint {data.fingerprint})")
    console.say(f"device   {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for act, depth in nets:
        console.say(f"network  {describe(settings, act, depth, data)}")
    config = {
        "experiment": "depth",
        "settings": {
            key: value for key, value in records.as_config(settings).items() if key not in ("data_dir", "out")
        },
        "data": {"name": data.name, "fingerprint": data.fingerprint, "description": str(data)},
        "parameters": {f"{act} {depth}": parameter_count(settings, act, depth, data) for act, depth in nets},
        "learning_rate": {str(depth): learning_rate(settings, depth) for depth in settings.depth},
    }
    record = records.Record(folder, config)
    lines: list[dict[str, Any]] = []
    try:
        for act, depth in nets:
            optimizer = make_optimizer(settings, depth)
            for seed in range(settings.seed, settings.seed + settings.seeds):
                for line in run(settings, data, act, depth, seed, optimizer, console):
                    record.add(line)
                    lines.append(line)
    finally:
        record.close()
    seeds = f"mean ± standard deviation of {settings.seeds} seeds" if settings.seeds > 1 else f"seed {settings.seed}"
    console.table(
        f"Test accuracy on {data.name}, {seeds}; dead units (zero on all test images) and the first layer with one; "
        "mean square of the pre-activations of the first and the last layer.",
        tables.depth_table(lines, width=units(settings)),
    )
    picture = plots.depth_picture(lines, folder / "depth.png", title=str(data))
    console.say(f"record   {folder}\npicture  {picture}")


def parse(arguments: list[str]) -> Settings:
    """The settings of a command line: the preset's, where no option says otherwise."""
    preset = argparse.ArgumentParser("python -m experiments.depth", add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", choices=sorted(PRESETS), default="quick")
    name = preset.parse_known_args(arguments)[0].preset
    return tyro.cli(Settings, args=arguments, default=PRESETS[name], prog="python -m experiments.depth")


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, before anything is loaded or written.

    Raises:
      UsageError: with what is wrong, what was received and what to do.
    """
    positive: dict[str, Any] = {
        "--depth": settings.depth, "--width": settings.width, "--seeds": settings.seeds,
        "--epochs": settings.epochs, "--batch-size": settings.batch_size,
    }  # fmt: skip
    for option, value in positive.items():
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < 1:
                raise UsageError(f"{option} is at least 1, got {number}")
    if not settings.act or not settings.depth:
        raise UsageError("--act and --depth take at least one value each, got none")
    if settings.lr is not None and not (0 < settings.lr < math.inf):
        raise UsageError(f"--lr is a positive number, got {settings.lr}; try 1e-3")
    if not 0 <= settings.decay < math.inf:
        raise UsageError(f"--decay is 0 or more, got {settings.decay}")
    if not 0 <= settings.seed <= 2**31 - settings.seeds:
        raise UsageError(f"all seeds are between 0 and 2^31, got {settings.seeds} from {settings.seed}; lower --seed")
    for act in settings.act:
        try:
            link = at_start(activation(act)(1))
        except ValueError as error:
            raise UsageError(f"--act: {error}") from error
        try:
            INITS[settings.init](link)
        except ValueError as error:
            raise UsageError(f"--init {settings.init} does not fit --act {act}: {error}; take --init auto") from error
    return settings


def settle(settings: Settings, data: data_lib.Dataset) -> Settings:
    """Fill in the defaults that depend on the data, by the rules that --help states."""
    size = len(data.train_labels)
    small = size <= _SMALL_SET
    batch_size = settings.batch_size or (32 if small else 128)
    if batch_size > size:
        raise UsageError(f"--batch-size is at most the {size:,} training images of {data.name}, got {batch_size:,}")
    return dataclasses.replace(
        settings, dataset=data.name, batch_size=batch_size, epochs=settings.epochs or (30 if small else 6)
    )


def activation(act: str) -> Callable[[int], Any]:
    """The number of features -> a link, or a new PReLU module.

    >>> from experiments.depth import activation
    >>> activation("lk_relu")(4).arity
    2
    """
    found = get_activation(act)
    return (lambda features: found) if isinstance(found, Link) else found


def build(settings: Settings, act: str, depth: int, data: data_lib.Dataset, seed: int) -> DepthNet:
    """The network of one run."""
    kernel_init = INITS[settings.init]
    variance = settings.init in ("auto", "looks_linear")
    scan = depth > _UNROLL_UP_TO or len(data.train_labels) <= _SMALL_SET
    return DepthNet(
        data.train_images.shape[1:],
        data.classes,
        depth=depth,
        width=units(settings),
        activation=activation(act),
        stem_init=lambda stride: (
            variance_preserving(identity) if variance and stride > 1 else kernel_init(identity, strides=stride)
        ),
        kernel_init=kernel_init,
        norm=settings.norm,
        unroll=not {"auto": scan, "yes": True, "no": False}[settings.scan_layers],
        rngs=nnx.Rngs(seed),
    )


def units(settings: Settings) -> int:
    """The width, or int(width * sqrt(2)) to match a linked net's parameters."""
    return int(settings.width * math.sqrt(2)) if settings.match_params else settings.width


def learning_rate(settings: Settings, depth: int) -> float:
    """--lr, or 1e-3 up to 50 layers and 0.05 / depth beyond: the usable rate falls about as 1 / depth."""
    return settings.lr or 1e-3 * min(1.0, 50 / depth)


def make_optimizer(settings: Settings, depth: int) -> optax.GradientTransformation:
    """The optimiser with the learning rate's schedule."""
    return OPTIMIZERS[settings.optimizer](inverse_time_decay(learning_rate(settings, depth), settings.decay))


def parameter_count(settings: Settings, act: str, depth: int, data: data_lib.Dataset) -> int:
    """The number of trained parameters, without building them."""
    model = nnx.eval_shape(functools.partial(build, settings, act, depth, data, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def describe(settings: Settings, act: str, depth: int, data: data_lib.Dataset) -> str:
    """One line on what runs."""
    norm = ", batch norm" if settings.norm == "batch" else ""
    rate = learning_rate(settings, depth)
    return (
        f"{act}, {depth:,} layers of {units(settings)} units{norm}, "
        f"{parameter_count(settings, act, depth, data):,} parameters, init {settings.init}, "
        f"{settings.optimizer} at {rate:g}, batch {settings.batch_size}, {settings.epochs} epochs"
    )


def run(settings: Settings, data: data_lib.Dataset, act: str, depth: int, seed: int, optimizer: Any, console: Console):
    """Train one network; yields a line of metrics for each epoch."""
    epochs, batch_size = settings.epochs or 1, settings.batch_size or 1
    steps = epochs * -(-len(data.train_labels) // batch_size)
    start = time.perf_counter()
    with console.progress(f"{act} {depth} seed {seed}", steps) as advance:
        model = build(settings, act, depth, data, seed)
        fitting = training.fit(
            model, optimizer, data, epochs=epochs, batch_size=batch_size, key=jax.random.key(seed),
            shuffle=settings.shuffle, on_steps=advance,
        )  # fmt: skip
        for metrics in fitting:
            seconds = time.perf_counter() - start
            console.say(
                f"{act} {depth} seed {seed}  epoch {metrics['epoch']:>3}/{epochs}  loss {metrics['train_loss']:.4f}  "
                f"test {metrics['test_accuracy']:.4f}  dead {metrics['dead_units']}  {seconds:.0f} s"
            )
            yield {"act": act, "depth": depth, "seed": seed, **metrics}


if __name__ == "__main__":
    run_command(main)
