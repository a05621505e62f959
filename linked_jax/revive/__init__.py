"""Bring a trained network back to life: link it without changing its outputs, re-initialise dormant units, and fold.

    g(z) W  =  f(z) [W; 0],   f = (g, g_2, ..., g_d)

The added weights are zero and get gradient in the first update; then the dead unit's own weights get it too.
"""

from linked_jax.revive.expand import Pair, link_params, link_params_opt_state
from linked_jax.revive.fold import fold_batch_norm, fold_sequential
from linked_jax.revive.redo import redo
from linked_jax.revive.sequential import link_sequential, link_sequential_opt_state
from linked_jax.revive.unlink import unlink
from linked_jax.revive.warm_up import warm_up_new

__all__ = [
    "Pair",
    "fold_batch_norm",
    "fold_sequential",
    "link_params",
    "link_params_opt_state",
    "link_sequential",
    "link_sequential_opt_state",
    "redo",
    "unlink",
    "warm_up_new",
]
