"""`python -m experiments.plasticity --protocol regression`: slowly changing regression, a million examples one by one.

Inputs are 20 bits and a constant: 15 slow bits, of which one flips every 10,000 examples, and 5 random ones. Targets
come from a fixed net of 100 threshold units with weights of +-1:

    y = sum_i w_i [v_i x > theta_i],   theta_i = (m + 1) beta - (number of -1 in v_i),   m = 20, beta = 0.7

The learner has 5 hidden units, too few, so it has to follow what changes: SGD, one example a step. The error of an
example is squared before it is learnt, and averaged over bins of 40,000. All seeds of a row and rate are one program.

    python -m experiments.plasticity --protocol regression
    python -m experiments.plasticity --protocol regression --methods relu lk_relu --seeds 5

Expected: ReLU's error rises from bin to bin at every rate; see results/plasticity. Some minutes a row on two cores.

Reference: Dohare et al., Loss of plasticity in deep continual learning, 2024. Starts are those of `kumar.starts`.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.checks import command_line, in_range, known
from experiments.engine.console import Console
from experiments.engine.files import write_whole
from experiments.engine.loop import Loop, advance
from experiments.engine.parallel import Placement
from experiments.engine.plots import COLOURS, figure, label_ends, mean_band, save
from experiments.engine.study import Line, open_record
from experiments.engine.tables import markdown, provenance, spread
from experiments.engine.tasks import LossOf
from experiments.plasticity.kumar.methods import METHODS
from experiments.plasticity.kumar.starts import STARTS
from experiments.plasticity.plots import ends

SLOW, RANDOM, UNITS, HIDDEN, BETA = 15, 5, 100, 5, 0.7
FLIP_AFTER, BIN, MOST = 10_000, 40_000, 10_000
"""Examples from flip to flip, of a bin; the most flips."""
RATES = (0.01, 0.003, 0.001)
DIVERGED = 1e6
"""A squared error."""
ROWS = (
    "relu", "leaky_relu", "fourier", "lk_relu", "lk_swish", "lk_leaky_0.7",
    "relu_ours", "lk_relu_ours", "lk_swish_ours", "lk_leaky_0.7_ours",
)  # fmt: skip
"""Of `METHODS`. A linked learner has 5 units too: 116 parameters, where the plain one has 111, and 4 would be 93."""
_RULE = optax.sgd(1.0)


class Examples(NamedTuple):
    """What is seen until the next bit flips."""

    inputs: Float[Array, "n 20"]
    targets: Float[Array, " n"]


@functools.partial(jax.jit, static_argnums=2)
def examples(seed: Any, number: Any, count: int = FLIP_AFTER) -> Examples:
    """The examples of a stretch between two flips, of a stream given by its seed."""
    of_units, of_outputs, of_bits, of_flips, of_noise = jax.random.split(jax.random.key(seed), 5)
    v = jax.random.rademacher(of_units, (UNITS, SLOW + RANDOM + 1), jnp.float32)
    w = jax.random.rademacher(of_outputs, (UNITS,), jnp.float32)
    theta = (SLOW + RANDOM + 1) * BETA - (v < 0).sum(axis=1)
    first = jax.random.bernoulli(of_bits, shape=(SLOW,))
    flipped = jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(of_flips, k), (), 0, SLOW))(jnp.arange(MOST))
    flips = (flipped[:, None] == jnp.arange(SLOW)).sum(axis=0, where=jnp.arange(MOST)[:, None] < number)
    slow = jnp.broadcast_to((first + flips) % 2, (count, SLOW))
    noise = jax.random.bernoulli(jax.random.fold_in(of_noise, number), shape=(count, RANDOM))
    x = jnp.concatenate([slow, noise], axis=1).astype(jnp.float32)
    fires = jnp.concatenate([x, jnp.ones((count, 1))], axis=1) @ v.T > theta
    return Examples(x, fires.astype(jnp.float32) @ w)


def squared_error(model: nnx.Sequential, data: Examples, batch: Array, _key: Any) -> Float[Array, ""]:
    """Of one example, before it is learnt."""
    return jnp.square(model(data.inputs[batch])[:, 0] - data.targets[batch]).mean()


def build(row: str, seed: int) -> nnx.Sequential:
    """The learner at its start: (N, 20) -> (N, 1)."""
    link, start, rngs = METHODS[row].act, STARTS[METHODS[row].start], nnx.Rngs(seed)
    layers = []
    for place, (c_in, c_out) in enumerate([(SLOW + RANDOM, HIDDEN), (link.arity * HIDDEN, 1)]):
        kernel_init, bias_init = start(link, place == 0)
        of_bias = functools.partial(bias_init, fan_in=c_in)
        layers.append(nnx.Linear(c_in, c_out, kernel_init=kernel_init, bias_init=of_bias, rngs=rngs))
    return nnx.Sequential(layers[0], link, layers[1])


def learn(
    row: str, runs: Sequence[tuple[int, float]], stretches: int, on_stretch: Callable[[int], None]
) -> list[dict[str, Any]]:
    """The error by bins of each run, given by its seed and its rate; all together."""
    seeds, rates = (np.array(values) for values in zip(*runs, strict=True))
    models = [build(row, seed) for seed, _ in runs]
    loss = LossOf(nnx.graphdef(models[0]), squared_error)
    loop = Loop(loss, _RULE, Placement(stacked=True), own_data=True, scanned=True)
    carry, keys, errors = loop.start(models), jax.vmap(jax.random.key)(seeds), []
    steps = np.broadcast_to(np.arange(FLIP_AFTER, dtype=np.int32)[:, None], (len(runs), FLIP_AFTER, 1))
    for number in range(stretches):
        data = jax.vmap(examples, in_axes=(0, None))(seeds, number)
        carry, losses = advance(loop, carry, data, steps, keys, lr=jnp.float32(rates))
        errors.append(np.asarray(losses).mean(axis=1))
        on_stretch(1)
    wide = BIN // FLIP_AFTER
    bins = np.stack(errors)[: stretches // wide * wide].reshape(-1, wide, len(runs)).mean(axis=1)
    return [{"error": [_known(error) for error in bins[:, place]]} for place in range(len(runs))]


def _known(error: float) -> float | None:
    """None where the learner has diverged: no error, or one that tells nothing; targets are of size 10."""
    return round(float(error), 5) if error < DIVERGED else None


def whole(runs: Sequence[Line]) -> list[Sequence[float]]:
    """The errors of those that have not diverged."""
    return [run["error"] for run in runs if None not in run["error"]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Slowly changing regression: can five units follow a target that changes bit by bit."""

    protocol: Literal["regression"] = "regression"
    """This problem."""
    methods: tuple[str, ...] = ("all",)
    """One or several rows; all: every one. A wrong name lists them."""
    seeds: int = 30
    """How many seeds, from 0; all together."""
    examples: int = 1_000_000
    """How many, one after the other; whole bins of 40,000."""
    out: str = "runs/plasticity_regression"
    """The folder of the record. One that is there and was made alike is resumed."""


def check(settings: Settings) -> Settings:
    """Refuse what cannot run, with a UsageError; name all methods."""
    in_range(settings, {"seeds": (1, 1000), "examples": (BIN, 100_000_000)})
    return dataclasses.replace(
        settings, methods=known("methods", ROWS if "all" in settings.methods else settings.methods, ROWS)
    )


def main() -> None:
    """Run what is missing, then print the table and draw the picture."""
    settings = check(command_line(Settings, "python -m experiments.plasticity --protocol regression"))
    console, stretches = Console(), settings.examples // BIN * (BIN // FLIP_AFTER)
    data = SimpleNamespace(identity={"name": "slowly changing regression", "description": "drawn from the seed"})
    protocol = {"regression": {"examples": stretches * FLIP_AFTER, "flip_after": FLIP_AFTER, "rates": list(RATES)}}
    with (
        open_record("plasticity", settings.out, protocol=protocol, data=data) as record,
        console.progress("flips", stretches * len(settings.methods)) as bar,
    ):
        runs = [(seed, rate) for rate in RATES for seed in range(settings.seeds)]
        for row in settings.methods:
            keys = [{"row": row, "rate": rate, "seed": seed} for seed, rate in runs]

            def make(missing: list[int], row: str = row) -> list[dict[str, Any]]:
                return learn(row, [runs[i] for i in missing], stretches, bar)

            errors = whole(lines := record.once_each(keys, make))
            first, last = (f"{np.mean([error[i] for error in errors]):.3f}" if errors else "-" for i in (0, -1))
            diverged = f"; {len(lines) - len(errors)} of {len(lines)} diverged" * (len(lines) > len(errors))
            console.say(f"{row}: error of the first bin {first}, of the last {last}, mean over rates{diverged}")
        console.table("Slowly changing regression: squared error, last bins", table(record.lines))
        write_whole(record.folder / "table.md", page(record.config, record.lines))
        console.say(f"picture  {picture(record.lines, record.folder / 'regression.png')}\nrecord   {record.folder}")


def table(lines: Sequence[Line], *, first: bool = False) -> list[dict[str, str]]:
    """The mean squared error of the last tenth of the bins, or of the first, by row and rate."""
    found = _by_net(lines)
    rates = sorted({rate for _, rate in found}, reverse=True)
    rows = []
    for row in dict.fromkeys(row for row, _ in found):
        texts = {"method": row}
        for rate in rates:
            errors = whole(runs := found.get((row, rate), []))
            diverged = f" ({len(runs) - len(errors)} of {len(runs)} diverged)" * (len(runs) > len(errors))
            at_end = [statistics.fmean(ends(error)[0 if first else 1]) for error in errors]
            texts[f"rate {rate:g}"] = (spread(at_end) if errors else "-") + diverged
        texts["seeds"] = str(max(len(runs) for (of, _), runs in found.items() if of == row))
        rows.append(texts)
    return rows


def page(config: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The page of a record."""
    bins = max(map(len, whole(lines)), default=1)
    few = len(ends(range(bins))[0])
    parts = [
        "# Slowly changing regression",
        f"{config['protocol']['regression']['examples']:,} examples, one by one, SGD; squared error before learning, "
        "mean ± standard deviation over the seeds that have not diverged; all rates that were tried.",
        f"{'The last bin' if few == 1 else f'The last {few} bins'} of {bins}, of {BIN:,} examples each:",
        markdown(table(lines)),
        f"{'The first bin' if few == 1 else f'The first {few}'}:",
        markdown(table(lines, first=True)),
        provenance(config, f"; {sum(line['seconds'] for line in lines) / 60:.0f} minutes of training"),
    ]
    return "\n\n".join(parts) + "\n"


def picture(lines: Sequence[Line], path: Path) -> Path:
    """The error by bins, a column a rate; single activations, links, and our start each in panels of their own."""
    found = _by_net(lines)
    rates = sorted({rate for _, rate in found}, reverse=True)
    names = list(dict.fromkeys(row for row, _ in found))
    bases = list(dict.fromkeys(row.removesuffix("_ours") for row in names))
    kinds = {row: "ours" if row.endswith("_ours") else "link" if row.startswith("lk_") else "one" for row in names}
    together = [[row for row in names if kinds[row] == kind] for kind in dict.fromkeys(kinds.values())]
    sheet = figure(4.2 * len(rates) + 1.5, 3.4 * len(together))
    grid = sheet.subplots(len(together), len(rates), squeeze=False, sharey=True)
    for panel, (rows, rate) in zip(grid.flat, itertools.product(together, rates), strict=True):
        for row in rows:
            if errors := whole(found.get((row, rate), [])):
                values = np.array(errors)
                colour = COLOURS[bases.index(row.removesuffix("_ours")) % len(COLOURS)]
                mean_band(panel, np.arange(1, values.shape[1] + 1), values, colour, "-", row)
        panel.set(title=f"rate {rate:g}", xlabel=f"bin of {BIN:,} examples", ylabel="squared error")
        panel.grid(alpha=0.25)
    grid[0, 0].set_ylim(bottom=0)  # of all, once all is drawn
    for panel in grid.flat:
        label_ends(panel)
    return save(sheet, path, 110)


def _by_net(lines: Sequence[Line]) -> dict[tuple[str, float], list[Line]]:
    found: dict[tuple[str, float], list[Line]] = {}
    for line in lines:
        found.setdefault((line["row"], line["rate"]), []).append(line)
    return found
