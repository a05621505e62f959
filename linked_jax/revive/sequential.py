"""Link a whole `nnx.Sequential`, and its optimiser's state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from linked_jax.learned import LinkedPReLU
from linked_jax.linking import Link
from linked_jax.members import member_name
from linked_jax.revive.expand import Pair, check_link, link_params, link_params_opt_state
from linked_jax.revive.foldable import Foldable, fit, plain
from linked_jax.revive.joints import (
    PRELUS,
    Joint,
    activations,
    apart,
    arity,
    joint_at,
    last_layer,
    linked_layers,
    nothing_after,
)
from linked_jax.revive.stack import Stack


def link_sequential(model: nnx.Sequential, link: Link) -> nnx.Sequential:
    """A new model with the same outputs, in which the link stands for every plain activation.

        g(z) W  ->  f(z) [W; 0],   f = link,   g = its first member

    Links of two or more members stay, and so do functions before the first layer and after the last one, and functions
    that are not elementwise, such as one that is relu and a pool. A PReLU module becomes a `LinkedPReLU` that starts
    with its slopes, z and -z alike, and has the link's layout. Added channels of a batch norm after an activation:
    see `link_params`. Dropout draws other masks for more channels. A next layer that computes its kernel, such as
    `linked_jax.remedies.WSConv`, is folded, for zeros in its parameters need not be zeros in its kernel.

    Outputs stay equal where all members are finite: at a large -z the mirror of exp is inf, and inf * 0 is NaN.

    Args:
      model: of nnx.Linear, nnx.LinearGeneral, nnx.Conv and layers that fold to them, activations, nnx.PReLU, norms,
        nnx.Dropout, pools, flatten and other functions, and of nnx.Sequential of these; no other modules of several
        layers, and no weights that stand in it twice. Norms other than batch norm stand before activations only. A
        flatten must leave the number of channels open.
      link: its first member is the model's activation, compared in values; axis -1.

    Returns:
      A new `nnx.Sequential`, nested like model, with variables of its own. Optimiser: `link_sequential_opt_state`.

    Raises:
      ValueError: if there is no plain activation, one is not the link's first member or has no layer after it, what
        stands between is not handled, or a module may hide an activation; with the index of the layer.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax import lk_relu
      >>> from linked_jax.revive import link_sequential
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), jax.nn.relu, nnx.Linear(16, 3, rngs=rngs))
      >>> revived = link_sequential(model, lk_relu)
      >>> x = jnp.ones((2, 8))
      >>> jnp.abs(revived(x) - model(x)).max() < 1e-6, revived.layers[2].kernel.shape
      (Array(True, dtype=bool), (32, 3))
    """
    joints = _plain_joints(Stack(model), link)
    new = Stack(nnx.clone(model))
    for joint in joints:
        new.put(joint.after, plain(new.layers[joint.after], new.name(joint.after)))
    nnx.update(new.model, link_params(nnx.state(new.model), _pairs(new, joints), link))
    for joint in joints:
        activation = new.layers[joint.activation]
        new.put(joint.activation, _linked_prelu(activation, link) if isinstance(activation, PRELUS) else link)
        fit(new.layers[joint.after])
        if joint.norm is not None:
            fit(new.layers[joint.norm])
    return new.model


def link_sequential_opt_state(
    opt_state: Any, model: nnx.Sequential, link: Link, *, tx: optax.GradientTransformation | None = None
) -> Any:
    """The Optax state for the model that `link_sequential` gives: of kept weights kept, of new ones as in tx.init.

        m' = [m; 0],   v' = [v; 0]   of each next layer

    See `link_params_opt_state` for what is no moment. Outputs stay the same, the training that follows is not smooth:
    Adam's first steps of the new weights are large while their v is still small, and the loss of a net in good health
    can rise for some steps: `warm_up_new` lets new weights start slowly. Behind a batch norm after the activation,
    evaluation lags at first: see `link_params`.

    Args:
      opt_state: of tx.init(nnx.state(model, nnx.Param)), or an nnx.Optimizer's.
      model: the plain model, before `link_sequential`.
      link: the same one.
      tx: the optimiser, see `link_params_opt_state`.

    Returns:
      A new state, like that of tx.init(nnx.state(link_sequential(model, link), nnx.Param)).

    Raises:
      ValueError: as `link_sequential` and `link_params_opt_state`, or if a next layer is one that has to be folded, or
        an activation a PReLU: their parameters are other ones in the linked model.

    Examples:
      >>> import jax, optax
      >>> from flax import nnx
      >>> from linked_jax import lk_relu
      >>> from linked_jax.revive import link_sequential_opt_state, link_sequential
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), jax.nn.relu, nnx.Linear(16, 3, rngs=rngs))
      >>> tx = optax.adam(1e-3)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> revived = link_sequential(model, lk_relu)
      >>> revived_optimizer = nnx.Optimizer(revived, tx, wrt=nnx.Param)
      >>> revived_optimizer.opt_state = link_sequential_opt_state(optimizer.opt_state, model, lk_relu, tx=tx)
      >>> revived_optimizer.opt_state[0].nu["layers"][2]["kernel"].shape
      (32, 3)
    """
    stack = Stack(model)
    joints = _plain_joints(stack, link)
    for i in sorted({i for joint in joints for i in (joint.activation, joint.after)}):
        if isinstance(layer := stack.layers[i], (Foldable, *PRELUS)):
            raise ValueError(
                f"{stack.name(i)}, a {type(layer).__name__}, is {'linked' if isinstance(layer, PRELUS) else 'folded'} "
                "and has other parameters then; start the optimiser anew (tx.init)"
            )
    return link_params_opt_state(opt_state, nnx.state(model, nnx.Param), _pairs(stack, joints), link, tx=tx)


def _plain_joints(stack: Stack, link: Link) -> list[Joint]:
    """The places of the activations that are to be linked, each checked."""
    check_link(link)
    layers, name = stack.layers, stack.name
    plain = [i for i in activations(stack) if arity(layers[i]) == 1]
    last = last_layer(stack)
    for i in plain:
        same = isinstance(layers[i], PRELUS) or _same_values(layers[i], link.members[0])
        if i < last and not same:
            raise ValueError(
                f"the link's first member must be the activation, got {link} for {name(i)}, {member_name(layers[i])}; "
                "pass a link that starts with it"
            )
        if i > last and same:
            raise nothing_after(stack, i)
    inner = [i for i in plain if i < last]
    if not inner:
        links = sorted({*linked_layers(stack), *activations(stack)} - {*plain})
        reason = f"{name(links[0])} is already linked" if links else "add one, such as jax.nn.relu"
        raise ValueError(f"no plain activation between two layers (nnx.Linear or nnx.Conv) is in the model; {reason}")
    return [joint_at(stack, i) for i in inner]


def _pairs(stack: Stack, joints: list[Joint]) -> list[Pair]:
    """Where the activations stand, as paths in the model's state."""
    return [
        Pair(
            before=joint.units,
            after=stack.path(joint.after),
            norm=None if joint.norm is None else stack.path(joint.norm),
            positions=joint.positions,
            leaf="kernel",
            rows=joint.rows,
        )
        for joint in joints
    ]


def _linked_prelu(prelu: Any, link: Link) -> LinkedPReLU:
    """Both members have the trained slopes at the start."""
    if getattr(prelu, "dtype", None) is not None:
        raise ValueError(f"a PReLU that computes in a dtype of its own is not handled, got dtype={prelu.dtype}")
    slopes = prelu.negative_slope[...]
    linked = LinkedPReLU(
        slopes.shape or 1, share="element" if slopes.ndim else "layer", layout=link.layout, param_dtype=slopes.dtype
    )
    linked.positive.negative_slope[...] = linked.mirrored.negative_slope[...] = slopes
    return linked


@jax.ensure_compile_time_eval()
def _same_values(f: Any, g: Any) -> bool:
    sizes = np.concatenate([np.linspace(0, 9, 37), np.geomspace(1e-6, 1e6, 241)])
    z = jnp.asarray(np.concatenate([-sizes, sizes])[:, None], jnp.float32)
    return bool(np.allclose(apart(f)(z), apart(g)(z), rtol=1e-5, atol=1e-6, equal_nan=True))
