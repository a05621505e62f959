"""ReDo within the training step: every so many steps, units that hardly ever fire start anew."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from linked_jax.arrays import Number, is_number
from linked_jax.diagnostics import relative_sizes
from linked_jax.plasticity.units import Draw, Renewal, Units, check_paths, listed, needs_params


class RecycleState(NamedTuple):
    """The number of steps, the key of the next weights, the optimiser's state."""

    steps: Int[Array, ""]
    key: PRNGKeyArray
    inner: Any


def recycle_dormant(
    tx: optax.GradientTransformation, units: Sequence[Units], draw: Draw, *, key: PRNGKeyArray, period: int | Array,
    tau: Number = 0.025,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """An optimiser that also gives dormant units new weights.

        s_i = m_i / mean_k m_k,   m_i = mean |h_i| of the step's batch
        s_i <= tau, after every `period`-th step:   incoming weights drawn anew, outgoing weights 0

    All that the optimiser holds of each of these weights is then as in tx.init; what it holds of many together, such as
    adafactor's rows and columns, stays. Where all units of a layer are dormant, the
    dormant ones of the next see them all the same: else a net of dead layers would come back one layer a period.
    `linked_jax.revive.redo` does this to a model, between steps and on a batch of one's own.

    Args:
      tx: the optimiser, rate included.
      units: the hidden layers.
      draw: key -> parameters at a fresh start, under the names of the parameters, of which the incoming weights are
        taken; with NNX lambda key: nnx.state(Net(nnx.Rngs(params=key)), nnx.Param).
      key: of the new weights; it is part of the state, see `shrink_and_perturb`.
      period: steps from one time to the next, at least 1.
      tau: the largest score of a dormant unit, at least 0.

    Returns:
      An Optax transformation. Its update takes params, and magnitudes: mean |h| over the batch, positions and members,
      (C,) for each layer of `units`; `tap.stats.magnitude / tap.stats.count` of `linked_jax.probe.observe`.

    Raises:
      ValueError: if a number is out of its range, there are no units, or a layer has them twice; by init, if a path is
        not there; by update, if params or magnitudes are missing.
      TypeError: if units are no list of `Units`, or draw is no function.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from linked_jax.plasticity import Units, recycle_dormant
      >>> draw = lambda key: {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((3, 1))}}
      >>> params = draw(None)
      >>> tx = recycle_dormant(optax.sgd(0.1), [Units("a", "b")], draw, key=jax.random.key(0), period=1)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(zeros, tx.init(params), params, magnitudes=[jnp.array([1.0, 0.0, 1.0])])
      >>> optax.apply_updates(params, updates)["b"]["kernel"][:, 0].tolist()
      [1.0, 0.0, 1.0]

    Reference: Sokar et al., The dormant neuron phenomenon in deep reinforcement learning, 2023, algorithm 1.
    """
    if is_number(period) and not period >= 1:
        raise ValueError(f"period is at least 1 step, got {period}; a task's number of steps is usual")
    if is_number(tau) and not tau >= 0:
        raise ValueError(f"tau is at least 0, got {tau}; 0 finds the units that never fire")
    renewal = Renewal(tx, units, draw)

    def init(params: Any) -> RecycleState:
        check_paths(params, units)
        return RecycleState(jnp.zeros((), jnp.int32), jax.random.clone(key), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, RecycleState]:
        needs_params(params, "recycle_dormant")
        sizes, count = listed(extra.get("magnitudes"), units, params, "recycle_dormant"), state.steps + 1
        due = count % period == 0
        dormant = [due & (relative_sizes(size, finite=jnp.isfinite(size)) <= tau) for size in sizes]
        steps, rest, inner = renewal.step(updates, state, params, extra, dormant)
        return steps, RecycleState(count, rest, inner)

    return optax.GradientTransformationExtraArgs(init, update)
