"""Any model as arrays, which are its parameters, and the rest, which is static."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import numpy as np
from flax import nnx


class Static(NamedTuple):
    """What of a model is no array: hashable, so that `jax.jit` takes it as a static argument.

    Attributes:
      kind: how the model is put together again.
      structure: the graph of an NNX module, a Linen module, or the structure of a pytree.
      leaves: of a pytree, those that are no arrays, and None for each array.
    """

    kind: str
    structure: Any
    leaves: tuple[Any, ...] = ()


def split(model: Any) -> tuple[Static, Any]:
    """The static part and the arrays of an NNX module, a bound Linen module, a `functools.partial` or a pytree.

    Example:
      >>> import functools, numpy as np
      >>> from linked_jax.probe.models import merge, split
      >>> static, arrays = split(functools.partial(pow, np.arange(3.0)))
      >>> arrays, merge(static, [10 * arrays[0]])(2)
      ([array([0., 1., 2.])], array([  0., 100., 400.]))
    """
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)
        return Static("nnx", graph), state
    if isinstance(model, flax.linen.Module) and model.scope is not None:
        module, variables = model.unbind()
        return Static("linen", module), variables
    if isinstance(model, functools.partial):
        model = jax.tree_util.Partial(model.func, *model.args, **model.keywords)
    leaves, structure = jax.tree.flatten(model)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    return Static("pytree", structure, tuple(None if _is_array(leaf) else leaf for leaf in leaves)), arrays


def merge(static: Static, arrays: Any) -> Any:
    """The model of `split`, with other arrays; a copy."""
    if static.kind == "nnx":
        return nnx.merge(static.structure, arrays)
    if static.kind == "linen":
        return static.structure.bind(arrays)
    rest = iter(arrays)
    return jax.tree.unflatten(static.structure, [next(rest) if leaf is None else leaf for leaf in static.leaves])


def check_model(model: Any, call: Callable[[Any, Any], Any] | None) -> None:
    """Refuse what cannot be called.

    Raises:
      ValueError: if the model without `call` is no module or function of the inputs, or `call` is no function.
    """
    if call is not None and not callable(call):
        raise ValueError(f"call is a function call(model, inputs), got {kind_of(call)}; pass e.g. module.apply")
    if call is None and isinstance(model, flax.linen.Module) and model.scope is None:
        raise ValueError(
            f"a Linen module needs its variables, got {type(model).__name__} alone; pass "
            "functools.partial(module.apply, variables)"
        )
    if call is None and not callable(model):
        raise ValueError(
            f"without call the model is called as model(inputs), got {kind_of(model)}; pass call=lambda model, x: ..."
        )
    name, arguments = ("the model", ["inputs"]) if call is None else ("call", ["model", "inputs"])
    try:
        signature = inspect.signature(model if call is None else call)
    except (TypeError, ValueError):  # some callables have none
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"{name} is called as {name.split()[-1]}({', '.join(arguments)}), got {signature}, {error}; pass "
            "functools.partial(f, params), or call=lambda model, x: ..."
        ) from None


def kind_of(x: Any) -> str:
    """What x is, in a few words for an error."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of {x.dtype}{list(x.shape)}"
    if isinstance(x, (tuple, list, dict)):
        return f"a {type(x).__name__} of {len(x)}"
    return f"{type(x).__name__} {x!r:.60}"


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
