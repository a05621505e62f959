"""DReLU: the difference of two rectifiers on two pre-activations of their own. Unlike a ReLU it has both signs."""

import jax
from jaxtyping import Array, Float


def drelu(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """The dual rectified linear unit of two independent pre-activations.

        max(0, a) - max(0, b)

    The derivative by a is 1 for a > 0 and 0 for a <= 0, by b it is -1 for b > 0 and 0 for b <= 0: at both kinks 0, as
    that of `jax.nn.relu`. Where a and b are below 0 the unit is dead; no link is.

    Args:
      a: the pre-activations of the positive branch.
      b: those of the negative branch, of the same shape.

    Returns:
      An array like a.

    Reference: Godin et al., Dual rectified linear units (DReLUs), 2017. The linked-neurons paper describes it as a
    concatenation that is symmetric to the origin; that is `linked_jax.min_max`. Since -max(0, b) = min(0, -b), DReLU is
    the sum of the two members of that link, one at a and the other at -b. At b = -a it is a itself.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax import min_max
      >>> from linked_jax.remedies.drelu import drelu
      >>> drelu(jnp.array([3.0, -1.0, -1.0]), jnp.array([1.0, 2.0, -5.0]))
      Array([ 2., -2.,  0.], dtype=float32)
      >>> min_max(jnp.array([3.0, -2.0]))  # another thing: of one pre-activation, twice as many values
      Array([ 3.,  0.,  0., -2.], dtype=float32)
    """
    return jax.nn.relu(a) - jax.nn.relu(b)
