"""What becomes of an optimiser's state when weights are added or start anew. tx.init, on old and new weights, tells.

An array of the state is
    of one weight each   it has the name and the shape of a weight: kept for kept entries, as in tx.init for new ones
    of no weight         its shape is the same for other shapes of the weights (counts, rates, sums): kept
    of many weights      all else (factored, flattened, projected): its whole record is that of tx.init

So no table of optimisers is needed. What shapes cannot tell is tried: beside weights of some age, a weight that starts
anew must move, and not wildly. (acprop divides by the last step's moment, which is 0 for a new weight.)
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from linked_jax.revive.names import Names, edit, ending, leaves_by_name, named_leaves

Place = Callable[[Array], Array]
"""A weight's array -> that of the new weight, in which new entries are 0, or False."""

_WILD = 1e3
"""A new weight's largest update over the largest of all others. Adam's is at most 1 / sqrt(1 - b2): 100 for 0.9999.
A division by a moment that is still 0 gives 1 / eps."""
_STEPS = 64
"""Updates of the trial before some weights start anew, and after it: enough where gradients are added up."""


def carry(
    opt_state: Any, tx: optax.GradientTransformation | None, params: Any, new_params: Any, places: Mapping[Names, Place]
) -> Any:
    """The optimiser's state for the new parameters.

    Args:
      opt_state: of tx.init(params), maybe some updates later.
      tx: may be None for a state without arrays.
      params: before the change.
      new_params: after it.
      places: for each weight that changes.

    Raises:
      ValueError: if the state is not one of this tx and these parameters, new weights would move wildly or not at all,
        or tx is None and has to be known.
    """
    if tx is None:
        if arrays := [name for name, leaf in named_leaves(opt_state) if jnp.ndim(leaf)]:
            raise ValueError(
                f"opt_state has arrays, e.g. {'/'.join(arrays[0])}, and what they mean only their optimiser knows; "
                "pass tx=, the Optax transformation that made it"
            )
        return opt_state
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise ValueError(f"tx is an Optax transformation, the one that made opt_state, got {type(tx).__name__}")
    _check_state(opt_state, tx, params)
    if any(ending(name, places) for name, _ in named_leaves(jax.eval_shape(tx.init, params))):
        tried = tx, jax.tree.structure(params), tuple((a.shape, a.dtype) for a in jax.tree.leaves(params))
        try:
            hash(tried)
        except TypeError:  # a structure or an optimiser that holds arrays
            _check_moves.__wrapped__(*tried)
        else:
            _check_moves(*tried)
    return _carried(opt_state, tx, params, new_params, places)


def _carried(opt_state: Any, tx: Any, params: Any, new_params: Any, places: Mapping[Names, Place]) -> Any:
    """`carry` without its checks."""
    weights, news = leaves_by_name(params), leaves_by_name(new_params)
    before, fresh = jax.eval_shape(tx.init, params), tx.init(new_params)
    # A weight that keeps its shape is made larger here, to see what depends on its shape.
    same = [name for name in places if jnp.shape(weights[name]) == jnp.shape(news[name])]
    larger = lambda a: jax.ShapeDtypeStruct(tuple(n + 1 for n in a.shape), a.dtype)  # noqa: E731
    other_params = edit(new_params, dict.fromkeys(same, larger))
    others, states = leaves_by_name(other_params), (opt_state, before, fresh, jax.eval_shape(tx.init, other_params))
    old, was, new, other = map(jax.tree.leaves, states)
    if not len(was) == len(new) == len(other):
        raise ValueError("tx.init gives a state of other arrays for the new parameters; start it anew: tx.init")
    names = [ending(name, weights) for name, _ in named_leaves(before)]
    shapes = [(a.shape, b.shape) for a, b in zip(was, other, strict=True)]
    mine = {i: name for i, name in enumerate(names) if name in places}
    of_one = {i for i, name in mine.items() if shapes[i] == (weights[name].shape, others[name].shape)}
    of_many = {i for i, (shape, grown) in enumerate(shapes) if shape != grown} - of_one
    indices = jax.tree.unflatten(jax.tree.structure(before), range(len(was)))
    anew = _anew(indices, of_many, {type(node) for node in _nodes(params)})

    def leaf(i: int) -> Any:
        if i in anew:
            return new[i]
        if i not in of_one:
            return old[i]
        place, kept = places[names[i]], jnp.asarray(old[i])
        return jnp.where(place(jnp.ones(kept.shape, bool)), place(kept), new[i].astype(kept.dtype))

    return jax.tree.unflatten(jax.tree.structure(opt_state), [leaf(i) for i in range(len(was))])


# --- records ----------------------------------------------------------------------------------------------------------


def _anew(node: Any, of_many: set[int], of_params: set[type]) -> set[int]:
    """The leaves, numbers, of all records that have one of these among their own."""
    mine = set(jax.tree.leaves(node))
    if not mine & of_many:
        return set()
    inner = [part for part in _parts(node) if any(_is_record(n, of_params) for n in _nodes(part))]
    own = [set(jax.tree.leaves(part)) for part in _parts(node) if not any(part is other for other in inner)]
    hit = [part for part in own if part & of_many]
    if not inner or (hit and _is_record(node, of_params)):
        return mine
    return set().union(*hit, *(_anew(part, of_many, of_params) for part in inner))


def _is_record(node: Any, of_params: set[type]) -> bool:
    """Whether it is a transformation's state, such as a ScaleByAdamState: no mere container, and no part of params."""
    plain = {tuple, list, type(None), optax.MaskedNode} | of_params
    return not (type(node) in plain or isinstance(node, Mapping) or jax.tree_util.all_leaves([node]))


def _nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for part in _parts(tree):
        yield from _nodes(part)


def _parts(node: Any) -> list[Any]:
    """One level below."""
    return [] if jax.tree_util.all_leaves([node]) else jax.tree.leaves(node, is_leaf=lambda a: a is not node)


# --- what is refused --------------------------------------------------------------------------------------------------


def _check_state(opt_state: Any, tx: Any, params: Any) -> None:
    """Refuse a state that has not the shapes of tx.init(params)."""
    for name, leaf in leaves_by_name(params).items():
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"params are arrays, got a {type(leaf).__name__} at {'/'.join(name)}; pass what tx.init was given, "
                "e.g. equinox.filter(model, equinox.is_array)"
            )
    wanted, found = named_leaves(jax.eval_shape(tx.init, params)), named_leaves(opt_state)
    differ = [(name, a.shape, jnp.shape(b)) for (name, a), (_, b) in zip(wanted, found, strict=False)]
    differ = [f"{'/'.join(name)} has the shape {is_} and not {due}" for name, due, is_ in differ if due != is_]
    if len(wanted) != len(found):
        differ = [f"it has {len(found)} arrays and not {len(wanted)}"]
    if differ:
        raise ValueError(
            f"opt_state is no state of tx.init(params): {differ[0]}; pass the tx that made it, and the parameters "
            "before the change"
        )


_GIVEN = (("value", "grad", "value_fn"), ("obj_fn",), ())
"""What updates are given beside gradients: line searches and such, sophia, sam."""


@functools.lru_cache(maxsize=4)
def _check_moves(tx: Any, structure: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> None:
    """Try, on weights of at most 2 entries an axis: after some updates the first entry of each starts anew.

    Raises:
      ValueError: if it then moves wildly, or not at all though others do, or cannot be tried.
    """
    leaves = tuple((shape, jnp.promote_types(dtype, jnp.float32)) for shape, dtype in leaves)
    small = tuple((tuple(min(n, 2) for n in shape), dtype) for shape, dtype in leaves)
    reason = ""
    with (  # without JAX' strict switches: what is tried may be what they stop
        jax.ensure_compile_time_eval(),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.disable_jit(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for sizes, given in itertools.product((small, leaves), _GIVEN):  # leaves: it may know the weights' true shapes
            try:
                params = jax.tree.unflatten(structure, [jnp.ones(shape, dtype) for shape, dtype in sizes])
                aged, others, anew = _trial(tx, params, given)
                break
            except Exception as error:
                reason = reason or f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            raise ValueError(f"tx could not be tried, to see what new weights do: {reason}; start it anew (tx.init)")
    most = max([*aged.values(), *others.values()], default=0.0)
    for name in anew:
        if not anew[name] <= _WILD * most:
            raise ValueError(
                f"with this tx a new weight would move by {anew[name]:.1g} where others moved by {most:.1g}: it cannot "
                "start beside weights of some age; start the optimiser anew (tx.init)"
            )
        if others[name] > 0 and anew[name] == 0:
            raise ValueError("with this tx a new weight would not move at all; start the optimiser anew (tx.init)")


def _trial(tx: Any, params: Any, given: tuple[str, ...]) -> list[dict[Names, float]]:
    """For each weight the largest update of its first entry: in the first steps, in the next, and in these anew."""
    tx, rng = optax.with_extra_args_support(tx), np.random.default_rng(0)

    @jax.jit
    def step(params: Any, state: Any, aim: Any) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> Array:
            apart = jax.tree.map(lambda w, a: jnp.sum(jnp.square(w - a)) / 2, params, aim)
            return jnp.asarray(sum(jax.tree.leaves(apart)))

        grads = jax.tree.map(lambda w, a: w - a, params, aim)
        extra = {"value": loss(params), "grad": grads, "value_fn": loss, "obj_fn": loss}
        updates, state = tx.update(grads, state, params, **{name: extra[name] for name in given})
        return optax.apply_updates(params, updates), state, updates

    def steps(params: Any, state: Any) -> tuple[Any, Any, dict[Names, float]]:
        largest: dict[Names, float] = dict.fromkeys(leaves_by_name(params), 0.0)
        for _ in range(_STEPS):
            aim = jax.tree.map(lambda w: jnp.asarray(rng.normal(scale=0.5, size=w.shape), w.dtype), params)
            params, state, updates = step(params, state, aim)
            for name, update in leaves_by_name(updates).items():
                sizes = np.abs(np.ravel(update)[:1])
                largest[name] = float(np.max(sizes, initial=largest[name]))  # NaN stays
        return params, state, largest

    def place(a: Array) -> Array:
        return jnp.where(jnp.arange(a.size).reshape(a.shape) == 0, jnp.zeros_like(a), a)

    params, state, aged = steps(params, tx.init(params))
    anew = _carried(state, tx, params, params, dict.fromkeys(aged, place))
    return [aged, steps(params, state)[-1], steps(params, anew)[-1]]
