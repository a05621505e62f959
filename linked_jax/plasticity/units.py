"""Hidden units, where their weights are in a tree of parameters, and how they start anew."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from linked_jax.revive.names import Names, leaf_names, leaves_by_name


@dataclasses.dataclass(frozen=True)
class Units:
    """A hidden layer of C units of d members, by the paths of the layers on both sides.

    Outgoing kernels have their rows in the order (d, positions, C), as a blocked link followed by a flatten with
    members outermost gives them; positions are those of a flatten, else 1. A window of a convolution is in front.
    Layers that a scan has stacked look like a window: a unit would start anew in all of them.

    Args:
      incoming: the path of the layer whose outputs are the pre-activations, such as "layers/0"; its kernel has C
        columns, its bias C entries.
      outgoing: the path of the next layer.

    Examples:
      >>> from linked_jax.plasticity import Units
      >>> Units("layers/0", "layers/1").kernels
      (('layers', '0', 'kernel'), ('layers', '1', 'kernel'))
    """

    incoming: str
    outgoing: str

    @property
    def kernels(self) -> tuple[Names, Names]:
        """The names of both kernels."""
        return (*self.incoming.split("/"), "kernel"), (*self.outgoing.split("/"), "kernel")

    @property
    def bias(self) -> Names:
        """The name of the incoming bias."""
        return (*self.incoming.split("/"), "bias")


def outgoing_size(kernel: Float[Array, "*window rows c_out"], units: int) -> Float[Array, " c"]:
    """The sum of |outgoing weights| of each unit, over members, positions and the window."""
    return jnp.abs(kernel).sum(axis=-1).reshape(-1, units).sum(axis=0)


def check_paths(params: Any, units: Sequence[Units]) -> None:
    """Raise ValueError if a path is not there, or the kernels do not fit; nothing is to check in a tree of no leaves.

    Such a tree is what `optax.tree_utils.tree_map_params` gives to init.
    """
    leaves = leaves_by_name(params)
    for layer in units if leaves else ():
        for name in layer.kernels:
            if name not in leaves:
                there = ", ".join("/".join(n[:-1]) for n in leaves if n[-1] == "kernel")
                raise ValueError(f"there is no kernel at {'/'.join(name[:-1])!r}; there are: {there or 'none'}")
        columns, rows = (leaves[name].shape[axis] for name, axis in zip(layer.kernels, (-1, -2), strict=True))
        if rows % columns:
            raise ValueError(
                f"{layer.outgoing!r} has {rows} rows, no multiple of the {columns} units of the layer before"
            )


def renewed(params: Any, fresh: Any, units: Sequence[Units], chosen: Sequence[Bool[Array, "_"]]) -> tuple[Any, Any]:
    """The parameters with the chosen units' incoming weights and bias drawn anew and outgoing weights 0, and where."""
    leaves, no = leaves_by_name(params), jnp.zeros((), bool)
    drawn: dict[Names, Array] = {}
    cut: dict[Names, Array] = {}
    for layer, mask in zip(units, chosen, strict=True):
        names = [name for name in (layer.kernels[0], layer.bias) if name in leaves]
        drawn |= {name: jnp.broadcast_to(mask, leaves[name].shape) for name in names}
    for layer, mask in zip(units, chosen, strict=True):
        after = layer.kernels[1]
        rows = jnp.tile(mask, leaves[after].shape[-2] // mask.size)[:, None]
        both = mask.all() & drawn.get(after, no)  # else new units of a layer would see nothing of one that is all new
        cut[after] = jnp.broadcast_to(rows, leaves[after].shape) & ~both

    def new(path: Any, p: Array, start: Array) -> Array:
        name = leaf_names(path)
        p = jnp.where(drawn.get(name, no), start, p)  # a layer's own weights first, then what its inputs have there
        return jnp.where(cut.get(name, no), 0, p).astype(p.dtype)

    def changed(path: Any, p: Array) -> Array:
        name = leaf_names(path)
        return jnp.broadcast_to(drawn.get(name, no) | cut.get(name, no), p.shape)

    at = jax.tree_util.tree_map_with_path
    return at(new, params, fresh), at(changed, params)


Draw = Callable[[Array], Any]
"""key -> parameters at a fresh start."""
_OF_UNITS = 1  # `shrink_and_perturb` may have the same key, and draws other numbers


def fresh_start(draw: Draw, key: PRNGKeyArray, params: Any) -> Any:
    """What `draw` gives; ValueError if that is no tree like the parameters."""
    fresh = draw(key)
    got, wanted = map(jax.tree.structure, (fresh, params))
    if got != wanted:
        raise ValueError(
            f"draw gives a tree of {got.num_leaves} arrays that is not like the parameters' of "
            f"{wanted.num_leaves}; return the very structure that update gets, inside optax.masked the masked one"
        )
    return fresh


@dataclasses.dataclass(frozen=True)
class Renewal:
    """An optimiser's step, after which chosen units of hidden layers start anew.

    Args:
      tx: the optimiser.
      units: the hidden layers.
      draw: key -> parameters at a fresh start.
    """

    tx: optax.GradientTransformation
    units: Sequence[Units]
    draw: Draw

    def __post_init__(self) -> None:
        if not self.units:
            raise ValueError(f"units are those of one or more hidden layers, got {self.units}; pass [Units(...)]")

    def step(
        self, updates: Any, state: Any, params: Any, extra: dict[str, Any], chosen: Sequence[Bool[Array, "_"]]
    ) -> tuple[Any, PRNGKeyArray, Any]:
        """Updates after which the chosen units have started anew; the next key, and the optimiser's state.

        Of the state it takes `key`, and `inner`, the optimiser's. Nothing is drawn where no unit is chosen.
        """
        updates, inner = optax.with_extra_args_support(self.tx).update(updates, state.inner, params, **extra)
        rest, now = jax.random.split(state.key)

        def replaced() -> tuple[Any, Any]:
            fresh = fresh_start(self.draw, jax.random.fold_in(now, _OF_UNITS), params)
            new, where = renewed(optax.apply_updates(params, updates), fresh, self.units, chosen)
            steps = jax.tree.map(lambda n, p, u: (n - p).astype(u.dtype), new, params, updates)
            of_state = optax.tree_utils.tree_map_params(  # of what it holds of each parameter, such as Adam's moments
                self.tx, lambda _, here: here, inner, where, transform_non_params=lambda _: False
            )
            anew = jax.tree.map(
                lambda here, s, start: jnp.where(here, start, s).astype(s.dtype), of_state, inner, self.tx.init(new)
            )
            return steps, anew

        updates, inner = jax.lax.cond(jnp.concatenate(chosen).any(), replaced, lambda: (updates, inner))
        return updates, rest, inner


def listed(magnitudes: Any, units: Sequence[Units], params: Any, name: str) -> list[Float[Array, "_"]]:
    """The magnitudes of each layer; ValueError if they are no sequence of one array (C,) for each layer of units."""
    found = [jnp.asarray(size) for size in magnitudes] if isinstance(magnitudes, list | tuple) else []
    if len(found) != len(units):
        got = f"{len(found)}" if found or magnitudes is None else f"a {type(magnitudes).__name__}"
        raise ValueError(
            f"{name} needs mean |h| of the units of {len(units)} layers, in their order, got {got}; call update(grads, "
            "state, params, magnitudes=[...])"
        )
    leaves = leaves_by_name(params)
    for layer, size in zip(units, found, strict=True):
        wanted = leaves[layer.kernels[0]].shape[-1:]
        if size.shape != wanted:
            raise ValueError(f"the magnitudes of {layer.incoming!r} have shape {wanted}, one a unit, got {size.shape}")
    return found


def needs_params(params: Any, name: str) -> None:
    """Raise ValueError if an update has no parameters."""
    if params is None:
        raise ValueError(
            f"{name} changes parameters by their values, got params=None; call update(grads, state, params)"
        )
