"""Units that start dead, on data that one can see: decision surfaces and gradients along training.

    python -m experiments.dynamics

A net with one hidden layer learns two moons in the plane, by gradient descent on the whole set:

    z = W x + b,   logits = K f(z) + c

The columns of W start with length 1 and every b at -10, and every x is shorter than 10. So z < 0 on all the data, for
every seed: a ReLU starts dead. All activations have the same settings. Accuracy after 10,000 steps, with --seeds 5
(results/records/dynamics; half a minute on 2 cores):

    relu    leaky_relu    lk_relu    selu     lk_selu
    0.500   0.940         0.989      0.921    0.990

A dead ReLU has no gradient, whatever the optimiser; a linked unit passes one. But while z has one sign on all the data,
lk_relu is linear. At the default rate it first overshoots, its mirror members being about 10, and so the kinks get into
the data.

The same command with the --out of a record resumes it. The toy is ours: the paper has no protocol for one, so there is
no --preset paper. Beside it, links.png is the paper's figure 1 for every named link: members, derivatives and
certificate.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Literal

import jax

from experiments.dynamics import links, plots
from experiments.dynamics.toy import Toy, moons
from experiments.dynamics.training import snapshots, train
from experiments.engine import folders
from experiments.engine.checks import command_line, in_range
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.study import open_record
from linked_jax import activation_arity

_MOST = {"units": (1, 10_000), "steps": (1, 10**9), "seeds": (1, 10_000)}  # a picture's lines, a 32-bit count, a table
_LARGEST_BIAS = 1e6  # well within float32


@dataclasses.dataclass(frozen=True)
class Settings(Toy):
    """Units that start dead, on data that one can see: decision surfaces and gradients along training."""

    preset: Literal["quick"] = "quick"
    """There is no other: the paper has no protocol for this toy."""
    act: tuple[str, ...] = ("relu", "leaky_relu", "lk_relu", "selu", "lk_selu")
    """One or several activations; a wrong name lists them all."""
    seed: int = 0
    """The first seed; it draws the kernels. The data are always the same."""
    seeds: int = 1
    """How many consecutive seeds to run; the picture shows the first."""
    out: str | None = None
    """The folder of the record; one that is there and was made alike is resumed. By default a new one in runs/."""


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, with a UsageError, before anything is written; name each activation once."""
    in_range(settings, _MOST)
    if not abs(settings.bias) <= _LARGEST_BIAS:  # nor nan
        raise UsageError(f"--bias is a number up to {_LARGEST_BIAS:g} in size, got {settings.bias}; try -10")
    if not 0 < settings.lr < math.inf:
        raise UsageError(f"--lr is a positive number, got {settings.lr}; try 0.1")
    if not 0 <= settings.seed <= 2**31 - settings.seeds:
        raise UsageError(f"all seeds are between 0 and 2^31, got {settings.seeds} from {settings.seed}; lower --seed")
    if not settings.act:
        raise UsageError("--act takes at least one value, got none")
    for act in settings.act:
        try:
            activation_arity(act)
        except ValueError as error:
            raise UsageError(f"--act: {error}") from error
    return dataclasses.replace(settings, act=tuple(dict.fromkeys(settings.act)))


def main() -> None:
    """Train the nets that the record lacks; leave a record, a table and two pictures."""
    settings, console = check(command_line(Settings, "python -m experiments.dynamics")), Console()
    folder = Path(settings.out) if settings.out else folders.new_folder(None, "dynamics")
    data, toy = moons(), Toy(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Toy)})
    with open_record("dynamics", folder, protocol=dataclasses.asdict(toy), data=data) as record:
        console.say(f"data     {data} (fingerprint {data.identity['fingerprint']})")
        console.say(f"device   {jax.devices()[0].device_kind}, jax {jax.__version__}")
        console.say(f"network  {toy}, {toy.steps:,} steps on the whole set")
        seeds = range(settings.seed, settings.seed + settings.seeds)
        runs = [{"act": act, "seed": seed} for act in settings.act for seed in seeds]
        missing = [run for run in runs if record.find(run) is None]
        with console.progress("training", settings.steps * len(missing)) as advance:
            make = functools.partial(train, toy, data, say=console.say, on_steps=advance)
            lines = [line for run in runs for line in record.once_all(run, functools.partial(make, **run))]
    over = f"seed {settings.seed}" if settings.seeds == 1 else f"mean ± standard deviation of {settings.seeds} seeds"
    console.table(
        f"From step 0 to step {settings.steps:,}, and accuracy at the end; {over}. Dead units: zero on all the data. "
        "One-sided units: z has one sign there, so that lk_relu is linear. Gradient: at step 0, mean norm of a unit's.",
        plots.table(toy, lines),
    )
    shown = [line for line in lines if line["seed"] == settings.seed]
    title = f"{data}; {toy}, seed {settings.seed}"
    with console.progress("surfaces", len(settings.act) * len(snapshots(settings.steps))) as advance:
        sheet = plots.picture(shown, data, toy, folder / "dynamics.png", title=title, on_surface=advance)
    with console.progress("certificates", len(links.named_links())) as advance:
        figure_1 = links.picture(folder / "links.png", on_link=advance)
    console.say(f"record   {folder}\npicture  {sheet}\npicture  {figure_1}")


if __name__ == "__main__":
    run_command(main)
