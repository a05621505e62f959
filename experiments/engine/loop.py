"""THE training loop: one pure update, scanned over the batches of an epoch or called once a batch.

    (loss, state'), g = d loss(parameters, state, data, batch, key) / d parameters
    parameters' = parameters + lr * optimizer(g)

On a CPU a convolution inside a loop body can be many times slower than outside, so nets with convolutions run one
jitted update a call there; elsewhere the epoch is one program. `python -m benchmarks.loop` measures both.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from experiments.engine.parallel import ONE_DEVICE, Placement

Loss = Callable[[Any, Any, Any, Any, Array], tuple[Array, Any]]
"""(parameters, state, data, batch, key) -> the scalar loss, the new state. Hashable: equal ones compile once."""


class Carry(NamedTuple):
    """What an update changes; under a stacked placement with a leading axis of seeds."""

    parameters: Any
    state: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Loop:
    """What is trained, and where; a static argument of jit."""

    loss: Loss  # of a batch, for one seed
    optimizer: optax.GradientTransformation  # keep the object: another one with equal settings compiles anew
    place: Placement = ONE_DEVICE
    own_data: bool = False  # each seed has data of its own, with a leading axis of seeds
    scanned: bool = dataclasses.field(default_factory=lambda: jax.default_backend() != "cpu")  # see above
    skip_nonfinite: bool = False  # an update that would leave a NaN or an infinity changes nothing; its loss is NaN

    def start(self, models: Sequence[nnx.Module], opt_states: Sequence[Any] | None = None) -> Carry:
        """The carry before the next update, of one model a seed; of several only where the placement stacks seeds.

        It shares no array with what it is made of. The optimiser's states are by default those before the first update.
        """
        stack = (lambda *leaves: jnp.stack(leaves)) if self.place.stacked else jnp.copy  # an update donates its carry
        carries = []
        for number, model in enumerate(models):
            _, parameters, state = nnx.split(model, nnx.Param, ...)
            opt_state = opt_states[number] if opt_states else self.optimizer.init(parameters)
            carries.append(Carry(parameters, state, opt_state))
        return self.place.of_seeds(jax.tree.map(stack, *carries))

    def update(self, carry: Carry, data: Any, batch: Any, key: Array, number: Any, lr: Any) -> tuple[Carry, Array]:
        """One update of one seed, in no jit: the new carry, and the loss before it.

        Data and batch, such as the indices of examples, are the loss's; it gets the key of the epoch folded with the
        number of the update in it, from 0. The rate multiplies the optimiser's updates.
        """

        def of(parameters: Any) -> tuple[Array, Any]:
            return self.loss(parameters, carry.state, data, batch, jax.random.fold_in(key, number))

        (loss, state), gradients = jax.value_and_grad(of, has_aux=True)(carry.parameters)
        optimizer = optax.with_extra_args_support(self.optimizer)  # one that asks for the state is given it
        updates, opt_state = optimizer.update(gradients, carry.opt_state, carry.parameters, seen=state)
        updates = jax.tree.map(lambda update: lr * update, updates)
        new = Carry(optax.apply_updates(carry.parameters, updates), state, opt_state)
        return _if_finite(new, loss, carry) if self.skip_nonfinite else (new, loss)

    def own(self, lr: Any) -> tuple[bool, ...]:
        """Which arguments of `update` have an axis of seeds where they are stacked; a rate may."""
        return (True, self.own_data, True, True, False, jnp.ndim(lr) > 0)


def _if_finite(new: Carry, loss: Array, old: Carry) -> tuple[Carry, Array]:
    """The new carry and the loss, if they are finite, else the old one and NaN."""
    inexact = [leaf for leaf in jax.tree.leaves((new, loss)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in inexact]).all()
    return jax.tree.map(functools.partial(jnp.where, finite), new, old), jnp.where(finite, loss, jnp.nan)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(loop: Loop, carry: Carry, data: Any, batch: Any, key: Array, number: Any, lr: Any) -> tuple[Carry, Array]:
    """One update of all seeds: the carry, which is used up, and the losses (1,) or (seeds, 1)."""
    carry, loss = loop.place.over_seeds(loop.update, loop.own(lr))(carry, data, batch, key, number, lr)
    return carry, loss[..., None]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def scan(loop: Loop, carry: Carry, data: Any, batches: Any, key: Array, first: Any, lr: Any) -> tuple[Carry, Array]:
    """An update for each of the batches, of all seeds, in one program: the carry, and the losses ([seeds,] updates)."""

    def of_one_seed(carry: Carry, data: Any, batches: Any, key: Array, first: Any, lr: Any) -> tuple[Carry, Array]:
        numbers = first + jnp.arange(len(jax.tree.leaves(batches)[0]))
        return jax.lax.scan(lambda c, x: loop.update(c, data, x[0], key, x[1], lr), carry, (batches, numbers))

    return loop.place.over_seeds(of_one_seed, loop.own(lr))(carry, data, batches, key, first, lr)


def advance(
    loop: Loop, carry: Carry, data: Any, batches: np.ndarray, key: Array, *, first: int = 0, lr: Any = 1.0
) -> tuple[Carry, Array]:
    """An update for each of the batches, in the way that is fast here.

    Args:
      loop: what is trained.
      carry: used up.
      data: of the loss; on the placement's devices.
      batches: of one size: (updates, batch) or, with stacked seeds, (seeds, updates, batch).
      key: of the epoch; with stacked seeds one each.
      first: the number of the first update in its epoch.
      lr: the rate; with stacked seeds it may be one each.

    Returns:
      The carry, and the losses: (updates,) or (seeds, updates).
    """
    if loop.scanned:
        return scan(loop, carry, data, loop.place.batch(batches), key, np.int32(first), lr)
    losses = []
    for number in range(batches.shape[-2]):
        batch = loop.place.batch(batches[..., number, :])
        carry, loss = step(loop, carry, data, batch, key, np.int32(first + number), lr)
        losses.append(loss)
    return carry, losses[0] if len(losses) == 1 else jnp.concatenate(losses, axis=-1)
