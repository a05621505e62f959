"""Names of a tree's leaves: of a Linen dictionary, an NNX state, Haiku's, Equinox' and an optimiser's trees."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

Names = tuple[str, ...]
COLLECTIONS = (("params",), ("batch_stats",))


def split(path: Any) -> Names:
    """The names of a path, each without a "/": Haiku's modules have some in theirs. Linen's collections are left out.

    >>> from linked_jax.revive.names import split
    >>> split(["params", "mlp/~/linear_0", "w"])
    ('mlp', '~', 'linear_0', 'w')
    """
    names = tuple("/".join(map(str, path)).split("/")) if path else ()
    return names[1:] if names[:1] in COLLECTIONS else names


def leaf_names(path: Any) -> Names:
    """The names of a path of jax.tree_util, without NNX' `.value`."""
    is_value = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return split([jax.tree_util.keystr((key,), simple=True) for key in (path[:-1] if is_value else path)])


def named_leaves(tree: Any) -> list[tuple[Names, Any]]:
    """The names of each leaf, and the leaf."""
    return [(leaf_names(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def leaves_by_name(tree: Any) -> dict[Names, Any]:
    """Names -> leaf.

    >>> from linked_jax.revive.names import leaves_by_name
    >>> leaves_by_name({"params": {"Dense_0": {"bias": 1.0}}})
    {('Dense_0', 'bias'): 1.0}
    """
    return dict(named_leaves(tree))


def ending(names: Names, known: Collection[Names]) -> Names:
    """The longest of the known names that these end in, or ().

    >>> from linked_jax.revive.names import ending
    >>> ending(("mu", "b", "a"), [("a",), ("b", "a")])
    ('b', 'a')
    """
    return next((names[i:] for i in range(len(names)) if names[i:] in known), ())


def edit(tree: Any, edits: Mapping[Names, Callable[[Any], Any]]) -> Any:
    """The tree with f(leaf) at every leaf whose names are in `edits`.

    >>> from linked_jax.revive.names import edit
    >>> edit({"a": 1, "b": {"a": 1}}, {("b", "a"): lambda x: -x})
    {'a': 1, 'b': {'a': -1}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: edits.get(leaf_names(path), lambda x: x)(x), tree)
