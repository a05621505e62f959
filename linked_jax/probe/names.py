"""Where an operation of a jaxpr was written: the module's path and the user's line."""

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax
from flax import nnx

_JAX, _FLAX = (str(Path(str(package.__file__)).parent) for package in (jax, flax))
_LIBRARIES = (_JAX, _FLAX, str(Path(__file__).parents[1]), "<")

LINK = "linked_jax:"
"""What the scope of a link begins with."""


@contextlib.contextmanager
def named_calls(model: Any) -> Iterator[None]:
    """Within it, operations of an NNX module are traced in a `jax.named_scope` of the path of the module they are in.

    Linen does so by itself. Submodules are scoped by their classes' `__call__`, and the plain functions in an
    `nnx.Sequential` are replaced by scoped ones: pass a copy of the model.

    Args:
      model: an NNX module; anything else is left alone.
    """
    modules = list(nnx.iter_modules(model)) if isinstance(model, nnx.Module) else []
    paths = {id(module): ".".join(map(str, path)) for path, module in modules}
    for path, module in modules:
        if isinstance(module, nnx.Sequential):
            for i, function in enumerate(module.layers):
                if not isinstance(function, nnx.Module):
                    module.layers[i] = jax.named_scope(".".join(map(str, (*path, "layers", i))))(function)
    with contextlib.ExitStack() as stack:
        for cls in {type(module) for _, module in modules if callable(module)}:
            stack.enter_context(_scoped_class(cls, paths))
        yield


def scope_of(equation: Any, outer: str = "") -> str:
    """The name scopes of an equation inside those of its caller; `blocks.0/blocks.0.conv` is shortened to its end.

    >>> import jax
    >>> from linked_jax.probe.names import scope_of
    >>> jaxpr = jax.make_jaxpr(jax.named_scope("net")(jax.named_scope("net.conv")(jax.numpy.tanh)))(1.0)
    >>> scope_of(jaxpr.eqns[0], "model")
    'model/net.conv'
    """
    parts = [_untransformed(part) for part in f"{outer}/{equation.source_info.name_stack}".split("/")]
    parts = [part for part in parts if part]
    kept = [a for a, b in itertools.pairwise([*parts, ""]) if b != a and not b.startswith(f"{a}.")]
    return "/".join(kept)


def _untransformed(part: str) -> str:
    """A scope without the transforms around it: vmap(jvp(net)) is net."""
    while match := re.fullmatch(r"(?:vmap|jvp|transpose|remat|checkpoint|rematted_computation)\((.*)\)", part):
        part = match[1]
    return part


def link_of(scope: str) -> str:
    """The members of the link whose call a scope is inside; empty if it is in none. See `linking.scope`."""
    return next((part.removeprefix(LINK) for part in reversed(scope.split("/")) if part.startswith(LINK)), "")


def module_of(scope: str) -> str:
    """A scope without the link."""
    return "/".join(part for part in scope.split("/") if not part.startswith(LINK))


def source_of(equation: Any, outer: str = "") -> str:
    """`file.py:12`, the innermost line outside JAX, Flax and this library; that of the caller where JAX kept none."""
    # The traceback is no documented part of JAX: without it names are less good and nothing else changes.
    for frame in getattr(getattr(equation.source_info, "traceback", None), "frames", None) or []:
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{Path(frame.file_name).name}:{frame.line_num}"
    return outer


@contextlib.contextmanager
def _scoped_class(cls: Any, paths: dict[int, str]) -> Iterator[None]:
    own, call = "__call__" in vars(cls), cls.__call__

    @functools.wraps(call)
    def scoped(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(self))
        with jax.named_scope(path) if path else contextlib.nullcontext():
            return call(self, *args, **kwargs)

    cls.__call__ = scoped
    try:
        yield
    finally:
        if own:
            cls.__call__ = call
        else:
            del cls.__call__
