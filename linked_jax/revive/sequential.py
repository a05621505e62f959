"""Link a whole `nnx.Sequential`, and its optimiser's state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from linked_jax.linking import Link
from linked_jax.revive.expand import Pair, check_link, link_params, link_params_opt_state
from linked_jax.revive.foldable import Foldable, plain
from linked_jax.revive.joints import Joint, activations, apart, joint_at, last_layer, linked_layers, nothing_after


def link_sequential(model: nnx.Sequential, link: Link) -> nnx.Sequential:
    """A new model with the same outputs, in which the link stands for every plain activation.

        g(z) W  ->  f(z) [W; 0],   f = link,   g = its first member

    Links of two or more members stay, and so do functions before the first layer and after the last one, and functions
    that are not elementwise, such as one that is relu and a pool. Added channels of a batch norm after an activation:
    see `link_params`. Dropout draws other masks for more channels. A next layer that computes its kernel, such as
    `linked_jax.remedies.WSConv`, is folded, for zeros in its parameters need not be zeros in its kernel.

    Outputs stay equal where all members are finite: at a large -z the mirror of exp is inf, and inf * 0 is NaN.

    Args:
      model: of nnx.Linear, nnx.Conv and layers that fold to them, activations, norms, nnx.Dropout, pools, flatten and
        other functions; no modules of several layers. Norms other than batch norm stand before activations only. A
        flatten must leave the number of channels open.
      link: its first member is the model's activation, compared in values; axis -1.

    Returns:
      A new `nnx.Sequential` with variables of its own. Optimiser: `link_sequential_opt_state`.

    Raises:
      ValueError: if there is no plain activation, one is not the link's first member or has no layer after it, what
        stands between is not handled, or a module may hide an activation; with the index of the layer.

    Example:
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
    joints = _plain_joints(model, link)
    new = nnx.clone(model)
    for joint in joints:
        new.layers[joint.after] = plain(new.layers[joint.after], joint.after)
    nnx.update(new, link_params(nnx.state(new), _pairs(joints), link))
    for joint in joints:
        new.layers[joint.activation] = link
        fit(new.layers[joint.after])
        if joint.norm is not None:
            fit(new.layers[joint.norm])
    return new


def link_sequential_opt_state(opt_state: Any, model: nnx.Sequential, link: Link) -> Any:
    """The Optax state for the model that `link_sequential` gives: moments of kept weights kept, new ones 0.

        m' = [m; 0],   v' = [v; 0]   of each next layer

    Outputs stay the same, the training that follows is not smooth: Adam's first steps of the new weights are large
    while their v is still small, and the loss of a net in good health can rise for some steps. Warm up again or take a
    smaller rate for some hundred steps. Behind a batch norm after the activation, evaluation lags at first: see
    `link_params`.

    Args:
      opt_state: of tx.init(nnx.state(model, nnx.Param)), or an nnx.Optimizer's; gradient moments only, so no copies of
        the parameters (schedule_free, lookahead); see `link_params_opt_state`.
      model: the plain model, before `link_sequential`.
      link: the same one.

    Returns:
      A new state, like that of tx.init(nnx.state(link_sequential(model, link), nnx.Param)).

    Raises:
      ValueError: as `link_sequential` and `link_params_opt_state`, or if a next layer is one that has to be folded.

    Example:
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
      >>> revived_optimizer.opt_state = link_sequential_opt_state(optimizer.opt_state, model, lk_relu)
      >>> grads = nnx.grad(lambda net: net(jax.numpy.ones((2, 8))).sum())(revived)
      >>> _ = revived_optimizer.update(revived, grads)
      >>> revived_optimizer.opt_state[0].nu["layers"][2]["kernel"].shape
      (32, 3)
    """
    joints = _plain_joints(model, link)
    for joint in joints:
        if isinstance(layer := model.layers[joint.after], Foldable):
            raise ValueError(
                f"layers[{joint.after}], a {type(layer).__name__}, is folded and has other parameters then; start the "
                "optimiser anew (tx.init)"
            )
    return link_params_opt_state(opt_state, nnx.state(model, nnx.Param), _pairs(joints), link)


def fit(layer: Any) -> None:
    """Set the sizes that a layer remembers to those of its variables."""
    if isinstance(layer, nnx.BatchNorm):
        layer.num_features = layer.mean.shape[0]
    else:
        layer.in_features = layer.kernel.shape[-2]
        if isinstance(layer, nnx.Conv):
            layer.kernel_shape = layer.kernel.shape


def _plain_joints(model: nnx.Sequential, link: Link) -> list[Joint]:
    """The places of the activations that are to be linked, each checked."""
    check_link(link)
    plain = [i for i in activations(model) if getattr(model.layers[i], "arity", 1) == 1]
    last = last_layer(model)
    for i in plain:
        same = _same_values(model.layers[i], link.members[0])
        if i < last and not same:
            raise ValueError(
                f"the link's first member must be the activation, got {link} for layers[{i}], {model.layers[i]}; "
                "pass a link that starts with it"
            )
        if i > last and same:
            raise nothing_after(model, i)
    inner = [i for i in plain if i < last]
    if not inner:
        links = sorted({*linked_layers(model), *activations(model)} - {*plain})
        reason = f"layers[{links[0]}] is already linked" if links else "add one, such as jax.nn.relu"
        raise ValueError(f"no plain activation between two layers (nnx.Linear or nnx.Conv) is in the model; {reason}")
    return [joint_at(model, i) for i in inner]


def _pairs(joints: list[Joint]) -> list[Pair]:
    """Where the activations stand, as paths in the model's state."""
    return [
        Pair(
            before=joint.units,
            after=("layers", joint.after),
            norm=None if joint.norm is None else ("layers", joint.norm),
            positions=joint.positions,
        )
        for joint in joints
    ]


@jax.ensure_compile_time_eval()
def _same_values(f: Any, g: Any) -> bool:
    z = jnp.asarray(np.append(np.linspace(-9, 9, 73), [-100, 100])[:, None], jnp.float32)  # 0 is among them
    return bool(np.allclose(apart(f)(z), apart(g)(z), rtol=1e-5, atol=1e-6, equal_nan=True))
