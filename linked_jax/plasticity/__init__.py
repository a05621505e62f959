"""Parts that keep a net learning: pull it back to its start, shrink and perturb it, give useless units new weights.

Each is an Optax transformation, so it is vmapped over seeds, scanned over steps and saved with the optimiser's state.
`linked_jax.revive` has what is done to a model between steps: ReDo on a batch of one's own, and links.
"""

from linked_jax.plasticity.continual_backprop import continual_backprop
from linked_jax.plasticity.l2_init import l2_init
from linked_jax.plasticity.recycle import recycle_dormant
from linked_jax.plasticity.shrink_and_perturb import shrink_and_perturb
from linked_jax.plasticity.units import Units

__all__ = ["Units", "continual_backprop", "l2_init", "recycle_dormant", "shrink_and_perturb"]
