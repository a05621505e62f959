"""Equi-normalisation (ENorm): after every step of an optimiser, balance adjacent layers.

    W_{k-1}[.., i] <- d_i W_{k-1}[.., i],   b_{k-1}[i] <- d_i b_{k-1}[i],   W_k[i, ..] <- W_k[i, ..] / d_i
    d_i = sqrt(||W_k[i, ..]|| / (c ||W_{k-1}[.., i]||))

The net computes the same function; at c = 1 its kernels have the least sum of squares of all nets rescaled like that.
Both hold where g(a z) = a g(z) for a > 0: for ReLU, leaky ReLU, PReLU, max(z, 0), |z| and links of them. Pooling,
dropout and flattening between layers do no harm. A norm between layers does, and so does anything else that sees or
changes units in between, such as a skip connection.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from linked_jax.activations import relu
from linked_jax.arrays import like, wide
from linked_jax.linking import Link
from linked_jax.measurements import is_homogeneous
from linked_jax.remedies.arguments import dotted, nearest, require_link

_OF_NORMS = ("scale", "mean", "var")
_BUFFERS = {"trace": -1, "mu": -1, "nu": -2}  # an optimiser's buffer -> the power of the factor in which it changes


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight layer of a chain: a dense layer or a convolution, by the rank of its kernel.

    Args:
      path: where the parameters `kernel` and, if any, `bias` are, joined by dots: "conv1", "blocks.conv.conv",
        "params.Dense_0". Lists count from 0: "layers.2".
      link: the activation before this layer. With d members a unit has d input kernels here, in the link's layout.
        For PReLU pass a link with any slopes.
      stacked: whether the parameters have a leading axis of equal layers, applied one after the other. Compiling takes
        time for each of them.

    Raises:
      TypeError: if the link is none.
      ValueError: if a member of the link is not positively homogeneous, see `linked_jax.measurements.is_homogeneous`.

    Examples:
      >>> from linked_jax import lk_relu
      >>> from linked_jax.remedies.enorm import Layer
      >>> chain = [Layer("stem"), Layer("blocks.conv.conv", link=lk_relu, stacked=True)]
    """

    path: str
    link: Link = relu
    stacked: bool = False

    def __post_init__(self):
        if not all(map(is_homogeneous, require_link(self.link).members)):
            raise ValueError(
                f"balancing needs g(a z) = a g(z) for a > 0, got {self.link} before {self.path!r}; "
                f"use members such as relu or leaky_relu"
            )


class _Part(NamedTuple):
    """A layer of the chain, one for each index of a stack."""

    layer: Layer
    kernel: Array
    unit_of_input: np.ndarray | None  # (c_in,); None for the first


def balance(params: Any, chain: Sequence[Layer], *, c: float = 1.0) -> Any:
    """Balance a chain of adjacent layers once, from its first pair of layers to its last.

        d_i = sqrt(||W_k[i, ..]|| / (c ||W_{k-1}[.., i]||)),   d_i = 1 where a norm is 0

    W_k[i, ..] is all input kernels of unit i together, of each member and, after flattening, of each position. The
    norms are of the kernels as the pairs before left them. Repeated calls converge: at c = 1 to equal norms.

    Args:
      params: any tree of parameters: an `nnx.State` from `nnx.split(model, nnx.Param, ...)`, a Linen dictionary.
      chain: the layers in the order of the forward pass, two or more. The outputs of the last are not rescaled, nor
        are the inputs of the first. All other parameters stay.
      c: the norm of a unit's input kernels in the next layer over that of its own kernel, once balanced.

    Returns:
      A tree like params; the computation is in float32 at least.

    Raises:
      ValueError: if a layer is missing or named twice; if shapes do not pair; if c is not positive; if a norm is seen
        in the smallest part of the tree that holds the chain: a parameter named scale, mean or var. A norm without
        such a parameter, or one elsewhere in the tree, cannot be seen.

    Reference: Stock et al., Equi-normalization of neural networks, 2019. The authors' code takes norms from before
    the pairs before, leaves biases as they are, and leaves the last layer of the net out of the chain; with the first
    two, a net changes what it computes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.enorm import Layer, balance
      >>> params = {"a": {"kernel": jnp.full((1, 1), 8.0)}, "b": {"kernel": jnp.full((1, 1), 2.0)}}
      >>> balanced = balance(params, [Layer("a"), Layer("b")])
      >>> float(balanced["a"]["kernel"][0, 0]), float(balanced["b"]["kernel"][0, 0])
      (4.0, 4.0)
    """
    _check(chain, c)
    factors = _factors(params, chain, c)
    return jax.tree_util.tree_map_with_path(lambda path, p: _times(p, factors.get(dotted(path))), params)


def enorm(
    inner: optax.GradientTransformation, chain: Sequence[Layer], *, c: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose every step is followed by `balance`.

        p <- balance(p + u),   buffer <- buffer / factor

    A gradient changes by the inverse of its parameter's factor; so do the inner optimiser's buffers, found by the
    names that Optax gives them: trace and mu, and nu by the squared inverse, as it is a mean of squares. Adamax' nu is
    none, so Adamax does not fit. Other buffers stay as they are, and so do those of one number a kernel, as NovoGrad's.

    Args:
      inner: an optimiser, with its rate. What it returns is not to be rescaled after `enorm`.
      chain: see `balance`.
      c: see `balance`. The authors take 1.2 for dense nets and 1.1 for convolutional ones.

    Returns:
      An Optax transformation with the state of inner; its update needs params. `optax.apply_updates` then gives
      balanced parameters up to rounding; updates are float32 at least.

    Raises:
      ValueError: as `balance`, for what params show at init.

    Reference: Stock et al., Equi-normalization of neural networks, 2019. The authors' code supports SGD only; what
    becomes of Adam's averages is ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from linked_jax.remedies.enorm import Layer, enorm
      >>> params = {"a": {"kernel": jnp.full((1, 1), 8.0)}, "b": {"kernel": jnp.full((1, 1), 2.0)}}
      >>> optimizer = enorm(optax.sgd(0.1, momentum=0.9), [Layer("a"), Layer("b")])
      >>> state = optimizer.init(params)
    """
    _check(chain, c)

    def init(params: Any) -> Any:
        if jax.tree.leaves(params):  # there are none where `optax.tree_utils.tree_map_params` looks for their places
            _parts(params, chain)
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("enorm rescales parameters, got None; pass optimizer.update(gradients, state, params)")
        updates, state = optax.with_extra_args_support(inner).update(updates, state, params, **extra)
        stepped = jax.tree.map(lambda p, u: wide(p) + u, params, updates)
        factors = _factors(stepped, chain, c)

        def difference(path: Any, u: Any, new: Any, p: Any) -> Any:
            factor = factors.get(dotted(path))
            return u if factor is None else _times(new, factor) - p

        def carried(path: Any, leaf: Any) -> Any:
            for buffer, power in _BUFFERS.items():
                _, _, name = f".{dotted(path)}".partition(f".{buffer}.")
                if name in factors and jnp.ndim(leaf) == factors[name].ndim:  # novograd has one number a kernel
                    return _times(leaf, factors[name] ** power)
            return leaf

        return (
            jax.tree_util.tree_map_with_path(difference, updates, stepped, params),
            jax.tree_util.tree_map_with_path(carried, state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(params: Any, chain: Sequence[Layer], c: float) -> dict[str, Array]:
    """What each kernel and bias of the chain is multiplied by, by name."""
    parts = _parts(params, chain)
    kernels = [wide(part.kernel) for part in parts]
    of_inputs = [jnp.ones(kernel.shape[-2], kernel.dtype) for kernel in kernels]
    of_outputs = [jnp.ones(kernel.shape[-1], kernel.dtype) for kernel in kernels]
    for k in range(1, len(parts)):
        before, units, unit = kernels[k - 1], kernels[k - 1].shape[-1], parts[k].unit_of_input
        left = jnp.square(before).reshape(-1, units).sum(0)  # ||W_{k-1}[.., i]||^2
        rows = jnp.square(kernels[k]).sum((*range(kernels[k].ndim - 2), -1))
        right = jax.ops.segment_sum(rows, jnp.asarray(unit), units)  # ||W_k[i, ..]||^2
        safe = (left > 0) & (right > 0)
        d = jnp.where(safe, jnp.sqrt(jnp.sqrt(jnp.where(safe, right, 1) / jnp.where(safe, left, 1)) / c), 1)
        of_outputs[k - 1], of_inputs[k] = d, 1 / d[unit]
        kernels[k] = kernels[k] * like(of_inputs[k][:, None], kernels[k])

    factors = {}
    for layer in chain:
        own = [k for k, part in enumerate(parts) if part.layer is layer]
        space = (1,) * (kernels[own[0]].ndim - 2)
        of_kernels = [jnp.outer(of_inputs[k], of_outputs[k]).reshape(*space, *kernels[k].shape[-2:]) for k in own]
        for name, each in (("kernel", of_kernels), ("bias", [of_outputs[k] for k in own])):
            factors[f"{layer.path}.{name}"] = jnp.stack(each) if layer.stacked else each[0]
    return factors


def _parts(params: Any, chain: Sequence[Layer]) -> list[_Part]:
    """The layers that a chain names, checked."""
    leaves = {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    layers = [name.removesuffix(".kernel") for name in leaves if name.endswith(".kernel")]
    paths = [layer.path for layer in chain]
    for path in paths:
        if path not in layers:
            raise ValueError(
                f"there is no layer {path!r} with a kernel in params; the nearest: {nearest(path, layers)}"
            )
    levels = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    root = [keys[0] for keys in itertools.takewhile(lambda keys: len(set(keys)) == 1, levels)]
    for name in leaves:
        *at, last = name.split(".")
        if last in _OF_NORMS and at[: len(root)] == root:
            raise ValueError(
                f"balancing across a norm changes what the net computes, got a norm's parameter {name!r} beside the "
                f"chain; use a net without norms, or a chain in a part of the tree without any"
            )
    parts: list[_Part] = []
    for layer in chain:
        stack = jnp.asarray(leaves[f"{layer.path}.kernel"])
        if stack.ndim < 2 + layer.stacked:
            raise ValueError(f"the kernel of {layer.path!r} has at least {2 + layer.stacked} axes, got {stack.shape}")
        for kernel in stack if layer.stacked else [stack]:
            unit = _unit_of_input(layer, kernel, parts[-1]) if parts else None
            parts.append(_Part(layer, kernel, unit))
    if len(parts) < 2:
        raise ValueError(f"a chain has at least two layers, got {paths}; add the layer before or after")
    return parts


def _unit_of_input(layer: Layer, kernel: Array, before: _Part) -> np.ndarray:
    """(c_in,): the unit of the layer before that each input kernel belongs to."""
    units, inputs, arity = before.kernel.shape[-1], kernel.shape[-2], layer.link.arity
    flattens = kernel.ndim == 2 and before.kernel.ndim > 2
    positions, left_over = divmod(inputs, arity * units)
    if left_over or positions < 1 or (positions > 1 and not flattens):
        raise ValueError(
            f"{before.layer.path!r} has {units} units of {arity} members, and {layer.path!r} a kernel of shape "
            f"{kernel.shape}, which has {inputs} inputs; give the layers in order, each with the link before it"
        )

    # The same whether an image was flattened before the link or after it.
    unit = np.tile(np.arange(units), positions)
    return np.tile(unit, arity) if layer.link.layout == "blocked" else np.repeat(unit, arity)


def _check(chain: Sequence[Layer], c: float) -> None:
    for layer in chain:
        if not isinstance(layer, Layer):
            raise TypeError(f"a chain is made of Layer, got {layer!r}; pass e.g. Layer('conv1')")
    for path, times in collections.Counter(layer.path for layer in chain).items():
        if times > 1:
            raise ValueError(f"a layer that is used twice cannot be balanced, got {path!r} twice; name each layer once")
    if not 0 < c < math.inf:
        raise ValueError(f"c is positive and finite, got {c!r}; pass 1.0 for equal norms")


def _times(x: Any, factor: Array | None) -> Array:
    return x if factor is None else (wide(x) * factor).astype(x.dtype)
