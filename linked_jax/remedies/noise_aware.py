"""Noise-aware batch normalisation: recalibrate the running statistics of a trained net for weights under noise.

Analogue hardware holds such weights. Only the running statistics change: no training, no labels.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from linked_jax.remedies.kernels import ComputedKernel

RelativeTo = Literal["max", "std"]
Which = Callable[[Any, Any], bool]
Model = TypeVar("Model", bound=nnx.Module)

_SCALES: dict[str, Callable[[Any], Any]] = {"max": lambda w: jnp.abs(w).max(), "std": jnp.std}
_NOT_RUN = -1.0  # no variance is


def is_kernel(path: Any, value: Any) -> bool:
    """Whether a parameter is a kernel, by its name: not gamma, beta, a bias or a slope."""
    del value
    return path[-1] == "kernel"


def perturb(
    params: Any, key: Key[Array, ""], *, noise: float, relative_to: RelativeTo = "max", which: Which = is_kernel
) -> Any:
    """Weights under Gaussian noise, independent for each.

        w' = w + eta scale(w) s,   s ~ N(0, I),   scale(w) = max|w| or std(w)

    Args:
      params: the state of a model, `nnx.state(model)`; what is no weight passes through.
      key: of s.
      noise: eta, 0 or above.
      relative_to: "max" or "std", each over one kernel. The paper does not fix this; max|w| is what hardware that maps
        weights to a range has.
      which: which(path, value), a filter of Flax: which parameters are under noise. By default all kernels.

    Returns:
      A state like params.

    Raises:
      ValueError: if noise is negative or not a number, relative_to is unknown, or there is no such parameter.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from linked_jax.remedies.noise_aware import perturb
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> graph, params = nnx.split(model)
      >>> noisy = nnx.merge(graph, perturb(params, jax.random.key(0), noise=0.1))
      >>> bool((noisy.kernel[...] != model.kernel[...]).all()), bool((noisy.bias[...] == model.bias[...]).all())
      (True, True)

    Reference: Tsai et al., Robust processing-in-memory neural networks via noise-aware normalization, 2020.
    """
    _check(noise, relative_to)
    return _perturb(params, key, noise, relative_to, which)


def recalibrate(
    model: Model,
    batches: Iterable[Any],
    *,
    noise: float = 0.0,
    relative_to: RelativeTo = "max",
    which: Which = is_kernel,
    key: Key[Array, ""] | None = None,
    forward: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
) -> Model:
    """A copy of a model, with running statistics of these batches in every `flax.nnx.BatchNorm`.

        mean = 1/K sum_k mean_k(w + noise_k),   var = 1/K sum_k var_k(w + noise_k)

    A copy of the model runs in evaluation mode, except that its batch norms normalise by the batch and, with momentum
    0, keep its moments alone. Each batch counts the same, whatever its size; batches of one shape compile once.

    Args:
      model: any Flax NNX model; left as it is.
      batches: K batches as forward takes them, arrays or trees of arrays; labels are not needed.
      noise: eta, see `perturb`; 0 is plain recalibration.
      relative_to: see `perturb`.
      which: see `perturb`.
      key: of the noise, which is drawn anew for each batch.
      forward: forward(model, batch) runs the model; needed where the mode is an argument of the call, such as
        `lambda model, batch: model(batch, train=True)`. The same function for each call saves compiling again.

    Returns:
      A model like the given one. Parameters and all other state are bit for bit the same. A batch norm which forward
      does not run by batch statistics keeps what it had; one that it runs several times has those of the last.

    Raises:
      ValueError: if there are no batches, or a batch norm sees one value a channel in each; the model has no batch norm
        or forward runs none by batch statistics; noise is negative or not a number; there is noise but no key, no
        kernel, or a layer that computes its kernel, which hardware would hold folded; or relative_to is unknown.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from linked_jax.remedies.noise_aware import recalibrate
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
      >>> batches = jax.random.normal(jax.random.key(1), (10, 32, 2))
      >>> calibrated = recalibrate(model, batches, noise=0.1, key=jax.random.key(2))
      >>> bool((calibrated.layers[1].var[...] != model.layers[1].var[...]).all())
      True

    Reference: Tsai et al., Robust processing-in-memory neural networks via noise-aware normalization, 2020.
    """
    _check(noise, relative_to)
    _check_noisy(model, noise, key)
    probe = nnx.clone(model)
    probe.eval()
    if not (norms := _batch_norms(probe)):
        raise ValueError(f"a model with flax.nnx.BatchNorm can be recalibrated, got {type(model).__name__} without any")
    for norm in norms:
        norm.use_running_average, norm.momentum = False, 0.0
        norm.mean[...], norm.var[...] = jnp.zeros_like(norm.mean[...]), jnp.full_like(norm.var[...], _NOT_RUN)
    graph, state = nnx.split(probe)

    average = None
    for k, batch in enumerate(batches, 1):
        noise_key = jax.random.fold_in(key, k) if noise > 0 and key is not None else None
        found = _batch_statistics(graph, relative_to, which, forward, state, batch, float(noise), noise_key)
        average = found if average is None else jax.tree.map(lambda a, b, k=k: a + (b - a) / k, average, found)
    if average is None:
        raise ValueError("recalibration needs at least one batch, got none; an iterator can be used only once")

    calibrated = nnx.clone(model)
    was_run = [bool((var != _NOT_RUN).all()) for _, var in average]
    if not any(was_run):
        raise ValueError(
            "forward ran no batch norm by batch statistics; pass e.g. forward=lambda model, x: model(x, train=True)"
        )
    for norm, (mean, var), run in zip(_batch_norms(calibrated), average, was_run, strict=True):
        if run:
            _check_variance(var)
            norm.mean[...], norm.var[...] = mean, var
    return calibrated


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _batch_statistics(graph, relative_to, which, forward, state, batch, noise, key):
    if key is not None:
        state = _perturb(state, key, noise, relative_to, which)
    model = nnx.merge(graph, state)
    forward(model, batch)
    return [(norm.mean[...], norm.var[...]) for norm in _batch_norms(model)]


def _batch_norms(model: nnx.Module) -> list[nnx.BatchNorm]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)]


def _perturb(params: Any, key: Array, noise: Any, relative_to: RelativeTo, which: Which) -> Any:
    weights, rest = nnx.split_state(params, which, ...)
    leaves, tree = jax.tree.flatten(weights)
    if not leaves:
        raise ValueError("there is no parameter to put noise on; pass which=, a filter that has some")
    keys = jax.random.split(key, len(leaves))
    noisy = [
        w + noise * _SCALES[relative_to](w) * jax.random.normal(key, w.shape, w.dtype)
        for w, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge_state(jax.tree.unflatten(tree, noisy), rest)


def _check_noisy(model: nnx.Module, noise: float, key: Array | None) -> None:
    if noise == 0:
        return
    if key is None:
        raise ValueError(f"noise needs a key, got noise={noise} and key=None; pass key=jax.random.key(0)")
    for path, node in nnx.iter_graph(model):
        if isinstance(node, ComputedKernel):
            raise ValueError(
                f"noise is on weights that hardware holds, and {'.'.join(map(str, path))}, a {type(node).__name__}, "
                "computes its own; put layer.fold() in its place first"
            )


def _check_variance(var: Array) -> None:
    if not var.any():
        raise ValueError(
            "the batches have variance 0 in every channel of a batch norm, so the model would divide by almost 0; "
            "pass a list of batches of several examples, [x] for one array"
        )


def _check(noise: float, relative_to: str) -> None:
    if not noise >= 0:
        raise ValueError(f"noise is 0 or above, got {noise}")
    if relative_to not in _SCALES:
        raise ValueError(f"relative_to is one of {tuple(_SCALES)}, got {relative_to!r}")
