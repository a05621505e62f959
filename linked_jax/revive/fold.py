"""Fold for deployment: batch norm and computed kernels become plain weights with the same outputs in evaluation.

((x K + b) - mean) r + beta = x (K r) + ((b - mean) r + beta),   r = gamma / sqrt(var + epsilon)
"""

from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from linked_jax.arrays import like, wide_dtype
from linked_jax.revive.foldable import LAYERS, Foldable, link_and_layer, plain
from linked_jax.revive.joints import is_activation
from linked_jax.revive.stack import check_sequential

Layer = TypeVar("Layer", nnx.Linear, nnx.Conv)


def fold_batch_norm(layer: Layer, norm: nnx.BatchNorm) -> Layer:
    """One layer that computes what the layer and then the batch norm compute in evaluation.

        K' = K r,   b' = (b - mean) r + beta,   r = gamma / sqrt(var + epsilon)

    Args:
      layer: an nnx.Linear or nnx.Conv, with or without a bias.
      norm: with axis=-1 and one channel for each output of the layer; its running statistics are used.

    Returns:
      A new layer, with a bias. Folded in float32 at least, then in the layer's param_dtype. Its outputs have its
        dtype, which may not be the norm's: a bfloat16 layer and a float32 norm give bfloat16 once folded.

    Raises:
      ValueError: if the two have other types, or other numbers of channels.

    Reference: Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only
    inference, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.revive import fold_batch_norm
      >>> rngs = nnx.Rngs(0)
      >>> conv, norm = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
      >>> fold_batch_norm(conv, norm)(jnp.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 4)
    """
    if type(layer) not in (nnx.Linear, nnx.Conv) or not isinstance(norm, nnx.BatchNorm):
        raise ValueError(
            f"a batch norm folds into nnx.Linear or nnx.Conv, got {type(layer).__name__} and {type(norm).__name__}"
        )
    if norm.axis != -1 or norm.num_features != layer.out_features:
        raise ValueError(
            f"a layer with {layer.out_features} outputs takes a batch norm of as many on axis -1, got "
            f"{norm.num_features} on axis {norm.axis}"
        )
    dtype = wide_dtype(layer.kernel.dtype)
    kernel, bias, mean, var, scale, shift = (
        0.0 if a is None else a[...].astype(dtype)
        for a in (layer.kernel, layer.bias, norm.mean, norm.var, norm.scale, norm.bias)
    )
    ratio = (1.0 if norm.scale is None else scale) / jnp.sqrt(var + norm.epsilon)
    folded = nnx.clone(layer)
    folded.kernel[...] = (kernel * like(ratio, kernel)).astype(layer.kernel.dtype)
    folded.bias = nnx.Param(((bias - mean) * ratio + shift).astype(layer.kernel.dtype))
    folded.use_bias = True
    return folded


def fold_sequential(model: nnx.Sequential) -> nnx.Sequential:
    """The model with all computed kernels folded, and each `flax.nnx.BatchNorm` into the layer right before it.

    A layer with a method `fold()`, such as those of `linked_jax.remedies`, becomes what that gives; linked
    layers become a link and a plain layer. A batch norm after an activation is refused: its shift does not pass the
    activation, g(r z + s) is not r g(z) + s, and its scale passes only where g is positively homogeneous. Other norms
    stay.

    Args:
      model: trained.

    Returns:
      A new `nnx.Sequential` with variables of its own and the same outputs in evaluation.

    Raises:
      ValueError: if a batch norm does not follow an nnx.Linear or nnx.Conv directly, a module has inside what would
        be folded, or a layer's `fold` has arguments; with its index.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.revive import fold_sequential
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs), jax.nn.relu)
      >>> [type(layer).__name__ for layer in fold_sequential(model).layers[:1]], len(fold_sequential(model).layers)
      (['Linear'], 2)
    """
    check_sequential(model)
    layers: list[Any] = []
    for i, layer in enumerate(nnx.clone(model).layers):
        for part in link_and_layer(layer):
            if isinstance(part, nnx.BatchNorm):
                _check_before(layers[-1] if layers else None, i)
                layers[-1] = fold_batch_norm(layers[-1], part)
            else:
                _check_inside(part, i)
                layers.append(plain(part, f"layers[{i}]"))
    return nnx.Sequential(*layers)


def _check_before(before: Any, i: int) -> None:
    if type(before) not in (nnx.Linear, nnx.Conv):
        link = before is not None and is_activation(before, f"layers[{i - 1}]")
        reason = "an activation, which its shift does not pass" if link else f"a {type(before).__name__}"
        reason = "nothing" if before is None else reason
        raise ValueError(f"the batch norm at layers[{i}] follows {reason}; move it right behind a layer")


def _check_inside(layer: Any, i: int) -> None:
    inside = [module for path, module in nnx.iter_modules(layer) if path] if isinstance(layer, nnx.Module) else []
    if type(layer) is not nnx.Sequential and not any(isinstance(module, (*LAYERS, Foldable)) for module in inside):
        return  # no layer that a norm inside could be folded into, as in a norm of several parts
    found = next((type(module).__name__ for module in inside if isinstance(module, (nnx.BatchNorm, Foldable))), None)
    if found:
        raise ValueError(
            f"layers[{i}], a {type(layer).__name__}, has a {found} inside, which would not be folded; flatten the "
            "Sequential: nnx.Sequential(*inner.layers, ...)"
        )
