"""The problems of Kumar et al.: streams are what they say, nets compare fairly, scores come before learning."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine.checkpoints import Checkpoints
from experiments.engine.errors import UsageError
from experiments.engine.flatten import flatten
from experiments.plasticity import __main__ as plasticity
from experiments.plasticity.kumar import command, problems, runs, table
from experiments.plasticity.kumar.methods import METHODS, RandomSmoothLeaky, hidden_units
from experiments.plasticity.kumar.net import Online, Shape, by_patches, max_pool, shape_for
from experiments.plasticity.kumar.problems import PROBLEMS, batches, task
from experiments.plasticity.kumar.starts import STARTS
from linked_jax import lk_relu, lk_swish
from tests.cases import first_fast

KEY = jax.random.key(0)


def half(name="mnist", size=40, classes=10):
    shape = (28, 28, 1) if name == "mnist" else (32, 32, 3)
    images = np.random.default_rng(size).integers(0, 256, (size, *shape), dtype=np.uint8)
    return data_lib.Split(name, "test", classes, images, np.arange(size, dtype=np.int32) % classes, "0" * 16)


def small(name, **changes):
    """A problem of few and short tasks."""
    changes = {"images": 32, "epochs": 2, "batch_size": 8, "tasks": 4} | changes
    return dataclasses.replace(PROBLEMS[name], **changes)


MNIST, CIFAR = half(), half("cifar10")


# --- problems -------------------------------------------------------------------------------------------------------


def test_the_sizes_are_the_papers():
    assert {name: (p.tasks, p.steps) for name, p in PROBLEMS.items()} == {
        "permuted_mnist": (500, 625),
        "random_label_mnist": (50, 30_000),
        "random_label_cifar": (50, 30_000),
        "cifar_5plus1": (30, 780),
    }


def test_a_permuted_task_has_the_same_pixels_in_another_order_and_its_labels():
    problem = small("permuted_mnist", images=40)
    made = task(problem, MNIST, 0, 3)
    flat_images = MNIST.images.reshape(40, -1)
    by_label = {image.tobytes(): label for image, label in zip(np.sort(flat_images), MNIST.labels, strict=True)}
    assert [by_label[np.sort(image).tobytes()] for image in made.images] == made.labels.tolist()
    columns = {column.tobytes() for column in flat_images[np.argsort(made.images.sum(axis=1))].T}
    assert len(columns) == 784
    order = np.argsort(made.images.sum(axis=1)), np.argsort(flat_images.sum(axis=1))
    assert sorted(c.tobytes() for c in made.images[order[0]].T) == sorted(c.tobytes() for c in flat_images[order[1]].T)


def test_random_labels_are_those_of_the_images_shuffled_and_images_stay():
    problem = small("random_label_mnist")
    first, second = (task(problem, MNIST, 0, number) for number in (0, 1))
    assert (first.images == second.images).all()
    assert (first.labels != second.labels).any()
    assert sorted(first.labels) == sorted(second.labels)
    assert (task(problem, MNIST, 1, 0).images != first.images).any()


def test_classes_of_5plus1_are_new_in_each_task_and_tasks_alternate():
    cifar100 = half("cifar100", 100 * 3, 100)
    problem = small("cifar_5plus1", images=15)
    seen = []
    for number in range(PROBLEMS["cifar_5plus1"].tasks):
        made = task(problem, cifar100, 0, number)
        found = set(made.labels.tolist())
        assert len(found) == (5 if number % 2 == 0 else 1)
        assert problem.hard(number) == (number % 2 == 0)
        assert len(made.labels) == 3 * len(found)
        of_class = {image.tobytes() for label in found for image in cifar100.images[cifar100.labels == label]}
        assert {image.tobytes() for image in made.images} == of_class
        seen += found
    assert len(seen) == len(set(seen)) == 90


@pytest.mark.parametrize("name", PROBLEMS)
def test_tasks_differ_by_number_and_seed_and_by_nothing_else(name):
    data = half(PROBLEMS[name].dataset, 200, PROBLEMS[name].classes)
    made = [task(small(name), data, seed, number) for seed, number in ((0, 0), (0, 2), (1, 0), (0, 0))]
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))  # noqa: E731
    assert [same(made[0], other) for other in made[1:]] == [False, False, True]


@pytest.mark.parametrize(("size", "epochs"), [(2500, 10), (500, 52)])
def test_batches_are_whole_epochs_of_full_batches(size, epochs):
    made = batches(PROBLEMS["cifar_5plus1"], KEY, size)
    assert made.shape == (780, 32)
    of_epoch = made.reshape(epochs, -1)
    assert all(len(set(epoch)) == len(epoch) for epoch in of_epoch.tolist())
    assert (of_epoch[0] != of_epoch[1]).any()


# --- nets -----------------------------------------------------------------------------------------------------------


def test_a_link_of_two_keeps_the_fraction_that_the_authors_print():
    kept = {"permuted_mnist": (91, 91), "random_label_mnist": (91, 91)}
    kept |= {"random_label_cifar": (11, 11, 73, 73), "cifar_5plus1": (11, 11, 69, 69)}
    assert {name: shape_for(problem, 2).sizes for name, problem in PROBLEMS.items()} == kept
    for problem in PROBLEMS.values():
        plain = shape_for(problem, 1)
        assert (plain.hidden, plain.channels) == (100, 16)
        assert 0 <= shape_for(problem, 2).parameters(2) / plain.parameters(1) - 1 < 0.01


@pytest.mark.parametrize("name", first_fast(["cifar_5plus1", "permuted_mnist"]))
@pytest.mark.parametrize("row", first_fast(["lk_relu", "relu"]))
def test_parameters_are_those_of_the_net(name, row):
    method, problem = METHODS[row], PROBLEMS[name]
    net = nnx.eval_shape(lambda: method.net(problem, KEY))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param)))
    assert method.shape(problem).parameters(method.act.arity) == count


@pytest.mark.slow
def test_a_product_of_patches_is_the_convolution_and_so_are_its_gradients():
    x, kernel = jax.random.normal(KEY, (3, 9, 8, 4)), jax.random.normal(KEY, (5, 5, 4, 6))
    numbers = ("NHWC", "HWIO", "NHWC")
    plain = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=numbers)  # noqa: E731
    np.testing.assert_allclose(by_patches(x, kernel), plain(x, kernel), atol=1e-4)
    g = jax.random.normal(jax.random.key(1), (3, 5, 4, 6))
    found, wanted = (jax.vjp(f, x, kernel)[1](g) for f in (by_patches, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)


def test_pools():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(max_pool(x), x.reshape(2, 2, 2, 3, 2, 6).max(axis=(2, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("link", first_fast([lk_relu, lk_swish]))
def test_our_start_reads_a_flattened_link_as_its_pre_activations(link):
    kernel = STARTS["ours"](link, False)[0](KEY, (2 * 2 * 2 * 3, 7), jnp.float32)
    z = jax.random.normal(KEY, (40, 2, 2, 3))
    k, residual, *_ = np.linalg.lstsq(flatten(z, 1), flatten(link(z), 2) @ kernel)
    assert residual.max() < 1e-6
    np.testing.assert_allclose(k.T @ k, np.eye(7), atol=1e-4)


@pytest.mark.slow
def test_pytorchs_start_is_uniform_within_one_over_the_root_of_the_fan_in():
    net = METHODS["relu"].net(PROBLEMS["cifar_5plus1"], KEY)
    for layer, fan_in in zip(net.layers, (75, 400, 400, 100, 100), strict=True):
        for values in (layer.kernel[...], layer.bias[...]):
            assert float(jnp.abs(values).max()) <= fan_in**-0.5
        np.testing.assert_allclose(layer.kernel[...].std(), (3 * fan_in) ** -0.5, rtol=0.05)
    assert len({float(layer.bias[0]) for layer in net.layers}) == 5


def test_the_shuffled_start_has_the_kernels_of_ours_but_for_signs_of_mirrored_rows():
    kernel = np.asarray(STARTS["shuffled"](lk_relu, False)[0](KEY, (5, 5, 2 * 8, 6), jnp.float32))
    plain, mirrored = np.split(kernel, 2, axis=-2)
    signs = np.where((mirrored == plain).all(axis=(0, 1, 3)), 1, -1)
    np.testing.assert_array_equal(mirrored, plain * signs[:, None])
    assert 0 < (signs == 1).sum() < 8
    np.testing.assert_allclose(plain.sum(axis=(0, 1)).T @ plain.sum(axis=(0, 1)), np.eye(6), atol=1e-5)


@pytest.mark.slow
def test_scales_of_the_ablation():
    kernels = {name: STARTS[name](lk_relu, False)[0](KEY, (64, 16), jnp.float32) for name in STARTS}
    squares = {name: float(jnp.square(kernel).sum() / 16) for name, kernel in kernels.items()}
    wanted = {"ours": 2, "shuffled": 2, "variance_preserving": 2, "normal": 2, "orthogonal": 1, "pytorch": 1 / 3}
    wanted |= {"normal_biased": 2, "pytorch_unbiased": 1 / 3}
    assert squares == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(
    ("kernels", "biases", "both"), [("normal", "pytorch", "normal_biased"), ("pytorch", "normal", "pytorch_unbiased")]
)
def test_a_crossed_start_has_the_kernel_of_one_start_and_the_bias_of_the_other(kernels, biases, both):
    (kernel, _), (_, bias), crossed = (STARTS[name](lk_relu, False) for name in (kernels, biases, both))
    shape = (64, 16)
    np.testing.assert_array_equal(crossed[0](KEY, shape, jnp.float32), kernel(KEY, shape, jnp.float32))
    drawn = crossed[1](KEY, (16,), jnp.float32, fan_in=64)
    np.testing.assert_array_equal(drawn, bias(KEY, (16,), jnp.float32, fan_in=64))
    assert drawn.any() == (biases == "pytorch")


def test_the_normal_start_has_the_scale_of_ours_and_no_columns_at_right_angles():
    shape = (400, 200)
    ours, normal = (
        STARTS[name](lk_relu, False)[0](KEY, shape, jnp.float32) for name in ("variance_preserving", "normal")
    )
    np.testing.assert_allclose((normal**2).mean(), (ours**2).mean(), rtol=0.02)
    right = ours.T @ ours
    np.testing.assert_allclose(right, right[0, 0] * np.eye(200), atol=1e-3)
    assert np.abs((normal.T @ normal) / right[0, 0] - np.eye(200)).max() > 0.1
    first = STARTS["normal"](lk_relu, True)[0](KEY, shape, jnp.float32)
    np.testing.assert_allclose((first**2).mean(), 1 / 400, rtol=0.02)
    assert not STARTS["normal"](lk_relu, False)[1](KEY, (9,), jnp.float32, fan_in=400).any()


def test_the_random_slope_is_drawn_once_a_pass_and_its_mean_is_the_links():
    act, z = RandomSmoothLeaky(0.6, 0.9), jnp.full((3, 4), -10.0)
    drawn = [np.unique(np.round(np.asarray(act(z, jax.random.key(i))) / -10, 5)) for i in range(40)]
    assert all(slopes.size == 1 for slopes in drawn)
    slopes = np.concatenate(drawn)
    assert 0.6 <= slopes.min() < 0.65
    assert 0.85 < slopes.max() <= 0.9
    np.testing.assert_allclose(act.link(z), 0.75 * z, atol=1e-4)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_batch_is_scored_by_the_logits_of_its_loss():
    net = METHODS["relu"].net(PROBLEMS["permuted_mnist"], KEY)
    graph, parameters, state = nnx.split(net, nnx.Param, ...)
    made = problems.Task(jnp.asarray(MNIST.images.reshape(40, -1)), jnp.asarray(MNIST.labels))
    loss, state = Online(graph, (0.5,), (0.5,))(parameters, state, made, jnp.arange(8, 24), KEY)
    x = (MNIST.images.reshape(40, -1)[8:24].astype(np.float64) / 255 - 0.5) / 0.5
    logits, labels = np.asarray(net(jnp.float32(x), KEY), np.float64), MNIST.labels[8:24]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(p[np.arange(16), labels]).mean(), rtol=1e-5)
    np.testing.assert_allclose(state["right"].get_value(), (logits.argmax(axis=1) == labels).mean(), rtol=1e-6)


def by_hand(work, seed, rate):
    """Accuracies of a plain loop: score, then learn; the optimiser goes on."""
    net = work.method.net(work.problem, jax.random.fold_in(jax.random.key(seed), 2**31 - 2))
    graph, params, _ = nnx.split(net, nnx.Param, ...)
    tx = optax.adam(rate)
    state, found = tx.init(params), []

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = nnx.merge(graph, params, nnx.split(net, nnx.Param, ...)[2], copy=True)(x, KEY)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits

        gradients, logits = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, (logits.argmax(axis=1) == y).mean()

    for number in range(work.tasks):
        images, labels = task(work.problem, work.data, seed, number)
        key = jax.random.fold_in(jax.random.key(seed), number)
        right = []
        for batch in batches(work.problem, key, len(labels)):
            x = (jnp.float32(images[batch]) / 255 - jnp.array(work.problem.mean)) / jnp.array(work.problem.deviation)
            params, state, accuracy = step(params, state, x, labels[batch])
            right.append(float(accuracy))
        found.append(np.mean(right))
    return found


@pytest.mark.slow
def test_runs_together_are_what_a_plain_loop_computes_for_each():
    work = runs.Work(small("random_label_mnist", epochs=4), METHODS["lk_relu_ours"], MNIST, 2)
    found = runs.learn(work, [(0, 1e-3), (1, 1e-2)])
    for line, (seed, rate) in zip(found, [(0, 1e-3), (1, 1e-2)], strict=True):
        wanted = by_hand(work, seed, rate)
        np.testing.assert_allclose(line["accuracy"], wanted, atol=0.02)
        assert line["score"] == pytest.approx(np.mean(line["accuracy"]), abs=1e-5)
        assert line["finite"]
    assert found[0]["accuracy"] != found[1]["accuracy"]


@pytest.mark.slow
def test_the_score_of_5plus1_is_that_of_its_hard_tasks():
    cifar100 = half("cifar100", 100 * 4, 100)
    work = runs.Work(small("cifar_5plus1", images=20, epochs=8, batch_size=4), METHODS["lk_relu_ours"], cifar100, 4)
    (line,) = runs.learn(work, [(0, 1e-3)])
    np.testing.assert_allclose(line["accuracy"], by_hand(work, 0, 1e-3), atol=0.03)
    assert line["score"] == pytest.approx(np.mean(line["accuracy"][::2]), abs=1e-5)
    assert np.mean(line["accuracy"][1::2]) > line["score"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random_label_mnist", "random_label_cifar"])
@pytest.mark.parametrize("row", METHODS)
def test_every_row_learns(row, name):
    data = MNIST if name == "random_label_mnist" else CIFAR
    work = runs.Work(small(name, epochs=25, images=16), METHODS[row], data, 2)
    (line,) = runs.learn(work, [(0, 1e-3)])
    assert line["finite"]
    assert min(line["accuracy"]) > 0.2  # of ten classes
    assert (np.array(line["weights"]) > 0).all()


@pytest.mark.slow
def test_linked_half_way_a_net_computes_the_same():
    work = runs.Work(small("random_label_cifar"), METHODS["revived"], CIFAR, 2)
    carry = work.start([(0, 1e-3)])
    after = runs.linked(carry)
    one = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    before, now = (
        nnx.merge(loop.loss.graph, one(c.parameters), one(c.state))
        for loop, c in zip(work.loops, (carry, after), strict=True)
    )
    x = jax.random.normal(KEY, (4, 32, 32, 3))
    np.testing.assert_allclose(now(x, KEY), before(x, KEY), atol=1e-5)
    assert (before.arity, now.arity) == (1, 2)
    moments = jax.tree.leaves(optax.tree_utils.tree_get(after.opt_state, "mu"))
    assert [m.shape for m in moments] == [p.shape for p in jax.tree.leaves(after.parameters)]


class CutOffError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("row", ["relu", "revived", "continual_backprop", "shrink_and_perturb"])
def test_a_run_that_was_cut_off_goes_on_and_is_the_same(row, tmp_path):
    work = runs.Work(small("random_label_mnist", epochs=1), METHODS[row], MNIST, 4)
    untimed = lambda lines: [each | {"training_seconds": 0} for each in lines]  # noqa: E731
    whole = untimed(runs.learn(work, [(0, 1e-3)]))
    kept, done = Checkpoints(tmp_path / "unfinished" / "run", 0.0), []

    def stop_in(number):
        def on_task(count):
            done.append(count)
            if sum(done) == number:
                raise CutOffError

        return on_task

    for number in (2, 4):  # the third task is not on disk yet when it is cut off
        done.clear()
        with pytest.raises(CutOffError):
            runs.learn(work, [(0, 1e-3)], unfinished=kept, on_task=stop_in(number))
    done.clear()
    assert untimed(runs.learn(work, [(0, 1e-3)], unfinished=kept, on_task=done.append)) == whole
    assert done == [3, 1]
    kept.clear()
    assert not (tmp_path / "unfinished" / "run").exists()


@pytest.mark.slow
def test_units_are_those_between_two_layers():
    net = METHODS["lk_relu"].net(small("cifar_5plus1"), KEY)
    names = {f"layers/{i}" for i in range(5)}
    found = hidden_units(Shape(True, 11, 69, 3, 100))
    assert [unit.incoming for unit in found] == [f"layers/{i}" for i in range(4)]
    assert {unit.outgoing for unit in found} < names
    assert len(net.layers) == 5


# --- tables ---------------------------------------------------------------------------------------------------------


def line(row, rate, seed, accuracy, problem="cifar_5plus1", tasks=4):
    counted = [a for n, a in enumerate(accuracy) if PROBLEMS[problem].hard(n)]
    more = {name: [0.5] * len(accuracy) for name in ("dormant", "rank", "weights")}
    key = {"problem": problem, "row": row, "tasks": tasks, "rate": rate, "seed": seed, "accuracy": accuracy}
    facts = {"units": [2, 2], "parameters": 1000, "data": "mnist's test half", "finite": True, "training_seconds": 2.0}
    return {**key, "score": float(np.mean(counted)), **more, **facts}


LINES = [
    *(line("relu", rate, seed, [rate, 0.9, rate, 0.9]) for rate in (0.1, 0.2) for seed in range(3)),
    *(line("relu", 0.2, seed, [0.5, 1.0, 0.25 * (seed - 2), 0.5]) for seed in (3, 4)),
    line("lk_relu", 0.1, 0, [0.75, 0.9, 0.95, 0.9]),
]


def test_the_rate_is_chosen_by_the_first_seeds_and_the_result_is_the_others():
    of_relu = [each for each in LINES if each["row"] == "relu"]
    assert table.best_rate(of_relu) == 0.2
    assert [each["seed"] for each in table.result(of_relu)] == [3, 4]
    assert [each["seed"] for each in table.result(LINES[-1:])] == [0]
    assert table.best_rate(of_relu[-2:]) is None
    assert len(table.result(of_relu[-2:])) == 2


def test_the_table_is_what_numpy_finds_in_the_lines():
    first, second = table.table("cifar_5plus1", 4, LINES)
    assert (first["method"], first["score"], first["seeds"]) == ("lk_relu", "85.00", "1*")
    scores = np.array([(0.5 + 0.25) / 2, (0.5 + 0.5) / 2])
    assert second["score"] == f"{100 * scores.mean():.2f} ± {100 * scores.std(ddof=1):.2f}"
    assert (second["easy tasks"], second["rate"], second["seeds"]) == ("75.00 ± 0.00", "0.2", "2")
    tried = {row["method"]: row for row in table.rates_table("cifar_5plus1", 4, LINES)}
    assert tried["relu"] == {"method": "relu", "rate 0.2": "20.00 ± 0.00", "rate 0.1": "10.00 ± 0.00"}
    assert tried["lk_relu"]["rate 0.2"] == "-"


def test_runs_that_no_table_shows_are_named():
    assert table.left_out("cifar_5plus1", 4, LINES) == ""
    another = line("relu", 0.3, 3, [0.25, 0.9, 0.75, 0.9])
    said = "Not in the table, at other rates: relu at 0.3, seed 3: 50.00."
    assert table.left_out("cifar_5plus1", 4, [*LINES, another]) == said


def test_published_numbers_stand_beside_ours_only_at_the_full_number_of_tasks():
    rows = {row["method"]: row for row in table.beside_published(LINES)}
    assert rows["relu"]["5+1 CIFAR"] == "- / 4.76"
    full = [line("relu", 1e-3, 3, [0.5] * 30, tasks=30)]
    rows = {row["method"]: row for row in table.beside_published(full)}
    assert rows["relu"]["5+1 CIFAR"] == "50.00 / 4.76"
    assert set(rows) <= set(METHODS)
    assert all(set(values) == set(rows) for values in table.published()["problems"].values())
    assert set(table.published()["problems"]) == set(PROBLEMS)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ("rleu",)}, "--methods: there is no 'rleu'; take of relu"),
        ({"problems": ("mnist",)}, "--problems: there is no 'mnist'; take of permuted_mnist"),
        ({"problems": ()}, "at least one of permuted_mnist"),
        ({"rates": (0.0,)}, "--rates are positive numbers, got 0.0"),
        ({"rates": (float("nan"),)}, "--rates are positive numbers, got nan"),
        ({"rates": ()}, "nothing to run"),
        ({"tasks": -1}, "--tasks is from 0 to 500, got -1"),
        ({"tasks": 31}, "--tasks 31 is more than there are: cifar_5plus1 has 30; pass fewer, or 0"),
        ({"seeds": -1}, "--seeds is from 0"),
        ({"tuning_seeds": 4}, "--tuning-seeds is from 0 to 3, got 4"),
        ({"seeds": 0, "tuning_seeds": 0}, "nothing to run"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        command.check(command.Settings(**options))


def test_a_rate_that_is_given_twice_counts_once():
    assert command.check(command.Settings(rates=(1e-3, 1e-4, 1e-3))).rates == (1e-3, 1e-4)


def test_all_problems_and_all_methods():
    settings = command.check(command.Settings())
    assert (settings.problems, settings.methods) == (tuple(PROBLEMS), tuple(METHODS))


@pytest.mark.parametrize(
    ("options", "seeds_that_choose"),
    [
        ({}, [0, 1, 2, 0, 1, 2]),
        ({"tuning_seeds": 1}, [0, 0]),
        ({"tuning_seeds": 0}, []),
        ({"rates": (1e-3,)}, []),
        ({"rates": (1e-3,), "seeds": 0, "tuning_seeds": 1}, [0]),
    ],
)
def test_which_seeds_choose_the_rate(options, seeds_that_choose):
    assert [seed for seed, _ in command._tuning(command.Settings(**options))] == seeds_that_choose


def test_conv_nets_run_one_by_one_on_a_cpu_and_mlps_together(monkeypatch):
    made = [(seed, 1e-3) for seed in range(3)]
    groups = {name: command._groups(made, problem) for name, problem in PROBLEMS.items()}
    assert groups["cifar_5plus1"] == groups["random_label_cifar"] == [[run] for run in made]
    assert groups["permuted_mnist"] == groups["random_label_mnist"] == [made]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert command._groups(made, PROBLEMS["cifar_5plus1"]) == [made]
    assert command._groups([], PROBLEMS["cifar_5plus1"]) == []


def started(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["plasticity", *map(str, arguments)])
    plasticity.main()


def test_an_unknown_protocol_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="--protocol: there is no 'kumra'; take of streams, kumar, regression"):
        started(monkeypatch, "--protocol", "kumra")


def test_missing_data_names_what_to_prepare_and_how(monkeypatch, tmp_path):
    options = ["--protocol", "kumar", "--problems", "cifar_5plus1", "--data-dir", tmp_path / "none"]
    with pytest.raises(UsageError) as caught:
        started(monkeypatch, *options, "--out", tmp_path / "run")
    assert "cifar_5plus1 needs cifar100" in str(caught.value)
    assert "experiments.prepare cifar100" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_leaves_a_record_that_grows_and_resumes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data_lib, "load_split", lambda name, _: half(name))
    short = {name: small(name) for name in PROBLEMS}
    for module in (command, table):
        monkeypatch.setattr(module, "PROBLEMS", short)
    folder = tmp_path / "run"
    options = ["--protocol", "kumar", "--problems", "random_label_mnist", "--out", folder, "--tasks", 2, "--seeds", 1]
    started(monkeypatch, *options, "--methods", "relu", "--tuning-seeds", 2)
    whole = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(text) for text in whole]
    assert [(each["rate"], each["seed"]) for each in lines[:4]] == [(1e-3, 0), (1e-3, 1), (1e-4, 0), (1e-4, 1)]
    assert [(each["rate"], each["seed"]) for each in lines[4:]] == [(table.best_rate(lines), 3)]
    page = (folder / "table.md").read_text(encoding="utf-8")
    assert page == table.markdown(json.loads((folder / "config.json").read_text(encoding="utf-8")), lines)
    assert "mnist's test half" in page
    assert (folder / "random_label_mnist_2.png").stat().st_size > 10_000
    assert not list((folder / "unfinished").glob("*")) or not (folder / "unfinished").exists()
    (folder / "metrics.jsonl").write_text("\n".join(whole[:-1]) + "\n", encoding="utf-8")
    started(monkeypatch, *options, "--methods", "relu", "--tuning-seeds", 2)
    again = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = {"seconds": 0, "training_seconds": 0}
    assert [each | timed for each in again] == [each | timed for each in lines]
    monkeypatch.setattr(data_lib, "load_split", lambda name, _: dataclasses.replace(half(name), fingerprint="other"))
    with pytest.raises(
        UsageError, match=r"the runs of random_label_mnist in .* are on mnist's test half, .*; pass ano"
    ):
        started(monkeypatch, *options, "--methods", "relu", "--tuning-seeds", 3)
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == len(lines)
    monkeypatch.setattr(data_lib, "load_split", lambda name, _: half(name))
    capsys.readouterr()
