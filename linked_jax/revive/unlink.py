"""Unlink for deployment: a link of which one member is used becomes that member; the next kernel loses its zeros."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from linked_jax.diagnostics import by_member
from linked_jax.learned import LinkedPReLU
from linked_jax.linking import Link
from linked_jax.revive.foldable import fit, link_and_layer, plain
from linked_jax.revive.joints import Joint, activations, arity, joint_at
from linked_jax.revive.stack import Stack


def unlink(model: nnx.Sequential) -> nnx.Sequential:
    """A new model with the same outputs, in which each link is the one member whose weights are not all zero.

        f(z) [W; 0] = g(z) W

    `LinkedLinear` and `LinkedConv` become an activation and a plain layer, an `nnx.Sequential` inside its layers, a
    `LinkedPReLU` a `ChannelPReLU`. It undoes `link_sequential`.

    Args:
      model: as for `link_sequential`, linked.

    Returns:
      A new `nnx.Sequential` with variables of its own; its activations are links of one member.

    Raises:
      ValueError: if two members of a link have weights that are not zero, with the layer and the largest weight of the
        second; or if no link stands between two layers.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import lk_relu
      >>> from linked_jax.revive import link_sequential, unlink
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), jax.nn.relu, nnx.Linear(16, 3, rngs=rngs))
      >>> plain = unlink(link_sequential(model, lk_relu))
      >>> plain.layers[1], plain.layers[2].kernel.shape
      (Link(relu(z)), (16, 3))
    """
    before = Stack(nnx.clone(model))
    parts = [(before.name(i), part) for i, layer in enumerate(before.layers) for part in link_and_layer(layer)]
    names = [name for name, _ in parts]
    new = Stack(nnx.Sequential(*(part for _, part in parts)))
    links = [i for i in activations(new) if arity(new.layers[i]) > 1]
    if not links:
        raise ValueError("no link of two or more members follows an nnx.Linear or nnx.Conv in the model; nothing to do")
    for joint in [joint_at(new, i) for i in links]:
        layer = plain(new.layers[joint.after], names[joint.after])
        new.put(joint.after, layer)
        used = _used_member(layer.kernel[...], joint, names[joint.after])
        new.put(joint.activation, _member(new.layers[joint.activation], used, names[joint.activation]))
        layer.kernel.set_value(_member_rows(layer.kernel[...], joint.rows, used, joint))
        fit(layer)
        if joint.norm is not None:
            norm = new.layers[joint.norm]
            for variable in (norm.mean, norm.var, norm.scale, norm.bias):
                if variable is not None:
                    variable.set_value(_member_rows(variable[...], 0, used, joint))
            fit(norm)
    return new.model


def _member(link: Any, used: int, name: str) -> Any:
    if not isinstance(link, LinkedPReLU):
        return Link((link.members[used],))
    if used:
        raise ValueError(f"{name}, a LinkedPReLU, is used for its mirrored member, for which there is no module")
    return link.positive


def _member_rows(a: Array, axis: int, member: int, joint: Joint) -> Array:
    """An axis of positions * d * C entries -> those of one member, positions * C."""
    rows, d = jnp.moveaxis(a, axis, -1), joint.link.arity
    one = by_member(rows.reshape(-1, d * joint.width), d, joint.link.layout)[:, member]
    return jnp.moveaxis(one.reshape(*rows.shape[:-1], -1), -1, axis)


def _used_member(kernel: Array, joint: Joint, name: str) -> int:
    """The member with weights in the layer of this name; no other may have one."""
    largest = [float(np.abs(_member_rows(kernel, joint.rows, i, joint)).max()) for i in range(joint.link.arity)]
    used = int(np.argmax(largest))
    rest = max(size for i, size in enumerate(largest) if i != used)
    if not rest == 0:
        raise ValueError(
            f"{name} uses more than one member of {joint.link}: the largest weight of the others is {rest:.3g}; it "
            "stays linked"
        )
    return used
