"""Continual backprop: at a low, steady rate the least useful units start anew."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from linked_jax.arrays import Number, is_number
from linked_jax.plasticity.units import Draw, Renewal, Units, check_paths, listed, needs_params, outgoing_size
from linked_jax.revive.names import leaves_by_name


class ContinualBackpropState(NamedTuple):
    """Of each layer: utilities and ages of its units, and how much of a unit is due; the key; the optimiser's state."""

    utility: tuple[Float[Array, "_"], ...]
    age: tuple[Float[Array, "_"], ...]
    due: tuple[Float[Array, ""], ...]
    key: PRNGKeyArray
    inner: Any


def continual_backprop(
    tx: optax.GradientTransformation, units: Sequence[Units], draw: Draw, *, key: PRNGKeyArray,
    replacement_rate: Number = 1e-4, maturity: int | Array = 100, decay: Number = 0.99,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """An optimiser that also gives units of little use new weights.

        u <- decay u + (1 - decay) |h| sum |outgoing weights|,      a <- a + 1
        c <- c + replacement_rate * (number of units with a > maturity)
        the floor(c) mature units with the least u / (1 - decay^a) start anew,      c <- c - their number

    Of a unit that starts anew, incoming weights and bias are drawn, outgoing weights, u and a become 0, and all that
    the optimiser holds of each of these weights is as in tx.init (what it holds of many together, such as adafactor's
    rows and columns, stays). So outputs change by what the unit gave.
    A linked unit has one utility, over all its members.

    Args:
      tx: the optimiser, rate included.
      units: the hidden layers.
      draw: key -> parameters at a fresh start, under the names of the parameters, of which the incoming weights are
        taken; with NNX lambda key: nnx.state(Net(nnx.Rngs(params=key)), nnx.Param).
      key: of the new weights; it is part of the state, see `shrink_and_perturb`.
      replacement_rate: the share of the mature units that is replaced in a step.
      maturity: steps before a unit may be replaced.
      decay: of the running utility.

    Returns:
      An Optax transformation. Its update takes params, and magnitudes: mean |h| over the batch, positions and members,
      (C,) for each layer of `units`; `tap.stats.magnitude / tap.stats.count` of `linked_jax.probe.observe`.

    Raises:
      ValueError: if a number is out of its range, there are no units, or a layer has them twice; by init, if a path is
        not there; by update, if params or magnitudes are missing.
      TypeError: if units are no list of `Units`, or draw is no function.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from linked_jax.plasticity import Units, continual_backprop
      >>> draw = lambda key: {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((3, 1))}}
      >>> params = draw(None)
      >>> options = {"replacement_rate": 0.5, "maturity": 0, "key": jax.random.key(0)}
      >>> tx = continual_backprop(optax.sgd(0.1), [Units("a", "b")], draw, **options)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(zeros, tx.init(params), params, magnitudes=[jnp.array([1.0, 0.1, 1.0])])
      >>> optax.apply_updates(params, updates)["b"]["kernel"][:, 0].tolist()
      [1.0, 0.0, 1.0]

    Reference: Dohare et al., Loss of plasticity in deep continual learning, 2024, algorithm 1; the division by
    1 - decay^a, without which a unit that is new looks useless, is in their code.
    """
    if is_number(replacement_rate) and not 0 <= replacement_rate <= 1:
        raise ValueError(f"replacement_rate is from 0 to 1, got {replacement_rate}; the paper's is 1e-4")
    if is_number(maturity) and not maturity >= 0:
        raise ValueError(f"maturity is at least 0 steps, got {maturity}; the paper's is 100 to 10,000")
    if is_number(decay) and not 0 <= decay < 1:
        raise ValueError(f"decay is at least 0 and below 1, got {decay}; the paper's is 0.99")
    renewal = Renewal(tx, units, draw)

    def init(params: Any) -> ContinualBackpropState:
        check_paths(params, units)
        return ContinualBackpropState(*_start(params, units), jax.random.clone(key), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, ContinualBackpropState]:
        needs_params(params, "continual_backprop")
        leaves, (utility, age, due, chosen) = leaves_by_name(params), ([], [], [], [])
        sizes = listed(extra.get("magnitudes"), units, params, "continual_backprop")
        for i, (layer, size) in enumerate(zip(units, sizes, strict=True)):
            contribution = size * sum(outgoing_size(leaves[name], size.size) for name in layer.after)
            u = decay * state.utility[i] + (1 - decay) * contribution
            u = jnp.where(jnp.isfinite(u), u, state.utility[i])  # one NaN would stay for ever
            a = state.age[i] + 1
            c = state.due[i] + replacement_rate * (a > maturity).sum(dtype=u.dtype)
            least = _least(u / (1 - decay**a), a > maturity, jnp.floor(c))
            utility.append(jnp.where(least, 0, u))
            age.append(jnp.where(least, 0, a))
            due.append(c - least.sum(dtype=c.dtype))
            chosen.append(least)
        steps, rest, inner = renewal.step(updates, state, params, extra, chosen)
        return steps, ContinualBackpropState(tuple(utility), tuple(age), tuple(due), rest, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _start(params: Any, units: Sequence[Units]) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
    """Utility, age and due: zeros, each an array of its own, so that the state may be donated."""
    leaves = leaves_by_name(params)
    counts = [leaves[layer.kernel].shape[-1] if leaves else 0 for layer in units]
    utility, age = (tuple(map(jnp.zeros, counts)) for _ in range(2))
    return utility, age, tuple(jnp.zeros(()) for _ in units)


def _least(utility: Float[Array, " c"], mature: Bool[Array, " c"], count: Float[Array, ""]) -> Bool[Array, " c"]:
    """Which of the mature units are the so many with the least utility."""
    rank = jnp.argsort(jnp.argsort(jnp.where(mature, utility, jnp.inf)))
    return mature & (rank < count)
