"""Where the activations of an `nnx.Sequential` are, and the layers around them.

A layer is an nnx.Linear, nnx.LinearGeneral or nnx.Conv, or folds to one. An activation is a `Link`, a PReLU, or a
function that is elementwise and not affine: functions are tried on a few numbers, each compiled by itself, so that a
`jax.jit` or `jax.vmap` around the call does not matter. What stands between an activation and the next layer must treat
channels alike: pools, flatten, dropout, batch norm.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from linked_jax.layers import LinkedConv, LinkedLinear
from linked_jax.learned import ChannelPReLU, LinkedPReLU
from linked_jax.linking import Link, join
from linked_jax.revive.foldable import LAYERS, Foldable, is_layer, plain, rows_axis
from linked_jax.revive.stack import Function, Stack, has_variables

_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)
_LINKED = (LinkedLinear, LinkedConv)
_KNOWN = (*LAYERS, *_NORMS, *_LINKED, nnx.Dropout, nnx.Embed, nnx.ConvTranspose)
PRELUS = (nnx.PReLU, ChannelPReLU, LinkedPReLU)


@dataclasses.dataclass(frozen=True)
class Joint:
    """An activation of a Sequential and what is around it, as indices of its `Stack`.

    Attributes:
      before: the layer before it.
      activation: the activation.
      after: the next layer.
      inner_norms: norms of any kind between the layer and the activation.
      norm: the batch norm between the activation and the next layer, or None.
      units: the layer's number of output channels C.
      width: that of the pre-activation: C, or positions * C if a flatten stands before the activation.
      positions: of a flatten after the activation, else 1: the next layer has positions * d * width input features.
      rows: the axis of the next layer's kernel that these are along.
      link: the activation as a `Link`; of a PReLU one of as many members.
    """

    before: int
    activation: int
    after: int
    inner_norms: tuple[int, ...]
    norm: int | None
    units: int
    width: int
    positions: int
    rows: int
    link: Link


def activations(stack: Stack) -> list[int]:
    """The indices of the activations that have a layer before them.

    Raises:
      ValueError: if a layer may hide activations.
    """
    layers = stack.layers
    for i, layer in enumerate(layers):
        _check_open(layer, stack.name(i))
    first = next((i for i, layer in enumerate(layers) if is_layer(layer)), len(layers))
    return [i for i in range(first, len(layers)) if is_activation(layers[i], stack.name(i))]


def last_layer(stack: Stack) -> int:
    """The index of the last layer; -1 if there is none."""
    return max((i for i, layer in enumerate(stack.layers) if is_layer(layer)), default=-1)


def joint_at(stack: Stack, index: int) -> Joint:
    """What is around the activation at this index, one of `activations`.

    Raises:
      ValueError: if something there is not handled; with the index of the layer.
    """
    layers, name = stack.layers, stack.name
    before = max(i for i in range(index) if is_layer(layers[i]))
    after = next((i for i in range(index + 1, len(layers)) if is_layer(layers[i])), None)
    if after is None:
        raise nothing_after(stack, index)
    inner, outer = range(before + 1, index), range(index + 1, after)
    for i in (*inner, *outer):
        if is_activation(layers[i], name(i)):
            raise ValueError(f"{name(index)} and {name(i)} are activations in a row; write them as one function")
        _check_known(layers[i], name(i))
    norms = [i for i in outer if isinstance(layers[i], _NORMS)]
    for i in norms:
        _check_outer_norm(layers[i], name(i), first=i == norms[0])
    first, following = plain(layers[before], name(before)), plain(layers[after], name(after))
    _check_next(following, name(after))

    link, axis = _as_link(layers[index]), rows_axis(following, name(after))
    units, rows = first.kernel.shape[-1], following.kernel.shape[axis]
    space = len(first.kernel_size) if isinstance(first, nnx.Conv) else None
    inner_functions, outer_functions = (
        [layers[i] for i in span if not isinstance(layers[i], (*_NORMS, nnx.Dropout))] for span in (inner, outer)
    )
    flattened = _flatten_is(inner_functions, outer_functions, space, link, grows=rows != link.arity * units)
    if flattened == "unknown":
        raise ValueError(
            f"a function between {name(before)} and {name(after)} does not treat channels alike, or asks for one "
            "fixed shape; pools, and a flatten to (N, -1), are fine"
        )
    positions, left = divmod(rows, link.arity * units)
    if left or (positions != 1 and flattened == "nowhere"):
        raise ValueError(
            f"{name(after)} has {rows} input features, which do not pair with {units} units of {name(before)} and "
            f"{link.arity} members of {name(index)}"
        )
    return Joint(
        before=before,
        activation=index,
        after=after,
        inner_norms=tuple(i for i in inner if isinstance(layers[i], _NORMS)),
        norm=norms[0] if norms else None,
        units=units,
        width=units * positions if flattened == "before" else units,
        positions=1 if flattened == "before" else positions,
        rows=axis,
        link=link,
    )


def nothing_after(stack: Stack, index: int) -> ValueError:
    """The error for an activation that no layer follows; it names the module that does."""
    rest = ((i, stack.layers[i]) for i in range(index + 1, len(stack.layers)))
    found = next((f", only {stack.name(i)}, a {type(a).__name__}" for i, a in rest if has_variables(a)), "")
    return ValueError(
        f"{stack.name(index)}, an activation, has no nnx.Linear or nnx.Conv after it{found}; add or remove one"
    )


def linked_layers(stack: Stack) -> list[int]:
    """The indices of the layers with a link of their own: `LinkedLinear`, `LinkedConv`."""
    return [i for i, layer in enumerate(stack.layers) if isinstance(layer, _LINKED)]


def arity(activation: Any) -> int:
    """The number of members d; a function has one."""
    return getattr(activation, "arity", 1)


def _as_link(activation: Any) -> Link:
    if isinstance(activation, nnx.PReLU):
        return Link((jax.nn.leaky_relu,))
    return activation.link if isinstance(activation, (Link, ChannelPReLU, LinkedPReLU)) else Link((activation,))


@jax.ensure_compile_time_eval()  # under jit too
def is_activation(layer: Any, name: str) -> bool:
    """Whether the layer of this name is a link, a PReLU, or an elementwise function that is not affine.

    Raises:
      ValueError: if it is one for arrays of some shapes only.
    """
    if isinstance(layer, (Link, *PRELUS)):
        return True
    if isinstance(layer, _KNOWN) or has_variables(layer):
        return False
    f = apart(layer)
    if not any(_bends(f, shape) for shape in ((8, 3), (2, 2, 2, 3))):
        return False
    if not all(_bends(f, shape) for shape in ((8, 3), (2, 2, 2, 3), (8, 1, 1, 3))):
        raise ValueError(
            f"{name} is an activation for arrays of some shapes only and does more for others; write it as two "
            "layers, e.g. a flatten and jax.nn.relu"
        )
    return True


def apart(layer: Function) -> Function:
    """The function, compiled by itself: jax.nn.relu alone would join a `jax.vmap` around it."""
    if isinstance(layer, nnx.Module):
        graph, state = nnx.split(layer)
        if not jax.tree.leaves(state):
            return _of_graph(graph)
    changeable = isinstance(layer, nnx.Module) or layer.__hash__ is None
    return jax.jit((lambda x: layer(x)) if changeable else layer)


@functools.lru_cache(maxsize=256)
def _of_graph(graph: Any) -> Function:
    """A module without arrays, compiled once for all that are made alike."""
    return jax.jit(lambda x: nnx.merge(graph, nnx.State({}))(x))


def _bends(f: Function, shape: tuple[int, ...]) -> bool:
    """Whether f is elementwise, at every place the same, and not affine, for arrays of this shape."""
    rng = np.random.default_rng(0)
    x, y = (3 * rng.normal(size=shape) for _ in range(2))
    first, order = rng.random(shape) < 0.5, rng.permutation(x.size)
    shuffled = lambda a: a.ravel()[order].reshape(shape)  # noqa: E731
    inputs = (x, y, x + y, np.zeros(shape), shuffled(np.where(first, x, y)))
    try:
        values = [np.asarray(f(jnp.asarray(a, jnp.float32)), np.float64) for a in inputs]
    except jax.errors.JAXTypeError:  # of the tracing around, not of the array
        raise
    except Exception:  # it does not take such an array, so it is no activation; joint_at tries it as a pool or flatten
        return False
    if any(value.shape != shape for value in values):
        return False
    of_x, of_y, of_sum, of_zero, mixed = values
    scale = 1e-2 * np.abs(of_x).max() + 1e-6  # more than the rounding of half precision
    elementwise = np.abs(mixed - shuffled(np.where(first, of_x, of_y))).max() <= scale
    return bool(elementwise and np.abs(of_sum - of_x - of_y + of_zero).max() > scale)


@jax.ensure_compile_time_eval()
def _flatten_is(
    inner: Sequence[Function], outer: Sequence[Function], space: int | None, link: Link, *, grows: bool
) -> str:
    """Where functions flatten: "nowhere", "before" or "after" the activation; "unknown" if they mix channels.

    They are tried on three channels: what comes after the link must give the members of what it gives for each.
    """
    if not inner and not outer:
        return "nowhere"
    spaces = range(3) if space is None else [space]
    for shape in [(2, *(size,) * n, 3) for size in (8, 32, 128) for n in spaces]:
        where = {_flattens(inner, outer, shape, link, scale) for scale in (1.0, 1e-3, 1e3, 1e6)}
        if len(where) == 1 and (found := where.pop()) is not None and (found != "nowhere" or not grows):
            return found
    return "unknown"


def _flattens(
    inner: Sequence[Function], outer: Sequence[Function], shape: tuple[int, ...], link: Link, scale: float
) -> str | None:
    """Where functions flatten arrays of this shape and size.

    None if they do not take them, mix channels, or flatten on both sides. A function may mix channels at one size
    only, as one that clips the norm of a vector.
    """
    rng = np.random.default_rng(0)
    try:
        members = [_through(inner, jnp.asarray(scale * rng.normal(size=shape), jnp.float32)) for _ in range(2)]
        alone = [_through(outer, a) for a in members]
        together = _through(outer, join(members, -1, link.layout))
    except jax.errors.JAXTypeError:
        raise
    except Exception:  # pools do not take every shape
        return None
    width = members[0].shape[-1]
    if not alone[0].size or alone[0].shape[-1] % width:
        return None
    by_position = [a.reshape(*a.shape[:-1], -1, width) for a in alone]
    wanted = join(by_position, -1, link.layout).reshape(*alone[0].shape[:-1], -1)
    close = functools.partial(np.allclose, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)  # NaN where both overflow
    if together.shape != wanted.shape or not close(together, wanted):
        return None
    before, after = width != 3, alone[0].shape[-1] != width
    if before and after:
        return None
    return "before" if before else "after" if after else "nowhere"


def _through(functions: Sequence[Function], x: Array) -> Array:
    for f in functions:
        x = apart(f)(x)
    return x


def _check_open(layer: Any, name: str) -> None:
    own = isinstance(layer, nnx.Module) and not isinstance(layer, (*_KNOWN, *PRELUS, Foldable))
    if own and (has_variables(layer) or len(list(nnx.iter_modules(layer))) > 1):
        raise ValueError(
            f"{name}, a {type(layer).__name__}, has variables or modules of its own and may hide an activation; use "
            "nnx.Linear, nnx.Conv, norms and functions, or link_params for other models"
        )


def _check_known(layer: Any, name: str) -> None:
    if not isinstance(layer, (*_NORMS, nnx.Dropout)) and has_variables(layer):
        raise ValueError(
            f"{name}, a {type(layer).__name__}, stands beside an activation and is not handled; use nnx.Linear, "
            "nnx.Conv and nnx.BatchNorm, and fold other layers into them first"
        )


def _check_outer_norm(norm: Any, name: str, *, first: bool) -> None:
    if not isinstance(norm, nnx.BatchNorm):
        raise ValueError(
            f"{name}, a {type(norm).__name__} after an activation, would give other values with added members; only "
            "batch norm can stand there"
        )
    if norm.axis != -1 or not first:
        raise ValueError(f"{name}: one batch norm with axis=-1 may follow an activation, got axis={norm.axis}")


def _check_next(layer: Any, name: str) -> None:
    if type(layer) not in LAYERS:
        raise ValueError(
            f"{name} is a {type(layer).__name__}, whose output may not be linear in its kernel; use nnx.Linear or "
            "nnx.Conv itself"
        )
    if isinstance(layer, nnx.Conv) and (layer.feature_group_count != 1 or layer.mask is not None):
        raise ValueError(f"{name}, a grouped or masked convolution, cannot take added channels; use a plain one")
