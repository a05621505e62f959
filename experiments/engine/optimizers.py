"""The paper's optimisers with the updates that Keras had in 2017, as Optax transformations.

g is the gradient, p a parameter, t the number of the update from 1, and lr the rate: a positive number, or a schedule
from the count of earlier updates (0, 1, 2, ...). Averages decay in [0, 1); epsilon is positive, in units of the
gradient; anything else is a ValueError. The averages of adam and rmsprop are of float32 at least, since
epsilon and g^2 vanish in float16; updates have g's dtype. Where Optax' own namesakes differ is said below.

Reference: keras/optimizers.py of Keras 2.0, 2017.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Rate = optax.ScalarOrSchedule
Optimizer = optax.GradientTransformation


def sgd(learning_rate: Rate, *, momentum: float = 0.0, nesterov: bool = False) -> Optimizer:
    """Gradient descent; the velocity adds up steps, so it keeps the rates of its time.

        v <- momentum * v - lr * g
        p <- p + v,   or with nesterov:   p <- p + momentum * v - lr * g

    Optax' sgd adds up gradients and multiplies by the rate of now: another method as soon as the rate changes.

    >>> import jax.numpy as jnp
    >>> from experiments.engine.optimizers import sgd
    >>> optimizer = sgd(0.5, momentum=0.5, nesterov=True)
    >>> optimizer.update(jnp.ones(1), optimizer.init(jnp.zeros(1)))[0]
    Array([-0.75], dtype=float32)
    """
    _check(learning_rate, momentum=momentum)
    if nesterov and momentum == 0:
        raise ValueError(f"nesterov needs momentum, got momentum={momentum}; pass momentum=0.9 or nesterov=False")
    scale = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(scale, optax.trace(momentum, nesterov)) if momentum else scale


def adam(learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Adam with epsilon beside the uncorrected root.

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

    Optax' adam corrects v first, which amounts to eps * sqrt(1 - b2^t) in this place: eps / 32 at t = 1.

    >>> import jax.numpy as jnp
    >>> from experiments.engine.optimizers import adam
    >>> from linked_jax.schedules import inverse_time_decay
    >>> optimizer = adam(inverse_time_decay(1e-3, decay=1e-6))
    >>> updates, state = optimizer.update(jnp.ones(1), optimizer.init(jnp.zeros(1)))
    >>> round(float(updates[0]), 6)
    -0.001
    """
    _check(learning_rate, eps, b1=b1, b2=b2)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu=zeros, nu=zeros)

    def update(updates, state, params=None):
        del params
        t = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        steps = jax.tree.map(lambda m, v: correction.astype(m.dtype) * m / (jnp.sqrt(v) + eps), mu, nu)
        return steps, optax.ScaleByAdamState(t, mu, nu)

    return _in_float32(optax.chain(Optimizer(init, update), optax.scale_by_learning_rate(learning_rate)))


def rmsprop(learning_rate: Rate, *, decay: float = 0.9, eps: float = 1e-8) -> Optimizer:
    """RMSProp with epsilon beside the root, where Optax by default has it under the root.

        v <- decay v + (1 - decay) g^2      (this decay is Keras' rho; Keras' decay belongs in the schedule)
        p <- p - lr g / (sqrt(v) + eps)

    >>> import jax.numpy as jnp
    >>> from experiments.engine.optimizers import rmsprop
    >>> optimizer = rmsprop(0.5, decay=0.75)
    >>> optimizer.update(jnp.ones(1), optimizer.init(jnp.zeros(1)))[0]
    Array([-1.], dtype=float32)
    """
    _check(learning_rate, eps, decay=decay)
    scale = optax.scale_by_rms(decay, eps, eps_in_sqrt=False)
    return _in_float32(optax.chain(scale, optax.scale_by_learning_rate(learning_rate)))


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": adam,
    "rmsprop": rmsprop,
    "sgd": sgd,
    "nesterov": functools.partial(sgd, momentum=0.9, nesterov=True),
}
"""By name, for settings; "nesterov" is the All-CNN experiment's, "sgd" has no momentum unless asked."""


def _check(learning_rate: Rate, eps: float = 1e-8, **decays: float) -> None:
    for name, value in (("learning_rate", learning_rate), ("eps", eps)):
        # Only plain numbers: a schedule checks itself, an array may be traced (optax.inject_hyperparams).
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ValueError(f"{name} is positive and finite, got {value!r}; pass e.g. 1e-3 for a rate, 1e-8 for eps")
    for name, value in decays.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is in [0, 1), got {value!r}; pass e.g. 0.9")


def _in_float32(optimizer: Optimizer) -> Optimizer:
    """The optimiser, which sees half precision as float32."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)

    def update(updates, state, params=None):
        del params
        steps, state = optimizer.update(wide(updates), state)
        return jax.tree.map(lambda step, g: step.astype(g.dtype), steps, updates), state

    return Optimizer(lambda params: optimizer.init(wide(params)), update)
