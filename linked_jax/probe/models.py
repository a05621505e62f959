"""Any model as its arrays, which are parameters, and the rest, which is static; and what is refused as a model."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.scope import DenyList


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Bound:
    """A Linen module that is bound to its variables and random streams, as a pytree."""

    module: Any = dataclasses.field(metadata={"static": True})
    mutable: Any = dataclasses.field(metadata={"static": True})
    variables: Any
    rngs: Any

    @classmethod
    def of(cls, model: flax.linen.Module) -> "_Bound":
        """What `bind` was given."""
        scope: Any = model.scope
        mutable = scope.mutable if isinstance(scope.mutable, (bool, str, DenyList)) else tuple(scope.mutable)
        rngs = {name: rng.as_jax_rng() for name, rng in scope.rngs.items()}
        module, variables = model.unbind()
        return cls(module, mutable, variables, rngs)

    def bind(self) -> flax.linen.Module:
        """The module again."""
        return self.module.bind(self.variables, rngs=self.rngs, mutable=self.mutable)


def split(model: Any) -> tuple[nnx.GraphDef[Any], Any]:
    """The static part and the arrays of an NNX module, a bound Linen module, a `functools.partial` or a pytree.

    Examples:
      >>> import functools, jax.numpy as jnp
      >>> from linked_jax.probe.models import merge, split
      >>> static, arrays = split(functools.partial(pow, jnp.array([1.0, 3.0])))
      >>> merge(static, jax.tree.map(lambda x: 10 * x, arrays))(2)
      Array([100., 900.], dtype=float32)
    """
    if isinstance(model, flax.linen.Module) and model.scope is not None:
        model = _Bound.of(model)
    if isinstance(model, functools.partial):
        model = jax.tree_util.Partial(model.func, *model.args, **model.keywords)
    return nnx.split([model])  # it takes any pytree, with modules in it and without


def merge(static: nnx.GraphDef[Any], arrays: Any) -> Any:
    """The model of `split`, with other arrays; a copy."""
    (model,) = nnx.merge(static, arrays)
    return model.bind() if isinstance(model, _Bound) else model


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
    if isinstance(model, type):
        raise ValueError(f"the model is an instance, got the class {model.__name__}; pass {model.__name__}(...)")
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


def is_key(x: Any) -> bool:
    """Whether it is a PRNG key, or an array of them: an input that is no data."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def kind_of(x: Any) -> str:
    """What x is, in a few words for an error."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of {x.dtype}{list(x.shape)}"
    if isinstance(x, (tuple, list, dict)):
        return f"a {type(x).__name__} of {len(x)}"
    return f"{type(x).__name__} {x!r:.60}"
