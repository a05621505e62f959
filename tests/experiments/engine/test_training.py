"""The training loop and the network of table 2, against the same network written out in NumPy."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import training
from experiments.engine.costs import count
from experiments.engine.loop import Carry, step
from experiments.engine.optimizers import adam, sgd
from experiments.engine.parallel import ONE_DEVICE, Placement
from experiments.engine.rows import Row
from experiments.models.depth_net import DepthNet
from experiments.models.parameters_net import ParametersNet
from linked_jax import LinkedLinear, get_activation, linked, lk_relu

ADAM = adam(3e-3)  # static arguments of the jitted step: made once, so that equal nets compile once
SLOW = sgd(1e-30)
MEMBERS = {"relu": (lambda z: np.maximum(z, 0),), "lk_relu": (lambda z: np.maximum(z, 0), lambda z: np.maximum(-z, 0))}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Nothing here runs long enough to be worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def digits():
    """331 train and 107 test digits: no multiple of a batch."""
    whole = data_lib.load("digits")
    return dataclasses.replace(
        whole,
        train_images=whole.train_images[:331],
        train_labels=whole.train_labels[:331],
        test_images=whole.test_images[:107],
        test_labels=whole.test_labels[:107],
    )


def net(act="lk_relu", *, depth=3, norm="none", unroll=False, seed=0, image_shape=(8, 8, 1), width=4):
    return DepthNet(
        image_shape,
        10,
        Row(act, norm=norm),
        "auto",
        depth=depth,
        width=width,
        unroll=unroll,
        rngs=nnx.Rngs(seed),
    )


def fitting(model, data, *, optimizer=ADAM, epochs=1, batch_size=100, seed=0, on_step=lambda *_: None, **options):
    plan = training.Plan(optimizer, epochs, batch_size, **options)
    loop, snapshot = training.start([model], plan)
    for lines in training.fit(loop, snapshot, data, plan, [seed], on_step=on_step):
        yield from lines


def fit(*arguments, **options):
    return [{key: value for key, value in line.items() if key != "seed"} for line in fitting(*arguments, **options)]


def evaluate(model, images, labels):
    graph, parameters, state = nnx.split(model, nnx.Param, ...)
    (line,) = training.evaluate(graph, Carry(parameters, state, None), images, labels, data_lib.UNIT, ONE_DEVICE)
    return line


def convolve(x, conv, stride, layer=...):
    """SAME convolution, (n, h, w, c), window by window."""
    kernel, bias = (np.asarray(parameter[...][layer], np.float64) for parameter in (conv.kernel, conv.bias))
    sizes = [-(-size // stride) for size in x.shape[1:3]]
    total = [max((n - 1) * stride + k - size, 0) for n, k, size in zip(sizes, kernel.shape, x.shape[1:3], strict=False)]
    x = np.pad(x, [(0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)])
    ends = [(n - 1) * stride + 1 for n in sizes]
    return bias + sum(
        x[:, row : row + ends[0] : stride, column : column + ends[1] : stride] @ kernel[row, column]
        for row, column in np.ndindex(kernel.shape[:2])
    )


def written_out(model, images, members):
    """The network in NumPy, from the paper's text: logits, and the pre-activations of each layer (n, h, w, c)."""

    def act(z):
        return np.concatenate([g(z) for g in members], axis=-1)

    x = np.asarray(images, np.float64) / 255
    zs = [convolve(convolve(x, model.stem, 2), model.first, 1)]
    for layer in range(model.depth - 1):
        zs.append(convolve(act(zs[-1]), model.blocks.conv.conv, 1, layer))
    dense = model.read_out.linear
    return act(zs[-1].reshape(len(x), -1)) @ np.asarray(dense.kernel[...]) + np.asarray(dense.bias[...]), zs


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


# --- the network


def by_hand(channels, pixels, *, depth=50, width=4, arity=1, norm=False):
    stem = 7 * 7 * channels * width + width
    first = 3 * 3 * width * width + width
    others = (depth - 1) * (3 * 3 * arity * width * width + width)
    positions = math.ceil(pixels / 2) ** 2
    return stem + first + others + positions * width * arity * 10 + 10 + norm * depth * 2 * width


@pytest.mark.parametrize(
    ("act", "norm", "width", "count"),  # width 5 is int(4 * sqrt(2)), the plain net of about a linked one's size
    [
        ("relu", "none", 4, 18_242),
        ("lk_relu", "none", 4, 35_538),
        ("relu", "batch", 4, 18_642),
        ("relu", "none", 5, 25_050),
    ],
)
def test_the_papers_network_has_the_parameters_counted_by_hand(act, norm, width, count):
    options = {"depth": 50, "width": width, "norm": norm}
    model = nnx.eval_shape(lambda: net(act, image_shape=(32, 32, 3), **options))
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    arity = len(MEMBERS[act])
    assert counted == by_hand(3, 32, arity=arity, width=width, norm=norm == "batch")
    assert counted == count


@pytest.mark.slow
@pytest.mark.parametrize("act", ["relu", "lk_relu"])
def test_logits_equal_the_network_written_out(act, digits):
    model = net(act, seed=1)
    expected, _ = written_out(model, digits.test_images[:20], MEMBERS[act])
    np.testing.assert_allclose(model(data_lib.scale(digits.test_images[:20])), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5, 2), (1, 1, 1)])
def test_odd_images(shape):
    def run():
        return net(image_shape=shape)(jnp.ones((2, *shape)))

    assert jax.eval_shape(run).shape == (2, 10)


# --- the evaluation


@pytest.mark.slow
def test_accuracy_counts_every_example_once(digits, monkeypatch):
    model = net("relu", seed=3)
    guesses = np.asarray(written_out(model, digits.test_images, MEMBERS["relu"])[0]).argmax(axis=-1)
    correct = (guesses == np.asarray(digits.test_labels)).sum()
    assert 0 < correct < 107
    for batch in (500, 25):
        monkeypatch.setattr(training, "_EVALUATE_AT_ONCE", batch)
        assert evaluate(model, digits.test_images, digits.test_labels)["test_accuracy"] == correct / 107
    labels = jnp.asarray(np.where(np.arange(107) == 106, guesses, (guesses + 1) % 10))  # right on the very last one
    monkeypatch.setattr(training, "_EVALUATE_AT_ONCE", 25)
    assert evaluate(model, digits.test_images, labels)["test_accuracy"] == 1 / 107


def plant(model, digits, act):
    """Kill units 1 and 2 of layer 2 and unit 3 of the last; let unit 0 of layer 1 live on one image alone."""
    model.blocks.conv.conv.bias[...] = (
        model.blocks.conv.conv.bias[...].at[0, jnp.array([1, 2])].set(-1e3).at[1, 3].set(-1e3)
    )
    z = np.asarray(written_out(model, digits.test_images, MEMBERS[act])[1][0])[..., 0].max(axis=(1, 2))
    runner_up, best = np.sort(z)[-2:]
    assert best > runner_up
    model.first.bias[...] = model.first.bias[...].at[0].add(-(best + runner_up) / 2)


@pytest.mark.slow
def test_dead_units_equal_a_count_over_all_activations(digits, monkeypatch):
    monkeypatch.setattr(training, "_EVALUATE_AT_ONCE", 25)
    model = net("relu")
    plant(model, digits, "relu")
    measured = evaluate(model, digits.test_images, digits.test_labels)
    zs = [np.asarray(z) for z in written_out(model, digits.test_images, MEMBERS["relu"])[1]]
    expected = [int((np.maximum(z, 0) == 0).all(axis=(0, 1, 2)).sum()) for z in zs]
    assert expected == [0, 2, 1]
    assert measured["dead_by_layer"] == expected
    assert measured["dead_units"] == 3
    np.testing.assert_allclose(measured["signal_by_layer"], [np.square(z).mean() for z in zs], rtol=1e-3)


@pytest.mark.slow
def test_a_linked_net_in_the_same_state_has_no_dead_unit(digits, monkeypatch):
    monkeypatch.setattr(training, "_EVALUATE_AT_ONCE", 25)
    model = net("lk_relu", seed=3)
    plant(model, digits, "lk_relu")
    measured = evaluate(model, digits.test_images, digits.test_labels)
    assert measured["dead_by_layer"] == [0, 0, 0]
    assert measured["dead_units"] == 0
    zs = [np.asarray(z) for z in written_out(model, digits.test_images, MEMBERS["lk_relu"])[1]]
    assert (zs[1][..., [1, 2]] < 0).all()  # their first members are all zero
    np.testing.assert_allclose(measured["signal_by_layer"], [np.square(z).mean() for z in zs], rtol=1e-3)


@pytest.mark.slow
def test_an_interleaved_link_is_scored_by_its_own_layout(digits):
    class Interleaved(Row):
        def activation(self, features):
            return linked(jax.nn.relu, jax.nn.relu, layout="interleaved")  # two members that die together

    model = DepthNet((8, 8, 1), 10, Interleaved("lk_relu"), "auto", depth=2, width=3, rngs=nnx.Rngs(0))
    model.first.bias[...] = jnp.array([-1e3, 1e3, -1e3])
    model.blocks.conv.conv.bias[...] = jnp.array([[1e5, 1e5, -1e5]])
    assert evaluate(model, digits.test_images, digits.test_labels)["dead_by_layer"] == [2, 1]


# --- the loop


@pytest.mark.slow
def test_the_loss_falls_and_the_model_passed_in_stays(digits):
    model = net()
    before = leaves(model)
    steps = []
    lines = fit(model, digits, epochs=4, on_step=lambda now, _: steps.append((now().epoch, now().step)))
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["train_loss"] < 0.9 * lines[0]["train_loss"]
    assert lines[-1]["test_accuracy"] > 0.3
    assert steps == [(epoch, step) for epoch in (1, 2, 3, 4) for step in (1, 2, 3, 4)]
    assert all(line["dead_units"] == 0 and line["seconds"] > 0 for line in lines)
    for now, then in zip(leaves(model), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_to_the_bit(digits):
    first, second = (without_seconds(fit(net(), digits, epochs=2, seed=5)) for _ in range(2))
    assert first == second
    other_order = without_seconds(fit(net(), digits, epochs=2, seed=6))
    other_kernels = without_seconds(fit(net(seed=1), digits, epochs=2, seed=5))
    assert first[-1]["train_loss"] not in (other_order[-1]["train_loss"], other_kernels[-1]["train_loss"])
    stored_order, again = (fit(net(), digits, seed=seed, shuffle=False) for seed in (5, 6))
    assert without_seconds(stored_order) == without_seconds(again)


@pytest.mark.slow
def test_the_train_loss_is_the_mean_over_examples_and_must_be_finite(digits):
    """Nothing moves in the first epoch, of 100 + 100 + 100 + 31 examples; the second explodes."""
    rate = sgd(lambda step: jnp.where(step < 4, 1e-30, 1e30))
    model = net()
    line, last = fitting(model, digits, optimizer=rate, epochs=3)
    logits = written_out(model, digits.train_images, MEMBERS["lk_relu"])[0]
    losses = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(331), np.asarray(digits.train_labels)]
    assert line["train_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    guesses = written_out(model, digits.test_images, MEMBERS["lk_relu"])[0].argmax(axis=-1)
    assert line["test_accuracy"] == (guesses == np.asarray(digits.test_labels)).mean()
    assert last.keys() == {"seed", "epoch", "diverged"}
    said = r"epoch 2, step 2: the loss is (nan|inf); .* makes (NaN|-?inf) of finite values, first seen by .*"
    assert re.fullmatch(said, last["diverged"])


@pytest.mark.slow
@pytest.mark.fault("numbers", "an infinite update: stop names its step")
def test_the_step_that_makes_parameters_not_finite_is_named(digits):
    lines = fit(net(), digits, optimizer=sgd(lambda step: jnp.where(step == 5, jnp.inf, 1e-3)), epochs=3)
    assert ["diverged" in line for line in lines] == [False, True]
    assert re.fullmatch(
        r"epoch 2, step 2: the loss is \d.*, and its gradient makes parameters .*", lines[1]["diverged"]
    )


@pytest.mark.slow
@pytest.mark.fault("numbers", "a batch whose loss is NaN: skip leaves it out and counts it")
@pytest.mark.parametrize("scanned", [False, True])
def test_an_update_that_is_not_finite_is_left_out(scanned, digits):
    """A label that is no class makes the loss NaN; the other batches train as if that one were not there."""

    def trained(data):
        plan = training.Plan(ADAM, 2, 100, shuffle=False, skip_nonfinite=True)
        loop, snapshot = training.start([net()], plan)
        loop = dataclasses.replace(loop, scanned=scanned)
        return [line for lines in training.fit(loop, snapshot, data, plan, [0]) for line in lines]

    images, labels = digits.train_images, np.asarray(digits.train_labels)
    bad = trained(dataclasses.replace(digits, train_labels=np.where(np.arange(len(labels)) == 5, 77, labels)))
    without = trained(dataclasses.replace(digits, train_images=images[100:], train_labels=labels[100:]))
    assert ([line["skipped"] for line in bad], [line["skipped"] for line in without]) == ([1, 1], [0, 0])
    times = {"seconds": 0, "skipped": 0}
    assert [line | times for line in bad] == [line | times for line in without]


@pytest.mark.slow
def test_scanned_and_unrolled_layers_are_the_same_network(digits):
    scanned, unrolled = net(unroll=False), net(unroll=True)
    for one, other in zip(leaves(scanned), leaves(unrolled), strict=True):
        np.testing.assert_array_equal(one, other)
    (one,), (other,) = (fit(model, digits, batch_size=331) for model in (scanned, unrolled))
    assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
    assert one["signal_by_layer"] == pytest.approx(other["signal_by_layer"], rel=2e-3)


@pytest.mark.slow
def test_batch_norm_trains_and_its_running_statistics_move(digits):
    model = net("relu", norm="batch")
    loop, snapshot = training.start([model], training.Plan(ADAM, 1, 331))
    arrays = digits.train_images, digits.train_labels, data_lib.UNIT
    carry, _ = step(loop, snapshot.arrays, arrays, jnp.arange(331), jax.random.key(0), 0, 1.0)
    moved = nnx.merge(nnx.graphdef(model), *carry[:2])
    z = np.asarray(written_out(model, digits.train_images, MEMBERS["relu"])[1][0])
    np.testing.assert_allclose(moved.first_norm.mean[...], 0.01 * z.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(moved.first_norm.var[...], 0.99 + 0.01 * z.var(axis=(0, 1, 2)), rtol=1e-5)
    assert (np.asarray(moved.blocks.norm.mean[...]) != 0).all(axis=-1).tolist() == [True, True]
    lines = fit(model, digits, epochs=9, batch_size=331)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("act", "depth"), [("lk_relu", 1), ("prelu", 3), ("lk_prelu", 3)])
def test_depth_one_and_links_with_parameters_train(act, depth, digits):
    lines = fit(net(act, depth=depth), digits, epochs=9, batch_size=331)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert len(lines[-1]["dead_by_layer"]) == len(lines[-1]["signal_by_layer"]) == depth


@pytest.mark.slow
def test_augmented_images_are_drawn_anew_for_each_step_and_epoch(digits):
    """With a rate of nearly nothing, in the stored order, each epoch's losses differ by their images alone."""

    def losses(augment):
        found = []
        options = {"optimizer": SLOW, "epochs": 2, "batch_size": 165, "shuffle": False, "augment": augment}
        fit(net("relu", depth=1), twice, on_step=lambda now, _: found.append(now().losses[-1]), **options)
        return np.reshape(found, (2, 2))

    half = digits.train_images[:165], digits.train_labels[:165]
    twice = dataclasses.replace(
        digits, train_images=jnp.concatenate([half[0]] * 2), train_labels=jnp.concatenate([half[1]] * 2)
    )
    assert len(set(losses(False).ravel().tolist())) == 1
    assert len(set(losses(True).ravel().tolist())) == 4


class RandomNet(nnx.Module):
    """Statistics and random numbers in a net: batch norm and dropout."""

    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(64, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout, self.read_out = nnx.Dropout(0.5, rngs=rngs), LinkedLinear(8, 10, link=lk_relu, rngs=rngs)

    def __call__(self, images, *, train=False):
        z = self.norm(self.dense(images.reshape(len(images), -1)), use_running_average=not train)
        z = self.dropout(z, deterministic=not train)
        return self.read_out(z)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0,), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_a_run_resumes_from_each_of_its_snapshots_to_the_same_bits(seeds, digits):
    place = Placement(stacked=len(seeds) > 1)
    plan = training.Plan(ADAM, 2, 100, augment=True, place=place)
    loop, begin = training.start([RandomNet(nnx.Rngs(seed)) for seed in seeds], plan)
    snapshots = []

    def keep(now, _done):
        snapshot = now()
        snapshots.append(dataclasses.replace(snapshot, arrays=jax.tree.map(jnp.copy, snapshot.arrays)))

    whole = [without_seconds(lines) for lines in training.fit(loop, begin, digits, plan, seeds, on_step=keep)]
    assert [(snapshot.epoch, snapshot.step) for snapshot in snapshots] == [(e, s) for e in (1, 2) for s in (1, 2, 3, 4)]
    for snapshot in snapshots:
        snapshot = dataclasses.replace(snapshot, seconds=1e3)
        rest = list(training.fit(loop, snapshot, digits, plan, seeds))
        assert all(line["seconds"] > 1e3 / len(seeds) for line in rest[0])  # what it took before it was cut off, too
        assert [without_seconds(lines) for lines in rest] == whole[snapshot.epoch - 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0,), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_an_epoch_in_one_program_is_the_epoch_step_by_step(seeds, digits):
    """Also where the last batch is smaller, and where a run resumes within a block of steps."""
    plan = training.Plan(ADAM, 2, 100, augment=True, place=Placement(stacked=len(seeds) > 1))
    found, snapshots = [], []

    def keep(now, done):
        snapshots.append((now().epoch, now().step, done))

    for scanned in (False, True):
        loop, begin = training.start([RandomNet(nnx.Rngs(seed)) for seed in seeds], plan)
        loop = dataclasses.replace(loop, scanned=scanned)
        found.append([line for lines in training.fit(loop, begin, digits, plan, seeds, on_step=keep) for line in lines])
    assert snapshots[8:] == [(1, 3, 3), (1, 4, 1), (2, 3, 3), (2, 4, 1)]
    for one, other in zip(*found, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=1 / 107)


# --- what a net costs


class Chain(nnx.Module):
    """Flatten, then layers one after another."""

    def __init__(self, *layers):
        self.layers = nnx.List(layers)

    def __call__(self, images, *, train=False):
        z = images.reshape(len(images), -1)
        for layer in self.layers:
            z = layer(z)
        return z


class NaiveLinked(nnx.Module):
    """What LinkedLinear computes, with nothing said about memory."""

    def __init__(self, features, out, rngs):
        self.dense = nnx.Linear(2 * features, out, rngs=rngs)

    def __call__(self, z):
        return self.dense(jnp.concatenate([jax.nn.relu(z), jax.nn.relu(-z)], axis=-1))


def test_the_costs_of_dense_layers_counted_by_hand():
    dense = count(lambda: Chain(nnx.Linear(120, 50, rngs=nnx.Rngs(0))), (5, 6, 4))
    assert dense["parameters"] == 120 * 50 + 50
    assert dense["flops"] == pytest.approx(2 * 120 * 50 + 50, rel=0.01)
    assert dense["activation_bytes"] == 4 * 120  # the image, for the kernel's gradient

    first = lambda: nnx.Linear(120, 50, rngs=nnx.Rngs(0))  # noqa: E731
    ours = count(lambda: Chain(first(), LinkedLinear(50, 30, link=lk_relu, rngs=nnx.Rngs(1))), (5, 6, 4))
    naive = count(lambda: Chain(first(), NaiveLinked(50, 30, nnx.Rngs(1))), (5, 6, 4))
    for counted in (ours, naive):
        assert counted["parameters"] == 120 * 50 + 50 + 2 * 50 * 30 + 30
        assert counted["flops"] == pytest.approx(2 * 120 * 50 + 2 * 100 * 30, rel=0.1)
    assert ours["activation_bytes"] == 4 * (120 + 50)  # the image, and z alone
    assert naive["activation_bytes"] >= 4 * (120 + 100)
    few = count(lambda: Chain(first()), (5, 6, 4), all_of_them=False)
    assert few == {"parameters": dense["parameters"]}


@pytest.mark.slow
@pytest.mark.parametrize("act", ["relu", "lk_relu"])
def test_the_flops_of_table_3_counted_by_hand(act):
    """Two for each product of a kernel's entry with a position that it sees."""
    link = get_activation(act)

    def build():
        return ParametersNet((32, 32, 3), 10, Row(act), "auto", rngs=nnx.Rngs(0))

    first = 32 * 32 * (9 * 3) * 32
    convs = 30 * 30 * (9 * 32) * 32 + 15 * 15 * (9 * 32) * 64 + 13 * 13 * (9 * 64) * 64
    dense = 6 * 6 * 64 * 512 + 512 * 10
    counted = count(build, (32, 32, 3))
    assert counted["flops"] == pytest.approx(2 * (first + link.arity * (convs + dense)), rel=0.1)
    features = 32 * 32 * 32 + 30 * 30 * 32 + 15 * 15 * 64 + 13 * 13 * 64 + 512
    assert counted["activation_bytes"] > 4 * features  # every pre-activation, and the image
