"""Linearly constrained weights (LCW): the weights of each unit sum to zero, so equal means of inputs cancel.

    w = B v,   1.w = 0,   so   E[w.a] = 0 where E[a] = gamma 1

Without it a unit's pre-activation has the mean |gamma| sqrt(m) ||w|| cos(angle(w, 1)), another one in each unit: the
activation shift. Batch norm, if there is one, goes between the layer and the activation.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.initializers import Initializer
from linked_jax.linking import Link
from linked_jax.moments import expectation
from linked_jax.remedies.kernels import Padding, apply_kernel, check_sizes


def zero_sum_kernel(v: Float[Array, "m_less_1 c_out"]) -> Float[Array, "m c_out"]:
    """The weights w = B v, whose columns sum to zero, in O(m) and without the matrix B.

        w_i = sum_(j >= i) u_j - (i - 1) u_(i-1),   u_j = v_j / sqrt(j (j + 1)),   i = 1 ... m,  j = 1 ... m - 1

    Column j of B is (1 repeated j times, -j, 0, ...) / sqrt(j (j + 1)), of Helmert's basis. B'B = I, so ||w|| = ||v||.

    Args:
      v: (m - 1, c_out), m at least 2.

    Returns:
      (m, c_out), of float32 at least: rounded to fewer bits it no longer sums to zero.

    Raises:
      ValueError: if v is empty.

    Reference: Kutsuna, Linearly constrained weights: reducing activation shift for faster training of neural networks,
    2020. The method does not depend on the basis; ours is Helmert's.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.lcw import zero_sum_kernel
      >>> zero_sum_kernel(jnp.array([[2.0**0.5], [6.0**0.5]])).round(3).ravel()
      Array([ 2.,  0., -2.], dtype=float32)
    """
    _check_fan_in(len(v) + 1, f"v of shape {v.shape}")
    j = jnp.arange(1, len(v) + 1)[:, None]
    u = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    u = u / jnp.sqrt(j * (j + 1.0)).astype(u.dtype)
    zero = jnp.zeros_like(u[:1])
    return jnp.concatenate([jax.lax.cumsum(u, reverse=True), zero]) - jnp.concatenate([zero, j.astype(u.dtype) * u])


def keep_variance(link: Link) -> Initializer:
    """An init of v for a layer after a link: pre-activations that are N(0, 1) give N(0, 1) again.

        v normal, of variance 1 / (fan_in mean_i Var[g_i(z)]),   z ~ N(0, 1)

    The variance of g counts and not its mean square, as for other kernels: the constraint removes the mean. It removes
    all of it where the members have the same mean; those of `min_max` have not.

    Args:
      link: what is before the layer, such as `linked_jax.sigmoid`.

    Returns:
      init(key, shape, dtype) for the `kernel_init` of `LCWLinear` and `LCWConv`.

    Raises:
      ValueError: if the link is constant.

    Example:
      >>> import jax
      >>> from linked_jax import relu
      >>> from linked_jax.remedies.lcw import keep_variance
      >>> v = keep_variance(relu)(jax.random.key(0), (1000, 1000), "float32")
      >>> round(float(v.var()) * 1000, 1)  # 1 / Var[relu(z)] = 2 / (1 - 1 / pi)
      2.9
    """
    means = [expectation(g) for g in link.members]
    variance = sum(expectation(lambda z, g=g, c=c: (g(z) - c) ** 2) for g, c in zip(link.members, means, strict=True))
    if not variance > 0:
        raise ValueError(f"a constant link has no variance to keep, got {link}; pass one that depends on z")
    return nnx.initializers.variance_scaling(link.arity / variance, "fan_in", "normal")


class _LCWLayer(nnx.Module):
    """What the dense layer and the convolution share: v, the bias, the kernel w = B v."""

    def __init__(
        self,
        shape: tuple[int, ...],
        use_bias: bool,
        kernel_init: Initializer | None,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        fan_in = math.prod(shape[:-1])
        _check_fan_in(fan_in, f"a kernel of shape {shape}")
        self.shape, self.dtype, self.param_dtype = shape, dtype, param_dtype
        init = kernel_init or nnx.initializers.lecun_normal()
        self.v = nnx.Param(init(rngs.params(), (fan_in - 1, shape[-1]), param_dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros(shape[-1], param_dtype)) if use_bias else None)

    def kernel(self) -> Float[Array, "... c_in c_out"]:
        """The weights, (in_features, out_features) or (*kernel_size, in_features, out_features); float32 at least."""
        return zero_sum_kernel(self.v[...]).reshape(self.shape)

    def _apply(self, x: Array, **geometry: Any) -> Array:
        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)  # not the wider one of the kernel
        return apply_kernel(x, self.kernel(), None if self.bias is None else self.bias[...], dtype=dtype, **geometry)

    def _folded_into(self, plain: type[Any], *args: Any, **geometry: Any) -> Any:
        use_bias, options = self.bias is not None, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layer = plain(*args, use_bias=use_bias, rngs=nnx.Rngs(0), **geometry, **options)
        layer.kernel[...] = self.kernel().astype(self.param_dtype)
        if self.bias is not None:
            layer.bias[...] = self.bias[...]
        return layer


class LCWLinear(_LCWLayer):
    """A dense layer whose weights sum to zero for each output: x (..., in_features) -> z (..., out_features).

        z = x (B v) + b

    A constant added to all inputs leaves z as it is.

    Args:
      in_features: the number of inputs m, 2 at least. After a link count all that it gives.
      out_features: the number of outputs.
      use_bias: whether to add b, zeros at the start.
      kernel_init: init(key, shape, dtype) of v, of shape (m - 1, out_features). If None normal with variance
        1 / (m - 1), cut at two deviations: then E||w||^2 = E||v||^2 = 1, and z has the variance of x where inputs are
        uncorrelated, whatever their common mean. After an activation take `keep_variance(link)`.
      dtype: of the computation; that of x and the parameters if None. B v is computed in float32 at least, and then
        rounded: in bfloat16 sums are zero to its precision only.
      param_dtype: of the parameters.
      rngs: Flax random streams; `params` is used.

    Raises:
      ValueError: if a number of features is below 1, or there is one input only.

    Reference: Kutsuna, Linearly constrained weights: reducing activation shift for faster training of neural networks,
    2020. We use Helmert's basis for B, and put batch norm after the layer and before the activation.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.lcw import LCWLinear
      >>> layer = LCWLinear(8, 4, rngs=nnx.Rngs(0))
      >>> jnp.abs(layer(jnp.full((2, 8), 5.0))).max() < 1e-5  # equal inputs cancel
      Array(True, dtype=bool)
      >>> layer.fold()(jnp.ones((2, 8))).shape
      (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, out_features=out_features)
        super().__init__((in_features, out_features), use_bias, kernel_init, dtype, param_dtype, rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c_out"]:
        """x (..., in_features) -> z (..., out_features)."""
        return self._apply(x)

    def fold(self) -> nnx.Linear:
        """A plain dense layer with the weights B v, for deployment.

        Returns:
          A `flax.nnx.Linear` with parameters of its own and the same output.
        """
        return self._folded_into(nnx.Linear, *self.shape)


class LCWConv(_LCWLayer):
    """A convolution whose weights sum to zero for each filter: x (N, *space, in_features) -> z (N, *space', features).

        z = x * (B v) + b

    The sum goes over all positions and input channels. Where zeros are padded only a part of a filter meets the input,
    and that part does not sum to zero: means do not cancel at the borders, unless padding is "VALID".

    Args:
      in_features: the number of input channels. After a link count all that it gives.
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      strides: an integer or one per spatial axis.
      padding: "SAME", "VALID" or explicit pairs, zeros all of them.
      use_bias: whether to add b, zeros at the start.
      kernel_init: init(key, shape, dtype) of v, of shape (fan-in - 1, out_features); see `LCWLinear`.
      dtype: of the computation; that of x and the parameters if None; see `LCWLinear`.
      param_dtype: of the parameters.
      rngs: Flax random streams; `params` is used.

    Raises:
      ValueError: if a number of features or a size is below 1, or a filter has one weight only.

    Reference: Kutsuna, Linearly constrained weights: reducing activation shift for faster training of neural networks,
    2020. We use Helmert's basis for B, and put batch norm after the layer and before the activation.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.lcw import LCWConv
      >>> conv = LCWConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
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
        use_bias: bool = True,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, out_features=out_features, kernel_size=kernel_size, strides=strides)
        window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__((*window, in_features, out_features), use_bias, kernel_init, dtype, param_dtype, rngs)
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.padding: Padding = padding if isinstance(padding, str) else tuple((a, b) for a, b in padding)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c_out"]:
        """x (N, *space, in_features) -> z (N, *space', out_features)."""
        return self._apply(x, strides=self.strides, padding=self.padding)

    def fold(self) -> nnx.Conv:
        """A plain convolution with the weights B v, for deployment.

        Returns:
          A `flax.nnx.Conv` with parameters of its own and the same output.
        """
        *window, in_features, out_features = self.shape
        geometry: Any = {"strides": self.strides, "padding": self.padding}
        return self._folded_into(nnx.Conv, in_features, out_features, tuple(window), **geometry)


def _check_fan_in(fan_in: int, received: str) -> None:
    if fan_in < 2:
        raise ValueError(
            f"weights that sum to zero need a fan-in of 2 at least, got {fan_in} ({received}); take a plain layer there"
        )
