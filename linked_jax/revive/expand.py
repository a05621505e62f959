"""Link a trained network by its tree of parameters: the next layer's kernel W becomes [W; 0], and so its moments.

    g(z) W = f(z) [W; 0],   f = (g, g_2, ..., g_d)

Rows are in the order of the link's layout, after a flatten position by position: (positions, d, C) if blocked, else
(positions, C, d). Any pytree with names will do: a Linen dictionary, an NNX state, an optimiser's state.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from linked_jax.linking import Link, join

Names = tuple[str, ...]
Fill = Callable[[Array], Array]
_COLLECTIONS = (("params",), ("batch_stats",))


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two layers around an activation, in the order of the data. Only the one after it gets new weights.

    Paths are names from the root of the parameters, "block/Dense_1" or ("block", "Dense_1"); the Linen collections
    "params" and "batch_stats" are not part of them and are left out of a path that starts with one.

    Args:
      before: path of the layer before the activation, whose `kernel` gives the number of units C; or C itself.
      after: path of the layer after it, with a `kernel` of shape (*window, rows, c_out).
      norm: path of a batch norm between the activation and the next layer, if there is one. Layer norm, group norm and
        instance norm are refused: the added members would change what they give.
      positions: needed if rows is not C: height times width where a flatten stands between the activation and the next
        layer, and 1 where it stands before the activation.

    Raises:
      ValueError: if a path has no names, or positions is no integer of at least 1.

    Example:
      >>> from linked_jax.revive import Pair
      >>> Pair("block/Conv_0", "block/Dense_1", positions=16).after
      ('block', 'Dense_1')
    """

    before: Any
    after: Any
    norm: Any = None
    positions: int | None = None

    def __post_init__(self):
        for field in ("before", "after", "norm"):
            path = getattr(self, field)
            units_or_none = type(path) is int and path >= 1 if field == "before" else path is None and field == "norm"
            if not units_or_none:
                object.__setattr__(self, field, _path(path, field))
        if self.positions is not None and not (isinstance(self.positions, int) and self.positions >= 1):
            raise ValueError(f"positions is an integer of at least 1, height * width, got {self.positions!r}")


def _path(path: Any, field: str) -> Names:
    split = path.split("/") if isinstance(path, str) else path
    names = tuple(map(str, split)) if isinstance(split, (tuple, list)) else ()
    names = names[1:] if names[:1] in _COLLECTIONS else names
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
      params: nested dictionaries, or an NNX state; with a `norm` the running statistics too, so all variables.
      pairs: where the activations are.
      link: the new activation. Its first member is the old one; parameters alone cannot show whether it is.

    Returns:
      A new tree like params.

    Raises:
      ValueError: if a path does not exist or appears twice, shapes do not pair, a norm is no batch norm, there is no
        pair, or link is no `Link` of two or more members.

    Example:
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
    return edit(params, _edits(params, pairs, link, moments=False), leaves_by_name(params))


def link_params_opt_state(opt_state: Any, params: Any, pairs: Sequence[Pair], link: Link) -> Any:
    """The Optax state for the parameters that `link_params` gives: moments of kept weights kept, new ones 0.

    Counts and learning rates stay. With Adam the first step of a new weight is then up to 3.2 times the learning rate,
    (1 - b1) / sqrt(1 - b2), since its bias correction is over.

    Every array beside a parameter is taken for a moment of its gradient. Copies of the parameters, as in schedule_free
    or lookahead, are not handled: their new entries would be 0 too.

    Args:
      opt_state: of an optimiser that keeps gradient moments of the parameters' shapes, under the parameters' names.
      params: the plain parameters, before `link_params`.
      pairs: as for `link_params`.
      link: as for `link_params`.

    Returns:
      A new state, like that of tx.init(link_params(params, pairs, link)).

    Raises:
      ValueError: as for `link_params`, or if an entry has another shape than its weight (factored moments), or the
        state has arrays of which none bears the name of a parameter (optax.flatten, or another model's state).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from linked_jax import lk_relu
      >>> from linked_jax.revive import Pair, link_params_opt_state
      >>> params = {"in": {"kernel": jnp.ones((2, 4))}, "out": {"kernel": jnp.ones((4, 3))}}
      >>> state = optax.adam(1e-3).init(params)
      >>> link_params_opt_state(state, params, [Pair("in", "out")], lk_relu)[0].mu["out"]["kernel"].shape
      (8, 3)
    """
    return edit_opt_state(opt_state, _edits(params, pairs, link, moments=True), leaves_by_name(params))


def edit_opt_state(opt_state: Any, edits: Mapping[Names, Callable[[Any], Any]], weights: Mapping[Names, Any]) -> Any:
    """`edit` of an optimiser's state, for arrays of the weights' shapes only; refuses a state of other weights."""
    arrays = [
        _names(path)
        for path, a in jax.tree_util.tree_flatten_with_path(opt_state)[0]
        if jnp.ndim(a) and jnp.issubdtype(jnp.result_type(a), jnp.floating)
    ]
    if arrays and not any(path[i:] in weights for path in arrays for i in range(len(path))):
        raise ValueError(
            f"no array of the optimiser's state has the name of a parameter, got e.g. {'/'.join(arrays[0])}; pass the "
            "state of tx.init of these parameters, of an optimiser that does not flatten them"
        )
    return edit(opt_state, {name: same_shape(f, name, weights[name]) for name, f in edits.items()}, weights)


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


def leaves_by_name(tree: Any) -> dict[Names, Any]:
    """Path -> leaf, without Linen's collections and NNX' `.value`.

    >>> from linked_jax.revive.expand import leaves_by_name
    >>> leaves_by_name({"params": {"Dense_0": {"bias": 1.0}}})
    {('Dense_0', 'bias'): 1.0}
    """
    named = ((_names(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0])
    return {name[1:] if name[:1] in _COLLECTIONS else name: leaf for name, leaf in named}


def edit(tree: Any, edits: Mapping[Names, Callable[[Any], Any]], names: Collection[Names]) -> Any:
    """The tree with f(leaf) at every leaf whose path ends in a name of `edits`; the longest of all `names` counts.

    >>> from linked_jax.revive.expand import edit
    >>> edit({"mu": {"a": 1, "b": {"a": 1}}}, {("a",): lambda x: -x}, [("a",), ("b", "a")])
    {'mu': {'a': -1, 'b': {'a': 1}}}
    """

    def leaf(path: Any, x: Any) -> Any:
        path = _names(path)
        name = next((path[i:] for i in range(len(path)) if path[i:] in names), ())
        return edits[name](x) if name in edits else x

    return jax.tree_util.tree_map_with_path(leaf, tree)


def same_shape(f: Callable[[Any], Any], name: Names, weight: Any) -> Callable[[Any], Any]:
    """The function f, for arrays of the weight's shape only."""

    def checked(x: Any) -> Any:
        if jnp.shape(x) != jnp.shape(weight):
            raise ValueError(
                f"the optimiser's entry for {'/'.join(name)} has the shape {jnp.shape(x)} and not the weight's "
                f"{jnp.shape(weight)}; start the optimiser anew (tx.init) or use one that does not factor its moments"
            )
        return f(x)

    return checked


def _edits(params: Any, pairs: Sequence[Pair], link: Link, *, moments: bool) -> dict[Names, Callable[[Any], Any]]:
    if check_link(link).axis != -1:
        raise ValueError(f"Flax layers have channels last, got a link with axis={link.axis}; pass one with axis=-1")
    if not isinstance(pairs, Sequence) or not pairs or not all(isinstance(pair, Pair) for pair in pairs):
        raise ValueError(f"pairs is a list of one or more Pair, got {pairs!r}")
    leaves, edits = leaves_by_name(params), {}
    for pair in pairs:
        units = _units(leaves, pair)
        found = {(*pair.after, "kernel"): (-2, jnp.zeros_like)}
        if pair.norm:
            if not moments:
                _check_norm(leaves, pair.norm, units)
            fills = {"mean": jnp.zeros_like, "var": jnp.ones_like, "scale": lambda a: a, "bias": jnp.zeros_like}
            for name, fill in fills.items():
                if (*pair.norm, name) in leaves:
                    found[*pair.norm, name] = (0, jnp.zeros_like if moments else fill)
        for name, (axis, fill) in found.items():
            if name in edits:
                raise ValueError(f"{'/'.join(name)} is in two pairs; give each activation one pair")
            edits[name] = functools.partial(_widened, axis=axis, units=units, link=link, fill=fill)
    return edits


def _widened(a: Array, *, axis: int, units: int, link: Link, fill: Fill) -> Array:
    """An axis of positions * C entries -> positions * d * C, where fill gives those of the added members."""
    axis %= a.ndim
    head, tail = a.shape[:axis], a.shape[axis + 1 :]
    kept = jnp.reshape(a, (*head, a.shape[axis] // units, units, *tail))
    return join([kept] + [fill(kept)] * (link.arity - 1), axis + 1, link.layout).reshape(*head, -1, *tail)


def _units(leaves: Mapping[Names, Any], pair: Pair) -> int:
    """The width of the pre-activation: the units, times the positions of a flatten before the activation."""
    kernel, counted = _kernel(leaves, pair.after), type(pair.before) is int
    units = pair.before if counted else _kernel(leaves, pair.before).shape[-1]
    whose = f"{units} units{'' if counted else ' of ' + '/'.join(pair.before)}"
    positions, left = divmod(kernel.shape[-2], units)
    one_of = {positions} if kernel.ndim > 2 else {1, positions}
    if left or (kernel.ndim > 2 and positions != 1) or (pair.positions or positions) not in one_of:
        raise ValueError(
            f"{'/'.join(pair.after)} has a kernel of shape {kernel.shape}, which does not take {pair.positions or 1} "
            f"positions of {whose}; positions is height * width where a flatten stands between the activation and a "
            "dense layer, else 1"
        )
    if pair.positions is None and positions != 1:
        raise ValueError(
            f"{'/'.join(pair.after)} has a kernel of shape {kernel.shape} after {whose}; pass positions={positions} if "
            "a flatten stands after the activation, and positions=1 if it stands before the activation"
        )
    return kernel.shape[-2] // (pair.positions or 1)


def _kernel(leaves: Mapping[Names, Any], path: Names) -> Any:
    kernel = leaves.get((*path, "kernel"))
    if kernel is None or jnp.ndim(kernel) < 2:
        known = ", ".join("/".join(name[:-1]) for name in leaves if name[-1] == "kernel")
        raise ValueError(f"there is no layer with a kernel at {'/'.join(path)!r}; there are: {known or 'none'}")
    return kernel


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


def _names(path: Any) -> Names:
    is_value = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in (path[:-1] if is_value else path))
