"""Activations by their names: what a command line or a configuration says instead of an object."""

import difflib

from linked_jax.activations import ACTIVATIONS, SYNONYMS
from linked_jax.arguments import brief
from linked_jax.learned import ChannelPReLU, LinkedPReLU
from linked_jax.linking import Link

_WITH_SLOPES: dict[str, type[ChannelPReLU] | type[LinkedPReLU]] = {"prelu": ChannelPReLU, "lk_prelu": LinkedPReLU}
ACTIVATION_NAMES = (*ACTIVATIONS, *_WITH_SLOPES)
"""The names that `get_activation` takes, without synonyms such as silu for swish."""


def activation_arity(name: str) -> int:
    """The number of members of the activation of that name; nothing is built.

    Args:
      name: one of `ACTIVATION_NAMES`, or a synonym (silu is swish).

    Returns:
      1 for a plain activation, 2 for a mirror link.

    Raises:
      ValueError: if there is no such name; the message has the nearest one and the list.

    Examples:
      >>> from linked_jax import activation_arity
      >>> activation_arity("relu"), activation_arity("lk_prelu")
      (1, 2)
    """
    return (ACTIVATIONS | _WITH_SLOPES)[_known(name)].arity


def get_activation(name: str, features: int | None = None) -> Link | ChannelPReLU | LinkedPReLU:
    """The activation of that name: a `Link`, or a module with slopes for each of a number of features.

    Args:
      name: one of `ACTIVATION_NAMES`, or a synonym (silu is swish).
      features: the number of pre-activation channels C. prelu and lk_prelu need it; the others ignore it.

    Returns:
      A callable z (..., C) -> (..., d*C) with an `arity` d and a `link`, the link that it is at the start.

    Raises:
      ValueError: if there is no such name; the message has the nearest one and the list. If features are missing.

    Examples:
      >>> from linked_jax import get_activation
      >>> get_activation("lk_silu") is get_activation("lk_swish")
      True
      >>> get_activation("lk_prelu", 3).arity
      2
    """
    known = _known(name)
    if known in ACTIVATIONS:
        return ACTIVATIONS[known]
    if features is None:
        raise ValueError(f"{name} has slopes for each feature, got features=None; pass get_activation({name!r}, C)")
    return _WITH_SLOPES[known](features)


def _known(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"an activation has a name such as 'lk_relu', got {brief(name)}; make a link: Link((g,))")
    known = SYNONYMS.get(name, name)
    if known not in ACTIVATION_NAMES:
        nearest = difflib.get_close_matches(name.lower(), [*ACTIVATION_NAMES, *SYNONYMS], n=1, cutoff=0.0)
        names = ", ".join(sorted(ACTIVATION_NAMES))
        raise ValueError(f"no activation {name!r}; did you mean {nearest[0]!r}? The names are: {names}")
    return known
