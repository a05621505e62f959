"""Normalisation by analytic variance propagation: batch norm with computed moments in place of the batch's.

    y = s (W x - mu) / sigma + beta,   (mu, sigma^2) = the moments of x through W, passing on (beta, s^2)

There is no state, no running average and no batch: training and evaluation are the same, at any batch size. Each layer
takes the moments of its inputs beside the inputs; `moment_calculus` carries them through activations and pools.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.arrays import like, wide
from linked_jax.remedies.kernels import ComputedKernel
from linked_jax.remedies.moment_calculus import Moments, through_kernel


def normalized_kernel(
    kernel: Float[Array, "... c_in c_out"],
    scale: Float[Array, " c_out"],
    bias: Float[Array, " c_out"],
    moments: Moments,
    *,
    groups: int = 1,
) -> tuple[Float[Array, "... c_in c_out"], Float[Array, " c_out"]]:
    """The kernel and the bias of the plain layer that a normalised one amounts to.

        s (W x - mu) / sigma + beta = (s / sigma W) x + (beta - s mu / sigma)

    Args:
      kernel: W, (c_in, c_out) or (*kernel_size, c_in, c_out).
      scale: s, (c_out,).
      bias: beta, (c_out,).
      moments: of the inputs, (c_in,).
      groups: of a grouped convolution, see `through_kernel`.

    Returns:
      A kernel and a bias, at least float32; gradients flow through mu and sigma too.

    Raises:
      ValueError: if the moments are of another number of channels than the kernel's inputs.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.moment_calculus import Moments
      >>> from linked_jax.remedies.variance_propagation import normalized_kernel
      >>> moments = Moments(jnp.ones(2), jnp.full(2, 4.0))  # mu = 2 and sigma = 2 sqrt(2)
      >>> kernel, bias = normalized_kernel(jnp.ones((2, 1)), jnp.full(1, 8**0.5), jnp.zeros(1), moments)
      >>> kernel.round(4).ravel().tolist(), bias.round(4).tolist()
      ([1.0, 1.0], [-2.0])
    """
    mu, variance = through_kernel(moments, kernel, groups=groups)
    s = scale / jnp.sqrt(variance)
    return like(s, kernel) * kernel, bias - s * mu


class _VariancePropagation(ComputedKernel):
    """What the dense layer and the convolution share."""

    def __init__(self: Any, *sizes: Any, use_bias: bool = True, **options: Any):
        if not use_bias:
            raise ValueError("the outputs have the mean beta, got use_bias=False; leave the bias, it starts at 0")
        super().__init__(*sizes, **options)
        self.scale = nnx.Param(jnp.ones(self.out_features, self.param_dtype))

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "... c"], moments: Moments, **options: Any
    ) -> tuple[Float[Array, "... c_out"], Moments]:
        """x and the moments of its channels, (in_features,) -> y and the moments of its own, (out_features,)."""
        return super().__call__(x, moments, **options), self.moments()

    def weights(  # pyright: ignore[reportIncompatibleMethodOverride]
        self: Any, moments: Moments
    ) -> tuple[Array, Array]:
        """The kernel and the bias for inputs of these moments, see `normalized_kernel`."""
        return normalized_kernel(self.masked, self.scale[...], self.bias[...], moments, groups=self._groups)

    def fold(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, moments: Moments
    ) -> Any:
        """The plain layer with the same output for inputs of these moments, (in_features,), also at padded borders."""
        return super().fold(moments)

    def moments(self: Any) -> Moments:
        """Those of the outputs, (beta, s^2), whatever comes in; at least float32."""
        return Moments(wide(self.bias[...]), jnp.square(wide(self.scale[...])))

    def preserve(self: Any, moments: Moments, bias: Float[Array, " c_out"] | None = None) -> Moments:
        """Set s = sigma and beta = b + mu, so that the layer computes W x + b for now.

        Args:
          moments: those of the inputs, (in_features,), that the layer will be called with.
          bias: b, zeros if None.

        Returns:
          The moments of the outputs, for the next layer.

        Raises:
          ValueError: if the moments do not fit the kernel.
        """
        mu, variance = through_kernel(moments, self.masked, groups=self._groups)
        self.scale[...] = jnp.sqrt(variance).astype(self.param_dtype)
        self.bias[...] = (mu if bias is None else mu + bias).astype(self.param_dtype)
        return self.moments()

    @property
    def _groups(self) -> int:
        return getattr(self, "feature_group_count", 1)


class VPLinear(_VariancePropagation, nnx.Linear):
    """A dense layer that normalises by the moments of its inputs: x (..., in_features) -> y (..., out_features).

        y = s (W x - mu) / sigma + beta,   mu = W mean,   sigma^2 = W^2 var + 1e-10

    `scale` s starts at 1 and `bias` beta at 0. `preserve` starts from a plain layer instead; `fold(moments)` gives one
    for deployment.

    Args:
      in_features: the number of inputs.
      out_features: the number of outputs.
      options: as `flax.nnx.Linear`, but there is always a bias. The size of W only matters for how fast it trains.
        Moments are at least float32.

    Raises:
      ValueError: if a number of features is below 1; when called, if x or the moments do not fit.

    Reference: Shekhovtsov and Flach, Normalization of neural networks using analytic variance propagation, 2018. The
    start at s = 1 and beta = 0 is that of batch norm.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import lk_relu
      >>> from linked_jax.remedies.moment_calculus import Moments, through_link
      >>> from linked_jax.remedies.variance_propagation import VPLinear
      >>> rngs = nnx.Rngs(0)
      >>> first, second = VPLinear(8, 16, rngs=rngs), VPLinear(32, 4, rngs=rngs)
      >>> z, moments = first(jnp.ones((1, 8)), Moments(jnp.zeros(8), jnp.ones(8)))
      >>> y, moments = second(lk_relu(z), through_link(moments, lk_relu))
      >>> y.shape, moments.variance
      ((1, 4), Array([1., 1., 1., 1.], dtype=float32))
    """


class VPConv(_VariancePropagation, nnx.Conv):
    """A convolution that normalises by the moments of its inputs: x (N, *space, in_features) -> y, and moments.

        y = s (W * x - mu) / sigma + beta,   mu = sum_k W_k mean,   sigma^2 = sum_k W_k^2 var + 1e-10

    The sums go over the positions of the kernel. Moments are the same at every pixel, so where zeros are padded, mu and
    sigma are those of the inside.

    Args:
      in_features: the number of input channels.
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      options: as `flax.nnx.Conv`; see `VPLinear`.

    Raises:
      ValueError: if a number of features or a size is below 1; when called, if x or the moments do not fit.

    Reference: as for `VPLinear`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.moment_calculus import Moments
      >>> from linked_jax.remedies.variance_propagation import VPConv
      >>> conv = VPConv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> y, moments = conv(jnp.ones((1, 8, 8, 3)), Moments(jnp.zeros(3), jnp.ones(3)))
      >>> y.shape, moments.mean.shape
      ((1, 4, 4, 8), (8,))
    """
