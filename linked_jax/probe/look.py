"""See the activations of any model, once."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx

from linked_jax.probe.axes import Samples, sample_axes
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
    flax activations; and written out tanh, sigmoid, relu by maximum, where or clip, clip(z, 0, a), leaky relu,
    Flax's PReLU, z * sigmoid(a * z), mish, and the usual ways to write gelu.
    So in relu(conv(h) + h) the pre-activation is the sum. Remat, scan and calls are looked into, softmax and the like
    are no activations, and other formulas are not known: one that has a tanh or sigmoid inside is seen as that, with
    the verdicts of that. Mark it as `Link((my_function,))`, a link with one member, which bears the function's name.
    Units are the link's axis, or the last axis of z that does not grow with the batch; all else are samples and
    positions, and z of shape (N,) is one unit. To know the axes that grow, the model is traced a second time, for twice
    the batch; if it fails there, the samples are along the first axis. Members of an ensemble or experts, made by vmap
    over parameters, would be pooled as if they were samples: probe them one at a time. A scan over layers gives a
    layer for each iteration; a scan over the data (time) gives one layer. `Report.not_seen` names the cond, while and
    others with activations inside.

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
      ValueError: if no activation is found, there is no batch, a batch is no array or pair or its arrays differ in N,
        the loss is no scalar, the model is no function or module, a link is laid along the samples, or tau is negative.

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
        _check_model(model_fn, params_or_model)
        return look_at_all(looker(model_fn, loss_fn), params_or_model, batches, loss_fn is not None, tau)
    if isinstance(model_fn, flax.linen.Module):
        raise ValueError(
            f"a Linen module needs its variables, got {type(model_fn).__name__} alone; pass "
            "probe(model, variables, batches)"
        )
    if not isinstance(model_fn, nnx.Module):
        raise ValueError(
            f"without params_or_model the model is an NNX module, got {_kind(model_fn)}; pass batches last"
        )
    return look_at_all(looker(None, loss_fn), model_fn, params_or_model, loss_fn is not None, tau)


def _check_model(model_fn: Any, params_or_model: Any) -> None:
    if isinstance(model_fn, nnx.Module) and isinstance(params_or_model, nnx.Module):
        raise ValueError(
            f"model_fn and the model are two NNX modules, {type(model_fn).__name__} and "
            f"{type(params_or_model).__name__}; pass probe(model, batches)"
        )
    if not callable(model_fn) and not callable(getattr(model_fn, "apply", None)):
        raise ValueError(f"model_fn is a function or a Linen module, got {_kind(model_fn)}; pass model_fn(params, x)")


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
    samples = _sample_axes(forward, jaxpr, state, inputs)
    arguments = jax.tree.leaves((state, inputs))
    varies = [False] * len(jax.tree.leaves(state)) + [True] * len(jax.tree.leaves(inputs))
    if loss_fn is None:
        taps = look_into(jaxpr, arguments, varies, samples)[1]
        return jax.tree.map(lambda tap: dataclasses.replace(tap, heard=None), taps, is_leaf=is_tap)

    def loss(ears: Any) -> tuple[Any, Any]:
        leaves, taps = look_into(jaxpr, arguments, varies, samples, ears)
        value = loss_fn(jax.tree.unflatten(jax.tree.structure(outputs), leaves), labels)
        if not jax.tree.all(jax.tree.map(lambda x: not jnp.shape(x), value)) or isinstance(value, (tuple, list, dict)):
            raise ValueError(f"loss_fn returns a scalar, the mean over the batch, got {_kind(value)}")
        return value, taps

    silent = jax.eval_shape(lambda: look_into(jaxpr, arguments, varies, samples)[1])
    ears = jax.tree.map(lambda tap: None if tap.heard is None else jnp.zeros(tap.heard.shape), silent, is_leaf=is_tap)
    heard, taps = jax.grad(loss, has_aux=True)(ears)
    n = jax.tree.leaves(inputs)[0].shape[0]
    return jax.tree.map(
        lambda tap, sums: dataclasses.replace(tap, heard=None if sums is None else sums * n**2),
        taps, heard, is_leaf=is_tap,
    )  # fmt: skip


def _sample_axes(forward: Any, jaxpr: Any, state: Any, inputs: Any) -> Samples:
    """The axes of the samples in a model's jaxpr, by a second one of twice the batch; that one is never run."""

    def twice(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype, weak_type=jax.typeof(x).weak_type)

    try:
        return sample_axes(jaxpr, jax.make_jaxpr(forward)(state, jax.tree.map(twice, inputs)))
    except Exception:  # whatever a model made for one size of batch raises: then its samples are along the first axis
        return None


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(together, a, b, is_leaf=is_tap)


def look_at_all(look: Looker, model: Any, batches: Iterable[Any], has_loss: bool, tau: float) -> Report:
    """The report of a model on all batches, by a `looker`."""
    try:
        tau = float(tau)
    except (TypeError, ValueError):
        raise ValueError(f"tau is a number, got {_kind(tau)}; 0.025 is usual") from None
    if not tau >= 0:
        raise ValueError(f"tau is at least 0, got {tau}; 0 finds the units that are always zero")
    graph, state = nnx.split(model) if isinstance(model, nnx.Module) else (None, model)
    total = None
    for batch in _checked(batches, has_loss):
        taps = look(graph, state, batch)
        if total is not None and _shapes(total) != _shapes(taps):
            raise ValueError(
                "the layers of two batches have other numbers of units, or the model has other layers for them; pass "
                "batches of one shape, and models that work for any number of samples"
            )
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


def _shapes(taps: Any) -> Any:
    return jax.tree.structure(taps), [x.shape for x in jax.tree.leaves(taps)]


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
        sizes = sorted({x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "ndim", 0)})
        if len(sizes) > 1:
            raise ValueError(f"the arrays of a batch have one leading axis, of its N samples, got the sizes {sizes}")
        yield tuple(batch) if has_loss else batch


def _is_number(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool


def _kind(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of {x.dtype}{list(x.shape)}"
    return (
        f"a {type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list, dict)) else f"{type(x).__name__} {x!r:.60}"
    )
