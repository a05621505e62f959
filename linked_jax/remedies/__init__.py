"""The other remedies for covariate shift and dead units, a file each: the maths first, then a thin module.

They take and give features as Flax' own layers do, so they go with links and with everything in `flax.nnx` and Optax.
Here are the modules and transformations; the pure functions beneath them are in the files. Flax and Optax have batch,
layer, group, RMS, weight and spectral norm, and adaptive gradient clipping: use theirs.
"""

from linked_jax.remedies.apr import apr_p, apr_s
from linked_jax.remedies.bcn import BatchChannelNorm, EstimatedBatchNorm
from linked_jax.remedies.bkn import BatchKalmanNorm
from linked_jax.remedies.drelu import drelu
from linked_jax.remedies.enorm import Layer, enorm
from linked_jax.remedies.ic import IndependentComponent
from linked_jax.remedies.lcw import LCWConv, LCWLinear, keep_variance
from linked_jax.remedies.moment_calculus import Moments
from linked_jax.remedies.noise_aware import recalibrate
from linked_jax.remedies.normprop import NormPropConv, NormPropLinear
from linked_jax.remedies.quasi_recurrent import QuasiRecurrent
from linked_jax.remedies.riemannian import adam_g, orthogonality_penalty, riemannian, scale_invariant, sgd_g
from linked_jax.remedies.variance_propagation import VPConv, VPLinear
from linked_jax.remedies.weight_standardization import WSConv

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
    "apr_p",
    "apr_s",
    "drelu",
    "enorm",
    "keep_variance",
    "orthogonality_penalty",
    "recalibrate",
    "riemannian",
    "scale_invariant",
    "sgd_g",
]
