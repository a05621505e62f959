"""Linearly constrained weights (LCW): the weights of each unit sum to zero, so equal means of inputs cancel.

    w = B v,   1.w = 0,   so   E[w.a] = 0 where E[a] = gamma 1

Without it the pre-activation of each unit has a mean of its own, |gamma| sqrt(m) ||w|| cos(angle(w, 1)): the activation
shift. Batch norm, if there is one, goes between the layer and the activation.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.arrays import wide
from linked_jax.initializers import Initializer
from linked_jax.linking import Link
from linked_jax.moments import expectation
from linked_jax.remedies.arguments import require_link
from linked_jax.remedies.kernels import ComputedKernel

_LECUN_NORMAL = nnx.initializers.lecun_normal()  # Flax' own


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

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.lcw import zero_sum_kernel
      >>> zero_sum_kernel(jnp.array([[2.0**0.5], [6.0**0.5]])).round(3).ravel()
      Array([ 2.,  0., -2.], dtype=float32)
    """
    _check_fan_in(len(v) + 1, f"v of shape {v.shape}")
    u = wide(v)
    j = jnp.arange(1, len(v) + 1, dtype=u.dtype)[:, None]
    u = u / jnp.sqrt(j * (j + 1))
    zero = jnp.zeros_like(u[:1])
    return jnp.concatenate([jax.lax.cumsum(u, reverse=True), zero]) - jnp.concatenate([zero, j * u])


def keep_variance(link: Link) -> Initializer:
    """An init of v for the layer after a link: pre-activations that are N(0, 1) give N(0, 1) again.

        v normal, of variance 1 / (fan_in mean_i Var[g_i(z)]),   z ~ N(0, 1)

    The variance of g counts and not its mean square, as for other kernels: the constraint removes the mean. It removes
    all of it where the members have the same mean; those of `min_max` have not.

    Args:
      link: what is before the layer, such as `linked_jax.sigmoid`.

    Returns:
      init(key, shape, dtype) for the `kernel_init` of `LCWLinear` and `LCWConv`.

    Raises:
      ValueError: if the link is constant.
      TypeError: if it is no link.

    Examples:
      >>> import jax
      >>> from linked_jax import relu
      >>> from linked_jax.remedies.lcw import keep_variance
      >>> v = keep_variance(relu)(jax.random.key(0), (1000, 1000), "float32")
      >>> round(float(v.var()) * 1000, 1)  # 1 / Var[relu(z)] = 2 / (1 - 1 / pi)
      2.9
    """
    means = [expectation(g) for g in require_link(link).members]
    variance = sum(expectation(lambda z, g=g, c=c: (g(z) - c) ** 2) for g, c in zip(link.members, means, strict=True))
    if not variance > 0:
        raise ValueError(f"a constant link has no variance to keep, got {link}; pass one that depends on z")
    return nnx.initializers.variance_scaling(link.arity / variance, "fan_in", "normal")


class _LCW(ComputedKernel):
    """What the dense layer and the convolution share: the parameter v stands for the kernel w = B v."""

    def __init__(self: Any, *sizes: Any, kernel_init: Initializer = _LECUN_NORMAL, **options: Any):
        def init_v(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            self.shape, fan_in = tuple(shape), math.prod(shape[:-1])
            _check_fan_in(fan_in, f"a kernel of shape {self.shape}")
            return kernel_init(key, (fan_in - 1, shape[-1]), dtype)

        super().__init__(*sizes, kernel_init=init_v, **options)
        self.v = self.kernel
        del self.kernel  # there is none to train

    def computed_kernel(self: Any) -> Float[Array, "... c_in c_out"]:
        """The kernel w = B v, float32 at least."""
        return zero_sum_kernel(self.v[...]).reshape(self.shape)


class LCWLinear(_LCW, nnx.Linear):
    """A dense layer whose weights sum to zero for each output: x (..., in_features) -> z (..., out_features).

        z = x (B v) + b

    A constant added to all inputs leaves z as it is.

    Args:
      in_features: the number of inputs m, 2 at least. After a link count all that it gives.
      out_features: the number of outputs.
      kernel_init: init(key, shape, dtype) of v, of shape (m - 1, out_features). By default normal with variance
        1 / (m - 1), cut at two deviations: then E||w||^2 = E||v||^2 = 1, and z has the variance of x where inputs are
        uncorrelated, whatever their common mean. After an activation take `keep_variance(link)`.
      options: as `flax.nnx.Linear`. B v is computed in float32 at least, and then rounded to dtype: in bfloat16 sums
        are zero to its precision only.

    Raises:
      ValueError: if a number of features is below 1, or there is one input only.

    Reference: Kutsuna, Linearly constrained weights: reducing activation shift for faster training of neural networks,
    2020. We use Helmert's basis for B, and put batch norm after the layer and before the activation.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.lcw import LCWLinear
      >>> layer = LCWLinear(8, 4, rngs=nnx.Rngs(0))
      >>> jnp.abs(layer(jnp.full((2, 8), 5.0))).max() < 1e-5  # equal inputs cancel
      Array(True, dtype=bool)
      >>> layer.fold()(jnp.ones((2, 8))).shape
      (2, 4)
    """


class LCWConv(_LCW, nnx.Conv):
    """A convolution whose weights sum to zero for each filter: x (N, *space, in_features) -> z (N, *space', features).

        z = x * (B v) + b

    The sum goes over all positions and input channels. Where zeros are padded, or a mask is, only a part of a filter
    meets the input, and that part does not sum to zero: means do not cancel at the borders, unless padding is "VALID"
    or "CIRCULAR".

    Args:
      in_features: the number of input channels. After a link count all that it gives.
      out_features: the number of output channels.
      kernel_size: an integer (one spatial axis) or a sequence, one size per spatial axis.
      kernel_init: init(key, shape, dtype) of v, of shape (fan-in - 1, out_features); see `LCWLinear`.
      options: as `flax.nnx.Conv`; see `LCWLinear`.

    Raises:
      ValueError: if a number of features or a size is below 1, or a filter has one weight only.

    Reference: as for `LCWLinear`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.lcw import LCWConv
      >>> conv = LCWConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((2, 8, 8, 4))).shape
      (2, 4, 4, 8)
    """


def _check_fan_in(fan_in: int, received: str) -> None:
    if fan_in < 2:
        raise ValueError(
            f"weights that sum to zero need a fan-in of 2 at least, got {fan_in} ({received}); take a plain layer there"
        )
