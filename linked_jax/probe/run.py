"""Observe any model on a data set."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from linked_jax.diagnostics import not_finite_units
from linked_jax.probe.interpret import Gradients, NotSeen, Taps, Trace, Watch, with_gradients
from linked_jax.probe.measures import make_report
from linked_jax.probe.models import check_model, is_key, kind_of, merge, split
from linked_jax.probe.origin import OUTPUTS, Origin, is_sound, origin_of
from linked_jax.probe.report import Report
from linked_jax.probe.taps import is_tap, nothing_yet, together, unstack


def probe(
    model: Any,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    tau: float = 0.025,
    mask: Callable[[Any], Any] | None = None,
) -> Report:
    """What every activation of a model does on a data set: dead, dormant, linear and saturated units, and the signal.

        probe(model, batches)                                           an NNX module, or a bound Linen module
        probe(model, batches, call=lambda model, x: model(x, ...))      called in your way
        probe(variables, batches, call=linen_module.apply)              any pytree of parameters
        probe(functools.partial(f, params), batches)                    any function

    The model is traced to a jaxpr, and its activations are found there by what they compute, however they are written:
    an activation is the largest elementwise region that depends on one pre-activation z, between a linear operation,
    a sum or a norm and the next. So in relu(conv(h) + h) the pre-activation is the sum, leaky relu as a sum of two
    relus is one activation, and a gate sigmoid(z) that multiplies others is its own. A bias or scale before it belongs
    to z. Several functions of one z that are concatenated are one link; those that are not are apart. It is
    differentiated by JAX, with the rules of custom_jvp and custom_vjp: a surrogate gradient counts. What is affine,
    softmax, attention, norms and losses are no activations. The name comes from a comparison of values with known
    functions; "unknown" is scored all the same. A `Link` in which nothing else happens has the names of its members.

    A unit is one channel of the operation that made z: along the free axes of its kernel, or else along the last axis
    that does not grow with the batch. A flatten, a transposition or a cast between the two changes nothing:
    (N, H, W, C) -> (N, H*W*C) has C units. Experts, ensembles and seeds, made by vmap over parameters or by einsum,
    have units of their own. All else are samples and positions, and z of shape (N,) is one unit. To know the axes that
    grow, the model is traced a second time, for twice the batch; if it fails there, the samples are along the first
    axis. A scan over layers, whose kernels it goes over, gives a layer for each iteration; a scan over the data (time),
    or a while loop, gives one layer. Each branch of a cond is a layer, without samples if it was never taken.
    `Report.not_seen` names the rest that has activations inside (shard_map, a Pallas kernel), and what chooses between
    values by more than one of them (the k largest, `jnp.piecewise`). What holds no jaxpr (a callback, a kernel in C)
    cannot be named.

    The model is run as it is and is not changed: its batch statistics and random streams are copies. Call `.eval()`
    first, unless you want to see it train. One pass, in constant memory; one compile for each shape of a batch.

    Args:
      model: an NNX module, a bound Linen module, a function of the inputs, or with `call` any pytree. The arrays in it
        and in a `functools.partial` are parameters; those that a function closes over are constants of the compile.
      batches: an iterable of inputs: arrays (N, ...), or dicts of them, in which PRNG keys and None may be. With
        loss_fn, of pairs (inputs, labels).
      call: call(model, inputs) -> outputs; model(inputs) if None.
      loss_fn: loss_fn(outputs, labels) -> the scalar mean over the batch. Then the report has the mean square of the
        gradient for each z, of a sample's own loss (that of the mean, times N).
      tau: a unit is dormant if its score is at most this, see `linked_jax.diagnostics.dormant_units`.
      mask: mask(inputs) -> which samples and steps count, booleans (N, T) or (N,); padded steps are left out of all
        statistics, that of the gradients too.

    Returns:
      A `Report`.

    Raises:
      ValueError: if no activation is found, there is no batch, a batch is no array or pair or its arrays differ in N,
        the loss is no scalar, the model cannot be called, the mask is of another shape, has steps that the model has
        not or samples that a layer has not, or tau is negative.

    Examples:
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
    return Probe(call, loss_fn, tau, mask)(model, batches)


class Probe:
    """(model, batches) -> `Report`, compiled once for each structure of the model and shape of a batch."""

    def __init__(
        self,
        call: Callable[[Any, Any], Any] | None,
        loss_fn: Callable[[Any, Any], Any] | None,
        tau: float,
        mask: Callable[[Any], Any] | None,
    ):
        try:
            self.tau = float(tau)
        except (TypeError, ValueError):
            raise ValueError(f"tau is a number, got {kind_of(tau)}; 0.025 is usual") from None
        if not self.tau >= 0:
            raise ValueError(f"tau is at least 0, got {tau}; 0 finds the units that are always zero")
        self.call, self.has_loss, self.mask = call, loss_fn is not None, mask
        self.apply = (lambda model, x: model(x)) if call is None else call
        if mask is not None and not callable(mask):
            raise ValueError(f"mask is a function mask(inputs), got {kind_of(mask)}; pass lambda inputs: inputs != 0")
        self.taps = jax.jit(functools.partial(_taps_of_batch, self.apply, loss_fn, mask), static_argnums=0)

    def __call__(self, model: Any, batches: Iterable[Any], *, explain: bool = True) -> Report:
        """The report; with `explain` it says where the first value that is not finite comes from."""
        check_model(model, self.call)
        static, arrays = split(model)
        try:
            hash(static)
        except TypeError as error:
            raise ValueError(f"what is no array in a model is hashable, got {error}; close over it in call") from None
        total, all_sound = None, True
        for batch in _checked(batches, self.has_loss):
            taps, sound = self.taps(static, arrays, batch)
            all_sound &= sound
            if total is not None and _shapes(total) != _shapes(taps):
                raise ValueError(
                    "the layers of two batches have other numbers of units, or the model has other layers for them; "
                    "pass batches of one shape, and models that work for any number of samples"
                )
            total = taps if total is None else _add(total, taps)
        if total is None:
            raise ValueError("batches has no batch: it is empty, or an iterator that was read before; pass a list")
        not_seen = [entry.what for entry in total.values() if isinstance(entry, NotSeen)]
        taps = [entry for entry in total.values() if is_tap(entry)]
        if not taps:
            raise ValueError(
                f"no activation was found in the model{f', and these were not entered: {not_seen}' if not_seen else ''}"
                "; an activation is an elementwise function of the inputs that is not affine"
            )
        report = make_report(taps, not_seen, self.tau)
        if not explain or isinstance(batches, Iterator):
            return report
        if all_sound and not any(layer.not_finite.any() for layer in report.layers):
            return report
        return dataclasses.replace(report, not_finite_first=self._origin(static, arrays, batches))

    def _origin(self, static: Any, arrays: Any, batches: Iterable[Any]) -> Origin | None:
        """Of the first batch that makes an activation, or the outputs, not finite."""
        for number, batch in enumerate(batches):
            entries, sound = self.taps(static, arrays, batch)
            taps = unstack([tap for tap in entries.values() if is_tap(tap)])
            bad = (f"{tap.name} at {tap.source}" for tap in taps if not_finite_units(tap.stats).any())
            seen_by = next(bad, OUTPUTS)
            if seen_by == OUTPUTS and sound:
                continue
            inputs = batch[0] if self.has_loss else batch
            trace = Trace.of(self.apply, merge(static, arrays), inputs)
            names = [("parameter", _name(path[1:])) for path, _ in jax.tree.leaves_with_path(arrays)]
            names += [("input", _name(path)) for path, _ in jax.tree.leaves_with_path(inputs)]
            found = "no operation by itself: sums over the data overflow, or operations that are compiled together"
            try:
                origin = origin_of(trace, names, _checked_mask(self.mask, inputs))
            except Exception as error:  # a training run goes on where an operation cannot be evaluated by itself
                origin, found = None, f"not found ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
            if origin is None:
                origin = Origin("unknown", found, "", "", "", seen_by)
            name = f"{origin.name} of batch {number}".strip() if origin.kind == "input" else origin.name
            return dataclasses.replace(origin, name=name)
        return None


def _name(path: Any) -> str:
    """layers.0.kernel, of a path of a pytree."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _taps_of_batch(call: Any, loss_fn: Any, mask: Any, static: Any, arrays: Any, batch: Any) -> tuple[Taps, Any]:
    """The taps of one batch; with a loss they have its gradients, of each sample's own. And if outputs are sound."""
    inputs, labels = batch if loss_fn else (batch, None)
    trace, where = Trace.of(call, merge(static, arrays), inputs), _checked_mask(mask, inputs)
    if loss_fn is None:
        outputs, taps = trace.evaluate(Watch(where))
        return taps, _sound(outputs, where)

    n = _samples(inputs)

    def loss(probes: Any) -> tuple[Any, Any]:
        outputs, taps = trace.evaluate(Watch(where, n, probes))  # n times the mean is a sample's own loss
        value = loss_fn(outputs, labels)
        if not jax.tree.all(jax.tree.map(lambda x: not jnp.shape(x), value)) or isinstance(value, (tuple, list, dict)):
            raise ValueError(f"loss_fn returns a scalar, the mean over the batch, got {kind_of(value)}")
        return value, (taps, _sound(outputs, where))

    silent = jax.eval_shape(lambda: trace.evaluate(Watch(where, n))[1])
    taps = {key: tap for key, tap in silent.items() if is_tap(tap) and tap.gradient_square_sum is not None}
    shapes = {key: Gradients(tap.gradient_square_sum, tap.gradient_histogram) for key, tap in taps.items()}
    zeros = nothing_yet(shapes)
    gradients, (taps, sound) = jax.grad(loss, has_aux=True)(zeros)
    return with_gradients(taps, gradients), sound


def _sound(outputs: Any, mask: Any) -> Any:
    """No NaN and no inf. Under a mask nothing is said of outputs: they can have any shape."""
    arrays = [x for x in jax.tree.leaves(outputs) if not is_key(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.array([is_sound(x) for x in arrays if mask is None]).all()


def _checked_mask(mask: Any, inputs: Any) -> Any:
    """Which samples and steps count; None for all."""
    if mask is None:
        return None
    where, n = jnp.asarray(mask(inputs)), _samples(inputs)
    if where.dtype != jnp.bool_ or where.ndim not in (1, 2) or len(where) != n:
        raise ValueError(f"mask(inputs) has booleans of shape ({n}, T) or ({n},), got {kind_of(where)}")
    return where


def _samples(inputs: Any) -> int:
    return next(x.shape[0] for x in jax.tree.leaves(inputs) if not is_key(x))


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(together, a, b, is_leaf=is_tap)


def _shapes(taps: Any) -> Any:
    return jax.tree.structure(taps), [x.shape for x in jax.tree.leaves(taps)]


def _checked(batches: Any, has_loss: bool) -> Iterator[Any]:
    """Each batch, refused if it is none."""
    if hasattr(batches, "shape") or isinstance(batches, (str, dict)) or not isinstance(batches, Iterable):
        raise ValueError(f"batches is an iterable of batches, got {kind_of(batches)}; pass a list, [x] for one batch")
    for batch in batches:
        if has_loss and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(f"with loss_fn a batch is a pair (inputs, labels), got {kind_of(batch)}")
        if not has_loss and isinstance(batch, (tuple, list)):
            raise ValueError(f"without loss_fn a batch is its inputs alone, got {kind_of(batch)}; pass x of (x, y)")
        inputs = batch[0] if has_loss else batch
        leaves = [leaf for leaf in jax.tree.leaves(inputs) if not is_key(leaf)]
        if not leaves or not all(getattr(leaf, "ndim", 0) and leaf.shape[0] and _is_number(leaf) for leaf in leaves):
            raise ValueError(
                f"the inputs of a batch are arrays (N, ...) of numbers, N at least 1, got {kind_of(inputs)}"
            )
        sizes = sorted({x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "ndim", 0)})
        if len(sizes) > 1:
            raise ValueError(f"the arrays of a batch have one leading axis, of its N samples, got the sizes {sizes}")
        yield tuple(batch) if has_loss else batch


def _is_number(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool
