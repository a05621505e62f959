"""ReDo: give dormant units new weights, so that they can learn again."""

import collections
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from linked_jax.arrays import wide_dtype
from linked_jax.diagnostics import by_member, relative_sizes
from linked_jax.linking import join
from linked_jax.revive.expand import Names, edit, edit_opt_state, leaves_by_name
from linked_jax.revive.foldable import Foldable
from linked_jax.revive.joints import Joint, activations, joint_at, last_layer, linked_layers

Changes = dict[Names, list[tuple[Any, Any]]]
"""For each weight, in order: where it changes, and to which value."""

_START = {"mean": 0.0, "var": 1.0, "scale": 1.0, "bias": 0.0}


def redo(
    model: nnx.Sequential, opt_state: Any, x: Float[Array, "..."], *, tau: float = 0.025, key: PRNGKeyArray
) -> tuple[nnx.Sequential, Any, Int[Array, ""]]:
    """Re-initialise the units that hardly ever fire: a new model, a new optimiser state, and the number of such units.

        s_i = m_i / mean_k m_k,   m_i = mean of |h_i| over batch, positions and members of the link
        s_i <= tau:   incoming weights drawn anew, bias 0, outgoing weights 0, moments of all these 0

    A linked unit is scored as one, and the weights of all its members become 0. All layers are scored first, then
    changed. With tau = 0 and dead relu units outputs stay the same, unless a batch norm stands after the activation:
    it makes a constant of a dead unit, which is 0 afterwards.

    Args:
      model: as for `link_sequential`; linked already or not. Norms between a layer and its activation are batch norms:
        a dormant unit's entries become mean 0, variance 1, scale 1 and bias 0. It is scored in evaluation mode.
      opt_state: of tx.init(nnx.state(model, nnx.Param)), with gradient moments of the parameters' shapes; counts stay.
        Copies of the parameters (schedule_free, lookahead) are not handled.
      x: the model's input, a batch, floating-point, finite (not checked under `jax.jit`).
      tau: the largest score of a dormant unit, at least 0.
      key: for the new weights: LeCun normal, the Flax default, since layers do not keep their kernel_init. Not
        the key that the model was built with, which could draw the same weights again.

    Returns:
      The model, the state and the number of units, an integer scalar. Works under `jax.jit`.

    Raises:
      ValueError: if there is no activation between two layers, tau is negative, x is empty or not finite, a layer is
        not handled, or the state is another model's.

    Reference: Sokar et al., The dormant neuron phenomenon in deep reinforcement learning, 2023.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from linked_jax.revive import redo
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), jax.nn.relu, nnx.Linear(16, 3, rngs=rngs))
      >>> model.layers[0].bias[...] = jnp.where(jnp.arange(16) < 5, -100.0, 0.0)  # five dead units
      >>> opt_state = optax.adam(1e-3).init(nnx.state(model, nnx.Param))
      >>> x = jax.random.normal(jax.random.key(0), (32, 8))
      >>> model, opt_state, units = redo(model, opt_state, x, key=jax.random.key(1))
      >>> int(units)
      5
    """
    joints = _checked(model, x, tau)
    outputs = _outputs(model, x)
    state = nnx.state(model)
    leaves = leaves_by_name(state)
    changes, count = _changes(model, joints, leaves, outputs, tau=tau, key=key)

    def changed(a: Array, name: Names, *, moments: bool) -> Array:
        for where, value in changes[name]:
            a = jnp.where(where, 0.0 if moments else value, a).astype(a.dtype)
        return a

    of_weights, of_moments = (
        {name: functools.partial(changed, name=name, moments=moments) for name in leaves.keys() & changes}
        for moments in (False, True)
    )
    new = nnx.clone(model)
    nnx.update(new, edit(state, of_weights, leaves))
    return new, edit_opt_state(opt_state, of_moments, leaves), count


def _checked(model: nnx.Sequential, x: Array, tau: float) -> list[Joint]:
    """The joints of the activations between two layers, if all is as `redo` needs it."""
    if not tau >= 0:
        raise ValueError(f"tau is at least 0, got {tau}; 0 finds the units that never fire")
    finite = jnp.isfinite(x).all()
    if not x.size or not (isinstance(finite, Tracer) or finite):
        raise ValueError(f"x is a batch of finite numbers, got shape {x.shape}{' with NaN or inf' if x.size else ''}")
    joints = [joint_at(model, i) for i in activations(model) if i < last_layer(model)]
    for i in linked_layers(model):
        raise ValueError(
            f"layers[{i}], a {type(model.layers[i]).__name__}, is already linked, and its link would be left out; "
            "write it as two layers, the link and then its nnx.Linear or nnx.Conv"
        )
    for i in (i for joint in joints for i in (joint.before, joint.after)):
        if isinstance(model.layers[i], Foldable):
            raise ValueError(
                f"layers[{i}], a {type(model.layers[i]).__name__}, computes its kernel, so it does not apply weights "
                "that are drawn anew; fold it first, see fold_sequential"
            )
    if not joints:
        raise ValueError("no activation between two layers (nnx.Linear or nnx.Conv) is in the model, so no units")
    return joints


def _changes(
    model: nnx.Sequential, joints: list[Joint], leaves: Mapping[Names, Array], outputs: list[Array], *, tau: float,
    key: Array,
) -> tuple[Changes, Array]:  # fmt: skip
    """What becomes of the weights of dormant units, and how many those are."""
    changes: Changes = collections.defaultdict(list)
    count = jnp.zeros((), int)
    # From the last to the first: a layer's own weights are drawn before what dormant inputs have there becomes 0.
    for joint, subkey in reversed(list(zip(joints, jax.random.split(key, len(joints)), strict=True))):
        dormant = _dormant(outputs[joint.activation], joint, tau)
        count += dormant.sum()
        layer = ("layers", str(joint.before))
        kernel = leaves[*layer, "kernel"]
        fresh = nnx.initializers.lecun_normal()(subkey, kernel.shape, kernel.dtype)
        changes[*layer, "kernel"].append((dormant, fresh))
        changes[*layer, "bias"].append((dormant, 0.0))
        members = join([jnp.tile(dormant, joint.width // joint.units)] * joint.link.arity, -1, joint.link.layout)
        for i in joint.inner_norms:
            _check_norm(model.layers[i], i)
        channels = [(i, dormant) for i in joint.inner_norms] + [(i, members) for i in (joint.norm,) if i is not None]
        for i, where in channels:
            where = jnp.tile(where, len(leaves["layers", str(i), "mean"]) // len(where))
            for name, value in _START.items():
                changes["layers", str(i), name].append((where, value))
        changes["layers", str(joint.after), "kernel"].append((jnp.tile(members, joint.positions)[:, None], 0.0))
    return changes, count


def _outputs(model: nnx.Sequential, x: Array) -> list[Array]:
    """The output of each layer, in evaluation mode, with no trace left in the model."""
    model = nnx.clone(model)
    model.eval()
    return [x := layer(x) for layer in model.layers]


def _dormant(h: Array, joint: Joint, tau: float) -> Bool[Array, " c"]:
    """s_i <= tau; all units of a silent layer are dormant."""
    size = jnp.abs(by_member(h, joint.link.arity, joint.link.layout)).astype(wide_dtype(h.dtype))
    size = size.mean(axis=(0, 1)).reshape(-1, joint.units).mean(axis=0)
    return relative_sizes(size, finite=jnp.isfinite(size)) <= tau


def _check_norm(norm: Any, i: int) -> None:
    if not isinstance(norm, nnx.BatchNorm) or norm.axis != -1:
        raise ValueError(
            f"layers[{i}], a {type(norm).__name__} before an activation: new weights of one unit would change the "
            "others' outputs; only batch norm with axis=-1 is handled"
        )
