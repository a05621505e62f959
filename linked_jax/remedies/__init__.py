"""The other remedies for covariate shift and dead units, a file each: the maths first, then a thin module.

They take and give features as Flax' own layers do, so they go with links and with everything in `flax.nnx` and Optax.
Flax and Optax have batch, layer, group, RMS, weight and spectral norm, and adaptive gradient clipping: use theirs.
"""

from linked_jax.remedies.apr import apr_p, apr_s, recombine
from linked_jax.remedies.bcn import BatchChannelNorm, EstimatedBatchNorm, channel_normalize
from linked_jax.remedies.bkn import BatchKalmanNorm, add_branches, channel_moments, fuse, predict
from linked_jax.remedies.drelu import delu, drelu
from linked_jax.remedies.enorm import Layer, balance, enorm
from linked_jax.remedies.ic import IndependentComponent
from linked_jax.remedies.lcw import LCWConv, LCWLinear, keep_variance, zero_sum_kernel
from linked_jax.remedies.moment_calculus import Moments, through_flatten, through_kernel, through_link, through_pool
from linked_jax.remedies.noise_aware import perturb, recalibrate
from linked_jax.remedies.normprop import (
    NormPropConv,
    NormPropLinear,
    normalized,
    normalized_avg_pool,
    normalized_max_pool,
)
from linked_jax.remedies.quasi_recurrent import QuasiRecurrent, fo_pool
from linked_jax.remedies.riemannian import (
    adam_g,
    orthogonality_penalty,
    riemannian,
    scale_invariant,
    sgd_g,
    to_sphere,
)
from linked_jax.remedies.variance_propagation import VPConv, VPLinear
from linked_jax.remedies.weight_standardization import WSConv, standardize

__all__ = [
    "BatchChannelNorm",
    "BatchKalmanNorm",
    "EstimatedBatchNorm",
    "IndependentComponent",
    "LCWConv",
    "LCWLinear",
    "Layer",
    "Moments",
    "NormPropConv",
    "NormPropLinear",
    "QuasiRecurrent",
    "VPConv",
    "VPLinear",
    "WSConv",
    "adam_g",
    "add_branches",
    "apr_p",
    "apr_s",
    "balance",
    "channel_moments",
    "channel_normalize",
    "delu",
    "drelu",
    "enorm",
    "fo_pool",
    "fuse",
    "keep_variance",
    "normalized",
    "normalized_avg_pool",
    "normalized_max_pool",
    "orthogonality_penalty",
    "perturb",
    "predict",
    "recalibrate",
    "recombine",
    "riemannian",
    "scale_invariant",
    "sgd_g",
    "standardize",
    "through_flatten",
    "through_kernel",
    "through_link",
    "through_pool",
    "to_sphere",
    "zero_sum_kernel",
]
