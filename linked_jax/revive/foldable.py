"""What counts as a layer: an nnx.Linear or nnx.Conv, and whatever knows how to fold to one."""

import inspect
from typing import Any, Protocol, runtime_checkable

from flax import nnx

from linked_jax.layers import LinkedConv, LinkedLinear

LAYERS = (nnx.Linear, nnx.Conv)


@runtime_checkable
class Foldable(Protocol):
    """A layer that knows the plain layer with the same outputs, such as `linked_jax.remedies.WSConv`."""

    def fold(self) -> Any:
        """An nnx.Linear or nnx.Conv with parameters of its own."""
        ...


def plain(layer: Any, i: int) -> Any:
    """What layers[i] folds to, or the layer itself.

    Raises:
      ValueError: if its `fold` has arguments.
    """
    if not isinstance(layer, Foldable):
        return layer
    try:
        inspect.signature(layer.fold).bind()
    except TypeError:
        raise ValueError(
            f"layers[{i}], a {type(layer).__name__}, does not fold by itself; put layer.fold(...) in its place first"
        ) from None
    return layer.fold()


def is_layer(layer: Any) -> bool:
    """Whether it is an nnx.Linear or nnx.Conv, or folds to one."""
    return isinstance(layer, (*LAYERS, Foldable))


def link_and_layer(layer: Any) -> list[Any]:
    """The layer; a `LinkedLinear` or `LinkedConv` as two, its link and its plain layer."""
    if isinstance(layer, (LinkedLinear, LinkedConv)):
        return [layer.link, layer.linear if isinstance(layer, LinkedLinear) else layer.conv]
    return [layer]
