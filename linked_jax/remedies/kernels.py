"""Apply a kernel that was just computed: what the remedies that reparametrise kernels have in common."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes
from jaxtyping import Array, Float

Padding = Literal["SAME", "VALID"] | Sequence[tuple[int, int]]


def apply_kernel(
    x: Float[Array, "... c_in"],
    kernel: Float[Array, "... c_in c_out"],
    bias: Float[Array, " c_out"] | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dtype: Any = None,
) -> Float[Array, "... c_out"]:
    """A dense layer or a convolution, by the rank of the kernel.

        z = x K + b   or   z = x * K + b

    Args:
      x: (..., c_in) for a kernel of two axes, else (N, *space, c_in).
      kernel: (c_in, c_out) or (*kernel_size, c_in, c_out).
      bias: (c_out,), or None.
      strides: of a convolution; an integer or one per spatial axis.
      padding: of a convolution; "SAME", "VALID" or explicit pairs, zeros all of them.
      dtype: of the computation and of z; that of the arguments together if None.

    Returns:
      (..., c_out) or (N, *space', c_out).

    Raises:
      ValueError: if x has the wrong rank or number of features.

    Example:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.kernels import apply_kernel
      >>> apply_kernel(jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4)), strides=2).shape
      (2, 4, 4, 4)
    """
    space = kernel.ndim - 2
    if x.shape[-1] != kernel.shape[-2] or (space and x.ndim != space + 2):
        raise ValueError(
            f"a kernel of shape {kernel.shape} takes {'(N, *space, c_in)' if space else '(..., c_in)'} with c_in = "
            f"{kernel.shape[-2]} and {space} spatial axes, got x of shape {x.shape}"
        )
    x, kernel, bias = dtypes.promote_dtype((x, kernel, bias), dtype=dtype)
    if space:
        axes = "DHW"[-space:]
        z = jax.lax.conv_general_dilated(
            x,
            kernel,
            (strides,) * space if isinstance(strides, int) else tuple(strides),
            padding if isinstance(padding, str) else list(padding),
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        )
    else:
        z = jnp.dot(x, kernel)
    return z if bias is None else z + bias


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Refuse numbers of features and kernel sizes below 1, by name.

    Raises:
      ValueError: with the name and what was received.
    """
    for name, size in sizes.items():
        if min((size,) if isinstance(size, int) else size, default=1) < 1:
            raise ValueError(f"{name} is at least 1, got {size}")
