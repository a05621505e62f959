"""What a training step of a linked net costs on a mesh, by formula; beside compiled programs, and on 1,024 chips.

    python -m benchmarks.scaling

With t tokens or n images on a device, C the width, H the hidden width on a device, a the arity (1 is a plain net):

    MLP     2 t C H (1 + a) FLOPs forward a block, twice that backward; all-reduces of t C numbers over "model", one
            forward and one backward; the gradients, C H (1 + a) + H + C numbers a block, over "data"
    ResNet  2 n (3 S - 2)^2 a C^2 FLOPs forward a 3x3 layer on S x S maps, twice that backward; the gradients,
            9 a C^2 + C numbers a layer, over "data"

The inputs need no gradient, so the first layer's backward pass lacks a product and an all-reduce. Bytes are passes over
arrays, times their sizes. How many passes is counted in XLA's programs for a CPU; other compilers fuse more. The nets
are those of `benchmarks.sharded_steps`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import sharded_steps, turns
from benchmarks.sharded_steps import STAGES, collectives
from experiments.engine.console import Console
from experiments.engine.errors import run_command
from experiments.engine.parallel import check_devices, request_devices


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one step on one device.

    Attributes:
      flops: floating-point operations; elementwise ones, a few per cent, are left out.
      bytes: read and written in its memory.
      activations: bytes of the all-reduces over "model".
      gradients: bytes of the all-reduce over "data".
      all_reduces: how many; XLA makes one of those of all gradients.
    """

    flops: float
    bytes: float
    activations: float = 0.0
    gradients: float = 0.0
    all_reduces: int = 0


def mlp(
    width: int, depth: int, batch: int, *, hidden: int, arity: int = 2, data: int = 1, model: int = 1, itemsize: int = 4
) -> Costs:
    """A transformer's MLP blocks, z -> z + f(z U + u) V + v.

    >>> from benchmarks.scaling import mlp
    >>> linked, plain = (mlp(1024, 24, 2048, hidden=4096, arity=arity, model=4) for arity in (2, 1))
    >>> round(linked.flops / plain.flops, 2), linked.activations / plain.activations
    (1.5, 1.0)
    """
    tokens, hidden_here = batch / data, hidden / model
    z, h = tokens * width, tokens * hidden_here
    weights = width * hidden_here * (1 + arity)
    passes = depth * ((17 + 4 * (model > 1)) * z + (7 + 5 * arity) * h + 8 * weights)
    all_reduces = 2 * depth - 1
    return Costs(
        flops=3 * depth * 2 * tokens * weights - 2 * tokens * width * hidden_here,
        bytes=itemsize * (passes - 4 * z - h - 3 * width * hidden_here),
        activations=itemsize * all_reduces * z * (model > 1),
        gradients=itemsize * depth * (weights + hidden_here + width) * (data > 1),
        all_reduces=all_reduces * (model > 1) + (data > 1),
    )


def resnet(width: int, depth: int, batch: int, *, size: int, arity: int = 2, data: int = 1, itemsize: int = 4) -> Costs:
    """A residual net of three stages of so many blocks of two 3x3 layers; each halves the maps and doubles the width.

    >>> from benchmarks.scaling import resnet
    >>> linked, plain = (resnet(64, 9, 128, size=32, arity=arity, data=8) for arity in (2, 1))
    >>> linked.flops / plain.flops, round(linked.gradients / plain.gradients, 2)
    (2.0, 2.0)
    """
    images, flops, passes, parameters = batch / data, 0.0, 0.0, 0.0
    for number in range(STAGES):
        wide, side = width * 2**number, size // 2**number
        z, kernel = images * side**2 * wide, 9 * arity * wide**2
        layer = 2 * images * (3 * side - 2) ** 2 * arity * wide**2
        flops += 6 * depth * layer
        passes += depth * ((30 + 12 * arity) * z + (20 + 4 * (data > 1)) * kernel)
        parameters += 2 * depth * (kernel + wide)
        if number == 0:
            flops -= layer
            passes -= (3.5 + 3 * arity) * z
        else:
            project = arity * wide**2 / 2
            flops += 6 * images * side**2 * project
            passes += 6 * arity * 2 * z + 50 * project
            parameters += project
    return Costs(flops, itemsize * passes, 0.0, itemsize * parameters * (data > 1), int(data > 1))


# --- beside compiled programs -----------------------------------------------------------------------------------------


def measured(compiled: Any) -> Costs:
    """What a compiled step says of itself.

    Raises:
      ValueError: if it has a collective that is no all-reduce.
    """
    found, costs = collectives(compiled), compiled.cost_analysis()
    if others := {kind for kind, _ in found} - {"all-reduce"}:
        raise ValueError(f"all-reduces alone were expected, got {', '.join(sorted(others))}")
    sizes = [size for _, size in found]
    return Costs(costs["flops"], costs["bytes accessed"], 0.0, float(sum(sizes)), len(sizes))


_MLP = {"width": 256, "depth": 3, "batch": 512, "hidden": 512}
_RESNET = {"width": 16, "depth": 2, "batch": 16, "size": 16}
SMALL = {
    **{
        f"MLP, {'linked' if arity == 2 else 'plain'}, mesh {data} x {model}": (
            mlp, sharded_steps.mlp_step, {**_MLP, "arity": arity, "data": data, "model": model}
        )
        for arity in (2, 1)
        for data, model in ((1, 1), (4, 1), (1, 4), (2, 2))
    },
    **{
        f"ResNet, {'linked' if arity == 2 else 'plain'}, mesh {data}": (
            resnet, sharded_steps.resnet_step, {**_RESNET, "arity": arity, "data": data}
        )
        for arity in (2, 1)
        for data in (1, 4)
    },
}  # fmt: skip
"""Name -> formula, program, and the arguments of both."""


def ratios(name: str) -> dict[str, float | None]:
    """Formula over compiled program of one of `SMALL`; None where nothing is reduced; of all-reduces the difference."""
    formula, program, arguments = SMALL[name]
    ours, theirs = formula(**arguments), measured(program(**arguments))
    reduced = (ours.activations + ours.gradients) / theirs.gradients if theirs.all_reduces else None
    return {
        "FLOPs": ours.flops / theirs.flops, "bytes": ours.bytes / theirs.bytes, "reduced bytes": reduced,
        "all-reduces": ours.all_reduces - theirs.all_reduces,
    }  # fmt: skip


# --- on many chips ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public numbers of a chip: bfloat16 FLOP/s, bytes/s of its memory, and of its links each way over both axes."""

    flops: float
    memory: float
    model_link: float
    data_link: float


CHIPS = {
    "H100 SXM": Chip(989e12, 3.35e12, 450e9, 50e9),
    "TPU v5p": Chip(459e12, 2.765e12, 300e9, 300e9),
}
"""NVIDIA's data sheet (dense; NVLink 900 GB/s both ways in a node of 8) and a 400 Gbit/s network adapter for each GPU;
Google's page on v5p (4,800 Gbit/s between chips, both ways)."""


def seconds(costs: Costs, chip: Chip, data: int, model: int = 1) -> dict[str, float]:
    """The least time of each part of a step: a ring all-reduce sends 2 (n - 1) / n times its bytes from each chip."""
    ring = {n: 2 * (n - 1) / n for n in (data, model)}
    return {
        "compute": costs.flops / chip.flops,
        "memory": costs.bytes / chip.memory,
        "model": ring[model] * costs.activations / chip.model_link,
        "data": ring[data] * costs.gradients / chip.data_link,
    }


def step_seconds(parts: Mapping[str, float]) -> float:
    """Memory traffic and gradients are hidden behind compute, or it behind them; what "model" waits for is not."""
    return max(parts["compute"], parts["memory"], parts["data"]) + parts["model"]


_LARGE: dict[str, tuple[Callable[..., Costs], dict[str, Any], str, float]] = {
    "MLP": (mlp, {"depth": 48, "data": 128, "model": 8}, "hidden", 1.5),
    "ResNet": (resnet, {"depth": 18, "size": 32, "data": 1024}, "width", math.sqrt(2)),
}
"""Formula, what is fixed, and what a plain net has more of, by how much, to have as many parameters as a linked one."""


def on_1024_chips(net: str, chip: str, width: int, batch: int) -> dict[str, Any]:
    """A row of the table: the linked net's step and what binds it, and its time over those of two plain nets."""
    formula, fixed, wider, factor = _LARGE[net]
    linked = {"width": width, "batch": batch, **fixed, **({"hidden": 4 * width} if net == "MLP" else {})}
    nets = {
        "linked": {**linked, "arity": 2},
        "as wide": {**linked, "arity": 1},
        "as large": {**linked, "arity": 1, wider: round(factor * linked[wider])},
    }
    mesh = {"data": fixed["data"], "model": fixed.get("model", 1)}
    parts = {name: seconds(formula(**shape, itemsize=2), CHIPS[chip], **mesh) for name, shape in nets.items()}
    times = {name: step_seconds(part) for name, part in parts.items()}
    return {
        "net": net, "chip": chip, "width": width, "batch a shard": f"{batch // mesh['data']:,}",
        "bound by": max(("compute", "memory", "data"), key=parts["linked"].__getitem__),
        **{f"{part} ms": f"{float(f'{1000 * value:.3g}'):,g}" for part, value in parts["linked"].items()},
        "over as wide": f"{times['linked'] / times['as wide']:.2f}",
        "over as large": f"{times['linked'] / times['as large']:.2f}",
    }  # fmt: skip


ROWS = [
    *(("MLP", chip, width, tokens * 128) for chip in CHIPS for width in (1024, 8192) for tokens in (256, 16_384)),
    *(("ResNet", chip, width, images * 1024) for chip in CHIPS for width in (16, 256) for images in (1, 32)),
]
"""Net, chip, width, and the batch of all chips."""


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Costs of linked nets on meshes: formulas beside compiled programs, then 1,024 chips."""


def main() -> None:
    """Print both tables, and write the record if it is asked for."""
    settings, console = turns.parse(Settings, "scaling"), Console()
    request_devices(4)
    check_devices(4)
    with console.progress("compiling", len(SMALL)) as advance:
        found = {}
        for name in SMALL:
            found[name] = ratios(name)
            advance(1)
    shown = [
        {"step": name, **{key: "-" if value is None else f"{value:.3f}" for key, value in row.items()}}
        for name, row in found.items()
    ]
    console.table("Formula over compiled program; all-reduces: difference.", shown)
    rows = [on_1024_chips(*row) for row in ROWS]
    title = "1,024 chips, bfloat16: the linked net's step by parts, and its time over a plain net's as wide, as large."
    console.table(title, [{key: str(value) for key, value in row.items()} for row in rows])
    turns.save(settings, "scaling", {"ratios": found, "on 1,024 chips": rows})


if __name__ == "__main__":
    run_command(main)
