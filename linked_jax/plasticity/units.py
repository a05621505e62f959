"""Hidden units, where their weights are in a tree of parameters, and how they start anew."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from linked_jax.arguments import brief
from linked_jax.revive.names import Names, ending, leaf_names, leaves_by_name, split


@dataclasses.dataclass(frozen=True)
class Units:
    """A hidden layer of C units of d members, by the paths of the layers on both sides.

    Outgoing kernels have their rows in the order (d, positions, C), as a blocked link followed by a flatten with
    members outermost gives them; positions are those of a flatten, else 1. A window of a convolution is in front.
    Layers that a scan has stacked look like a window: a unit would start anew in all of them.

    Args:
      incoming: the path of the layer whose outputs are the pre-activations, such as "layers/0"; its kernel has C
        columns, its bias C entries.
      outgoing: the path of the next layer, or those of all layers that see these units, such as the heads of a torso.

    Raises:
      TypeError: if a path is no string.

    Examples:
      >>> from linked_jax.plasticity import Units
      >>> Units("torso", ("policy", "value")).after
      (('policy', 'kernel'), ('value', 'kernel'))
    """

    incoming: str
    outgoing: str | tuple[str, ...]

    def __post_init__(self) -> None:
        for path in (self.incoming, *self._outgoing):
            if not isinstance(path, str):
                raise TypeError(f"a layer's path is a string, got {brief(path)}; pass e.g. 'layers/0'")

    @property
    def _outgoing(self) -> tuple[str, ...]:
        return self.outgoing if isinstance(self.outgoing, tuple) else (self.outgoing,)

    @property
    def kernel(self) -> Names:
        """The name of the incoming kernel."""
        return split((*self.incoming.split("/"), "kernel"))

    @property
    def bias(self) -> Names:
        """The name of the incoming bias."""
        return split((*self.incoming.split("/"), "bias"))

    @property
    def after(self) -> tuple[Names, ...]:
        """The names of the outgoing kernels."""
        return tuple(split((*path.split("/"), "kernel")) for path in self._outgoing)


def outgoing_size(kernel: Float[Array, "*window rows c_out"], units: int) -> Float[Array, " c"]:
    """The sum of |outgoing weights| of each unit, over members, positions and the window."""
    return jnp.abs(kernel).sum(axis=-1).reshape(-1, units).sum(axis=0)


def check_paths(params: Any, units: Sequence[Units]) -> None:
    """Raise ValueError if a path is not there, or the kernels do not fit; nothing is to check in a tree of no leaves.

    Such a tree is what `optax.tree_utils.tree_map_params` gives to init.
    """
    leaves = leaves_by_name(params)
    for layer in units if leaves else ():
        for name in (layer.kernel, *layer.after):
            if name not in leaves:
                there = ", ".join("/".join(n[:-1]) for n in leaves if n[-1] == "kernel")
                raise ValueError(f"there is no kernel at {'/'.join(name[:-1])!r}; there are: {there or 'none'}")
        columns = leaves[layer.kernel].shape[-1]
        for name in layer.after:
            if (rows := leaves[name].shape[-2]) % columns:
                path = "/".join(name[:-1])
                raise ValueError(f"{path!r} has {rows} rows, no multiple of the {columns} units of the layer before")


def renewed(params: Any, fresh: Any, units: Sequence[Units], chosen: Sequence[Bool[Array, "_"]]) -> tuple[Any, Any]:
    """The parameters with the chosen units' incoming weights and bias drawn anew and outgoing weights 0, and where."""
    leaves, no = leaves_by_name(params), jnp.zeros((), bool)
    drawn: dict[Names, Array] = {}
    cut: dict[Names, Array] = {}
    for layer, mask in zip(units, chosen, strict=True):
        names = [name for name in (layer.kernel, layer.bias) if name in leaves]
        drawn |= {name: jnp.broadcast_to(mask, leaves[name].shape) for name in names}
    for layer, mask in zip(units, chosen, strict=True):
        for after in layer.after:
            rows = jnp.tile(mask, leaves[after].shape[-2] // mask.size)[:, None]
            # Where all units of both layers are new: else those of the second would see nothing of the first.
            both = mask.all() & drawn.get(after, no)
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
    """What `draw` gives for each parameter, by its name; ValueError if it gives none, or one of another shape."""
    fresh = leaves_by_name(draw(key))

    def of(path: Any, p: Array) -> Array:
        name = leaf_names(path)
        if name not in fresh or jnp.shape(fresh[name]) != p.shape:
            got = f"one of {jnp.shape(fresh[name])}" if name in fresh else "none"
            raise ValueError(
                f"draw gives an array of {p.shape} at {'/'.join(name)!r}, as the parameters have there, got {got}; "
                "return the parameters of a fresh start, under the same names"
            )
        return fresh[name]

    return jax.tree_util.tree_map_with_path(of, params)


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
        if not isinstance(self.units, list | tuple) or not all(isinstance(layer, Units) for layer in self.units):
            raise TypeError(f"units are a list of Units, got {brief(self.units)}; pass [Units(...)]")
        if not self.units:
            raise ValueError(f"units are those of one or more hidden layers, got {self.units}; pass [Units(...)]")
        for path, times in collections.Counter(layer.incoming for layer in self.units).items():
            if times > 1:
                raise ValueError(
                    f"a layer has its units once, got {path!r} {times} times; name all that see them in one: "
                    f"Units({path!r}, ('a', 'b'))"
                )
        if not callable(self.draw):
            raise TypeError(f"draw is a function key -> parameters, got {brief(self.draw)}; pass lambda key: ...")

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
            return steps, _restarted(inner, self.tx.init(new), leaves_by_name(where))

        updates, inner = jax.lax.cond(jnp.concatenate(chosen).any(), replaced, lambda: (updates, inner))
        return updates, rest, inner


def _restarted(state: Any, start: Any, where: dict[Names, Array]) -> Any:
    """The optimiser's state, as at the start for these entries of the parameters.

    What it holds of many weights together, such as adafactor's rows and columns, has another shape and stays.
    """

    def of(path: Any, s: Any, anew: Any) -> Any:
        here = where.get(ending(leaf_names(path), where))
        return s if here is None or here.shape != jnp.shape(s) else jnp.where(here, anew, s).astype(s.dtype)

    return jax.tree_util.tree_map_with_path(of, state, start)


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
        wanted = leaves[layer.kernel].shape[-1:]
        if size.shape != wanted:
            raise ValueError(f"the magnitudes of {layer.incoming!r} have shape {wanted}, one a unit, got {size.shape}")
    return found


def needs_params(params: Any, name: str) -> None:
    """Raise ValueError if an update has no parameters."""
    if params is None:
        raise ValueError(
            f"{name} changes parameters by their values, got params=None; call update(grads, state, params)"
        )
