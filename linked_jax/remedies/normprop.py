"""Normalisation propagation (NormProp): unit filters and normalised activations keep N(0, 1), without batch statistics.

Standardise the network's input, and put no activation after the last layer. The result for an example does not depend
on the others of its batch: nothing changes at batch size 1, or from training to evaluation.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.arrays import like, wide
from linked_jax.linking import Link
from linked_jax.members import Wrapped
from linked_jax.moments import expectation
from linked_jax.remedies.arguments import check_sizes, require_link
from linked_jax.remedies.kernels import ComputedKernel


@dataclasses.dataclass(frozen=True, eq=False)
class Normalized(Wrapped):
    """The member z -> (g(z) - c1) / c2. Made by `normalized`."""

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(
                f"a constant member has no deviation to divide by, got {self.g!r}; pass one that depends on z"
            )

    @functools.cached_property
    def mean(self) -> float:
        """c1, of g on a standard normal z."""
        return expectation(self.g)

    @functools.cached_property
    def std(self) -> float:
        """c2."""
        return math.sqrt(expectation(lambda z: (self.g(z) - self.mean) ** 2))

    def __call__(self, z: Any) -> Any:
        """(g(z) - c1) / c2."""
        return (self.g(z) - self.mean) / self.std

    def __repr__(self) -> str:
        return f"Normalized({Link((self.g,))!r})"


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
      TypeError: if it is no link.

    Reference: Arpit et al., Normalization propagation: a parametric technique for removing internal covariate shift in
    deep networks, 2016, for relu. Other functions and links are ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax import relu
      >>> from linked_jax.remedies.normprop import normalized
      >>> normalized(relu)(jnp.array([-1.0, 1.0])).round(2)
      Array([-0.68,  1.03], dtype=float32)
    """
    return Link(tuple(map(Normalized, require_link(link).members)), axis=link.axis, layout=link.layout)


def unit_filters(kernel: Float[Array, "... c_in c_out"]) -> Float[Array, "... c_in c_out"]:
    """Each output filter over its norm; gradients flow through the norm.

        w / max(||w||, 1e-12)

    ||w|| is the Frobenius norm, over all axes but the last. At a filter of zeros the result is 0, and the derivative
    that of w / 1e-12: large, and finite.

    Args:
      kernel: (c_in, c_out) or (*kernel_size, c_in, c_out).

    Returns:
      Like kernel, of float32 at least.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.normprop import unit_filters
      >>> unit_filters(jnp.array([[3.0], [4.0]])).ravel()
      Array([0.6, 0.8], dtype=float32)
    """
    w = wide(kernel)
    return w / like(optax.safe_norm(w.reshape(-1, w.shape[-1]), 1e-12, axis=0), w)


class _NormProp(ComputedKernel):
    """What the dense layer and the convolution share: the scale gamma, and unit filters."""

    def __init__(self: Any, *sizes: Any, scale_init: float = 1 / 1.21, **options: Any):
        super().__init__(*sizes, **options)
        self.scale = nnx.Param(jnp.full(self.out_features, scale_init, self.param_dtype))

    def computed_kernel(self: Any) -> Float[Array, "... c_in c_out"]:
        """The kernel gamma w / ||w||, float32 at least."""
        return like(self.scale[...], self.kernel) * unit_filters(self.masked)


class NormPropLinear(_NormProp, nnx.Linear):
    """A dense layer with unit filters: x (..., in_features) -> u (..., out_features).

        u = gamma (w.x) / ||w|| + beta

    For inputs that are N(0, I), u has mean beta and deviation gamma. Follow it with `normalized(link)`.

    Args:
      in_features: the number of inputs. After a link count all that it gives.
      out_features: the number of outputs.
      scale_init: gamma at the start, for all units. At the authors' 1 / 1.21 the Jacobian of a relu layer has singular
        values near 1; outputs have variance 1 at gamma = 1 only.
      options: as `flax.nnx.Linear`. The size of w only matters for how fast it trains. Norms are computed in float32
        at least.

    Raises:
      ValueError: if a number of features is below 1.

    Reference: Arpit et al., Normalization propagation: a parametric technique for removing internal covariate shift in
    deep networks, 2016. We start gamma at 1 / 1.21 and beta at 0, both learned, one per unit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import lk_relu
      >>> from linked_jax.remedies.normprop import NormPropLinear, normalized
      >>> rngs, act = nnx.Rngs(0), normalized(lk_relu)
      >>> first, last = NormPropLinear(8, 16, rngs=rngs), NormPropLinear(32, 3, rngs=rngs)
      >>> last(act(first(jnp.ones((1, 8))))).shape
      (1, 3)
    """


class NormPropConv(_NormProp, nnx.Conv):
    """A convolution with unit filters: x (N, *space, in_features) -> u (N, *space', out_features).

        u = gamma (w * x) / ||w|| + beta

    ||w|| is over all positions and input channels. Where zeros are padded, u is smaller.

    Args:
      in_features: the number of input channels. After a link count all that it gives.
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      scale_init: gamma at the start, see `NormPropLinear`.
      options: as `flax.nnx.Conv`; see `NormPropLinear`.

    Raises:
      ValueError: if a number of features or a size is below 1.

    Reference: Arpit et al., 2016, see `NormPropLinear`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.normprop import NormPropConv
      >>> conv = NormPropConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((1, 8, 8, 4))).shape
      (1, 4, 4, 8)
    """


@functools.lru_cache
def max_moments(n: int) -> tuple[float, float]:
    """The mean and the standard deviation of the largest of n independent N(0, 1) numbers.

        E[h(max)] = int h(z) n Phi(z)^(n - 1) phi(z) dz

    Examples:
      >>> from linked_jax.remedies.normprop import max_moments
      >>> [round(moment, 7) for moment in max_moments(4)]
      [1.0293754, 0.7012241]
    """
    check_sizes(n=n)
    density: Any = lambda z: n * jax.scipy.special.ndtr(z) ** (n - 1)  # noqa: E731
    mean = expectation(lambda z: z * density(z))
    return mean, math.sqrt(expectation(lambda z: (z - mean) ** 2 * density(z)))


def normalized_max_pool(
    x: Float[Array, "... c"], window_shape: Sequence[int], *, strides: Sequence[int] | None = None
) -> Float[Array, "... c"]:
    """Max pooling, without padding, that gives mean 0 and variance 1 for independent N(0, 1) inputs.

        y = (max_pool(x) - m) / s,   (m, s) = max_moments(n),   n = the number of positions in a window

    At a tie the derivative is that of one of the largest. Neighbours in an image are correlated, and outputs of relu
    are not normal: for them mean and variance are not exactly 0 and 1.

    Args:
      x: (N, *space, C).
      window_shape: one size per spatial axis.
      strides: one per spatial axis; 1 each if None, as in `flax.nnx.max_pool`.

    Returns:
      (N, *space', C), in the dtype of x.

    Raises:
      ValueError: if a size or a stride is below 1.

    Reference: Arpit et al., 2016, see `NormPropLinear`. The constants are ours, for normal inputs.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.normprop import normalized_max_pool
      >>> round(normalized_max_pool(jnp.ones((1, 2, 2, 1)), (2, 2)).item(), 3)  # (1 - 1.029) / 0.701
      -0.042
    """
    check_sizes(window_shape=window_shape, strides=strides or 1)
    mean, std = max_moments(math.prod(window_shape))
    return (nnx.max_pool(x, window_shape, strides) - mean) / std
