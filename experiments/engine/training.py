"""How a table's nets are trained: image classification, epoch after epoch, each followed by a test on every example.

A model is any NNX module with model(images, train=) -> logits.
"""

import dataclasses
import functools
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
from experiments.engine.loop import Carry, Loop, advance
from experiments.engine.nonfinite import Watch
from experiments.engine.parallel import ONE_DEVICE, Placement
from experiments.engine.processes import fetch
from linked_jax.diagnostics import UnitStatistics
from linked_jax.probe import observe
from linked_jax.signal_statistics import mean_square

_EVALUATE_AT_ONCE = 500
_IN_FLIGHT = 32  # updates between checks of the loss: dispatch stays ahead of the device, and bad news is not late
_IN_FLIGHT_OF_MANY = 4  # virtual devices wait for each other for ever if too much is in flight


@dataclasses.dataclass
class Snapshot:
    """All that a run needs to resume from here."""

    arrays: Any  # the loop's carry
    losses: np.ndarray  # of this epoch's updates so far, float32: (updates,) or (seeds, updates)
    epoch: int = 1  # from 1
    step: int = 0  # updates done in this epoch
    diverged: tuple[int, ...] = ()  # the seeds whose loss is no longer finite
    seconds: float = 0.0  # spent in this epoch


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train."""

    optimizer: optax.GradientTransformation  # its updates are multiplied by lr
    epochs: int  # passes over the training set
    batch_size: int  # the last batch of an epoch may be smaller
    lr: float = 1.0  # the learning rate, or a factor of the optimizer's own
    inputs: data_lib.Affine = data_lib.UNIT  # what the net sees of pixels, see `data.scale`
    shuffle: bool = True  # draw a new order of the examples for each epoch
    augment: bool = False  # flip and shift the training images at random
    place: Placement = ONE_DEVICE
    skip_nonfinite: bool = False  # leave out and count updates that are not finite; else the first one ends the run

    def arrays(self, data: data_lib.Dataset) -> tuple[Any, Array]:
        """The loop's data, and its rate, on the devices."""
        return self.place.shared(((data.train_images, data.train_labels, self.inputs), np.float32(self.lr)))


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The mean cross-entropy of a batch, given by its indices."""

    graph: Any
    augment: bool = False

    def images(self, x: Array, key: Array) -> Array:
        """What of the images an update sees."""
        return flip_and_shift(key, x) if self.augment else x

    def __call__(self, parameters: Any, state: Any, data: Any, batch: Array, key: Array) -> tuple[Array, Any]:
        """See `loop.Loss`; data: images, labels, inputs."""
        images, labels, inputs = data
        x = self.images(images[batch], key)
        model = nnx.merge(self.graph, parameters, state, copy=True)  # batch statistics change, inside this trace
        logits = model(data_lib.scale(x, inputs), train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()
        return loss, nnx.split(model, nnx.Param, ...)[2]


def start(models: Sequence[nnx.Module], plan: Plan) -> tuple[Loop, Snapshot]:
    """The loop, and the snapshot before the first update.

    There is one model a seed, left as it is; more than one only where the plan stacks seeds.
    """
    loss = CrossEntropy(nnx.graphdef(models[0]), plan.augment)
    loop = Loop(loss, plan.optimizer, plan.place, skip_nonfinite=plan.skip_nonfinite)
    return loop, Snapshot(loop.start(models), np.zeros((len(models), 0) if plan.place.stacked else 0, np.float32))


def fit(
    loop: Loop,
    snapshot: Snapshot,
    data: data_lib.Dataset,
    plan: Plan,
    seeds: Sequence[int],
    *,
    on_step: Callable[[Callable[[], Snapshot], int], None] = lambda _now, _done: None,
) -> Iterator[list[dict[str, Any]]]:
    """Train from a snapshot on, and after each epoch evaluate every test example.

    Args:
      loop: from `start`.
      snapshot: from `start`, or one that was saved. Its arrays are used up.
      data: the set.
      plan: how to train.
      seeds: of the order of the examples and of augmentation, one a model.
      on_step: called after each update, or block of updates that is one program, with a function that gives the
        snapshot and the number of updates; it may save, or raise to end the run.

    Yields:
      After each epoch a list with a line for each seed: seed, epoch (from 1), train_loss, test_accuracy, units,
      dead_units, dead_by_layer, signal_by_layer, seconds, its share. Units are scored per link on the test set; the
      signal is the mean square of the pre-activations of a layer. As soon as a loss is seen not to be finite, a line
      with seed, epoch and diverged, which says in which step and where in the net; that seed has no further lines.
      Where such updates are skipped, a line also has skipped, their number, and the train_loss is the mean over the
      others.
    """
    place, size = plan.place, len(data.train_labels)
    arrays, lr = plan.arrays(data)
    test_images, test_labels = place.shared((data.test_images, data.test_labels))
    assert isinstance(loop.loss, CrossEntropy)
    stack = np.stack if place.stacked else lambda orders: orders[0]
    in_flight = _IN_FLIGHT if place.mesh is None else _IN_FLIGHT_OF_MANY
    whole, steps = size // plan.batch_size, -(-size // plan.batch_size)
    diverged, carry, done = set(snapshot.diverged), snapshot.arrays, snapshot.step
    losses, spent = [jnp.asarray(snapshot.losses)], snapshot.seconds

    for epoch in range(snapshot.epoch, plan.epochs + 1):
        if len(diverged) == len(seeds):
            return
        began = time.perf_counter() - spent
        keys = [jax.random.fold_in(jax.random.key(seed), epoch) for seed in seeds]
        epoch_keys = place.of_seeds(jnp.stack(keys) if place.stacked else keys[0])
        order = stack([data_lib.order(key if plan.shuffle else None, size) for key in keys])
        watch = None
        while done < steps:
            watch = watch or Watch(carry, done)
            count = min(in_flight - done % in_flight, whole - done) if loop.scanned and done < whole else 1
            first, last = done * plan.batch_size, min((done + count) * plan.batch_size, size)
            batches = order[..., first:last].reshape(*order.shape[:-1], count, -1)
            carry, new = advance(loop, carry, arrays, batches, epoch_keys, first=done, lr=lr)
            losses.append(new)
            watch.add(batches, new)
            done += count
            if done % in_flight == 0 or done == steps:
                for number in [] if plan.skip_nonfinite else watch.not_finite():
                    if (seed := seeds[number]) not in diverged:
                        diverged.add(seed)
                        where = f"epoch {epoch}, {watch.explain(loop, arrays, epoch_keys, lr, number)}"
                        yield [{"seed": seed, "epoch": epoch, "diverged": where}]
                watch = None
            on_step(functools.partial(_snapshot, carry, losses, epoch, done, tuple(sorted(diverged)), began), count)
            if len(diverged) == len(seeds):
                return
        sizes = np.full(steps, plan.batch_size)
        sizes[-1] = size - (steps - 1) * plan.batch_size
        of_epoch = np.atleast_2d(_joined(losses))
        tested = evaluate(loop.loss.graph, carry, test_images, test_labels, arrays[-1], place)
        seconds = round((time.perf_counter() - began) / len(seeds), 3)
        lines = []
        for seed, of_seed, result in zip(seeds, of_epoch, tested, strict=True):
            if seed not in diverged:
                line = _line(of_seed, sizes, result, epoch, plan.skip_nonfinite)
                diverged |= {seed} if "diverged" in line else set()
                timed = {} if "diverged" in line else {"seconds": seconds}
                lines.append({"seed": seed, "epoch": epoch, **line, **timed})
        yield lines
        losses, done, spent = [], 0, 0.0


def _line(losses: np.ndarray, sizes: np.ndarray, tested: dict[str, Any], epoch: int, skips: bool) -> dict[str, Any]:
    """What an epoch came to for a seed: its losses, by the sizes of the batches, and the test; or how it diverged."""
    kept = np.isfinite(losses)
    if not kept.any():
        return {"diverged": f"epoch {epoch}: no update of it was finite"}
    if not np.isfinite(tested["signal_by_layer"]).all():
        return {"diverged": f"epoch {epoch}: the signal is not finite after it"}
    skipped = {"skipped": int((~kept).sum())} if skips else {}
    return {"train_loss": float(np.average(losses[kept], weights=sizes[kept])), **tested, **skipped}


def _snapshot(
    carry: Carry, losses: list[Any], epoch: int, done: int, diverged: tuple[int, ...], began: float
) -> Snapshot:
    return Snapshot(carry, _joined(losses), epoch, done, diverged, time.perf_counter() - began)


def _joined(losses: list[Any]) -> np.ndarray:
    return np.concatenate(jax.device_get(fetch(losses)), axis=-1).astype(np.float32)


def train(model: nnx.Module, data: data_lib.Dataset, plan: Plan, seed: int) -> tuple[nnx.Module, list[dict[str, Any]]]:
    """Train a copy of one model from start to end, without checkpoints; the seed is of the order of the examples.

    Returns:
      The trained model, and the lines of `fit`. If it diverged the last line says so, and the model is what was left.
    """
    loop, snapshot = start([model], plan)
    latest: list[Callable[[], Snapshot]] = [lambda: snapshot]

    def keep(now: Callable[[], Snapshot], _done: int) -> None:
        latest[0] = now

    lines = [line for lines in fit(loop, snapshot, data, plan, [seed], on_step=keep) for line in lines]
    return nnx.merge(nnx.graphdef(model), *latest[0]().arrays[:2]), lines


def evaluate(
    graph: Any, carry: Carry, images: Array, labels: Array, inputs: data_lib.Affine, place: Placement
) -> list[dict[str, Any]]:
    """Accuracy over every example, dead units and signal of each layer; one a seed."""
    correct, live, signal = 0, [], []
    for begin in range(0, len(labels), _EVALUATE_AT_ONCE):
        batch = slice(begin, begin + _EVALUATE_AT_ONCE)
        arguments = (carry.parameters, carry.state, images[batch], labels[batch], inputs)
        hits, seen = jax.device_get(fetch(_evaluate_batch(place, graph, *arguments)))
        correct = correct + np.asarray(hits)
        live.append([units for units, _ in seen])
        signal.append([np.asarray(layers, np.float64) * len(labels[batch]) for _, layers in seen])
    live = [np.any(layers, axis=0) for layers in zip(*live, strict=True)]
    signal = [np.sum(layers, axis=0) / len(labels) for layers in zip(*signal, strict=True)]
    if not place.stacked:
        return [_tested(len(labels), correct, live, signal)]
    return [
        _tested(len(labels), hits, [layers[seed] for layers in live], [layers[seed] for layers in signal])
        for seed, hits in enumerate(np.asarray(correct))
    ]


def _tested(examples: int, correct: Any, live: list[np.ndarray], signal: list[np.ndarray]) -> dict[str, Any]:
    dead = [int((~units).sum()) for layers in live for units in layers]
    return {
        "test_accuracy": int(correct) / examples,
        "units": sum(layers.size for layers in live),
        "dead_units": sum(dead),
        "dead_by_layer": dead,
        "signal_by_layer": [float(f"{value:.4g}") for layers in signal for value in layers],
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate_batch(place, graph, parameters, state, images, labels, inputs):
    """Correct answers; and of each tap its layers' live units (layers, C) and mean squares (layers,)."""

    def test(parameters, state, images, labels, inputs):
        def logits_of(variables, x):
            return nnx.merge(graph, *variables)(x, train=False)

        logits, taps = observe(logits_of, (parameters, state), data_lib.scale(images, inputs))
        return (logits.argmax(axis=-1) == labels).sum(), [_layers(tap.stats) for tap in taps]

    return place.over_seeds(test, (True, True, False, False, False))(parameters, state, images, labels, inputs)


def _layers(stats: UnitStatistics) -> tuple[Array, Array]:
    """Live units and mean square of the one layer of a tap, or of the layers of a scan."""
    layers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[stats.count.ndim :]), stats)
    return layers.live, jax.vmap(mean_square)(layers)
