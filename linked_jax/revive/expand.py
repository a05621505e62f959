"""Link a trained network by its tree of parameters: the next layer's kernel W becomes [W; 0], and so its moments.

    g(z) W = f(z) [W; 0],   f = (g, g_2, ..., g_d)

Rows are in the order of the link's layout, after a flatten position by position: (positions, d, C) if blocked, else
(positions, C, d). With channels first, axis=0 say, a flatten puts positions last. Any pytree with names will do: a
Linen dictionary, an NNX state, Haiku's parameters, an Equinox module.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from linked_jax.linking import Link, join
from linked_jax.revive.carry import carry
from linked_jax.revive.names import Names, edit, leaves_by_name, split

_ROWS = {"kernel": -2, "w": -2, "weight": 1}
"""Weights -> the axis of rows, their inputs: Flax' and Haiku's (*window, in, out), Equinox' (out, in, *window)."""
_UNITS = {-2: -1, 0: -1, 1: 0, -1: 0}
"""The axis of rows -> that of units, its outputs."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two layers around an activation, in the order of the data. Only the one after it gets new weights.

    Paths are names from the root of the parameters, "block/Dense_1" or ("block", "Dense_1"); the Linen collections
    "params" and "batch_stats" are not part of them and are left out of a path that starts with one.

    Args:
      before: path of the layer before the activation, whose weights give the number of units C; or C itself.
      after: path of the layer after it.
      norm: path of a Flax batch norm between the activation and the next layer, if there is one. Layer norm, group norm
        and instance norm are refused: the added members would change what they give.
      positions: needed if rows are not C: height times width where a flatten stands between the activation and the next
        layer, and 1 where it stands before the activation.
      leaf: the name of a layer's weights. By default those of Flax ("kernel"), Haiku ("w") and Equinox ("weight").
      rows: the axis of the weights with one entry for each input: by default -2 (Flax, Haiku: (*window, in, out)), and
        1 for "weight" (Equinox: (out, in, *window)). Units are along the last axis if it is -2 or 0, and along the
        first one if it is 1 or -1; for another one let before be C.

    Raises:
      ValueError: if a path has no names, positions is no integer of at least 1, leaf no name or rows no integer.

    Examples:
      >>> from linked_jax.revive import Pair
      >>> Pair("block/Conv_0", "block/Dense_1", positions=16).after
      ('block', 'Dense_1')
    """

    before: Any
    after: Any
    norm: Any = None
    positions: int | None = None
    leaf: str | None = None
    rows: int | None = None

    def __post_init__(self):
        for field in ("before", "after", "norm"):
            path = getattr(self, field)
            units_or_none = type(path) is int and path >= 1 if field == "before" else path is None and field == "norm"
            if not units_or_none:
                object.__setattr__(self, field, _path(path, field))
        if self.positions is not None and not (isinstance(self.positions, int) and self.positions >= 1):
            raise ValueError(f"positions is an integer of at least 1, height * width, got {self.positions!r}")
        if self.leaf is not None and not (isinstance(self.leaf, str) and self.leaf):
            raise ValueError(f"leaf is the name of a layer's weights, such as 'kernel', got {self.leaf!r}")
        if self.rows is not None and type(self.rows) is not int:
            raise ValueError(f"rows is the axis of a layer's inputs, such as -2, got {self.rows!r}")

    def weights(self, leaves: Mapping[Names, Any], path: Names) -> tuple[Names, int]:
        """The names of a layer's weights, and the axis of their rows.

        Raises:
          ValueError: if there are none.
        """
        known = [self.leaf] if self.leaf else list(_ROWS)
        for leaf in known:
            names = (*path, leaf)
            rows = _ROWS.get(leaf, -2) if self.rows is None else self.rows
            ndim = jnp.ndim(leaves[names]) if names in leaves else 0
            if ndim >= 2 and -ndim <= rows < ndim:
                return names, rows
        layers = ", ".join("/".join(n[:-1]) for n, a in leaves.items() if n[-1] in known and jnp.ndim(a) >= 2)
        axis = "" if self.rows is None else f" that has an axis {self.rows}"
        raise ValueError(
            f"there is no layer with a {', a '.join(known)}{axis} at {'/'.join(path)!r}; there are: {layers or 'none'}"
        )


def _path(path: Any, field: str) -> Names:
    parts = path.split("/") if isinstance(path, str) else path
    names = split(parts) if isinstance(parts, (tuple, list)) else ()
    if not names or not all(names):
        raise ValueError(f"{field} is a path such as 'block/Dense_1' or ('block', 'Dense_1'), got {path!r}")
    return names


def link_params(params: Any, pairs: Sequence[Pair], link: Link) -> Any:
    """The parameters of the network in which some plain activations are replaced by a link that starts with them.

        W  ->  [W; 0]   of each next layer

    Outputs stay the same. An added channel of a batch norm after the activation gets mean 0, variance 1, bias 0 and
    the scale of its unit. The model's code must call the link where it called the activation; the next layer must be
    linear in its kernel, and not normalise or standardise it.

    Outputs stay equal where all members are finite: inf * 0 is NaN. For an NNX module m:
    `nnx.update(m, link_params(nnx.state(m), pairs, link)); m.act = link`. In training, an added channel's running
    statistics start at 0 and 1 and take some steps to follow, so evaluation lags behind training at first.

    Args:
      params: nested dictionaries, an NNX state, an Equinox module, or another tree with names; with a `norm` the
        running statistics too, so all variables. An Equinox layer goes on saying its old `in_features`;
        equinox.nn.MLP calls its activation unit by unit and cannot take a link: write its layers one by one.
      pairs: where the activations are, and where weights are if they are none of Flax', Haiku's or Equinox'.
      link: the new activation. Its first member is the old one; parameters alone cannot show whether it is. Its axis
        is -1 where channels are last, always in Flax; in an Equinox convolution they are first, axis=0.

    Returns:
      A new tree like params.

    Raises:
      ValueError: if a path does not exist or appears twice, shapes do not pair, a norm is no batch norm, there is no
        pair, or link is no `Link` of two or more members.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
      >>> from linked_jax import lk_relu, relu
      >>> from linked_jax.revive import Pair, link_params
      >>> class Net(nn.Module):
      ...     act: object = relu  # write the activation as a field, and swap it below
      ...
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         x = self.act(nn.Conv(4, (3, 3))(x))
      ...         return nn.Dense(3)(x.reshape(len(x), -1))
      >>> x = jnp.ones((2, 8, 8, 1))
      >>> variables = Net().init(jax.random.key(0), x)
      >>> pair = Pair("Conv_0", "Dense_0", positions=8 * 8)
      >>> revived = link_params(variables, [pair], lk_relu)
      >>> revived["params"]["Dense_0"]["kernel"].shape
      (512, 3)
      >>> np.testing.assert_allclose(Net(lk_relu).apply(revived, x), Net().apply(variables, x), atol=1e-6)
    """
    return edit(params, _edits(params, pairs, link, check_norms=True))


def link_params_opt_state(
    opt_state: Any, params: Any, pairs: Sequence[Pair], link: Link, *, tx: optax.GradientTransformation | None = None
) -> Any:
    """The Optax state for the parameters that `link_params` gives: of kept weights kept, of new ones as in tx.init.

        m' = [m; 0]   and so for step sizes, accumulators, copies of the weights: all that is one array a weight

    Counts and learning rates stay. What is of many weights, such as adafactor's factored moments, starts anew with the
    record that holds it. docs/optimisers.md has the table over all of Optax. With Adam the first step of a new weight
    is up to 3.2 times the learning rate, (1 - b1) / sqrt(1 - b2), since its bias correction is over: see `warm_up_new`.

    Args:
      opt_state: of tx.init(params), maybe some updates later.
      params: the plain parameters, before `link_params`; what tx.init was given.
      pairs: as for `link_params`.
      link: as for `link_params`.
      tx: the optimiser. It may be left out only if opt_state has no arrays but scalars, as that of plain SGD.

    Returns:
      A new state, like that of tx.init(link_params(params, pairs, link)).

    Raises:
      ValueError: as for `link_params`, or if opt_state is no state of tx and params, tx is needed, or beside weights of
        some age a new one would move wildly or not at all (acprop), which is tried on small arrays.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from linked_jax import lk_relu
      >>> from linked_jax.revive import Pair, link_params_opt_state
      >>> params, tx = {"in": {"kernel": jnp.ones((2, 4))}, "out": {"kernel": jnp.ones((4, 3))}}, optax.adam(1e-3)
      >>> state = link_params_opt_state(tx.init(params), params, [Pair("in", "out")], lk_relu, tx=tx)
      >>> state[0].mu["out"]["kernel"].shape
      (8, 3)
    """
    edits = _edits(params, pairs, link, check_norms=False)
    places = {name: functools.partial(widen, fill=jnp.zeros_like) for name, widen in edits.items()}
    return carry(opt_state, tx, params, edit(params, edits), places)


def check_link(link: Any) -> Link:
    """The link, if it has two or more members.

    Raises:
      ValueError: if it is something else.
    """
    if not isinstance(link, Link) or link.arity < 2:
        name = repr(link) if isinstance(link, Link) else getattr(link, "__name__", type(link).__name__)
        raise ValueError(
            f"link is a Link of two or more members, got {name}; pass linked(jax.nn.relu), or linked of your activation"
        )
    return link


def _edits(params: Any, pairs: Sequence[Pair], link: Link, *, check_norms: bool) -> dict[Names, Callable[..., Array]]:
    """For each weight that grows, how."""
    check_link(link)
    if not isinstance(pairs, Sequence) or not pairs or not all(isinstance(pair, Pair) for pair in pairs):
        raise ValueError(f"pairs is a list of one or more Pair, got {pairs!r}")
    leaves, edits = leaves_by_name(params), {}
    for pair in pairs:
        names, rows = pair.weights(leaves, pair.after)
        if link.axis != -1 and names[-1] == "kernel":
            raise ValueError(f"Flax layers have channels last, got a link with axis={link.axis}; pass one with axis=-1")
        units = _units(leaves, pair)
        found = {names: (rows, jnp.zeros_like)}
        if pair.norm:
            if check_norms:
                _check_norm(leaves, pair.norm, units)
            fills = {"mean": jnp.zeros_like, "var": jnp.ones_like, "scale": lambda a: a, "bias": jnp.zeros_like}
            found |= {(*pair.norm, name): (0, fill) for name, fill in fills.items() if (*pair.norm, name) in leaves}
        for name, (axis, fill) in found.items():
            if name in edits:
                raise ValueError(f"{'/'.join(name)} is in two pairs; give each activation one pair")
            edits[name] = functools.partial(_widened, axis=axis, units=units, link=link, fill=fill)
    return edits


def _widened(a: Array, *, axis: int, units: int, link: Link, fill: Callable[[Array], Array]) -> Array:
    """An axis of positions * C entries -> positions * d * C, where fill gives those of the added members.

    With channels first: C * positions -> d * C * positions.
    """
    axis %= a.ndim
    head, tail, last = a.shape[:axis], a.shape[axis + 1 :], link.axis == -1
    kept = jnp.reshape(a, (*head, *((-1, units) if last else (units, -1)), *tail))
    return join([kept] + [fill(kept)] * (link.arity - 1), axis + last, link.layout).reshape(*head, -1, *tail)


def _units(leaves: Mapping[Names, Any], pair: Pair) -> int:
    """The width of the pre-activation: the units, times the positions of a flatten before the activation."""
    names, rows = pair.weights(leaves, pair.after)
    kernel, units = leaves[names], pair.before
    whose, entries = f"{units} units", kernel.shape[rows]
    if type(units) is not int:
        names, own = pair.weights(leaves, pair.before)
        if own not in _UNITS:
            raise ValueError(f"with rows={own} the axis of units is not known; let before be their number")
        units = leaves[names].shape[_UNITS[own]]
        whose = f"{units} units of {'/'.join(pair.before)}"
    positions, left = divmod(entries, units)
    window = kernel.ndim > 2 and pair.rows is None
    one_of = {positions} if window else {1, positions}
    if left or (window and positions != 1) or (pair.positions or positions) not in one_of:
        raise ValueError(
            f"{'/'.join(pair.after)} has a kernel of shape {kernel.shape}, which does not take {pair.positions or 1} "
            f"positions of {whose}; before is the layer in front of the activation, after the one behind it, and "
            "positions is height * width where a flatten stands between them, else 1"
        )
    if pair.positions is None and positions != 1:
        raise ValueError(
            f"{'/'.join(pair.after)} has a kernel of shape {kernel.shape} after {whose}; pass positions={positions} if "
            "a flatten stands after the activation, and positions=1 if it stands before the activation"
        )
    return entries // (pair.positions or 1)


def _check_norm(leaves: Mapping[Names, Any], path: Names, units: int) -> None:
    if any((*path, name) not in leaves for name in ("mean", "var")):
        raise ValueError(
            f"there are no running mean and var at {'/'.join(path)!r}; pass all variables, and batch norm only: the "
            "added members would change what layer norm, group norm and instance norm give"
        )
    shape = jnp.shape(leaves[*path, "mean"])
    if len(shape) != 1 or shape[0] % units:
        raise ValueError(
            f"the norm at {'/'.join(path)!r} has a mean of shape {shape}, which is not one channel for each of {units} "
            "units; layers stacked by a scan are not handled"
        )
