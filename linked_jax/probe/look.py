"""See the activations of any model, once."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from linked_jax.probe.listen import NotSeen, Tap, is_tap, look_into, together
from linked_jax.probe.names import named_calls
from linked_jax.probe.report import Report
from linked_jax.probe.summary import make_report


def probe(
    model_fn: Any,
    params_or_model: Any,
    batches: Iterable[Any] | None = None,
    *,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    tau: float = 0.025,
) -> Report:
    """What every activation of a model does on a data set: dead, dormant, linear and saturated units, and the signal.

        probe(model, batches)                                      an NNX module
        probe(lambda model, x: model(x, ...), model, batches)      an NNX module, called in your way
        probe(linen_model, variables, batches)                     a Linen module, called by `apply`
        probe(lambda params, x: ..., params, batches)              any function

    The model is traced to a jaxpr, and its activations are found there: links of this library; calls to jax.nn and
    flax activations; tanh, sigmoid, maximum(z, 0), where(z > 0, z, 0), z * sigmoid(z) and Flax's PReLU written out.
    So in relu(conv(h) + h) the pre-activation is the sum. Remat, scan and calls are looked into, softmax and the like
    are no activations, and other formulas are not known: mark one as `Link((my_function,))`, a link with one member.
    Units are the last axis of z, or the link's axis. A scan over layers gives a layer for each iteration; a scan over
    the data (time) gives one layer. `Report.not_seen` names the cond, while and others with activations inside.

    The model is run as it is and is not changed: its batch statistics and random streams are copies. Call `.eval()`
    first, unless you want to see it train. One pass, in constant memory; one compile for each shape of a batch.

    Args:
      model_fn: model_fn(params_or_model, inputs) -> outputs, or as above.
      params_or_model: any pytree of arrays, or an NNX module.
      batches: an iterable of inputs: arrays (N, ...), or dicts of them. With loss_fn, of pairs (inputs, labels).
      loss_fn: loss_fn(outputs, labels) -> the scalar mean over the batch. Then the report has the mean square of the
        gradient for each z, of a sample's own loss (that of the mean, times N).
      tau: a unit is dormant if its score is at most this, see `linked_jax.diagnostics.dormant_units`.

    Returns:
      A `Report`.

    Raises:
      ValueError: if no activation is found, there is no batch, a batch is no array or pair, the loss is no scalar, or
        tau is negative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.probe import probe
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jax.nn.relu)
      >>> model.layers[0].bias[...] = jnp.array([0.0, 0.0, -1e3])
      >>> report = probe(model, [jax.random.normal(jax.random.key(i), (16, 4)) for i in range(2)])
      >>> layer = report.layers[0]
      >>> layer.name, layer.activation, layer.samples, layer.dead.tolist()
      ('layers.1', 'relu', 32, [False, False, True])
    """
    if batches is not None:
        return look_at_all(looker(model_fn, loss_fn), params_or_model, batches, loss_fn is not None, tau)
    if not isinstance(model_fn, nnx.Module):
        raise ValueError(
            f"without params_or_model the model is an NNX module, got {_kind(model_fn)}; pass batches last"
        )
    return look_at_all(looker(None, loss_fn), model_fn, params_or_model, loss_fn is not None, tau)


Looker = Callable[[Any, Any, Any], Any]


def looker(model_fn: Any, loss_fn: Any) -> Looker:
    """look(graph, state, batch) -> the taps of one batch, jitted."""
    call = (lambda model, x: model(x)) if model_fn is None else getattr(model_fn, "apply", model_fn)
    return jax.jit(functools.partial(_look, call, loss_fn), static_argnums=0)


def _look(call: Any, loss_fn: Any, graph: Any, state: Any, batch: Any) -> Any:
    inputs, labels = batch if loss_fn else (batch, None)

    def forward(state: Any, inputs: Any) -> Any:
        model = state if graph is None else nnx.merge(graph, state)
        with named_calls(model):
            return call(model, inputs)

    jaxpr, outputs = jax.make_jaxpr(forward, return_shape=True)(state, inputs)
    arguments = jax.tree.leaves((state, inputs))
    varies = [False] * len(jax.tree.leaves(state)) + [True] * len(jax.tree.leaves(inputs))
    if loss_fn is None:
        taps = look_into(jaxpr, arguments, varies)[1]
        return jax.tree.map(lambda tap: dataclasses.replace(tap, heard=None), taps, is_leaf=is_tap)

    def loss(ears: Any) -> tuple[Any, Any]:
        leaves, taps = look_into(jaxpr, arguments, varies, ears)
        value = loss_fn(jax.tree.unflatten(jax.tree.structure(outputs), leaves), labels)
        if jnp.shape(value):
            raise ValueError(f"loss_fn returns a scalar, the mean over the batch, got shape {jnp.shape(value)}")
        return value, taps

    silent = jax.eval_shape(lambda: look_into(jaxpr, arguments, varies)[1])
    ears = jax.tree.map(lambda tap: None if tap.heard is None else jnp.zeros(tap.heard.shape), silent, is_leaf=is_tap)
    heard, taps = jax.grad(loss, has_aux=True)(ears)
    n = jax.tree.leaves(inputs)[0].shape[0]
    return jax.tree.map(
        lambda tap, sums: dataclasses.replace(tap, heard=None if sums is None else sums * n**2),
        taps, heard, is_leaf=is_tap,
    )  # fmt: skip


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(together, a, b, is_leaf=is_tap)


def look_at_all(look: Looker, model: Any, batches: Iterable[Any], has_loss: bool, tau: float) -> Report:
    """The report of a model on all batches, by a `looker`."""
    if not tau >= 0:
        raise ValueError(f"tau is at least 0, got {tau}; 0 finds the units that are always zero")
    graph, state = nnx.split(model) if isinstance(model, nnx.Module) else (None, model)
    total = None
    for batch in _checked(batches, has_loss):
        taps = look(graph, state, batch)
        total = taps if total is None else _add(total, taps)
    if total is None:
        raise ValueError("there is no batch to look at: batches is empty, or an iterator that was read before")
    found = jax.tree.leaves(total, is_leaf=lambda x: isinstance(x, (Tap, NotSeen)))
    taps, not_seen = [x for x in found if is_tap(x)], [x.what for x in found if isinstance(x, NotSeen)]
    if not taps:
        raise ValueError(
            "no activation was found in the model's jaxpr, neither a link nor one of jax.nn or flax"
            f"{f', and these were not looked into: {not_seen}' if not_seen else ''}; "
            "write an activation of your own as linked_jax.Link((my_function,))"
        )
    return make_report(taps, not_seen, tau)


def _checked(batches: Any, has_loss: bool) -> Iterator[Any]:
    """The batches, if they are some."""
    if hasattr(batches, "shape") or isinstance(batches, (str, dict)) or not isinstance(batches, Iterable):
        raise ValueError(f"batches is an iterable of batches, got {_kind(batches)}; pass a list, [x] for one batch")
    for batch in batches:
        if has_loss and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(f"with loss_fn a batch is a pair (inputs, labels), got {_kind(batch)}")
        if not has_loss and isinstance(batch, (tuple, list)):
            raise ValueError(f"without loss_fn a batch is its inputs alone, got {_kind(batch)}; pass x of (x, y)")
        inputs = batch[0] if has_loss else batch
        leaves = jax.tree.leaves(inputs)
        if not leaves or not all(getattr(leaf, "ndim", 0) and leaf.shape[0] and _is_number(leaf) for leaf in leaves):
            raise ValueError(f"the inputs of a batch are arrays (N, ...) of numbers, N at least 1, got {_kind(inputs)}")
        yield tuple(batch) if has_loss else batch


def _is_number(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool


def _kind(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of {x.dtype}{list(x.shape)}"
    return (
        f"a {type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list, dict)) else f"{type(x).__name__} {x!r:.60}"
    )
