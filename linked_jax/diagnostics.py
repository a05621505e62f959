"""Is a unit dead? Pure functions of arrays, to be combined over batches.

A unit is one pre-activation channel. It is scored by its whole link and never by its members: half of the members of
a mirrored relu are zero by construction.
"""

from jaxtyping import Array, Bool, Float

from linked_jax.linking import Layout


def live_units(h: Float[Array, "... c_linked"], *, arity: int = 1, layout: Layout = "blocked") -> Bool[Array, " c"]:
    """Which units have a non-zero output for at least one sample and position of this batch.

        live_c = any over samples, positions n and members i of g_i(z_nc) != 0

    A unit that is live in no batch is dead (the paper's definition); combine batches with a logical or.

    Args:
      h: the outputs of a link, (..., d*C), channels last.
      arity: the link's number of members d.
      layout: the link's layout.

    Returns:
      A boolean for each of the C units.

    Raises:
      ValueError: if the channels are not a multiple of the arity, or the layout is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax import live_units, lk_relu, relu
      >>> z = jnp.array([[-1.0, 2.0], [-3.0, -4.0]])
      >>> live_units(relu(z)).tolist(), live_units(lk_relu(z), arity=2).tolist()
      ([False, True], [True, True])
    """
    if arity < 1 or h.shape[-1] % arity:
        raise ValueError(f"the channels of h are a multiple of the arity, got {h.shape[-1]} channels and arity {arity}")
    if layout not in ("blocked", "interleaved"):
        raise ValueError(f"layout is 'blocked' or 'interleaved', got {layout!r}")
    live = (h != 0).any(axis=tuple(range(h.ndim - 1)))
    members = live.reshape(arity, -1) if layout == "blocked" else live.reshape(-1, arity).T
    return members.any(axis=0)
