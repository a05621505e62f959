"""Several devices and several seeds in one program compute what one device does, one seed after another."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import depth
from experiments.engine import data as data_lib
from experiments.engine import training
from experiments.engine.errors import UsageError
from experiments.engine.loop import step
from experiments.engine.optimizers import adam, sgd
from experiments.engine.parallel import check_devices, placement
from tests.children import finish, start

ADAM = adam(3e-3)
SEEDS = (3, 4)


@pytest.fixture(scope="module")
def digits():
    """231 images: the last batch of 100, 100, 31 does not divide by 2."""
    whole = data_lib.load("digits")
    return dataclasses.replace(
        whole,
        train_images=whole.train_images[:231],
        train_labels=whole.train_labels[:231],
        test_images=whole.test_images[:60],
        test_labels=whole.test_labels[:60],
    )


def train(digits, act="relu_bn", *, devices=1, mode="sequential", optimizer=ADAM, epochs=2, **options):
    """The lines of each seed."""
    settings = depth.Settings(devices=devices, seeds_mode=mode, seeds=len(SEEDS))
    place = placement(settings)
    plan = training.Plan(optimizer, epochs, 100, place=place, **options)
    cell = {"act": act, "init": "auto", "depth": 2}
    lines = []
    for group in [SEEDS] if place.stacked else [(seed,) for seed in SEEDS]:
        loop, snapshot = training.start([depth.build(settings, cell, digits, seed) for seed in group], plan)
        for found in training.fit(loop, snapshot, digits, plan, group):
            lines += found
    return {seed: [line for line in lines if line["seed"] == seed] for seed in SEEDS}


WAYS = [(2, "sequential"), (1, "vmap"), (2, "vmap"), (2, "spread")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "mode", "act"),
    [(2, "sequential", "relu_bn")]
    + [pytest.param(*way, act, marks=pytest.mark.slow) for way in WAYS for act in ("lk_relu", "relu_bn")],
)
def test_the_curves_are_those_of_one_device_and_one_seed_at_a_time(devices, mode, act, digits):
    ours = train(digits, act, devices=devices, mode=mode, augment=True)
    for seed, expected in train(digits, act, augment=True).items():
        assert [line["epoch"] for line in ours[seed]] == [1, 2]
        for line, reference in zip(ours[seed], expected, strict=True):
            assert line["train_loss"] == pytest.approx(reference["train_loss"], abs=1e-5)
            assert line["test_accuracy"] == pytest.approx(reference["test_accuracy"], abs=1 / 60)
            assert line["dead_by_layer"] == reference["dead_by_layer"]
            if act == "lk_relu":  # Adam moves a bias before batch norm by rounding errors: its gradient is zero
                np.testing.assert_allclose(line["signal_by_layer"], reference["signal_by_layer"], rtol=1e-3)


def test_a_batch_is_split_and_an_uneven_one_is_not():
    place = placement(depth.Settings(devices=2))
    even, uneven = place.batch(np.arange(100)), place.batch(np.arange(31))
    assert sorted(shard.data.shape for shard in even.addressable_shards) == [(50,), (50,)]
    assert sorted(shard.data.shape for shard in uneven.addressable_shards) == [(31,), (31,)]
    shared = place.shared(jnp.ones((4, 3)))
    assert [shard.data.shape for shard in shared.addressable_shards] == [(4, 3), (4, 3)]


def flops(digits, settings, batch_size):
    """Of a training step, on each device."""
    place = placement(settings)
    plan = training.Plan(ADAM, 1, batch_size, place=place)
    seeds = range(settings.seeds) if place.stacked else range(1)
    cell = {"act": "lk_relu", "init": "auto", "depth": 2}
    loop, snapshot = training.start([depth.build(settings, cell, digits, seed) for seed in seeds], plan)
    index = place.batch(np.stack([np.arange(batch_size)] * len(seeds)) if place.stacked else np.arange(batch_size))
    key = jax.random.split(jax.random.key(0), len(seeds)) if place.stacked else jax.random.key(0)
    arrays, lr = plan.arrays(digits)
    lowered = step.lower(loop, snapshot.arrays, arrays, index, place.of_seeds(key), np.int32(0), lr)
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_each_device_does_its_share_of_the_work(digits):
    alone = flops(digits, depth.Settings(), 100)
    assert flops(digits, depth.Settings(devices=2), 100) == pytest.approx(alone / 2, rel=0.1)
    assert flops(digits, depth.Settings(devices=2), 99) == pytest.approx(alone, rel=0.1)  # not split
    spread = flops(digits, depth.Settings(devices=2, seeds=2, seeds_mode="spread"), 100)
    assert spread == pytest.approx(alone, rel=0.1)


def test_seeds_are_spread_over_the_devices():
    place = placement(depth.Settings(devices=2, seeds=4, seeds_mode="spread"))
    own = place.of_seeds(jnp.arange(4.0))
    assert [shard.data.tolist() for shard in own.addressable_shards] == [[0, 1], [2, 3]]
    doubled = jax.jit(place.over_seeds(lambda x, y: x * y, (True, False)))(own, jnp.float32(2))
    assert doubled.tolist() == [0, 2, 4, 6]
    assert len({shard.device for shard in doubled.addressable_shards}) == 2


@pytest.mark.slow
def test_a_seed_that_diverges_leaves_the_other_one_unharmed(digits):
    """Only the first seed has parameters that explode."""
    settings = depth.Settings(seeds=2, seeds_mode="vmap")
    plan = training.Plan(sgd(1e-2), 2, 100, place=placement(settings))
    cell = {"act": "relu", "init": "auto", "depth": 2}
    models = [depth.build(settings, cell, digits, seed) for seed in SEEDS]
    models[0].read_out.linear.kernel[...] = models[0].read_out.linear.kernel[...] * 1e30
    loop, snapshot = training.start(models, plan)
    lines = [line for found in training.fit(loop, snapshot, digits, plan, SEEDS) for line in found]
    assert [(line["seed"], line["epoch"], "diverged" in line) for line in lines] == [
        (SEEDS[0], 1, True), (SEEDS[1], 1, False), (SEEDS[1], 2, False)
    ]  # fmt: skip
    alone = train(digits, "relu", optimizer=sgd(1e-2))[SEEDS[1]]
    assert [line["train_loss"] for line in lines[1:]] == pytest.approx([line["train_loss"] for line in alone], abs=1e-5)


def test_more_devices_than_there_are():
    check_devices(jax.device_count())
    with pytest.raises(UsageError, match=rf"--devices 64 needs 64 devices, got {jax.device_count()} \(cpu\)"):
        check_devices(64)


@pytest.mark.slow
def test_four_devices_by_command(tmp_path):
    """Batches of 480, 480 and 477, the last of which 4 does not divide; batch norm; seeds in all ways."""

    def run(name, *options):
        tiny = "--preset quick --act relu_bn lk_relu --depth 3 --epochs 2 --batch-size 480 --seeds 4 --augment"
        code, out, error = finish(start("-m", "experiments.depth", *tiny.split(), *options, "--out", tmp_path / name))
        assert (code, error) == (0, "")
        said.append(out)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return {(line["act"], line["seed"], line["epoch"]): line for line in lines}

    said = []
    alone = run("alone")
    assert len(alone) == 2 * 4 * 2
    for mode in ("sequential", "vmap", "spread"):
        ours = run(mode, "--devices", "4", "--seeds-mode", mode, "--time-steps", "2")
        assert "device   4 x cpu" in said[-1]
        assert json.loads((tmp_path / mode / "config.json").read_text())["hardware"]["devices"] == 4
        assert ours.keys() == alone.keys()
        for key, line in alone.items():
            assert ours[key]["train_loss"] == pytest.approx(line["train_loss"], abs=1e-5)
            assert ours[key]["test_accuracy"] == pytest.approx(line["test_accuracy"], abs=2 / 360)
        times = json.loads((tmp_path / mode / "times.json").read_text())
        assert [net["act"] for net in times["medians"]] == ["relu_bn", "lk_relu"]
        assert all(net["step_seconds"] > 0 for net in times["medians"])
