"""Linked neurons for JAX and Flax: networks whose units cannot die.

    f(z) = (g_1(z), ..., g_d(z)),   for every z some g_i'(z) != 0.

`linked(g)` makes one from almost any activation; `certify` proves it for every float; `LinkedConv` and `LinkedLinear`
are the layers, and start so that signals keep their size at any depth. `linked_jax.linen` has the layers for Flax
Linen, `linked_jax.probe` looks into a model, `linked_jax.revive` links a trained one, `linked_jax.remedies` holds the
other methods of the literature, `linked_jax.plasticity` those that keep a net learning; these five are imported when
they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

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
from linked_jax.diagnostics import live_units
from linked_jax.initializers import (
    default_kernel_init,
    embed_plain_kernel,
    gain,
    looks_linear,
    read_out,
    variance_preserving,
)
from linked_jax.layers import LinkedConv, LinkedConvTranspose, LinkedLinear
from linked_jax.learned import ChannelPReLU, LinkedPReLU
from linked_jax.linking import Link, fourier, linked, min_max
from linked_jax.registry import ACTIVATION_NAMES, activation_arity, get_activation
from linked_jax.schedules import inverse_time_decay

if TYPE_CHECKING:
    from linked_jax import linen, plasticity, probe, remedies, revive
    from linked_jax.certificates import Certificate, certify

__version__ = "0.2.0"

__all__ = [
    "ACTIVATION_NAMES",
    "Certificate",
    "ChannelPReLU",
    "Link",
    "LinkedConv",
    "LinkedConvTranspose",
    "LinkedLinear",
    "LinkedPReLU",
    "activation_arity",
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
    "linen",
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
    "plasticity",
    "prelu",
    "probe",
    "read_out",
    "relu",
    "remedies",
    "revive",
    "selu",
    "sigmoid",
    "softplus",
    "swish",
    "tanh",
    "variance_preserving",
]

# Imported when first used: the packages are slow to import, and `python -m linked_jax.certificates` would warn that
# the module it is about to run is there already.
_LAZY = {name: f"linked_jax.{name}" for name in ("certificates", "linen", "plasticity", "probe", "remedies", "revive")}
_LAZY |= dict.fromkeys(("Certificate", "certify"), "linked_jax.certificates")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'linked_jax' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if module.__name__ == f"linked_jax.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
