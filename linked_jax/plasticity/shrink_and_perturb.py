"""Shrink and perturb: after each step the parameters shrink, and get a little of a fresh start."""

from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PRNGKeyArray

from linked_jax.arrays import Number, is_number
from linked_jax.plasticity.units import Draw, fresh_start, needs_params


class ShrinkAndPerturbState(NamedTuple):
    """The key of the next perturbation."""

    key: PRNGKeyArray


def shrink_and_perturb(
    shrink: Number, perturb: Number, draw: Draw, *, key: PRNGKeyArray
) -> optax.GradientTransformation:
    """Shrink the parameters after a step and add a perturbation; it stands last in a chain, after the rate.

        theta' = (1 - shrink) (theta + u) + perturb * epsilon,   epsilon drawn as the parameters' start is

    Args:
      shrink: from 0 to 1. The original is once a task, with 0.5 to 0.9 kept; a step's is small, 1e-5 to 1e-2.
      perturb: the scale of the perturbation, at least 0.
      draw: key -> parameters at a fresh start, under the same names; with NNX
        lambda key: nnx.state(Net(nnx.Rngs(params=key)), nnx.Param).
      key: of the perturbations. It is part of the state: `optax.tree_utils.tree_set(state, key=...)` gives a seed its
        own.

    Returns:
      An Optax transformation; it needs params.

    Raises:
      ValueError: if a number is out of its range; by update, if params are missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from linked_jax.plasticity import shrink_and_perturb
      >>> draw = lambda key: {"w": jax.random.normal(key, (2,))}
      >>> tx = optax.chain(optax.sgd(0.1), shrink_and_perturb(0.5, 0.0, draw, key=jax.random.key(0)))
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [0.5, 1.0]

    Reference: Ash and Adams, On warm-starting neural network training, 2020; at each step and with the start's own
    distribution as Kumar et al. 2023 have it.
    """
    if is_number(shrink) and not 0 <= shrink <= 1:
        raise ValueError(f"shrink is from 0 to 1, got {shrink}; 1e-4 is what Kumar et al. chose for random labels")
    if is_number(perturb) and not perturb >= 0:
        raise ValueError(f"perturb is at least 0, got {perturb}; 1e-2 is what Kumar et al. chose for random labels")

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ShrinkAndPerturbState]:
        needs_params(params, "shrink_and_perturb")
        key, now = jax.random.split(state.key)
        epsilon = fresh_start(draw, now, params)
        moved = jax.tree.map(lambda u, p, e: (1 - shrink) * u - shrink * p + perturb * e, updates, params, epsilon)
        return moved, ShrinkAndPerturbState(key)

    # A copy of the key: the state may be donated.
    return optax.GradientTransformation(lambda params: ShrinkAndPerturbState(jax.random.clone(key)), update)
