"""Linked neurons for JAX and Flax: networks whose units cannot die.

    f(z) = (g_1(z), ..., g_d(z)),   for every z some g_i'(z) != 0.

`linked(g)` makes one from almost any activation; `certify` proves it for every float; `LinkedConv` and `LinkedLinear`
are the layers, and start so that signals keep their size at any depth.
"""

from linked_jax.activations import (
    crelu,
    elu,
    gelu,
    leaky_relu,
    lk_elu,
    lk_gelu,
    lk_leaky_relu,
    lk_relu,
    lk_selu,
    lk_sigmoid,
    lk_softplus,
    lk_swish,
    lk_tanh,
    prelu,
    relu,
    selu,
    sigmoid,
    softplus,
    swish,
    tanh,
)
from linked_jax.certificates import Certificate, certify
from linked_jax.diagnostics import live_units
from linked_jax.initializers import (
    default_kernel_init,
    embed_plain_kernel,
    gain,
    looks_linear,
    read_out,
    variance_preserving,
)
from linked_jax.layers import (
    ACTIVATION_NAMES,
    ChannelPReLU,
    LinkedConv,
    LinkedLinear,
    LinkedPReLU,
    activation_arity,
    get_activation,
)
from linked_jax.linking import Link, fourier, linked, min_max
from linked_jax.schedules import all_cnn_schedule, inverse_time_decay, step_schedule

__version__ = "0.1.0"

__all__ = [
    "ACTIVATION_NAMES",
    "Certificate",
    "ChannelPReLU",
    "Link",
    "LinkedConv",
    "LinkedLinear",
    "LinkedPReLU",
    "activation_arity",
    "all_cnn_schedule",
    "certify",
    "crelu",
    "default_kernel_init",
    "elu",
    "embed_plain_kernel",
    "fourier",
    "gain",
    "gelu",
    "get_activation",
    "inverse_time_decay",
    "leaky_relu",
    "linked",
    "live_units",
    "lk_elu",
    "lk_gelu",
    "lk_leaky_relu",
    "lk_relu",
    "lk_selu",
    "lk_sigmoid",
    "lk_softplus",
    "lk_swish",
    "lk_tanh",
    "looks_linear",
    "min_max",
    "prelu",
    "read_out",
    "relu",
    "selu",
    "sigmoid",
    "softplus",
    "step_schedule",
    "swish",
    "tanh",
    "variance_preserving",
]
