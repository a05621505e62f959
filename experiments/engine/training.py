"""THE training loop. A model is any NNX module with model(images, train=, tap=) -> (logits, taps)."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from experiments.engine import data as data_lib
from experiments.engine.errors import NonFiniteLossError
from linked_jax import live_units

_EVALUATE_AT_ONCE = 500
_REMEDY = "try a smaller --lr or another --init"
_STEPS_IN_FLIGHT = 32  # between looks at the loss: dispatch stays ahead of the device, and bad news is not late


def fit(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    data: data_lib.Dataset,
    *,
    epochs: int,
    batch_size: int,
    key: jax.Array,
    shuffle: bool = True,
    on_steps: Callable[[int], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Train, and after each epoch evaluate every test example.

    Args:
      model: see the top of this file; it is left as it is at the start, the trained one is not returned.
      optimizer: an Optax transformation.
      data: the set, on the device.
      epochs: passes over the training set.
      batch_size: the last batch of an epoch may be smaller.
      key: of the order of the examples.
      shuffle: draw a new order for each epoch.
      on_steps: called with the number of steps just done, now and then.

    Yields:
      For each epoch: epoch (from 1), train_loss, test_accuracy, dead_units, dead_by_layer, signal_by_layer, seconds.
      Units are scored per link on the test set; the signal is the mean square of the pre-activations of a layer.

    Raises:
      NonFiniteLossError: as soon as it is seen.
    """
    graph, parameters, state = nnx.split(model, nnx.Param, ...)
    carry = jax.tree.map(jnp.copy, (parameters, state, optimizer.init(parameters)))  # the step donates its input
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        order = data_lib.batches(
            jax.random.fold_in(key, epoch) if shuffle else None, len(data.train_labels), batch_size
        )
        losses: list[Array] = []
        reported = 0
        for done, index in enumerate(order, start=1):
            carry, loss = _step(graph, optimizer, carry, data.train_images, data.train_labels, jnp.asarray(index))
            losses.append(loss)
            if done % _STEPS_IN_FLIGHT == 0 or done == len(order):
                if not math.isfinite(float(loss)):
                    raise NonFiniteLossError(f"the loss is {float(loss)} in epoch {epoch}, step {done}; {_REMEDY}")
                on_steps(done - reported)
                reported = done
        tested = evaluate(graph, carry[:2], data.test_images, data.test_labels)
        if not np.isfinite(tested["signal_by_layer"]).all():
            raise NonFiniteLossError(f"the signal is not finite after epoch {epoch}; {_REMEDY}")
        sizes = np.asarray([len(index) for index in order])
        yield {
            "epoch": epoch,
            "train_loss": float(np.average(np.asarray(jax.device_get(losses)), weights=sizes)),
            **tested,
            "seconds": round(time.perf_counter() - start, 3),
        }


def evaluate(graph: Any, variables: tuple[Any, Any], images: Array, labels: Array) -> dict[str, Any]:
    """Accuracy over every example, dead units and signal of each layer."""
    correct, live, signal = 0, None, 0.0
    for start in range(0, len(labels), _EVALUATE_AT_ONCE):
        batch = slice(start, start + _EVALUATE_AT_ONCE)
        hits, batch_live, mean_square = jax.device_get(_evaluate_batch(graph, variables, images[batch], labels[batch]))
        correct += int(hits)
        live = batch_live if live is None else live | batch_live
        signal = signal + np.asarray(mean_square, np.float64) * len(labels[batch])
    dead = (~np.asarray(live)).sum(axis=-1)
    return {
        "test_accuracy": correct / len(labels),
        "dead_units": int(dead.sum()),
        "dead_by_layer": dead.tolist(),
        "signal_by_layer": [float(f"{value:.4g}") for value in np.asarray(signal) / len(labels)],
    }


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(graph, optimizer, carry, images, labels, index) -> tuple[Any, Float[Array, ""]]:
    parameters, state, optimizer_state = carry

    def loss_of(parameters):
        model = nnx.merge(graph, parameters, state, copy=True)  # batch statistics change, inside this trace
        logits, _ = model(data_lib.scale(images[index]), train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()
        return loss, nnx.split(model, nnx.Param, ...)[2]

    (loss, state), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
    return (optax.apply_updates(parameters, updates), state, optimizer_state), loss


@functools.partial(jax.jit, static_argnums=0)
def _evaluate_batch(graph, variables, images, labels) -> tuple[Array, Array, Array]:
    model = nnx.merge(graph, *variables)
    logits, (live, mean_square) = model(data_lib.scale(images), tap=functools.partial(_observe, model.width))
    return (logits.argmax(axis=-1) == labels).sum(), live, mean_square


def _observe(width: int, link: Any, z: Array) -> tuple[Array, Array]:
    """Which of the layer's units are live, and the mean square of its pre-activations.

    Before a dense layer z is flat, (n, positions * width): a unit is a channel there too.
    """
    live = live_units(link(z), arity=link.arity, layout=link.layout)
    return live.reshape(-1, width).any(axis=0), jnp.square(z.astype(jnp.float32)).mean()
