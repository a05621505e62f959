"""ReDo: give dormant units new weights, so that they can learn again."""

import collections
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from linked_jax.arrays import wide_dtype
from linked_jax.diagnostics import by_member, relative_sizes
from linked_jax.linking import join
from linked_jax.revive.carry import carry
from linked_jax.revive.foldable import LAYERS, Foldable
from linked_jax.revive.joints import Joint, activations, joint_at, last_layer, linked_layers
from linked_jax.revive.names import Names, edit, leaves_by_name
from linked_jax.revive.stack import Stack

Changes = dict[Names, list[tuple[Any, Any]]]
"""For each weight, in order: where it changes, and to which value."""

_START = {"mean": 0.0, "var": 1.0, "scale": 1.0, "bias": 0.0}


def redo(
    model: nnx.Sequential,
    opt_state: Any,
    x: Float[Array, "..."],
    *,
    key: PRNGKeyArray,
    tau: float = 0.025,
    tx: optax.GradientTransformation | None = None,
) -> tuple[nnx.Sequential, Any, Int[Array, ""]]:
    """Re-initialise the units that hardly ever fire: a new model, a new optimiser state, and the number of such units.

        s_i = m_i / mean_k m_k,   m_i = mean of |h_i| over batch, positions and members of the link
        s_i <= tau:   incoming weights drawn anew, bias 0, outgoing weights 0, their optimiser's state as in tx.init

    A linked unit is scored as one, and the weights of all its members become 0. All layers are scored first, then
    changed. If all units of a layer are dormant, dormant ones of the next layer keep the weights that are drawn for
    them: with incoming and outgoing weights of 0 they would never move, and outputs do not depend on them. With tau = 0
    and dead relu units outputs stay the same, unless a batch norm stands after the activation: it makes a constant of a
    dead unit, which is 0 afterwards. New weights are drawn, so a unit can be silent again: the next call finds it.

    Args:
      model: as for `link_sequential`; linked already or not. Layers around activations are nnx.Linear, nnx.Conv or
        nnx.LinearGeneral of one axis. Where a layer adds to its kernel (nnx.LoRALinear, nnx.WeightNorm), computes it,
        or shares it, a unit with new weights could stay dead: these are refused. Norms between a layer and its
        activation are batch norms: a dormant unit's entries become mean 0, variance 1, scale 1 and bias 0. It is scored
        in evaluation mode.
      opt_state: of tx.init(nnx.state(model, nnx.Param)); see `link_params_opt_state` for what stays and what does not.
      x: the model's input, a batch, floating-point, finite (not checked under `jax.jit`).
      tau: the largest score of a dormant unit, at least 0.
      key: for the new weights: LeCun normal, the Flax default, since layers do not keep their kernel_init. Not
        the key that the model was built with, which could draw the same weights again.
      tx: the optimiser. It may be left out only if opt_state has no arrays but scalars.

    Returns:
      The model, the state and the number of units, an integer scalar. Works under `jax.jit`.

    Raises:
      ValueError: if there is no activation between two layers, tau is negative, x is empty or not finite, a layer is
        not handled, tx is needed, or the state is another model's.

    Reference: Sokar et al., The dormant neuron phenomenon in deep reinforcement learning, 2023.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from linked_jax.revive import redo
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), jax.nn.relu, nnx.Linear(16, 3, rngs=rngs))
      >>> model.layers[0].bias[...] = jnp.where(jnp.arange(16) < 5, -100.0, 0.0)  # five dead units
      >>> tx = optax.adam(1e-3)
      >>> opt_state = tx.init(nnx.state(model, nnx.Param))
      >>> x = jax.random.normal(jax.random.key(0), (32, 8))
      >>> model, opt_state, units = redo(model, opt_state, x, tx=tx, key=jax.random.key(1))
      >>> int(units)
      5
    """
    stack = Stack(model)
    joints = _checked(stack, x, tau)
    outputs = _outputs(model, x)
    leaves = leaves_by_name(nnx.state(model))
    changes, count = _changes(stack, joints, leaves, outputs, tau=tau, key=key)
    changes = {name: changes[name] for name in leaves.keys() & changes}

    def changed(a: Array, name: Names) -> Array:
        return functools.reduce(lambda a, change: jnp.where(*change, a).astype(a.dtype), changes[name], a)

    def kept(a: Array, name: Names) -> Array:
        return functools.reduce(lambda a, change: jnp.where(change[0], jnp.zeros_like(a), a), changes[name], a)

    new = nnx.clone(model)
    nnx.update(new, edit(nnx.state(model), {name: functools.partial(changed, name=name) for name in changes}))
    params, new_params = nnx.state(model, nnx.Param), nnx.state(new, nnx.Param)
    places = {name: functools.partial(kept, name=name) for name in leaves_by_name(params).keys() & changes}
    return new, carry(opt_state, tx, params, new_params, places), count


def _checked(stack: Stack, x: Array, tau: float) -> list[Joint]:
    """The joints of the activations between two layers, if all is as `redo` needs it."""
    if not tau >= 0:
        raise ValueError(f"tau is at least 0, got {tau}; 0 finds the units that never fire")
    finite = jnp.isfinite(x).all()
    if not x.size or not (isinstance(finite, Tracer) or finite):
        raise ValueError(f"x is a batch of finite numbers, got shape {x.shape}{' with NaN or inf' if x.size else ''}")
    joints = [joint_at(stack, i) for i in activations(stack) if i < last_layer(stack)]
    for i in linked_layers(stack):
        raise ValueError(
            f"{stack.name(i)}, a {type(stack.layers[i]).__name__}, is already linked, and its link would be left out; "
            "write it as two layers, the link and then its nnx.Linear or nnx.Conv"
        )
    for i in (i for joint in joints for i in (joint.before, joint.after)):
        _check_layer(stack.layers[i], stack.name(i))
    if not joints:
        raise ValueError("no activation between two layers (nnx.Linear or nnx.Conv) is in the model, so no units")
    return joints


def _check_layer(layer: Any, name: str) -> None:
    if isinstance(layer, Foldable):
        raise ValueError(
            f"{name}, a {type(layer).__name__}, computes its kernel, so it does not apply weights that are drawn anew; "
            "fold it first, see fold_sequential"
        )
    if type(layer) not in LAYERS:
        raise ValueError(
            f"{name}, a {type(layer).__name__}, may add to its kernel, so that a unit with new weights could stay "
            "dead; merge what it adds into an nnx.Linear or nnx.Conv first"
        )
    if isinstance(layer, nnx.LinearGeneral) and layer.kernel.ndim != 2:
        raise ValueError(
            f"{name}, an nnx.LinearGeneral with a kernel of shape {layer.kernel.shape}: its units have more than one "
            "axis; only one of one input and one output axis is handled"
        )
    if isinstance(layer, nnx.Conv) and layer.mask is not None:
        raise ValueError(f"{name}, a masked convolution, may not apply weights that are drawn anew; use a plain one")


def _changes(
    stack: Stack, joints: list[Joint], leaves: Mapping[Names, Array], outputs: list[Array], *, tau: float, key: Array
) -> tuple[Changes, Array]:
    """What becomes of the weights of dormant units, and how many those are."""
    changes: Changes = collections.defaultdict(list)
    count = jnp.zeros((), int)
    dormant_units: dict[int, Array] = {}  # of the layer before a joint
    of = lambda i, name: tuple(map(str, (*stack.path(i), name)))  # noqa: E731
    # From the last to the first: a layer's own weights are drawn before what dormant inputs have there becomes 0.
    for joint, subkey in reversed(list(zip(joints, jax.random.split(key, len(joints)), strict=True))):
        dormant = _dormant(outputs[joint.activation], joint, tau)
        count += dormant.sum()
        kernel = leaves[of(joint.before, "kernel")]
        fresh = nnx.initializers.lecun_normal()(subkey, kernel.shape, kernel.dtype)
        changes[of(joint.before, "kernel")].append((dormant, fresh))
        changes[of(joint.before, "bias")].append((dormant, 0.0))
        members = join([jnp.tile(dormant, joint.width // joint.units)] * joint.link.arity, -1, joint.link.layout)
        for i in joint.inner_norms:
            _check_norm(stack.layers[i], stack.name(i))
        channels = [(i, dormant) for i in joint.inner_norms] + [(i, members) for i in (joint.norm,) if i is not None]
        for i, where in channels:
            where = jnp.tile(where, len(leaves[of(i, "mean")]) // len(where))
            for name, value in _START.items():
                changes[of(i, name)].append((where, value))
        outgoing = jnp.tile(members, joint.positions)[:, None]
        if joint.after in dormant_units:
            outgoing &= ~(dormant.all() & dormant_units[joint.after])
        changes[of(joint.after, "kernel")].append((outgoing, 0.0))
        dormant_units[joint.before] = dormant
    return changes, count


def _outputs(model: nnx.Sequential, x: Array) -> list[Array]:
    """The output of each layer, in evaluation mode, with no trace left in the model."""
    model = nnx.clone(model)
    model.eval()
    return [x := layer(x) for layer in Stack(model).layers]


def _dormant(h: Array, joint: Joint, tau: float) -> Bool[Array, " c"]:
    """s_i <= tau; all units of a silent layer are dormant."""
    size = jnp.abs(by_member(h, joint.link.arity, joint.link.layout)).astype(wide_dtype(h.dtype))
    size = size.mean(axis=(0, 1)).reshape(-1, joint.units).mean(axis=0)
    return relative_sizes(size, finite=jnp.isfinite(size)) <= tau


def _check_norm(norm: Any, name: str) -> None:
    if not isinstance(norm, nnx.BatchNorm) or norm.axis != -1:
        raise ValueError(
            f"{name}, a {type(norm).__name__} before an activation: new weights of one unit would change the others' "
            "outputs; only batch norm with axis=-1 is handled"
        )
