"""Weight standardisation: each output filter has mean 0 and standard deviation 1, so its gradient is centred too."""

import math
from collections.abc import Sequence
from typing import Any

import optax
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.arrays import wide
from linked_jax.remedies.kernels import ComputedKernel


def standardize(kernel: Float[Array, "... c_in c_out"], *, epsilon: float = 1e-5) -> Float[Array, "... c_in c_out"]:
    """Each output filter minus its mean, over its standard deviation.

        (w - mean) / (sqrt(var) + epsilon)

    var is unbiased, over all weights of a filter. At a constant filter the result is 0 and the derivative that of
    (w - mean) / epsilon.

    Args:
      kernel: (c_in, c_out) or (*kernel_size, c_in, c_out). The computation is at least float32.
      epsilon: keeps constant filters finite.

    Returns:
      Like kernel, in its dtype.

    Raises:
      ValueError: if a filter has one weight only, and so no standard deviation.

    Reference: Qiao et al., Micro-batch training with batch-channel normalization and weight standardization, 2019.
    Epsilon is outside the root, as in the authors' code for detection; their code for ImageNet has it inside.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.weight_standardization import standardize
      >>> standardize(jnp.array([[1.0], [2.0], [3.0]])).round(3).ravel()
      Array([-1.,  0.,  1.], dtype=float32)
    """
    fan_in = _fan_in(kernel.shape)
    w = wide(kernel).reshape(fan_in, -1)
    w = w - w.mean(0, keepdims=True)
    std = optax.safe_norm(w, 0.0, axis=0, keepdims=True) / math.sqrt(fan_in - 1)
    return (w / (std + epsilon)).reshape(kernel.shape).astype(kernel.dtype)


class WSConv(ComputedKernel, nnx.Conv):
    """A convolution with standardised weights: x (N, *space, in_features) -> z (N, *space', out_features).

        z = x * standardize(K) + b

    Put a normalisation after it: a filter has the norm sqrt(fan-in - 1), whatever its weights, and nothing else keeps
    the size of z.

    Args:
      in_features: the number of input channels.
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      use_bias: whether to add b; not by default, as the normalisation after it has its own.
      options: as `flax.nnx.Conv`. `kernel_init` is of the weights before they are standardised; the dtype in which
        they are is param_dtype, or float32 if that has less precision.

    Raises:
      ValueError: if a number of features or a size is below 1, or a filter has one weight only.

    Reference: Qiao et al., Micro-batch training with batch-channel normalization and weight standardization, 2019;
    epsilon is 1e-5 outside the root, as in the authors' detection code, and there is no gain.

    Examples:
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
        use_bias: bool = False,
        **options: Any,
    ):
        super().__init__(in_features, out_features, kernel_size, use_bias=use_bias, **options)
        _fan_in(self.kernel.shape)

    def computed_kernel(self) -> Float[Array, "... c_in c_out"]:
        """Standardised."""
        return standardize(self.masked)


def _fan_in(shape: Sequence[int]) -> int:
    fan_in = math.prod(shape[:-1])
    if fan_in < 2:
        raise ValueError(
            f"a filter needs two weights at least to have a standard deviation, got a kernel of shape {tuple(shape)}; "
            "take a plain layer"
        )
    return fan_in
