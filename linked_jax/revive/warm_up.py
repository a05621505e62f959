"""Let the weights that linking adds start slowly: an Optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class WarmUpNewState(NamedTuple):
    """The number of updates so far, up to `steps`, and which weights are new: True where one was 0."""

    t: Int[Array, ""]
    new: Any


def warm_up_new(steps: int) -> optax.GradientTransformation:
    """Multiply the updates of new weights by a factor that grows from 1/steps to 1; all others stay what they are.

        u_i  ->  min(1, t / steps) u_i   in update t,   where w_i = 0 at the start

    `link_params`, `link_sequential` and `redo` leave new weights at exactly 0, by which they are known: so give `init`
    the linked parameters. Put it last in a chain. A weight that was 0 for another reason warms up too. Adam's first
    steps of new weights are large, since its bias correction is over, and all at once: the loss of a net in good health
    rises. docs/optimisers.md says how much, with and without.

    Args:
      steps: how many updates it takes, at least 1; some hundred for Adam.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: if steps is no integer of at least 1.

    Examples:
      >>> import jax, optax
      >>> from flax import nnx
      >>> from linked_jax import lk_relu
      >>> from linked_jax.revive import link_sequential, link_sequential_opt_state, warm_up_new
      >>> rngs, tx = nnx.Rngs(0), optax.adam(1e-3)
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), jax.nn.relu, nnx.Linear(16, 3, rngs=rngs))
      >>> state = tx.init(nnx.state(model, nnx.Param))  # and train
      >>> linked = link_sequential(model, lk_relu)
      >>> warm = warm_up_new(100)
      >>> state = link_sequential_opt_state(state, model, lk_relu, tx=tx), warm.init(nnx.state(linked, nnx.Param))
      >>> tx = optax.chain(tx, warm)  # and train on
      >>> state[1].new["layers"][2]["kernel"][...].sum(0)
      Array([16, 16, 16], dtype=int32)
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps is an integer of at least 1, got {steps!r}")

    def init(params: Any) -> WarmUpNewState:
        return WarmUpNewState(jnp.zeros((), jnp.int32), jax.tree.map(lambda w: w == 0, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, WarmUpNewState]:
        del params
        t = jnp.minimum(state.t + 1, steps)
        slow = lambda u, new: jnp.where(new, (t / steps).astype(u.dtype) * u, u)  # noqa: E731
        return jax.tree.map(slow, updates, state.new), WarmUpNewState(t, state.new)

    return optax.GradientTransformation(init, update)
