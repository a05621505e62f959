"""What counts as a layer: an nnx.Linear, nnx.LinearGeneral or nnx.Conv, and whatever knows how to fold to one."""

import inspect
from typing import Any, Protocol, runtime_checkable

from flax import nnx

from linked_jax.layers import LinkedConv, LinkedLinear

LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv)


@runtime_checkable
class Foldable(Protocol):
    """A layer that knows the plain layer with the same outputs, such as `linked_jax.remedies.WSConv`."""

    def fold(self) -> Any:
        """An nnx.Linear or nnx.Conv with parameters of its own."""
        ...


def plain(layer: Any, name: str) -> Any:
    """What the layer folds to, or the layer itself.

    Raises:
      ValueError: if its `fold` has arguments.
    """
    if not isinstance(layer, Foldable):
        return layer
    try:
        inspect.signature(layer.fold).bind()
    except TypeError:
        raise ValueError(
            f"{name}, a {type(layer).__name__}, does not fold by itself; put layer.fold(...) in its place first"
        ) from None
    return layer.fold()


def is_layer(layer: Any) -> bool:
    """Whether it is an nnx.Linear, nnx.LinearGeneral or nnx.Conv, or folds to one."""
    return isinstance(layer, (*LAYERS, Foldable))


def rows_axis(layer: Any, name: str) -> int:
    """The axis of a layer's kernel with an entry for each channel of its input.

    Raises:
      ValueError: if it is an nnx.LinearGeneral over other axes than the last one.
    """
    if not isinstance(layer, nnx.LinearGeneral):
        return layer.kernel.ndim - 2
    if -1 not in layer.axis:
        raise ValueError(f"{name}, an nnx.LinearGeneral over axes {layer.axis}, is not over the channels, axis -1")
    return len(layer.batch_axis) + len(layer.axis) - 1  # Flax contracts over sorted axes


def fit(layer: Any) -> None:
    """Set the sizes that a layer remembers to those of its variables."""
    if isinstance(layer, nnx.BatchNorm):
        layer.num_features = layer.mean.shape[0]
    elif isinstance(layer, nnx.LinearGeneral):
        first = len(layer.batch_axis)
        layer.in_features = tuple(layer.kernel.shape[first : first + len(layer.axis)])
    else:
        layer.in_features = layer.kernel.shape[-2]
        if isinstance(layer, nnx.Conv):
            layer.kernel_shape = layer.kernel.shape


def link_and_layer(layer: Any) -> list[Any]:
    """The layer; a `LinkedLinear` or `LinkedConv` as two, its link and its plain layer."""
    if isinstance(layer, (LinkedLinear, LinkedConv)):
        return [layer.link, layer.linear if isinstance(layer, LinkedLinear) else layer.conv]
    return [layer]
