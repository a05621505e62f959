"""An `nnx.Sequential` and those in it as one list of layers, in the order of the data."""

import functools
import types
from collections.abc import Iterator
from typing import Any

from flax import nnx

Function = Any
_EMPTY = types.CellType()
"""Of a name that has no value yet."""


class Stack:
    """The layers of an nnx.Sequential, and of each nnx.Sequential in it, as one list.

    Args:
      model: an nnx.Sequential.

    Raises:
      ValueError: if model is another module, weights stand in it twice, or a function holds some of its own.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from linked_jax.revive.stack import Stack
      >>> stack = Stack(nnx.Sequential(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jax.nn.relu), jax.nn.tanh))
      >>> stack.name(1), stack.path(1)
      ('layers[0].layers[1]', ('layers', 0, 'layers', 1))
    """

    def __init__(self, model: nnx.Sequential):
        check_sequential(model)
        self.model = model
        self.places = list(_places(model))
        for i, layer in enumerate(self.layers):
            if held := _held(layer):
                raise ValueError(
                    f"{self.name(i)} is a function that holds an {type(held).__name__}, so its weights may be shared "
                    "and would stay what they are; write it as a layer with weights of its own"
                )
        seen: dict[int, int] = {}
        for i, layer in enumerate(self.layers):
            mine = {id(v) for v in _variables(layer) if not isinstance(v, nnx.RngState)}
            mine |= {id(layer)} if mine else set()
            if twice := [seen[v] for v in mine if v in seen]:
                raise ValueError(
                    f"{self.name(twice[0])} and {self.name(i)} share weights: a layer or a variable stands in the "
                    "model twice, and shared weights are not handled; give each its own"
                )
            seen |= dict.fromkeys(mine, i)

    @property
    def layers(self) -> list[Any]:
        """All layers; the list is a new one."""
        return [self._at(place) for place in self.places]

    def name(self, i: int) -> str:
        """Where the i-th layer is, for messages: layers[0].layers[1]."""
        return ".".join(f"layers[{n}]" for n in self.places[i])

    def path(self, i: int) -> tuple[Any, ...]:
        """Its names in the model's state."""
        return tuple(part for n in self.places[i] for part in ("layers", n))

    def put(self, i: int, layer: Any) -> None:
        """Put a layer in the place of the i-th."""
        *outer, last = self.places[i]
        self._at(outer).layers[last] = layer

    def _at(self, place: Any) -> Any:
        return functools.reduce(lambda model, n: model.layers[n], place, self.model)


def check_sequential(model: Any) -> None:
    """Refuse other models.

    Raises:
      ValueError: if model is not an nnx.Sequential.
    """
    if not isinstance(model, nnx.Sequential):
        raise ValueError(f"model is an nnx.Sequential, got a {type(model).__name__}; for other models see link_params")


def has_variables(layer: Any) -> bool:
    """Whether it is a module with variables."""
    return bool(_variables(layer))


def _variables(layer: Any) -> list[nnx.Variable]:
    if not isinstance(layer, nnx.Module):
        return []
    return [node for _, node in nnx.iter_graph(layer) if isinstance(node, nnx.Variable)]


def _places(model: Any, outer: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    for n, layer in enumerate(model.layers):
        if type(layer) is nnx.Sequential:  # a subclass may do more
            yield from _places(layer, (*outer, n))
        else:
            yield (*outer, n)


def _held(layer: Function) -> Any:
    """A module with weights, or a variable, that a function holds: as its self, in a closure, in a partial."""
    todo, seen = [] if isinstance(layer, nnx.Module) else [layer], set()
    while todo:
        thing = todo.pop()
        if isinstance(thing, nnx.Variable) or has_variables(thing):
            return thing
        if callable(thing) and id(thing) not in seen:
            seen.add(id(thing))
            todo += [getattr(thing, "__self__", None), getattr(thing, "__wrapped__", None)]
            todo += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or () if cell != _EMPTY]
            if isinstance(thing, functools.partial):
                todo += [thing.func, *thing.args, *thing.keywords.values()]
    return None
