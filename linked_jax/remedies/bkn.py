"""BKN, batch Kalman normalisation: what a small batch says of a layer, fused with what the layer before predicts."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, Float, Key

from linked_jax.arrays import like, wide
from linked_jax.remedies.arguments import check_shares, check_sizes
from linked_jax.remedies.moment_calculus import Moments

_TRUSTED_BELOW = 100.0  # the mean of v_pred / v_B; the authors' limit


def channel_moments(x: Float[Array, "... c"]) -> Moments:
    """The mean and the biased variance of each channel over everything else, at least in float32.

    >>> import jax.numpy as jnp
    >>> from linked_jax.remedies.bkn import channel_moments
    >>> [each.tolist() for each in channel_moments(jnp.array([[1.0, 4.0], [3.0, 4.0]]))]
    [[2.0, 4.0], [1.0, 0.0]]
    """
    x = wide(x)
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return Moments(mean, jnp.square(x - like(mean, x)).mean(axes))


def fuse(predicted: Moments, observed: Moments, p: float) -> Moments:
    """The posterior of a layer: the moments of a mixture of what was predicted, weight p, and what was observed.

        m = m_B + p (m_pred - m_B),   v = v_B + p (v_pred - v_B) + p (1 - p) (m_B - m_pred)^2

    Unless the mean over channels of v_pred / v_B is below 100 the prediction is left out: m = m_B and v = v_B. So it
    is also where some v_B is 0.

    Args:
      predicted: m_pred and v_pred, (C,).
      observed: m_B and v_B, of the batch, (C,).
      p: the weight of the prediction.

    Returns:
      m and v, (C,). The gradient passes both sources, but not the choice to leave the prediction out.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.bkn import fuse
      >>> from linked_jax.remedies.moment_calculus import Moments
      >>> predicted, observed = Moments(jnp.array([2.0]), jnp.array([1.0])), Moments(jnp.array([0.0]), jnp.array([3.0]))
      >>> [each.tolist() for each in fuse(predicted, observed, 0.5)]
      [[1.0], [3.0]]

    Reference: Wang et al., Batch Kalman normalization, 2018; the form and the limit are those of the authors' code,
    github.com/wanggrun/Kalman-Normalization. The learned transition of the paper is not in it, and not here.
    """
    m_B, v_B = observed
    positive = v_B > 0
    ratio = jnp.where(positive, predicted.variance / jnp.where(positive, v_B, 1), jnp.inf)
    trusted = ratio.mean() < _TRUSTED_BELOW
    m_pred, v_pred = (jnp.where(trusted, *pair) for pair in zip(predicted, observed, strict=True))
    m = m_B + p * (m_pred - m_B)
    v = v_B + p * (v_pred - v_B) + p * (1 - p) * jnp.square(m_B - m_pred)
    return Moments(m, v)


def predict(
    posterior: Moments,
    key: Key[Array, ""],
    layer: Callable[[Any], Any],
    shape: Sequence[int],
    *,
    samples: int = 1,
) -> Moments:
    """The moments that a layer will have, from those of what it sees.

        x = layer(s sqrt(v) + m),   s ~ N(0, I);   m_pred, v_pred = mean and variance of x

    Args:
      posterior: m and v of what the layer sees, (C,).
      key: of s.
      layer: activation and kernel together, (n, *shape) -> (n, ..., C'), as applied to the data.
      shape: of one example, (*space, C).
      samples: how many examples to draw. The paper draws one image; a dense layer needs many, or has no variance.

    Returns:
      m_pred and v_pred, (C',). Where v = 0 the derivative of sqrt(v) is taken as 0.

    Raises:
      ValueError: if shape does not end with C, or x has one value for each channel only.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.bkn import predict
      >>> from linked_jax.remedies.moment_calculus import Moments
      >>> posterior = Moments(jnp.zeros(1), jnp.ones(1))
      >>> predicted = predict(posterior, jax.random.key(0), jax.nn.relu, (1000, 1000, 1))
      >>> [round(float(each[0]), 2) for each in predicted]  # sqrt(1 / (2 pi)), (1 - 1 / pi) / 2
      [0.4, 0.34]
    """
    m, v = posterior
    check_sizes(samples=samples)
    if tuple(shape[-1:]) != m.shape:
        raise ValueError(f"shape is (*space, C) with the {m.shape} means of the posterior, got {tuple(shape)}")
    positive = v > 0
    deviation = jnp.where(positive, jnp.sqrt(jnp.where(positive, v, 1)), 0)
    s = jax.random.normal(key, (samples, *shape), m.dtype)
    x = layer(s * like(deviation, s) + like(m, s))
    if math.prod(x.shape[:-1]) < 2:
        raise ValueError(f"one value for each channel has no variance, got x of shape {x.shape}; pass more samples")
    return channel_moments(x)


class BatchKalmanNorm(nnx.Module):
    """Batch norm with the fused moments m and v: (x, predicted) -> (y, posterior).

        y = gamma (x - m) / sqrt(v + epsilon) + beta

    Evaluation has the running averages of m and v in their place, as in the authors' code. The posterior is that of y,
    which the next layer sees: mean beta, variance gamma^2 v / (v + epsilon).

    Args:
      num_features: C.
      prediction_weight: p in [0, 1]. 0.9 is for batches of a few examples, the authors' 0.05 for large ones; 0 is
        batch norm.
      reference: give the authors' posterior: m and v, of x before it is normalised, though the next layer does not
        see that.
      momentum: of the running averages.
      epsilon: added to variances.
      use_running_average: as in `flax.nnx.BatchNorm`.
      dtype: of y; that of x and the parameters together if None. Moments have at least float32.
      param_dtype: of gamma and beta, which start at 1 and 0.
      rngs: not used; there so that all layers are built alike.

    Raises:
      ValueError: if num_features is below 1 or prediction_weight is not in [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.bkn import BatchKalmanNorm, predict
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.conv1 = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
      ...         self.conv2 = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
      ...         self.norm1, self.norm2 = (BatchKalmanNorm(8, rngs=rngs) for _ in range(2))
      ...         self.rngs = rngs
      ...     def __call__(self, images):
      ...         y, posterior = self.norm1(self.conv1(images))  # the first layer has no prediction
      ...         layer = lambda y: self.conv2(nnx.relu(y))
      ...         predicted = predict(posterior, self.rngs.prediction(), layer, y.shape[1:])
      ...         y, posterior = self.norm2(layer(y), predicted)
      ...         return nnx.relu(y)
      >>> Net(nnx.Rngs(0))(jnp.ones((2, 8, 8, 1))).shape
      (2, 8, 8, 8)

    Reference: Wang et al., Batch Kalman normalization, 2018.
    """

    def __init__(
        self,
        num_features: int,
        *,
        prediction_weight: float = 0.9,
        reference: bool = False,
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
        if not 0 <= prediction_weight <= 1:
            raise ValueError(f"prediction_weight is in [0, 1], got {prediction_weight}; 0.9 is for micro batches")
        self.num_features = num_features
        self.prediction_weight = prediction_weight
        self.reference = reference
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_running_average = use_running_average
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(num_features, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(num_features, jnp.float32))

    def __call__(
        self, x: Float[Array, "... c"], predicted: Moments | None = None, *, use_running_average: bool | None = None
    ) -> tuple[Float[Array, "... c"], Moments]:
        """x (..., C) and its prediction, or None -> y (..., C) and the posterior. Evaluation ignores the prediction."""
        if x.shape[-1] != self.num_features:
            raise ValueError(f"the norm was built for {self.num_features} channels, got x of shape {x.shape}")
        if self.use_running_average if use_running_average is None else use_running_average:
            m, v = Moments(self.mean[...], self.var[...])
        else:
            m, v = observed = channel_moments(x)
            if predicted is not None:
                m, v = fuse(predicted, observed, self.prediction_weight)
            self._average(self.mean, m)
            self._average(self.var, v)
        gamma, beta = self.scale[...], self.bias[...]
        factor = gamma * jax.lax.rsqrt(v + self.epsilon)
        y = (x - like(m, x)) * like(factor, x) + like(beta, x)
        y = y.astype(dtypes.canonicalize_dtype(x, gamma, beta, dtype=self.dtype))
        return y, Moments(m, v) if self.reference else Moments(beta.astype(v.dtype), jnp.square(factor) * v)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `flax.nnx.view` calls, as `flax.nnx.BatchNorm` has it."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _average(self, running: nnx.BatchStat, new: Array) -> None:
        new = jax.lax.stop_gradient(new).astype(running.dtype)
        running[...] = self.momentum * running[...] + (1 - self.momentum) * new
