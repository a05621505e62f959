"""The rows of `experiments.plasticity`: an MLP of three hidden layers, as `nnx.Sequential`, and what is done to it.

All kernels start as Flax' own, LeCun normal, which is also what ReDo draws.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from linked_jax import fourier, leaky_relu, lk_relu, lk_swish, relu
from linked_jax.diagnostics import UnitStatistics, unit_statistics
from linked_jax.linking import Link
from linked_jax.revive import link_sequential_opt_state, link_sequential, redo

HIDDEN_LAYERS = 3
RULE = optax.scale_by_adam()
"""Adam without its rate, which is applied after it: a rate is then an array like any other."""

TAU = 0.025
"""A unit is dormant if its score is at most this (Sokar et al. 2023)."""

Change = Callable[[nnx.Sequential, Any, "Moment"], tuple[nnx.Sequential, Any]]


class Moment(NamedTuple):
    """When a net may be changed: before the round of a task; with the images that it will learn."""

    task: int
    tasks: int
    round: int
    images: Array
    key: Array


@dataclasses.dataclass(frozen=True)
class Method:
    """A row: the net, and what is done to it between rounds of training.

    Attributes:
      says: what it is, for the table.
      link: of all hidden layers.
      norm: whether there is layer normalisation before the link.
      change: (model, opt_state, moment) -> (model, opt_state), before each round; None for nothing.
      at_end: the link that the net has after the last task, if it is another one.
    """

    says: str
    link: Link
    norm: bool = False
    change: Change | None = None
    at_end: Link | None = None


def redo_dormant(model: nnx.Sequential, opt_state: Any, moment: Moment) -> tuple[nnx.Sequential, Any]:
    """ReDo of Sokar et al. 2023, once a round."""
    graph, state = nnx.split(model)
    state, opt_state = _redo(graph, state, opt_state, moment.images, moment.key)
    return nnx.merge(graph, state), opt_state


@functools.partial(jax.jit, static_argnums=0)
def _redo(graph, state, opt_state, images, key) -> tuple[Any, Any]:
    model, opt_state, _ = redo(nnx.merge(graph, state), opt_state, images, tau=TAU, key=key)
    return nnx.state(model), opt_state


def link_half_way(model: nnx.Sequential, opt_state: Any, moment: Moment) -> tuple[nnx.Sequential, Any]:
    """Replace ReLU by its link, without a change of outputs, before the task in the middle of the stream."""
    if (moment.task, moment.round) != (moment.tasks // 2, 0):
        return model, opt_state
    return link_sequential(model, lk_relu), link_sequential_opt_state(opt_state, model, lk_relu)


METHODS = {
    "relu": Method("ReLU", relu),
    "leaky_relu": Method("leaky ReLU, slope 0.01", leaky_relu),
    "lk_relu": Method("(relu(z), relu(-z))", lk_relu),
    "lk_swish": Method("(swish(z), swish(-z))", lk_swish),
    "fourier": Method("(sin z, cos z)", fourier),
    "layer_norm": Method("layer norm, then ReLU", relu, norm=True),
    "redo": Method(f"ReLU; dormant units (tau {TAU}) are made anew once a round", relu, change=redo_dormant),
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
    width = 1
    while (more := parameters(method, features, width + 1, classes)) <= wanted:
        width += 1
    less = parameters(method, features, width, classes)
    return width if wanted - less <= more - wanted else width + 1


class Hidden(NamedTuple):
    """What one link saw and gave."""

    link: Link
    z: Float[Array, "n width"]
    h: Float[Array, "n linked"]
    slopes: Float[Array, "n linked"]

    @property
    def statistics(self) -> UnitStatistics:
        """Of its units."""
        return unit_statistics(self.z, self.h, self.slopes, arity=self.link.arity, layout=self.link.layout)


def hidden(model: nnx.Sequential, x: Array) -> tuple[Array, list[Hidden]]:
    """The logits, and every link's pre-activations, outputs and derivatives."""
    seen = []
    for layer in model.layers:
        if isinstance(layer, Link):
            z = x
            x, slopes = jax.jvp(layer, (z,), (jnp.ones_like(z),))
            seen.append(Hidden(layer, z, x, slopes))
        else:
            x = layer(x)
    return x, seen
