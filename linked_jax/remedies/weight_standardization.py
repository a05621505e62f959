"""Weight standardisation: each output filter has mean 0 and standard deviation 1, so its gradient is centred too.

K_o = (w_o - mean(w_o)) / (std(w_o) + epsilon)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.initializers import Initializer
from linked_jax.remedies.kernels import Padding, apply_kernel, check_sizes


def standardize(
    kernel: Float[Array, "... c_in c_out"], *, epsilon: float = 1e-5, inside_root: bool = False
) -> Float[Array, "... c_in c_out"]:
    """Each output filter minus its mean, over its standard deviation.

        (w - mean) / (sqrt(var) + epsilon)   or, inside the root,   (w - mean) / sqrt(var + epsilon)

    var is unbiased, over all weights of a filter. At a constant filter the result is 0 and the derivative that of
    (w - mean) / epsilon, or / sqrt(epsilon).

    Args:
      kernel: (c_in, c_out) or (*kernel_size, c_in, c_out). The computation is at least float32.
      epsilon: keeps constant filters finite.
      inside_root: add epsilon to the variance, instead of to the standard deviation.

    Returns:
      Like kernel, in its dtype.

    Raises:
      ValueError: if a filter has one weight only, and so no standard deviation.

    Reference: Qiao et al., Micro-batch training with batch-channel normalization and weight standardization, 2019. The
    authors' code has both forms: epsilon outside the root for detection, inside it for ImageNet.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.weight_standardization import standardize
      >>> standardize(jnp.array([[1.0], [2.0], [3.0]])).round(3).ravel()
      Array([-1.,  0.,  1.], dtype=float32)
    """
    _check_fan_in(math.prod(kernel.shape[:-1]), f"a kernel of shape {kernel.shape}")
    w = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    axes = tuple(range(w.ndim - 1))
    w = w - w.mean(axes)
    var = jnp.square(w).sum(axes) / (math.prod(w.shape[:-1]) - 1)
    if inside_root:
        return (w / jnp.sqrt(var + epsilon)).astype(kernel.dtype)
    spread = var > 0  # where there is none, sqrt has no derivative
    std = jnp.where(spread, jnp.sqrt(jnp.where(spread, var, 1)), 0)
    return (w / (std + epsilon)).astype(kernel.dtype)


class WSConv(nnx.Module):
    """A convolution with standardised weights: x (N, *space, in_features) -> z (N, *space', out_features).

        z = x * standardize(K) + b

    Put a normalisation after it: a filter has the norm sqrt(fan-in - 1), whatever its weights, and nothing else keeps
    the size of z.

    Args:
      in_features: the number of input channels.
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      strides: an integer or one per spatial axis.
      padding: "SAME", "VALID" or explicit pairs, zeros all of them.
      use_bias: whether to add b, zeros at the start; the normalisation after it has its own.
      kernel_init: init(key, shape, dtype) of the weights before they are standardised; that of `flax.nnx.Conv` if
        None.
      dtype: of the computation; that of x and the parameters if None. Weights are standardised in param_dtype, or in
        float32 if that has less precision.
      param_dtype: of the parameters.
      rngs: Flax random streams; `params` is used.

    Raises:
      ValueError: if a number of features or a size is below 1, or a filter has one weight only.

    Reference: Qiao et al., Micro-batch training with batch-channel normalization and weight standardization, 2019;
    epsilon is 1e-5 outside the root, as in the authors' detection code, and there is no gain.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.weight_standardization import WSConv
      >>> conv = WSConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((2, 8, 8, 4))).shape
      (2, 4, 4, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        use_bias: bool = False,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, out_features=out_features, kernel_size=kernel_size, strides=strides)
        window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        _check_fan_in(math.prod(window) * in_features, f"in_features={in_features}, kernel_size={kernel_size}")
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.padding: Padding = padding if isinstance(padding, str) else tuple((a, b) for a, b in padding)
        self.dtype, self.param_dtype = dtype, param_dtype
        init = kernel_init or nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (*window, in_features, out_features), param_dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else None)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c_out"]:
        """x (N, *space, in_features) -> z (N, *space', out_features)."""
        bias = None if self.bias is None else self.bias[...]
        kernel = standardize(self.kernel[...])
        return apply_kernel(x, kernel, bias, strides=self.strides, padding=self.padding, dtype=self.dtype)

    def fold(self) -> nnx.Conv:
        """A plain convolution with the standardised weights, for deployment.

        Returns:
          A `flax.nnx.Conv` with parameters of its own and the same output.
        """
        *window, in_features, out_features = self.kernel.shape
        conv = nnx.Conv(
            in_features,
            out_features,
            tuple(window),
            strides=self.strides,
            padding=self.padding,
            use_bias=self.bias is not None,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=nnx.Rngs(0),
        )
        conv.kernel[...] = standardize(self.kernel[...])
        if self.bias is not None:
            assert conv.bias is not None
            conv.bias[...] = self.bias[...]
        return conv


def _check_fan_in(fan_in: int, received: str) -> None:
    if fan_in < 2:
        raise ValueError(
            f"a filter needs two weights at least to have a standard deviation, got {received}; take a plain layer"
        )
