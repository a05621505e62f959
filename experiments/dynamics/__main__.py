"""Units that start dead, on data that one can see: decision surfaces and gradients along training.

    python -m experiments.dynamics

A net with one hidden layer learns two moons in the plane, by gradient descent on the whole set:

    z = W x + b,   logits = K f(z) + c

The columns of W start with length 1 and every b at -10, and every x is shorter than 10. So z < 0 on all the data, for
every seed: a ReLU starts dead. All activations have the same settings. Accuracy after 10,000 steps, with --seeds 5:

    relu    leaky_relu    lk_relu    selu     lk_selu
    0.500   0.940         0.989      0.921    0.990      --lr 0.1 (the default); half a minute on 2 cores
    0.500   0.812         0.885      0.827    0.947      --lr 0.01
    0.500   0.985         0.944      1.000    0.999      --optimizer adam --lr 0.03

A dead ReLU has no gradient, whatever the optimiser; a linked unit passes one. But while z has one sign on all the data,
lk_relu is linear: with small steps it settles at the best straight line, 0.885. At 0.1 it first overshoots, its mirror
members being about 10, and so the kinks get into the data. Adam enlarges what small gradients leaky_relu and selu have.

The toy is ours: the paper has no protocol for one, so there is no --preset paper. Beside it, links.png is the paper's
figure 1 for every named link: members, derivatives and certificate.
"""

import dataclasses
import functools
import hashlib
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.dynamics import plots as dynamics_plots
from experiments.engine import records, tables
from experiments.engine.console import Console
from experiments.engine.errors import NonFiniteLossError, UsageError, run_command
from experiments.engine.optimizers import OPTIMIZERS
from linked_jax import LinkedLinear, activation_arity, get_activation, live_units

_MOST = {"units": 10_000, "steps": 10**9, "seeds": 10_000}  # a picture's lines, a 32-bit count, a table
_LARGEST_BIAS = 1e6  # well within float32

Line = dict[str, Any]
Data = tuple[Float[Array, "n 2"], Int[Array, " n"]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Units that start dead, on data that one can see: decision surfaces and gradients along training."""

    preset: Literal["quick"] = "quick"
    """There is no other: the paper has no protocol for this toy."""
    act: tuple[str, ...] = ("relu", "leaky_relu", "lk_relu", "selu", "lk_selu")
    """One or several activations; a wrong name lists them all."""
    bias: float = -10.0
    """Where the bias of every hidden unit starts; from -10 down every ReLU is dead on all the data."""
    units: int = 8
    """Hidden units."""
    steps: int = 10_000
    """Updates, each on the whole set."""
    lr: float = 0.1
    """Learning rate."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd: a unit moves as far as its gradient says. adam rescales every gradient that is not exactly zero."""
    seed: int = 0
    """The first seed; it draws the kernels. The data are always the same."""
    seeds: int = 1
    """How many consecutive seeds to run; the picture shows the first."""
    out: str | None = None
    """The folder for the record; by default a new one in runs/."""


class Net(nnx.Module):
    """z = W x + b, logits = K f(z) + c; W has columns of length 1, b is the same for all units."""

    def __init__(self, units: int, act: str, bias: float, *, rngs: nnx.Rngs):
        link = get_activation(act, units)
        constant = nnx.initializers.constant(bias)
        self.hidden = nnx.Linear(2, units, kernel_init=unit_columns, bias_init=constant, rngs=rngs)
        self.read_out = LinkedLinear(units, 2, link=link, rngs=rngs)

    def __call__(self, x: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
        """x (n, 2) -> logits (n, 2)."""
        return self.read_out(self.hidden(x))


def main() -> None:
    """Read the command line, train every net, and leave a record, a table and two pictures."""
    console = Console()
    settings = check(tyro.cli(Settings, args=sys.argv[1:], prog="python -m experiments.dynamics"))
    folder = records.new_folder(settings.out, "dynamics")
    points, labels = data = moons()
    fingerprint = hashlib.sha256(np.asarray(points).tobytes() + np.asarray(labels).tobytes()).hexdigest()[:16]
    description = f"two moons: {len(labels)} points, coordinates within ±{np.abs(points).max():.1f}"
    console.say(f"data     {description} (fingerprint {fingerprint})")
    console.say(f"device   {jax.devices()[0].device_kind}, jax {jax.__version__}")
    about_net = f"{settings.units} units, first biases {settings.bias:g}, {settings.optimizer} at {settings.lr:g}"
    console.say(f"network  {about_net}, {settings.steps:,} steps on the whole set")
    about = {"name": "moons", "fingerprint": fingerprint, "description": description}
    values = {key: value for key, value in dataclasses.asdict(settings).items() if key != "out"}
    record = records.Record.create(folder, {"experiment": "dynamics", "settings": values, "data": about})
    optimizer = OPTIMIZERS[settings.optimizer](settings.lr)
    lines: list[Line] = []
    try:
        for act in settings.act:
            for seed in range(settings.seed, settings.seed + settings.seeds):
                for line in train(settings, act, seed, data, optimizer, console):
                    record.add(line)
                    lines.append(line)
    finally:
        record.close()
    seeds = f"seed {settings.seed}" if settings.seeds == 1 else f"mean ± standard deviation of {settings.seeds} seeds"
    console.table(
        f"From step 0 to step {settings.steps:,}, and accuracy at the end; {seeds}. Dead units: zero on all the data. "
        "One-sided units: z has one sign there, so that lk_relu is linear. Gradient: at step 0, mean norm of a unit's.",
        table(settings, lines),
    )
    shown = [line for line in lines if line["seed"] == settings.seed]
    title, path = f"{description}; {about_net}, seed {settings.seed}", folder / "dynamics.png"
    with console.progress("surfaces", len(settings.act) * len(snapshots(settings.steps))) as advance:
        sheet = dynamics_plots.dynamics_picture(
            shown, data, functools.partial(restore, settings), path, bias=settings.bias, title=title, on_surface=advance
        )
    with console.progress("certificates", len(dynamics_plots.named_links())) as advance:
        figure_1 = dynamics_plots.links_picture(folder / "links.png", on_link=advance)
    console.say(f"record   {folder}\npicture  {sheet}\npicture  {figure_1}")


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, before anything is written; name each activation once.

    Raises:
      UsageError: with what is wrong, what was received and what to do.
    """
    for name, most in _MOST.items():
        if not 1 <= getattr(settings, name) <= most:
            raise UsageError(f"--{name} is from 1 to {most:,}, got {getattr(settings, name):,}")
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


def moons() -> Data:
    """200 points of two half circles, centred, and five times as large as usual: linked nets need no standard scale."""
    from sklearn.datasets import make_moons  # seconds

    points, labels = map(np.asarray, make_moons(200, noise=0.15, random_state=0))
    return jnp.asarray(5 * (points - points.mean(axis=0)), jnp.float32), jnp.asarray(labels, jnp.int32)


def unit_columns(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """A kernel whose columns have random directions and length 1."""
    kernel = jax.random.normal(key, shape, dtype)
    return kernel / jnp.linalg.norm(kernel, axis=0)


@functools.cache
def start(settings: Settings, act: str, seed: int) -> tuple[Any, Any]:
    """The graph and the parameters of a net before its first step."""
    return nnx.split(Net(settings.units, act, settings.bias, rngs=nnx.Rngs(seed)))


def snapshots(steps: int) -> list[int]:
    """The steps whose parameters are kept and whose surfaces are drawn.

    >>> from experiments.dynamics.__main__ import snapshots
    >>> snapshots(10_000), snapshots(3)
    ([0, 10, 100, 1000, 10000], [0, 3])
    """
    return sorted({0, *(steps // 10**power for power in range(4))})


def recorded_steps(steps: int) -> list[int]:
    """The steps that leave a line: about equally many in each power of ten.

    >>> from experiments.dynamics.__main__ import recorded_steps
    >>> recorded_steps(5)
    [0, 1, 2, 3, 4, 5]
    """
    return sorted({*snapshots(steps), *map(int, np.geomspace(1, steps, 80).round())})


def train(
    settings: Settings, act: str, seed: int, data: Data, optimizer: optax.GradientTransformation, console: Console
) -> Iterator[Line]:
    """Train one net; yields a line for each recorded step.

    Raises:
      NonFiniteLossError: as soon as a recorded step shows it.
    """
    graph, parameters = start(settings, act, seed)
    carry, done = (parameters, optimizer.init(parameters)), 0
    with console.progress(f"{act} seed {seed}", settings.steps) as advance:
        for step in recorded_steps(settings.steps):
            carry = _update(graph, optimizer, carry, data, step - done)
            advance(step - done)
            done = step
            line = {"act": act, "seed": seed, "step": step}
            line |= {name: value.tolist() for name, value in jax.device_get(measure(graph, carry[0], data)).items()}
            leaves = jax.device_get(jax.tree.leaves(carry[0]))
            if not all(np.isfinite(values).all() for values in (line["loss"], line["gradient_norms"], *leaves)):
                raise NonFiniteLossError(f"the loss or its gradient is not finite at step {step}; try a smaller --lr")
            if step in snapshots(settings.steps):
                line["parameters"] = [leaf.tolist() for leaf in leaves]
                console.say(
                    f"{act} seed {seed}  step {step:>6,}  loss {line['loss']:.4f}  accuracy {line['accuracy']:.4f}  "
                    f"dead {line['dead_units']}/{settings.units}  one-sided {line['one_sided_units']}/{settings.units}"
                )
            yield line


@functools.partial(jax.jit, static_argnums=0)
def measure(graph: Any, parameters: Any, data: Data) -> dict[str, Array]:
    """Loss, accuracy, dead and one-sided units, and the norm of the loss's gradient by each unit's w and b."""
    net = nnx.merge(graph, parameters)
    (loss, logits), gradients = jax.value_and_grad(_loss, argnums=1, has_aux=True)(graph, parameters, data)
    z, link, by = net.hidden(data[0]), net.read_out.link, nnx.merge(graph, gradients).hidden
    live = live_units(link(z), arity=link.arity, layout=link.layout)
    return {
        "loss": loss,
        "accuracy": (logits.argmax(axis=-1) == data[1]).mean(),
        "dead_units": (~live).sum(),
        "one_sided_units": ((z < 0).all(axis=0) | (z > 0).all(axis=0)).sum(),
        "gradient_norms": jnp.sqrt(jnp.square(by.kernel[...]).sum(axis=0) + jnp.square(by.bias[...])),
    }


def _loss(graph, parameters, data) -> tuple[Array, Array]:
    logits = nnx.merge(graph, parameters)(data[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean(), logits


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(graph, optimizer, carry, data, count) -> Any:
    """That many steps; the count is traced, so that one program serves all."""

    def step(_, carry):
        parameters, state = carry
        gradients = jax.grad(_loss, argnums=1, has_aux=True)(graph, parameters, data)[0]
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    return jax.lax.fori_loop(0, count, step, carry)


def restore(settings: Settings, line: Mapping[str, Any]) -> Net:
    """The net of a line that has parameters."""
    graph, state = start(settings, line["act"], line["seed"])
    leaves = [jnp.asarray(values, jnp.float32) for values in line["parameters"]]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


def table(settings: Settings, lines: Sequence[Line]) -> list[dict[str, str]]:
    """A row for each activation, from its first and last lines of each seed."""
    rows = []
    for act in settings.act:
        mine = [line for line in lines if line["act"] == act]
        first, last = ([line for line in mine if line["step"] == step] for step in (0, settings.steps))
        loss, dead, one_sided = (
            [statistics.fmean(line[key] for line in end) for end in (first, last)]
            for key in ("loss", "dead_units", "one_sided_units")
        )
        rows.append(
            {
                "act": act,
                "loss": f"{loss[0]:.3f} to {loss[1]:.3f}",
                "accuracy": tables.spread([line["accuracy"] for line in last]),
                "dead": f"{dead[0]:.3g} to {dead[1]:.3g} of {settings.units}",
                "one-sided": f"{one_sided[0]:.3g} to {one_sided[1]:.3g}",
                "gradient": f"{np.mean([line['gradient_norms'] for line in first]):.2g}",
            }
        )
    return rows


if __name__ == "__main__":
    run_command(main)
