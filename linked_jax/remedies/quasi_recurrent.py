"""A quasi-recurrent layer: causal convolutions give all gates at once, and only a pooling runs along time.

The candidate z is tanh of one pre-activation, DReLU of two, or any link of one.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.arrays import wide
from linked_jax.linking import Activation, Link
from linked_jax.remedies.arguments import check_sizes
from linked_jax.remedies.drelu import drelu


def fo_pool(f: Float[Array, "*n t h"], o: Float[Array, "*n t h"], z: Float[Array, "*n t h"]) -> Float[Array, "*n t h"]:
    """The only part with a memory: a running mean with a forget gate, and an output gate.

        c_t = f_t c_{t-1} + (1 - f_t) z_t,   h_t = o_t c_t,   c_0 = 0

    Time is the last axis but one. All steps are computed together, in about log2 T rounds, and in float32 at least.

    Args:
      f: forget gates in [0, 1], (..., T, H).
      o: output gates in [0, 1], (..., T, H).
      z: candidates, (..., T, H).

    Returns:
      h, (..., T, H), in the dtype of z.

    Reference: Bradbury et al., Quasi-recurrent neural networks, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.quasi_recurrent import fo_pool
      >>> half = jnp.full((1, 3, 1), 0.5)
      >>> fo_pool(half, jnp.ones((1, 3, 1)), jnp.ones((1, 3, 1))).ravel()
      Array([0.5  , 0.75 , 0.875], dtype=float32)
    """
    keep, new = wide(f), wide(z)

    def then(first, second):  # c -> a c + b, one after the other
        (a, b), (a_2, b_2) = first, second
        return a * a_2, a_2 * b + b_2

    _, c = jax.lax.associative_scan(then, (keep, (1 - keep) * new), axis=-2)
    return (o * c).astype(z.dtype)


class QuasiRecurrent(nnx.Module):
    """A quasi-recurrent layer along time: x (..., T, in_features) -> h (..., T, d*hidden_features).

        a, (b,) f, o = x * K + k       causal convolutions: step t sees x_t and the kernel_size - 1 steps before it
        z = tanh(a),  max(0, a) - max(0, b)  or  link(a)
        c_t = sigmoid(f_t) c_{t-1} + (1 - sigmoid(f_t)) z_t,   h_t = sigmoid(o_t) c_t

    With use_norm, a and b are batch-normalised over examples and steps, each unit of each branch by itself; f and o are
    not. In training the statistics then see the whole sequence. In evaluation h_t depends on no later step.

    Args:
      in_features: the number of features of a step.
      hidden_features: the number of units H.
      kernel_size: how many steps a convolution sees.
      candidate: "tanh" or "drelu"; or a function, a `Link` or a module such as `LinkedPReLU`, of one
        pre-activation. A link of d members makes d states of a unit, each with gates of its own; d is 1 else.
      use_norm: whether to normalise the candidate's branches; the scale gamma starts at 0.5.
      momentum: the share of the running statistics that a batch keeps, as in `flax.nnx.BatchNorm`.
      dtype: of the computation; that of x and the parameters if None. The pooling is in float32 at least.
      param_dtype: of the parameters.
      rngs: Flax random streams; `params` is used.

    Raises:
      ValueError: if a size is below 1, or the candidate has an unknown name.
      TypeError: if the candidate is neither a name nor a function.

    Reference: Bradbury et al., Quasi-recurrent neural networks, 2017; Godin et al., Dual rectified linear units
    (DReLUs), 2017. Linked candidates are ours, and so is normalising a tanh candidate too. What the papers leave open:
    epsilon is 1e-5, and kernels start as those of `flax.nnx.Conv`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import lk_relu
      >>> from linked_jax.remedies.quasi_recurrent import QuasiRecurrent
      >>> QuasiRecurrent(3, 8, candidate="drelu", rngs=nnx.Rngs(0))(jnp.ones((2, 5, 3))).shape
      (2, 5, 8)
      >>> QuasiRecurrent(3, 8, candidate=lk_relu, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 3))).shape
      (2, 5, 16)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        kernel_size: int = 2,
        candidate: Literal["tanh", "drelu"] | Activation | Callable[[Any], Any] = "tanh",
        use_norm: bool = True,
        momentum: float = 0.99,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, hidden_features=hidden_features, kernel_size=kernel_size)
        self.link = None if isinstance(candidate, str) and candidate == "drelu" else _as_link(candidate)
        branches = hidden_features * (2 if self.link is None else 1)
        states = hidden_features * (1 if self.link is None else self.link.arity)
        self.splits = (branches, branches + states)  # branches, forget gates, output gates
        shared: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = nnx.Conv(in_features, branches + 2 * states, (kernel_size,), padding="CAUSAL", **shared)
        half = nnx.initializers.constant(0.5)
        norm = nnx.BatchNorm(branches, momentum=momentum, scale_init=half, **shared) if use_norm else None
        self.norm = nnx.data(norm)

    def __call__(self, x: Float[Array, "*n t c"], *, use_running_average: bool | None = None) -> Float[Array, "*n t h"]:
        """x (..., T, in_features) -> h (..., T, d*H). The argument wins over what `train()` and `eval()` set."""
        branches, f, o = jnp.split(self.conv(x), self.splits, axis=-1)
        if self.norm is not None:
            branches = self.norm(branches, use_running_average=use_running_average).astype(f.dtype)
        z = drelu(*jnp.split(branches, 2, axis=-1)) if self.link is None else self.link(branches)
        return fo_pool(jax.nn.sigmoid(f), jax.nn.sigmoid(o), z)


def _as_link(candidate: Any) -> Activation:
    if isinstance(candidate, str):
        if candidate != "tanh":
            raise ValueError(f"candidate is 'tanh', 'drelu' or a link, got {candidate!r}; pass e.g. lk_relu")
        return Link((jnp.tanh,))
    if isinstance(candidate, type) or not callable(candidate):
        raise TypeError(f"candidate is a name, a function or a built link, got {candidate!r}; pass e.g. lk_relu")
    if isinstance(candidate, Link) and candidate.axis != -1:
        raise ValueError(f"features are last here, got a link with axis={candidate.axis}; pass one with axis=-1")
    return candidate if isinstance(candidate, Activation) else Link((candidate,))
