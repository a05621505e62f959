"""Normalisation by analytic variance propagation: batch norm with computed moments in place of the batch's.

    y = s (W x - mu) / sigma + beta,   (mu, sigma^2) = the moments of x through W, passing on (beta, s^2)

There is no state, no running average and no batch: training and evaluation are the same, at any batch size. Each layer
takes the moments of its inputs beside the inputs; `moment_calculus` carries them through activations and pools.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.initializers import Initializer
from linked_jax.remedies.kernels import Padding, apply_kernel, check_sizes
from linked_jax.remedies.moment_calculus import Moments, through_kernel


def normalized_kernel(
    kernel: Float[Array, "... c_in c_out"],
    scale: Float[Array, " c_out"],
    bias: Float[Array, " c_out"],
    moments: Moments,
) -> tuple[Float[Array, "... c_in c_out"], Float[Array, " c_out"]]:
    """The kernel and the bias of the plain layer that a normalised one amounts to.

        s (W x - mu) / sigma + beta = (s / sigma W) x + (beta - s mu / sigma)

    Args:
      kernel: W, (c_in, c_out) or (*kernel_size, c_in, c_out).
      scale: s, (c_out,).
      bias: beta, (c_out,).
      moments: of the inputs, (c_in,).

    Returns:
      A kernel and a bias, at least float32; gradients flow through mu and sigma too.

    Raises:
      ValueError: if the moments are of another number of channels than the kernel's inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.moment_calculus import Moments
      >>> from linked_jax.remedies.variance_propagation import normalized_kernel
      >>> moments = Moments(jnp.ones(2), jnp.full(2, 4.0))  # mu = 2 and sigma = 2 sqrt(2)
      >>> kernel, bias = normalized_kernel(jnp.ones((2, 1)), jnp.full(1, 8**0.5), jnp.zeros(1), moments)
      >>> kernel.round(4).ravel().tolist(), bias.round(4).tolist()
      ([1.0, 1.0], [-2.0])
    """
    mu, variance = through_kernel(moments, kernel)
    s = scale / jnp.sqrt(variance)
    return s * kernel, bias - s * mu


class _VPLayer(nnx.Module):
    """What the dense layer and the convolution share."""

    def __init__(
        self,
        shape: Sequence[int],
        kernel_init: Initializer | None,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.param_dtype = dtype, param_dtype
        init = kernel_init or nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), tuple(shape), param_dtype))
        self.scale = nnx.Param(jnp.ones(shape[-1], param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape[-1], param_dtype))

    def moments(self) -> Moments:
        """Those of the outputs, (beta, s^2), whatever comes in; at least float32."""
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        return Moments(self.bias[...].astype(wide), jnp.square(self.scale[...].astype(wide)))

    def preserve(self, moments: Moments, bias: Float[Array, " c_out"] | None = None) -> Moments:
        """Set s = sigma and beta = b + mu, so that the layer computes W x + b for now.

        Args:
          moments: those of the inputs, (in_features,), that the layer will be called with.
          bias: b, zeros if None.

        Returns:
          The moments of the outputs, for the next layer.

        Raises:
          ValueError: if the moments do not fit the kernel.
        """
        mu, variance = through_kernel(moments, self.kernel[...])
        self.scale[...] = jnp.sqrt(variance).astype(self.param_dtype)
        self.bias[...] = (mu if bias is None else mu + bias).astype(self.param_dtype)
        return self.moments()

    def _plain(self, moments: Moments) -> tuple[Array, Array]:
        return normalized_kernel(self.kernel[...], self.scale[...], self.bias[...], moments)

    def _folded_into(self, plain: Any, moments: Moments) -> Any:
        kernel, bias = self._plain(moments)
        plain.kernel[...], plain.bias[...] = kernel.astype(self.param_dtype), bias.astype(self.param_dtype)
        return plain


class VPLinear(_VPLayer):
    """A dense layer that normalises by the moments of its inputs: x (..., in_features) -> y (..., out_features).

        y = s (W x - mu) / sigma + beta,   mu = W mean,   sigma^2 = W^2 var + 1e-10

    `scale` s starts at 1 and `bias` beta at 0. `preserve` starts from a plain layer instead.

    Args:
      in_features: the number of inputs.
      out_features: the number of outputs.
      kernel_init: init(key, shape, dtype) of W; that of `flax.nnx.Linear` if None. Its size does not matter, but for
        how fast it trains.
      dtype: of the computation; that of x and the parameters if None. Moments are at least float32.
      param_dtype: of the parameters.
      rngs: Flax random streams; `params` is used.

    Raises:
      ValueError: if a number of features is below 1; when called, if x or the moments do not fit.

    Reference: Shekhovtsov and Flach, Normalization of neural networks using analytic variance propagation, 2018. The
    start at s = 1 and beta = 0 is that of batch norm.

    Example:
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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, out_features=out_features)
        super().__init__((in_features, out_features), kernel_init, dtype, param_dtype, rngs)

    def __call__(self, x: Float[Array, "... c"], moments: Moments) -> tuple[Float[Array, "... c_out"], Moments]:
        """x (..., in_features) and its moments (in_features,) -> y (..., out_features) and its moments."""
        return apply_kernel(x, *self._plain(moments), dtype=_computed_in(self, x)), self.moments()

    def fold(self, moments: Moments) -> nnx.Linear:
        """A plain dense layer with the same output, for deployment.

        Args:
          moments: of the inputs, (in_features,).

        Returns:
          A `flax.nnx.Linear` with parameters of its own.
        """
        options: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": nnx.Rngs(0)}
        return self._folded_into(nnx.Linear(*self.kernel.shape, **options), moments)


class VPConv(_VPLayer):
    """A convolution that normalises by the moments of its inputs: x (N, *space, in_features) -> y, and moments.

        y = s (W * x - mu) / sigma + beta,   mu = sum_k W_k mean,   sigma^2 = sum_k W_k^2 var + 1e-10

    The sums go over the positions of the kernel. Moments are the same at every pixel, so where zeros are padded, mu and
    sigma are those of the inside.

    Args:
      in_features: the number of input channels.
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      strides: an integer or one per spatial axis.
      padding: "SAME", "VALID" or explicit pairs, zeros all of them.
      kernel_init: init(key, shape, dtype) of W; that of `flax.nnx.Conv` if None.
      dtype: of the computation; that of x and the parameters if None. Moments are at least float32.
      param_dtype: of the parameters.
      rngs: Flax random streams; `params` is used.

    Raises:
      ValueError: if a number of features or a size is below 1; when called, if x or the moments do not fit.

    Reference: Shekhovtsov and Flach, Normalization of neural networks using analytic variance propagation, 2018. The
    start at s = 1 and beta = 0 is that of batch norm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.moment_calculus import Moments
      >>> from linked_jax.remedies.variance_propagation import VPConv
      >>> conv = VPConv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> y, moments = conv(jnp.ones((1, 8, 8, 3)), Moments(jnp.zeros(3), jnp.ones(3)))
      >>> y.shape, moments.mean.shape
      ((1, 4, 4, 8), (8,))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, out_features=out_features, kernel_size=kernel_size, strides=strides)
        window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__((*window, in_features, out_features), kernel_init, dtype, param_dtype, rngs)
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.padding: Padding = padding if isinstance(padding, str) else tuple((a, b) for a, b in padding)

    def __call__(self, x: Float[Array, "... c"], moments: Moments) -> tuple[Float[Array, "... c_out"], Moments]:
        """x (N, *space, in_features) and its moments (in_features,) -> y (N, *space', out_features) and its moments."""
        options: Any = {"strides": self.strides, "padding": self.padding, "dtype": _computed_in(self, x)}
        return apply_kernel(x, *self._plain(moments), **options), self.moments()

    def fold(self, moments: Moments) -> nnx.Conv:
        """A plain convolution with the same output, also at padded borders, for deployment.

        Args:
          moments: of the inputs, (in_features,).

        Returns:
          A `flax.nnx.Conv` with parameters of its own.
        """
        *window, in_features, out_features = self.kernel.shape
        options: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": nnx.Rngs(0)}
        geometry: Any = {"strides": self.strides, "padding": self.padding}
        return self._folded_into(nnx.Conv(in_features, out_features, tuple(window), **geometry, **options), moments)


def _computed_in(layer: _VPLayer, x: Array) -> Any:
    """The dtype that x and the parameters give, not the wider one of the moments."""
    return layer.dtype or jnp.promote_types(x.dtype, layer.param_dtype)
