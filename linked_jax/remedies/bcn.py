"""Batch-channel normalisation (BCN): batch norm, then group norm, which keeps neurons away from staying deactivated.

The batch part may be estimated from running statistics, so that it works on batches of one or two examples.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, Float

from linked_jax.arrays import like, wide, wide_dtype
from linked_jax.remedies.arguments import check_shares, check_sizes


def channel_normalize(
    x: Float[Array, "n *space c"],
    num_groups: int,
    scale: Float[Array, " g"] | None = None,
    bias: Float[Array, " g"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "n *space c"]:
    """Group norm with a scale and a bias for each group, not for each channel.

        y = gamma_g (x - mean_ng) / sqrt(var_ng + epsilon) + beta_g

    mean_ng and var_ng (biased) are over space and the channels of group g, of example n alone.

    Args:
      x: (N, *space, C). Statistics are at least float32.
      num_groups: G; a group is C / G neighbouring channels.
      scale: gamma (G,); ones if None.
      bias: beta (G,); zeros if None.
      epsilon: added to the variance.

    Returns:
      y like x, in its dtype.

    Raises:
      ValueError: if G does not divide C, or a group holds one value only: its variance is always 0.

    Reference: Qiao et al., Rethinking normalization and elimination singularity in neural networks, 2019; the affine
    per group is that of the authors' code.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.bcn import channel_normalize
      >>> channel_normalize(jnp.array([[1.0, 3.0, 10.0, 30.0]]), 2).round(2)
      Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    _check_groups(x.shape[-1], num_groups)
    if math.prod(x.shape[1:]) == num_groups:
        raise ValueError(
            f"a group needs two values at least, got x of shape {x.shape} and num_groups={num_groups}; take fewer "
            "groups"
        )
    grouped = wide(x).reshape(*x.shape[:-1], num_groups, -1)
    axes = (*range(1, x.ndim - 1), -1)
    mean, var = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
    y = ((grouped - mean) * jax.lax.rsqrt(var + epsilon)).reshape(x.shape)
    per_group = x.shape[-1] // num_groups
    if scale is not None:
        y = y * like(jnp.repeat(scale, per_group), y)
    if bias is not None:
        y = y + like(jnp.repeat(bias, per_group), y)
    return y.astype(x.dtype)


def estimate_statistics(
    x: Float[Array, "... c"], mean: Float[Array, " c"], var: Float[Array, " c"], *, momentum: float = 0.9
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """The running statistics after one more batch.

        mu' = (1 - r) mu + r mean(x),   s2' = (1 - r) s2 + r mean((x - mu)^2),   r = 1 - momentum

    The squares are about the OLD running mean mu, so a batch of one value has a variance too.

    Args:
      x: (..., C).
      mean: mu (C,).
      var: s2 (C,).
      momentum: by Flax' convention the share that is kept; the papers' rate is r = 1 - momentum.

    Returns:
      mu' and s2', in the dtypes of mean and var. No gradient flows through them.

    Reference: Qiao et al., Rethinking normalization and elimination singularity in neural networks, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.bcn import estimate_statistics
      >>> estimate_statistics(jnp.array([[4.0]]), jnp.array([0.0]), jnp.array([1.0]), momentum=0.75)
      (Array([1.], dtype=float32), Array([4.75], dtype=float32))
    """
    x = jax.lax.stop_gradient(wide(x))
    axes = tuple(range(x.ndim - 1))
    batch_mean, batch_var = x.mean(axes), jnp.square(x - like(mean, x)).mean(axes)
    r = 1 - momentum
    new_mean, new_var = (1 - r) * mean + r * batch_mean, (1 - r) * var + r * batch_var
    return jax.lax.stop_gradient((new_mean.astype(mean.dtype), new_var.astype(var.dtype)))


class EstimatedBatchNorm(nnx.Module):
    """Batch norm for micro batches: the updated running statistics normalise, also in training.

        y = gamma (x - mu') / sqrt(s2' + epsilon) + beta

    mu' and s2' are those of `estimate_statistics`; they start at 0 and 1.

    Args:
      num_features: the number of channels C, the last axis.
      momentum: the share of the running statistics that a batch keeps, Flax' convention; the papers' rate is
        1 - momentum. At least 0 and below 1.
      epsilon: added to the variance.
      use_running_average: normalise by the stored statistics and leave them as they are; `eval()` sets it.
      dtype: of y; that of x and the parameters together if None. Statistics are at least float32.
      param_dtype: of the parameters.
      rngs: not used; there so that all layers are built alike.

    Raises:
      ValueError: if num_features is below 1 or momentum is not in [0, 1).

    Reference: Qiao et al., Rethinking normalization and elimination singularity in neural networks, 2019. The rate is
    a schedule in the authors' code; here it is constant, 0.1 by default.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.bcn import EstimatedBatchNorm
      >>> norm = EstimatedBatchNorm(1, momentum=0.75)
      >>> norm(jnp.array([[4.0]])).round(3)  # (4 - 1) / sqrt(4.75)
      Array([[1.376]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        use_running_average: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        check_sizes(num_features=num_features)
        check_shares(momentum=momentum)
        self.momentum, self.epsilon, self.use_running_average = momentum, epsilon, use_running_average
        self.dtype = dtype
        self.mean = nnx.BatchStat(jnp.zeros(num_features, wide_dtype(param_dtype)))
        self.var = nnx.BatchStat(jnp.ones(num_features, wide_dtype(param_dtype)))
        self.scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))

    def __call__(self, x: Float[Array, "... c"], use_running_average: bool | None = None) -> Float[Array, "... c"]:
        """x (..., C) -> y (..., C)."""
        if x.shape[-1:] != self.scale.shape:
            raise ValueError(f"x has {self.scale.shape[0]} channels on its last axis, got {x.shape}; build it with x's")
        if not (self.use_running_average if use_running_average is None else use_running_average):
            self.mean[...], self.var[...] = estimate_statistics(
                x, self.mean[...], self.var[...], momentum=self.momentum
            )
        dtype = dtypes.canonicalize_dtype(x, self.scale[...], self.bias[...], dtype=self.dtype)
        factor = jax.lax.rsqrt(self.var[...] + self.epsilon) * self.scale[...]
        y = (x - like(self.mean[...], x)) * like(factor, x) + like(self.bias[...], x)
        return y.astype(dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `flax.nnx.view` calls, as `flax.nnx.BatchNorm` has it."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


class BatchChannelNorm(nnx.Module):
    """Batch norm, then group norm of what it gives: between a layer without a bias and its activation.

        y = channel_normalize(batch_norm(x))

    Training uses and updates the statistics of the batch part; evaluation takes the stored ones. The channel part
    always takes those of each example itself.

    Args:
      num_features: the number of channels C, the last axis.
      num_groups: G, a divisor of C; 32 in the authors' code.
      estimate: take `EstimatedBatchNorm`, for micro batches, instead of `flax.nnx.BatchNorm`.
      use_running_average: of the batch part: normalise by the stored statistics; `eval()` sets it.
      momentum: the share of the running statistics that a batch keeps, Flax' convention; the papers' rate is
        1 - momentum. At least 0 and below 1.
      epsilon: added to both variances.
      dtype: of y; that of x and the parameters together if None. Statistics are at least float32.
      param_dtype: of the parameters: scale and bias for each channel in the batch part, for each group after it.
      rngs: Flax random streams; the parameters start at 1 and 0 whatever they are.

    Raises:
      ValueError: if G does not divide C (the message says which number would), or momentum is not in [0, 1).

    Reference: Qiao et al., Rethinking normalization and elimination singularity in neural networks, 2019; also in
    Micro-batch training with batch-channel normalization and weight standardization.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.bcn import BatchChannelNorm
      >>> norm = BatchChannelNorm(8, 4, rngs=nnx.Rngs(0))
      >>> norm(jnp.ones((2, 5, 5, 8))).shape, norm.scale.shape
      ((2, 5, 5, 8), (4,))
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        *,
        estimate: bool = False,
        use_running_average: bool = False,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(num_features=num_features)
        _check_groups(num_features, num_groups)
        check_shares(momentum=momentum)
        self.num_groups, self.epsilon, self.dtype = num_groups, epsilon, dtype
        self.batch_norm = (EstimatedBatchNorm if estimate else nnx.BatchNorm)(
            num_features,
            use_running_average=use_running_average,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.scale = nnx.Param(jnp.ones(num_groups, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_groups, param_dtype))

    def __call__(
        self, x: Float[Array, "n *space c"], use_running_average: bool | None = None
    ) -> Float[Array, "n *space c"]:
        """x (N, *space, C) -> y (N, *space, C)."""
        scale, bias = self.scale[...], self.bias[...]
        y = channel_normalize(
            self.batch_norm(x, use_running_average), self.num_groups, scale, bias, epsilon=self.epsilon
        )
        return y.astype(dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype))


def _check_groups(num_features: int, num_groups: int) -> None:
    if num_groups < 1 or num_features % num_groups:
        most = max(1, min(num_groups, num_features // 2))  # two channels a group at least
        fits = next(groups for groups in range(most, 0, -1) if num_features % groups == 0)
        raise ValueError(
            f"num_groups divides num_features, got num_groups={num_groups} and num_features={num_features}; take e.g. "
            f"num_groups={fits}"
        )
