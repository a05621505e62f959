"""The rows of `experiments.plasticity`: an MLP of three hidden layers, as `nnx.Sequential`, and what is done to it.

All kernels start as Flax' own, LeCun normal, which is also what ReDo draws.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jaxtyping import Array

from experiments.engine.loop import Loop
from experiments.engine.parallel import Placement
from experiments.engine.tasks import LossOf
from linked_jax import Link, fourier, leaky_relu, lk_relu, lk_swish, relu
from linked_jax.revive import link_sequential, link_sequential_opt_state, redo

HIDDEN_LAYERS = 3
RULE = optax.adam(1.0)
"""The loop multiplies its updates by the rate."""

TAU = 0.025
"""A unit is dormant if its score is at most this (Sokar et al. 2023)."""

Net = tuple[nnx.Sequential, Any]
"""A model, and its optimiser's state."""


class Round(NamedTuple):
    """Which round of training comes next: the task of how many, the round of the task; its images, and a key."""

    task: int
    tasks: int
    number: int
    images: Array
    key: Array


@dataclasses.dataclass(frozen=True)
class Method:
    """A row: the net, and what is done to it between rounds of training.

    Attributes:
      says: what it is, for the table.
      link: of all hidden layers.
      norm: whether there is layer normalisation before the link.
      change: (net, round) -> the net that is trained in that round; None for the same one.
      at_end: the link that the net has after the last task, if it is another one.
    """

    says: str
    link: Link
    norm: bool = False
    change: Callable[[Net, Round], Net] | None = None
    at_end: Link | None = None


def redo_dormant(net: Net, images: Array, key: Array) -> Net:
    """The net after ReDo of Sokar et al. 2023."""
    model, opt_state, _ = _redo(*net, images, key=key)
    return model, opt_state


_redo = jax.jit(functools.partial(redo, tau=TAU, tx=RULE))


def link_half_way(net: Net, now: Round) -> Net:
    """Replace ReLU by its link, without a change of outputs, before the task in the middle of the stream."""
    return linked(net) if (now.task, now.number) == (now.tasks // 2, 0) else net


def linked(net: Net) -> Net:
    """The net with lk_relu instead of ReLU and the same outputs. Adam's moments stay, those of new weights are 0."""
    model, opt_state = net
    return link_sequential(model, lk_relu), link_sequential_opt_state(opt_state, model, lk_relu, tx=RULE)


METHODS = {
    "relu": Method("ReLU", relu),
    "leaky_relu": Method("leaky ReLU, slope 0.01", leaky_relu),
    "lk_relu": Method("(relu(z), relu(-z))", lk_relu),
    "lk_swish": Method("(swish(z), swish(-z))", lk_swish),
    "fourier": Method("(sin z, cos z)", fourier),
    "layer_norm": Method("layer norm, then ReLU", relu, norm=True),
    "redo": Method(
        f"ReLU; dormant units (tau {TAU}) are made anew once a round",
        relu,
        change=lambda net, now: redo_dormant(net, now.images, now.key),
    ),
    "revived": Method("ReLU, linked before the task in the middle", relu, change=link_half_way, at_end=lk_relu),
}


def build(method: Method, features: int, width: int, classes: int, seed: int) -> nnx.Sequential:
    """The net at the start: (N, features) -> (N, classes)."""
    link, rngs = method.link, nnx.Rngs(seed)
    layers: list[Any] = [nnx.Linear(features, width, rngs=rngs)]
    for hidden in range(1, HIDDEN_LAYERS + 1):
        if method.norm:
            layers.append(nnx.LayerNorm(width, rngs=rngs))
        outputs = width if hidden < HIDDEN_LAYERS else classes
        layers += [link, nnx.Linear(link.arity * width, outputs, rngs=rngs)]
    return nnx.Sequential(*layers)


def parameters(method: Method, features: int, width: int, classes: int) -> int:
    """How many the net has after the last task."""
    d = (method.at_end or method.link).arity
    dense = (features + 1) * width + (HIDDEN_LAYERS - 1) * (d * width + 1) * width + (d * width + 1) * classes
    return dense + method.norm * HIDDEN_LAYERS * 2 * width


def width_for(method: Method, features: int, wanted: int, classes: int) -> int:
    """The width whose net has the number of parameters that is nearest to the wanted one."""
    widths = range(1, wanted // features + 2)
    return min(widths, key=lambda width: abs(parameters(method, features, width, classes) - wanted))


def loop_for(model: nnx.Sequential, *, stacked: bool = False) -> Loop:
    """The loop that trains nets like this one; stacked: several together, on data of their own."""
    return Loop(LossOf(nnx.graphdef(model)), RULE, Placement(stacked=stacked), own_data=stacked, scanned=True)
