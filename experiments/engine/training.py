"""THE training loop. A model is any NNX module with model(images, train=, tap=) -> (logits, taps).

`tap(link, z, units)` is called for each activation with its pre-activations z, (N, ..., units) or flat; taps is a list
of what it returned, each with a leading axis of layers.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from experiments.engine import data as data_lib
from experiments.engine.augment import flip_and_shift
from experiments.engine.parallel import ONE_DEVICE, Placement
from linked_jax import live_units

_EVALUATE_AT_ONCE = 500
_STEPS_IN_FLIGHT = 32  # between looks at the loss: dispatch stays ahead of the device, and bad news is not late
_STEPS_IN_FLIGHT_OF_MANY = 4  # virtual devices wait for each other for ever if too much is in flight


@dataclasses.dataclass
class Moment:
    """All that a run needs to go on from here.

    Attributes:
      arrays: parameters, statistics, random keys and optimiser state.
      losses: of this epoch's steps so far, a float32 array of shape (steps,) or (steps, seeds).
      epoch: from 1.
      step: steps done in this epoch.
      diverged: the seeds whose loss is no longer finite.
    """

    arrays: Any
    losses: np.ndarray
    epoch: int = 1
    step: int = 0
    diverged: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
      optimizer: an Optax transformation; its updates are multiplied by lr.
      lr: the learning rate, or a factor of the optimizer's own.
      epochs: passes over the training set.
      batch_size: the last batch of an epoch may be smaller.
      inputs: what the net sees of pixels, see `data.scale`.
      shuffle: draw a new order of the examples for each epoch.
      augment: flip and shift the training images at random.
      place: on which devices.
    """

    optimizer: optax.GradientTransformation
    epochs: int
    batch_size: int
    lr: float = 1.0
    inputs: data_lib.Affine = data_lib.UNIT
    shuffle: bool = True
    augment: bool = False
    place: Placement = ONE_DEVICE


def start(models: Sequence[nnx.Module], plan: Plan) -> tuple[Any, Moment]:
    """The graph that the models share, and the moment before the first step.

    Args:
      models: one a seed, left as they are; more than one only where the plan stacks seeds.
      plan: how to train.
    """
    graphs, carries = [], []
    for model in models:
        graph, parameters, state = nnx.split(model, nnx.Param, ...)
        graphs.append(graph)
        carries.append((parameters, state, plan.optimizer.init(parameters)))
    stack = (lambda *leaves: jnp.stack(leaves)) if plan.place.stacked else jnp.copy  # a step donates its input
    carry = plan.place.of_seeds(jax.tree.map(stack, *carries))
    return graphs[0], Moment(carry, np.zeros((0, len(models)) if plan.place.stacked else 0, np.float32))


def fit(
    graph: Any,
    moment: Moment,
    data: data_lib.Dataset,
    plan: Plan,
    seeds: Sequence[int],
    *,
    on_step: Callable[[Callable[[], Moment]], None] = lambda _: None,
) -> Iterator[list[dict[str, Any]]]:
    """Train from a moment on, and after each epoch evaluate every test example.

    Args:
      graph: from `start`.
      moment: from `start`, or one that was saved. Its arrays are used up.
      data: the set.
      plan: how to train.
      seeds: of the order of the examples and of augmentation, one a model.
      on_step: called after each step with a function that gives the moment; it may save, or raise to end the run.

    Yields:
      After each epoch a list with a line for each seed: seed, epoch (from 1), train_loss, test_accuracy, units,
      dead_units, dead_by_layer, signal_by_layer, seconds. Units are scored per link on the test set; the signal is the
      mean square of the pre-activations of a layer. As soon as a loss is seen not to be finite, a line with seed, epoch
      and diverged, which says where; that seed has no further lines.
    """
    place = plan.place
    images, labels, test_images, test_labels = place.shared(
        (data.train_images, data.train_labels, data.test_images, data.test_labels)
    )
    inputs, lr = place.shared((plan.inputs, np.float32(plan.lr)))
    run_keys = [jax.random.key(seed) for seed in seeds]
    stack = jnp.stack if place.stacked else lambda keys: keys[0]
    in_flight = _STEPS_IN_FLIGHT if place.mesh is None else _STEPS_IN_FLIGHT_OF_MANY
    diverged, carry, losses, done = set(moment.diverged), moment.arrays, list(moment.losses), moment.step

    for epoch in range(moment.epoch, plan.epochs + 1):
        if len(diverged) == len(seeds):
            return
        began = time.perf_counter()
        keys = [jax.random.fold_in(key, epoch) for key in run_keys]
        orders = [
            data_lib.batches(key if plan.shuffle else None, len(data.train_labels), plan.batch_size) for key in keys
        ]
        steps = len(orders[0])
        epoch_keys = place.of_seeds(stack(keys))
        for number in range(done, steps):
            index = place.batch(np.stack([order[number] for order in orders]) if place.stacked else orders[0][number])
            carry, loss = step(
                place, graph, plan.optimizer, plan.augment,
                carry, images, labels, inputs, lr, index, epoch_keys, np.int32(number),
            )  # fmt: skip
            losses.append(loss)
            done = number + 1
            if done % in_flight == 0 or done == steps:
                for seed, value in zip(seeds, np.atleast_1d(loss), strict=True):
                    if not math.isfinite(value) and seed not in diverged:
                        diverged.add(seed)
                        where = f"the loss is {float(value)} in epoch {epoch}, step {done}"
                        yield [{"seed": seed, "epoch": epoch, "diverged": where}]
            on_step(
                lambda carry=carry, losses=losses, epoch=epoch, done=done: Moment(
                    carry, np.asarray(jax.device_get(losses), np.float32), epoch, done, tuple(sorted(diverged))
                )
            )
            if len(diverged) == len(seeds):
                return
        sizes = np.asarray([len(index) for index in orders[0]])
        train_losses = np.average(np.asarray(jax.device_get(losses)), axis=0, weights=sizes)
        tested = evaluate(graph, carry[:2], test_images, test_labels, inputs, place)
        seconds = round(time.perf_counter() - began, 3)
        lines = []
        for seed, train_loss, result in zip(seeds, np.atleast_1d(train_losses), tested, strict=True):
            if seed in diverged:
                continue
            if not np.isfinite(result["signal_by_layer"]).all():
                diverged.add(seed)
                lines.append(
                    {"seed": seed, "epoch": epoch, "diverged": f"the signal is not finite after epoch {epoch}"}
                )
                continue
            lines.append({"seed": seed, "epoch": epoch, "train_loss": float(train_loss), **result, "seconds": seconds})
        yield lines
        losses, done = [], 0


def train(model: nnx.Module, data: data_lib.Dataset, plan: Plan, seed: int) -> tuple[nnx.Module, list[dict[str, Any]]]:
    """Train one model from start to end, without checkpoints.

    Args:
      model: left as it is.
      data: the set.
      plan: how to train, for one model.
      seed: of the order of the examples.

    Returns:
      The trained model, and the lines of `fit`. If it diverged the last line says so, and the model is what was left.
    """
    graph, moment = start([model], plan)
    latest: list[Callable[[], Moment]] = [lambda: moment]

    def on_step(now: Callable[[], Moment]) -> None:
        latest[0] = now

    lines = [line for lines in fit(graph, moment, data, plan, [seed], on_step=on_step) for line in lines]
    return nnx.merge(graph, *latest[0]().arrays[:2]), lines


def evaluate(
    graph: Any, variables: Any, images: Array, labels: Array, inputs: data_lib.Affine, place: Placement
) -> list[dict[str, Any]]:
    """Accuracy over every example, dead units and signal of each layer; one a seed."""
    correct, live, signal = np.zeros((), np.int64), None, None
    for begin in range(0, len(labels), _EVALUATE_AT_ONCE):
        batch = slice(begin, begin + _EVALUATE_AT_ONCE)
        found = jax.device_get(_evaluate_batch(place, graph, variables, images[batch], labels[batch], inputs))
        hits, batch_live, mean_square = found
        weighted = [np.asarray(chunk, np.float64) * len(labels[batch]) for chunk in mean_square]
        correct = np.asarray(correct + hits)
        live = batch_live if live is None else [a | b for a, b in zip(live, batch_live, strict=True)]
        signal = weighted if signal is None else [a + b for a, b in zip(signal, weighted, strict=True)]
    assert live is not None
    assert signal is not None
    if not place.stacked:
        correct, live, signal = correct[None], [x[None] for x in live], [x[None] for x in signal]
    return [
        _tested(len(labels), correct[seed], [x[seed] for x in live], [x[seed] for x in signal])
        for seed in range(len(correct))
    ]


def _tested(examples: int, correct: Any, live: list[np.ndarray], signal: list[np.ndarray]) -> dict[str, Any]:
    dead = [int((~layer).sum()) for chunk in live for layer in chunk]
    return {
        "test_accuracy": int(correct) / examples,
        "units": sum(chunk.size for chunk in live),
        "dead_units": sum(dead),
        "dead_by_layer": dead,
        "signal_by_layer": [float(f"{value / examples:.4g}") for chunk in signal for value in chunk],
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def step(place, graph, optimizer, augment, carry, images, labels, inputs, lr, index, key, number):
    """One update: (carry, loss). The carry is used up; number is that of the step in its epoch, for augmentation."""

    def train(carry, images, labels, inputs, lr, index, key, number):
        parameters, state, optimizer_state = carry
        x = images[index]
        if augment:
            x = flip_and_shift(jax.random.fold_in(key, number), x)

        def loss_of(parameters):
            model = nnx.merge(graph, parameters, state, copy=True)  # batch statistics change, inside this trace
            logits, _ = model(data_lib.scale(x, inputs), train=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()
            return loss, nnx.split(model, nnx.Param, ...)[2]

        (loss, new_state), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
        updates = jax.tree.map(lambda update: lr * update, updates)
        return (optax.apply_updates(parameters, updates), new_state, optimizer_state), loss

    own = (True, False, False, False, False, True, True, False)
    return place.over_seeds(train, own)(carry, images, labels, inputs, lr, index, key, number)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate_batch(place, graph, variables, images, labels, inputs):
    def test(variables, images, labels, inputs):
        model = nnx.merge(graph, *variables)
        logits, taps = model(data_lib.scale(images, inputs), train=False, tap=observe)
        return (logits.argmax(axis=-1) == labels).sum(), [live for live, _ in taps], [signal for _, signal in taps]

    return place.over_seeds(test, (True, False, False, False))(variables, images, labels, inputs)


def observe(link: Any, z: Array, units: int) -> tuple[Array, Array]:
    """Which of the layer's units are live, and the mean square of its pre-activations.

    Before a dense layer z is flat, (n, positions * units): a unit is a channel there too.
    """
    live = live_units(link(z), arity=link.arity, layout=link.layout)
    return live.reshape(-1, units).any(axis=0), jnp.square(z.astype(jnp.float32)).mean()
