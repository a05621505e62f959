"""The independent-component (IC) layer: batch norm and dropout between an activation and the next weights.

Batch norm whitens each unit, and dropout makes units less dependent: with the probability p of keeping a value, the
correlation of two units becomes p times what it was.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, Float

from linked_jax.remedies.arguments import check_shares, check_sizes


class IndependentComponent(nnx.Module):
    """Batch norm, then dropout: before a weight layer and after the activation, not before it.

        y = m / (1 - rate) * (gamma (x - mean) / sqrt(var + epsilon) + beta),   m ~ Bernoulli(1 - rate)

    In training it takes the statistics of the batch and drops; in evaluation the stored ones, and drops nothing. At
    rate 0 it is batch norm. For a link, num_features counts what the link gives.

    Args:
      num_features: the number of channels, the last axis.
      rate: the probability that a value is dropped, each by itself; at least 0 and below 1. The paper has 0.05 to 0.1.
      momentum: the share of the running statistics that a batch keeps, as in `flax.nnx.BatchNorm`.
      epsilon: added to the variance.
      dtype: of y; that of x and the parameters together if None. Batch statistics are at least float32.
      param_dtype: of the parameters.
      rngs: Flax random streams; `dropout` is used, and `params`.

    Raises:
      ValueError: if num_features is below 1, or rate or momentum is not in [0, 1).

    Reference: Chen et al., Rethinking the usage of batch normalization and dropout in the training of deep neural
    networks, 2019. The paper does not fix momentum and epsilon; we use 0.99 and 1e-5, as Flax does.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.ic import IndependentComponent
      >>> ic = IndependentComponent(4, rngs=nnx.Rngs(0))
      >>> layer = nnx.Linear(4, 2, rngs=nnx.Rngs(1))
      >>> layer(ic(jax.nn.relu(jnp.ones((8, 4))))).shape
      (8, 2)
    """

    def __init__(
        self,
        num_features: int,
        *,
        rate: float = 0.05,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(num_features=num_features)
        check_shares(rate=rate, momentum=momentum)
        self.batch_norm = nnx.BatchNorm(
            num_features, momentum=momentum, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "... c"], *, use_running_average: bool | None = None, deterministic: bool | None = None
    ) -> Float[Array, "... c"]:
        """x (..., C) -> y (..., C). The arguments win over what `train()` and `eval()` set."""
        y = self.dropout(self.batch_norm(x, use_running_average), deterministic=deterministic)
        return y.astype(dtypes.canonicalize_dtype(x, self.batch_norm.scale, self.batch_norm.bias, dtype=self.dtype))
