"""L2 Init: a penalty on how far the parameters are from where they started."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from linked_jax.arrays import Number, is_number
from linked_jax.plasticity.units import needs_params


class L2InitState(NamedTuple):
    """Where the parameters started."""

    start: Any


def l2_init(strength: Number) -> optax.GradientTransformation:
    """Add the gradient of a pull towards the start to the gradients; it stands before the optimiser.

        g' = g + 2 lambda (theta - theta_0)   =   gradient of   L(theta) + lambda |theta - theta_0|^2

    theta_0 are the very values that `init` sees. L2 regularisation is the same with theta_0 = 0. Chained before Adam it
    is part of the loss, as in the paper, and Adam scales it as any gradient, unlike AdamW's weight decay.

    Args:
      strength: lambda, at least 0.

    Returns:
      An Optax transformation; it needs params.

    Raises:
      ValueError: if the strength is negative; by update, if params are missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from linked_jax.plasticity import l2_init
      >>> tx = optax.chain(l2_init(0.5), optax.sgd(0.1))
      >>> state = tx.init({"w": jnp.array(1.0)})
      >>> updates, state = tx.update({"w": jnp.array(0.0)}, state, {"w": jnp.array(3.0)})
      >>> round(float(updates["w"]), 6)
      -0.2

    Reference: Kumar et al., Maintaining plasticity in continual learning via regenerative regularization, 2023,
    equation (1). Their code has lambda / 2 where the paper has lambda.
    """
    if is_number(strength) and not strength >= 0:
        raise ValueError(f"the strength of L2 Init is at least 0, got {strength}; 0.01 is the authors' largest")

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, L2InitState]:
        needs_params(params, "l2_init")
        pulled = jax.tree.map(lambda g, p, start: g + 2 * strength * (p - start), updates, params, state.start)
        return pulled, state

    # Copies: the caller's arrays may be donated, and an nnx.State shares its variables with the model.
    return optax.GradientTransformation(lambda params: L2InitState(jax.tree.map(jnp.copy, params)), update)
