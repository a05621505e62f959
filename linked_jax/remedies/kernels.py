"""A layer of Flax whose kernel is computed at every call: what the remedies that reparametrise kernels have in common.

    z = x k(w) + b   or   z = x * k(w) + b

A remedy is its equation k, a pure function, and a class of a few lines. All other arguments, of padding, groups,
dilation, masks and precision, are those of `flax.nnx.Linear` and `flax.nnx.Conv`, whose own code computes z.
"""

import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from linked_jax.remedies.arguments import check_sizes


class ComputedKernel(nnx.Module):
    """Makes a `flax.nnx.Linear` or `flax.nnx.Conv` apply a kernel that it computes from its parameters.

    A subclass names this class before Flax' own and gives `computed_kernel`, or `weights` where the bias is computed
    too. Flax' mask multiplies the computed kernel. Lists among the arguments become tuples, which are hashable.

    Raises:
      ValueError: if a number of features, a kernel size or a stride is below 1; when called, if x does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.kernels import ComputedKernel
      >>> class Positive(ComputedKernel, nnx.Linear):
      ...     def computed_kernel(self):
      ...         return jnp.exp(self.kernel[...])
      >>> layer = Positive(2, 3, rngs=nnx.Rngs(0))
      >>> bool((layer(jnp.ones((1, 2))) > 0).all()), type(layer.fold()).__name__
      (True, 'Linear')
    """

    def __init__(self: Any, in_features: int, out_features: int, *geometry: Any, **options: Any):
        named = dict(zip(("kernel_size", "strides"), geometry, strict=False)) | options
        sizes = {name: named[name] for name in ("kernel_size", "strides") if named.get(name) is not None}
        check_sizes(in_features=in_features, out_features=out_features, **sizes)
        options = {name: _as_tuple(option) for name, option in options.items()}
        as_flax: Any = super().__init__
        as_flax(in_features, out_features, *map(_as_tuple, geometry), **options)

    def computed_kernel(self) -> Float[Array, "... c_in c_out"]:
        """The kernel that is applied, (in_features, out_features) or (*kernel_size, in_features, out_features)."""
        raise NotImplementedError

    def weights(self: Any) -> tuple[Array, Array | None]:
        """The kernel and the bias that are applied. What a call gets beside x, this gets too."""
        return self.computed_kernel(), None if self.bias is None else self.bias[...]

    @property
    def masked(self: Any) -> Float[Array, "... c_in c_out"]:
        """The parameter `kernel`, zero where Flax' mask is."""
        mask = getattr(self, "mask", None)
        return self.kernel[...] if mask is None else self.kernel[...] * mask

    def __call__(self: Any, x: Float[Array, "... c"], *given: Any, **options: Any) -> Float[Array, "... c_out"]:
        """x (..., in_features) -> z (..., out_features), or (N, *space, in_features) -> (N, *space', out_features)."""
        space = len(getattr(self, "kernel_size", ()))
        if x.shape[-1] != self.in_features or x.ndim <= space:
            raise ValueError(
                f"{type(self).__name__} takes x of shape (..., {'*space, ' * bool(space)}c_in) with c_in = "
                f"{self.in_features} and {space} spatial axes, got {x.shape}; build it with x's features"
            )
        kernel, bias = self.weights(*given)
        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)  # not the wider one of the kernel
        seen = {"kernel": nnx.Param(kernel), "bias": None if bias is None else nnx.Param(bias)}
        seen |= {"use_bias": bias is not None, "dtype": dtype}
        return _plain(self).__call__(_Replaced(self, seen), x, **options)

    def fold(self: Any, *given: Any) -> Any:
        """A plain layer with the computed weights, for deployment.

        Args:
          given: what a call gets beside x.

        Returns:
          A `flax.nnx.Linear` or `flax.nnx.Conv` with parameters of its own and the same output, but for the rounding
          of the weights to param_dtype.
        """
        kernel, bias = self.weights(*given)
        plain = _plain(self)
        options = {
            name: getattr(self, name) for name in inspect.signature(plain.__init__).parameters if hasattr(self, name)
        }
        options |= {"use_bias": bias is not None, "rngs": nnx.Rngs(0)}
        return plain(
            **options,
            kernel_init=lambda _key, _shape, dtype: jnp.array(kernel, dtype),
            bias_init=lambda _key, _shape, dtype: jnp.array(bias, dtype),
        )


class _Replaced:
    """A layer as Flax' own __call__ sees it, with some attributes replaced; the layer stays as it is."""

    def __init__(self, layer: Any, attributes: dict[str, Any]):
        vars(self).update(attributes, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_layer"], name)


def _plain(layer: Any) -> Any:
    return nnx.Conv if isinstance(layer, nnx.Conv) else nnx.Linear


def _as_tuple(option: Any) -> Any:
    return tuple(map(_as_tuple, option)) if isinstance(option, list) else option
