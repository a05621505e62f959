"""Normalisation propagation (NormProp): unit filters and normalised activations keep N(0, 1), without batch statistics.

    u = gamma (w.x) / ||w|| + beta,   o = (g(u) - c1) / c2,   c1, c2 = mean and deviation of g on N(0, 1)

Standardise the network's input, and put no activation after the last layer. The result for an example does not depend
on the others of its batch: nothing changes at batch size 1, or from training to evaluation.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.initializers import Initializer
from linked_jax.linking import Link
from linked_jax.moments import expectation
from linked_jax.remedies.kernels import Padding, apply_kernel, check_sizes


class Normalized:
    """The member z -> (g(z) - c1) / c2; equal to another one over an equal g. Made by `normalized`."""

    def __init__(self, g: Callable[[Any], Any]):
        self.g = g
        self.mean = expectation(g)
        self.std = math.sqrt(expectation(lambda z: (g(z) - self.mean) ** 2))
        if not self.std > 0:
            raise ValueError(f"a constant member has no deviation to divide by, got {g!r}; pass one that depends on z")

    def __call__(self, z: Any) -> Any:
        """(g(z) - c1) / c2."""
        return (self.g(z) - self.mean) / self.std

    def __repr__(self) -> str:
        return f"Normalized({Link((self.g,))!r})"

    def __eq__(self, other: object) -> bool:
        return Link((self.g,)) == Link((other.g,)) if isinstance(other, Normalized) else NotImplemented

    def __hash__(self) -> int:
        return hash((Normalized, Link((self.g,))))


def normalized(link: Link) -> Link:
    """The link with each member shifted and scaled to mean 0 and variance 1 on a standard normal pre-activation.

        g_i(z)  ->  (g_i(z) - c1_i) / c2_i,   c1_i = E[g_i(z)],   c2_i^2 = E[(g_i(z) - c1_i)^2],   z ~ N(0, 1)

    At z = 0 the derivative is that of the link, over c2_i: a link of two or more members takes the limit z -> 0+. A
    dead unit of the link is constant now and not zero, so show `live_units` the link itself.

    Args:
      link: any `Link`; for relu c1 = sqrt(1 / (2 pi)) and c2 = sqrt((1 - 1 / pi) / 2).

    Returns:
      A link with as many members and the same axis and layout. Links that are equal stay so.

    Raises:
      ValueError: if a member is constant, or not finite somewhere on [-12, 12].

    Reference: Arpit et al., Normalization propagation: a parametric technique for removing internal covariate shift in
    deep networks, 2016, for relu. Other functions and links are ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax import relu
      >>> from linked_jax.remedies.normprop import normalized
      >>> normalized(relu)(jnp.array([-1.0, 1.0])).round(2)
      Array([-0.68,  1.03], dtype=float32)
    """
    return Link(tuple(map(Normalized, link.members)), axis=link.axis, layout=link.layout)


def unit_filters(kernel: Float[Array, "... c_in c_out"]) -> Float[Array, "... c_in c_out"]:
    """Each output filter over its norm; gradients flow through the norm.

        w / max(||w||, 1e-12)

    ||w|| is the Frobenius norm, over all axes but the last. At a filter of zeros the result is 0, and the derivative
    that of w / 1e-12: large, and finite.

    Args:
      kernel: (c_in, c_out) or (*kernel_size, c_in, c_out).

    Returns:
      Like kernel, of float32 at least.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.normprop import unit_filters
      >>> unit_filters(jnp.array([[3.0], [4.0]])).ravel()
      Array([0.6, 0.8], dtype=float32)
    """
    w = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    square = jnp.square(w).sum(tuple(range(w.ndim - 1)))
    return w / jnp.sqrt(jnp.maximum(square, 1e-12**2))  # inside the root, whose derivative at 0 is infinite


class _NormPropLayer(nnx.Module):
    """What the dense layer and the convolution share."""

    def __init__(
        self, shape: Sequence[int], scale_init: float, kernel_init: Initializer | None,
        dtype: Any, param_dtype: Any, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.dtype, self.param_dtype = dtype, param_dtype
        init = kernel_init or nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), tuple(shape), param_dtype))
        self.scale = nnx.Param(jnp.full(shape[-1], scale_init, param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape[-1], param_dtype))

    def _apply(self, x: Array, **geometry: Any) -> Array:
        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)  # not the wider one of the unit filters
        kernel = self.scale[...] * unit_filters(self.kernel[...])
        return apply_kernel(x, kernel, self.bias[...], dtype=dtype, **geometry)


class NormPropLinear(_NormPropLayer):
    """A dense layer with unit filters: x (..., in_features) -> u (..., out_features).

        u = gamma (w.x) / ||w|| + beta

    For inputs that are N(0, I), u has mean beta and deviation gamma. Follow it with `normalized(link)`.

    Args:
      in_features: the number of inputs. After a link count all that it gives.
      out_features: the number of outputs.
      scale_init: gamma at the start, for all units. At the authors' 1 / 1.21 the Jacobian of a relu layer has singular
        values near 1; outputs have variance 1 at gamma = 1 only.
      kernel_init: init(key, shape, dtype) of w; that of `flax.nnx.Linear` if None. Its size only matters for speed.
      dtype: of the computation; that of x and the parameters if None. Norms are computed in float32 at least.
      param_dtype: of the parameters.
      rngs: Flax random streams; `params` is used.

    Raises:
      ValueError: if a number of features is below 1.

    Reference: Arpit et al., Normalization propagation: a parametric technique for removing internal covariate shift in
    deep networks, 2016. We start gamma at 1 / 1.21 and beta at 0, both learned, one per unit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import lk_relu
      >>> from linked_jax.remedies.normprop import NormPropLinear, normalized
      >>> rngs, act = nnx.Rngs(0), normalized(lk_relu)
      >>> first, last = NormPropLinear(8, 16, rngs=rngs), NormPropLinear(32, 3, rngs=rngs)
      >>> last(act(first(jnp.ones((1, 8))))).shape
      (1, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale_init: float = 1 / 1.21,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, out_features=out_features)
        super().__init__((in_features, out_features), scale_init, kernel_init, dtype, param_dtype, rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c_out"]:
        """x (..., in_features) -> u (..., out_features)."""
        return self._apply(x)


class NormPropConv(_NormPropLayer):
    """A convolution with unit filters: x (N, *space, in_features) -> u (N, *space', out_features).

        u = gamma (w * x) / ||w|| + beta

    ||w|| is over all positions and input channels. Where zeros are padded, u is smaller.

    Args:
      in_features: the number of input channels. After a link count all that it gives.
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      strides: an integer or one per spatial axis.
      padding: "SAME", "VALID" or explicit pairs, zeros all of them.
      scale_init, kernel_init, dtype, param_dtype, rngs: see `NormPropLinear`.

    Raises:
      ValueError: if a number of features or a size is below 1.

    Reference: Arpit et al., 2016, see `NormPropLinear`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.normprop import NormPropConv
      >>> conv = NormPropConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((1, 8, 8, 4))).shape
      (1, 4, 4, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        scale_init: float = 1 / 1.21,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, out_features=out_features, kernel_size=kernel_size, strides=strides)
        window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__((*window, in_features, out_features), scale_init, kernel_init, dtype, param_dtype, rngs)
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.padding: Padding = padding if isinstance(padding, str) else tuple((a, b) for a, b in padding)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c_out"]:
        """x (N, *space, in_features) -> u (N, *space', out_features)."""
        return self._apply(x, strides=self.strides, padding=self.padding)


@functools.lru_cache
def max_moments(n: int) -> tuple[float, float]:
    """The mean and the standard deviation of the largest of n independent N(0, 1) numbers.

        E[h(max)] = int h(z) n Phi(z)^(n - 1) phi(z) dz

    Example:
      >>> from linked_jax.remedies.normprop import max_moments
      >>> [round(moment, 7) for moment in max_moments(4)]
      [1.0293754, 0.7012241]
    """
    check_sizes(n=n)
    density: Any = lambda z: n * jax.scipy.special.ndtr(z) ** (n - 1)  # noqa: E731
    mean = expectation(lambda z: z * density(z))
    return mean, math.sqrt(expectation(lambda z: (z - mean) ** 2 * density(z)))


def normalized_avg_pool(
    x: Float[Array, "... c"], window_shape: Sequence[int], *, strides: Sequence[int] | None = None
) -> Float[Array, "... c"]:
    """Average pooling, without padding, that gives variance 1 for independent N(0, 1) inputs.

        y = sqrt(n) avg_pool(x),   n = the number of positions in a window

    For neighbours in an image, which are correlated, it is larger.

    Args:
      x: (N, *space, C).
      window_shape: one size per spatial axis.
      strides: one per spatial axis; 1 each if None, as in `flax.nnx.avg_pool`.

    Returns:
      (N, *space', C), in the dtype of x.

    Raises:
      ValueError: if a size or a stride is below 1.

    Reference: Arpit et al., 2016, see `NormPropLinear`. The constants are ours, for normal inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.normprop import normalized_avg_pool
      >>> normalized_avg_pool(jnp.ones((1, 4, 4, 1)), (2, 2), strides=(2, 2)).ravel()
      Array([2., 2., 2., 2.], dtype=float32)
    """
    check_sizes(window_shape=window_shape, strides=strides or 1)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (nnx.avg_pool(wide, window_shape, strides) * math.sqrt(math.prod(window_shape))).astype(x.dtype)


def normalized_max_pool(
    x: Float[Array, "... c"], window_shape: Sequence[int], *, strides: Sequence[int] | None = None
) -> Float[Array, "... c"]:
    """Max pooling, without padding, that gives mean 0 and variance 1 for independent N(0, 1) inputs.

        y = (max_pool(x) - m) / s,   (m, s) = max_moments(n),   n = the number of positions in a window

    At a tie the derivative is that of one of the largest. Neighbours in an image are correlated, and outputs of relu
    are not normal: for them mean and variance are not exactly 0 and 1.

    Args, Returns, Raises, Reference: as for `normalized_avg_pool`.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.normprop import normalized_max_pool
      >>> round(normalized_max_pool(jnp.ones((1, 2, 2, 1)), (2, 2)).item(), 3)  # (1 - 1.029) / 0.701
      -0.042
    """
    check_sizes(window_shape=window_shape, strides=strides or 1)
    mean, std = max_moments(math.prod(window_shape))
    return (nnx.max_pool(x, window_shape, strides) - mean) / std
