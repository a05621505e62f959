"""The rows of the comparison of remedies. All train with Adam but the Riemannian two; each starts as its paper says."""

import functools
from collections.abc import Callable
from typing import Any

import optax
from flax import nnx

from experiments.engine.optimizers import adam, sgd
from experiments.remedies.net import NETS
from experiments.remedies.steps import DReluStep, KalmanStep, Method, NormPropStep, Rule, VarianceStep
from linked_jax.remedies.bcn import BatchChannelNorm
from linked_jax.remedies.bkn import BatchKalmanNorm
from linked_jax.remedies.enorm import Layer, enorm
from linked_jax.remedies.ic import IndependentComponent
from linked_jax.remedies.lcw import LCWConv, LCWLinear, keep_variance
from linked_jax.remedies.normprop import NormPropConv, NormPropLinear
from linked_jax.remedies.riemannian import adam_g, scale_invariant, sgd_g
from linked_jax.remedies.variance_propagation import VPConv, VPLinear
from linked_jax.remedies.weight_standardization import WSConv

_MOMENTUM = 0.9  # of running statistics: the runs are short, 0.99 would lag behind them
_GROUPS = 4  # of group norms, a divisor of all widths
_CLASSES = 10


def batch_norm(features: int, _on_image: bool, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Flax' own."""
    return nnx.BatchNorm(features, momentum=_MOMENTUM, rngs=rngs)


def layer_norm(features: int, on_image: bool, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Flax' own, over all pixels and channels of an example."""
    return nnx.LayerNorm(features, reduction_axes=(-3, -2, -1) if on_image else -1, rngs=rngs)


def standardised(*sizes: Any, strides: int, kernel_init: Any, **options: Any) -> Any:
    """A standardised convolution with its own start; the stem, which no norm follows, is plain."""
    if strides > 1:
        return nnx.Conv(*sizes, strides=strides, kernel_init=kernel_init, **options)
    return WSConv(*sizes, strides=strides, **options)


@functools.cache  # another optimiser would compile anew
def balanced(net: str, rate: float) -> Rule:
    """Adam, then ENorm on all layers of the network."""
    return enorm(adam(rate), [Layer(f"steps.{number}.weights") for number in range(len(NETS[net](_CLASSES)))]), 1.0


def on_sphere(make: Callable[[float], optax.GradientTransformation]) -> Callable[[str, float], Rule]:
    """SGD-G or Adam-G for kernels that a batch norm follows; Nesterov at a twentieth of the rate for the rest."""

    @functools.cache
    def rule(net: str, rate: float) -> Rule:
        following = enumerate(NETS[net](_CLASSES)[1:])
        normed = [f"steps.{number}.weights" for number, stage in following if stage.active]
        rest = sgd(rate / 20, momentum=0.9, nesterov=True)
        return optax.partition({True: make(rate), False: rest}, lambda params: scale_invariant(params, normed)), 1.0

    return rule


METHODS: dict[str, Method] = {
    "relu": Method("plain"),
    "leaky_relu": Method("leaky ReLU, slope 0.01", act="leaky_relu"),
    "selu": Method("SELU", act="selu"),
    "lk_relu": Method("linked neurons: (relu(z), relu(-z)), twice the weights", act="lk_relu"),
    "lk_swish": Method("linked neurons: (swish(z), swish(-z)), twice the weights", act="lk_swish"),
    "batch_norm": Method("ReLU, batch norm before it", norm=batch_norm, batch_one=False),
    "layer_norm": Method("ReLU, layer norm before it", norm=layer_norm),
    "group_norm": Method(
        "ReLU, group norm before it, 4 groups", norm=lambda c, _, rngs: nnx.GroupNorm(c, num_groups=_GROUPS, rngs=rngs)
    ),
    "lcw": Method(
        "ReLU, linearly constrained weights", conv=LCWConv, linear=LCWLinear, init=lambda link, _: keep_variance(link)
    ),
    "normprop": Method(
        "ReLU, normalisation propagation", step=NormPropStep, conv=NormPropConv, linear=NormPropLinear, init=None
    ),
    "bcn": Method(
        "ReLU, weight standardisation, batch-channel norm",
        conv=standardised,
        norm=lambda c, _, rngs: BatchChannelNorm(c, _GROUPS, momentum=_MOMENTUM, rngs=rngs),
        batch_one=False,
    ),
    "bcn_estimated": Method(
        "the same with estimated statistics",
        conv=standardised,
        norm=lambda c, _, rngs: BatchChannelNorm(c, _GROUPS, estimate=True, momentum=_MOMENTUM, rngs=rngs),
    ),
    "enorm": Method("ReLU, equi-normalisation after every step", rule=balanced),
    "ic": Method(
        "ReLU, then batch norm and dropout 0.05 before the weights",
        before=lambda c, rngs: IndependentComponent(c, momentum=_MOMENTUM, rngs=rngs),
        batch_one=False,
    ),
    "bkn": Method(
        "ReLU, batch Kalman normalisation, p = 0.05",
        step=KalmanStep,
        norm=lambda c, _, rngs: BatchKalmanNorm(c, prediction_weight=0.05, momentum=_MOMENTUM, rngs=rngs),
        batch_one=False,
    ),
    "sgd_g": Method(
        "ReLU, batch norm, SGD on the sphere",
        norm=batch_norm,
        rule=on_sphere(sgd_g),
        rates=(0.06, 0.2, 0.6),
        batch_one=False,
    ),
    "adam_g": Method(
        "ReLU, batch norm, Adam on the sphere",
        norm=batch_norm,
        rule=on_sphere(adam_g),
        rates=(0.015, 0.05, 0.15),
        batch_one=False,
    ),
    "variance_propagation": Method(
        "ReLU, analytic variance propagation", step=VarianceStep, conv=VPConv, linear=VPLinear, init=None
    ),
    "drelu": Method("two pre-activations a unit, max(0, a) - max(0, b)", branches=2, step=DReluStep),
}
"""Name -> row."""
