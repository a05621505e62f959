"""Continual learning: the streams are what they say, nets compare fairly, tables come from lines alone."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.engine import data as data_lib
from experiments.engine import tasks
from experiments.engine.errors import UsageError
from experiments.engine.loop import advance
from experiments.plasticity import __main__ as plasticity
from experiments.plasticity import continual
from experiments.plasticity import net as plasticity_net
from experiments.plasticity import plots as plasticity_plots
from experiments.plasticity.net import METHODS, RULE, Round, build, loop_for
from linked_jax import Link
from linked_jax.diagnostics import unit_statistics
from linked_jax.probe import observe
from linked_jax.signal_statistics import feature_moments
from tests.commands import command

ROOT = Path(__file__).parents[2]
DIGITS = data_lib.load("digits")
BASE = tasks.flat(DIGITS, 48)


def small(name, seed=0, width=8):
    return build(METHODS[name], 64, width, 10, seed)


def taps_of(model, x):
    return observe(lambda model, x: model(x), model, x)


def line(row, rate, seed, accuracy, *, width=8, stream="permuted", dormant=0.25):
    measures = {"dead": [0.125] * 20, "dormant": [dormant] * 20, "rank": [3.0] * 20, "finite": [1.0] * 20}
    key = {"stream": stream, "row": row, "width": width, "rate": rate, "seed": seed}
    return {**key, "accuracy": accuracy, **measures, "seconds": 1.0}


def net(row, *, width=8, column="equal_width"):
    return {"row": row, "column": column, "says": row, "width": width, "parameters": 10}


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_permuted_task_has_the_same_pixels_in_another_order_everywhere():
    task = tasks.permuted(BASE, tasks.task_key(0, 3))
    pairs = [(BASE.images, task.images), (BASE.test_images, task.test_images)]
    before, after = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    columns = {column.tobytes() for column in before.T}
    assert len(columns) > 40  # some pixels of the digits are always 0
    assert sorted(column.tobytes() for column in after.T) == sorted(column.tobytes() for column in before.T)
    assert (after != before).any()
    assert (task.labels == BASE.labels).all()
    assert (task.test_labels == BASE.test_labels).all()


def test_random_labels_are_of_ten_classes_and_about_uniform_and_images_stay():
    base = BASE._replace(images=jnp.zeros((5000, 64)), labels=jnp.zeros(5000, int))
    task = tasks.random_labels(base, tasks.task_key(0, 3))
    counts = np.bincount(np.asarray(task.labels))
    assert len(counts) == 10
    assert np.abs(counts - 500).max() < 5 * np.sqrt(450)
    assert task.images is base.images
    assert task.test_images is base.images
    assert task.test_labels is task.labels


@pytest.mark.parametrize(("stream", "what"), [("random_labels", "labels"), ("permuted", "images")])
def test_tasks_differ_by_number_and_by_seed_and_by_nothing_else(stream, what):
    keys = [tasks.task_key(seed, number) for seed, number in ((0, 0), (0, 1), (1, 0), (0, 0))]
    made = [np.asarray(getattr(tasks.STREAMS[stream](BASE, key), what)) for key in keys]
    assert (made[0] == made[3]).all()
    assert (made[0] != made[1]).any()
    assert (made[0] != made[2]).any()


def test_images_are_grey_averaged_over_blocks_and_standardised():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3))
    data = dataclasses.replace(
        DIGITS, train_images=jnp.asarray(pixels, jnp.uint8), train_labels=jnp.arange(5), test_images=DIGITS.test_images
    )
    blocks = pixels.mean(axis=3).reshape(5, 16, 2, 16, 2).mean(axis=(2, 4)).reshape(5, 256)
    found = tasks.flat(data, 3)
    np.testing.assert_allclose(found.images, ((blocks - blocks.mean()) / blocks.std())[:3], atol=1e-5)
    assert found.labels.tolist() == [0, 1, 2]
    whole = np.asarray(tasks.flat(DIGITS, 1437).images)
    assert whole.shape == (1437, 64)
    np.testing.assert_allclose([whole.mean(), whole.std()], [0, 1], atol=1e-5)


# --- nets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [64, 256])
def test_nets_of_equal_parameters_are_within_two_per_cent(features):
    wanted = plasticity_net.parameters(METHODS["relu"], features, plasticity.UNITS, 10)
    for method in METHODS.values():
        width = plasticity_net.width_for(method, features, wanted, 10)
        found, *others = (plasticity_net.parameters(method, features, width + step, 10) for step in (0, -1, 1))
        assert abs(found - wanted) <= 0.02 * wanted
        assert abs(found - wanted) <= min(abs(other - wanted) for other in others)


@pytest.mark.parametrize("name", ["layer_norm", *(name for name in METHODS if name != "layer_norm")])
def test_parameters_are_those_of_the_net(name):
    method = METHODS[name]
    end = dataclasses.replace(method, link=method.at_end or method.link)
    net = nnx.eval_shape(lambda: build(end, 64, 8, 10, 0))
    leaves = jax.tree.leaves(nnx.state(net, nnx.Param))
    assert plasticity_net.parameters(method, 64, 8, 10) == sum(leaf.size for leaf in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_units_of_a_net_are_those_of_its_links(name):
    model = small(name)
    logits, taps = taps_of(model, BASE.images)
    np.testing.assert_allclose(logits, model(BASE.images), atol=1e-5)
    x, wanted = BASE.images, []
    for layer in model.layers:
        z, x = x, layer(x)
        if isinstance(layer, Link):
            slopes = [jax.vmap(jax.vmap(jax.grad(g)))(z) for g in layer.members]
            stats = unit_statistics(z, x, jnp.concatenate(slopes, axis=1), arity=layer.arity)
            wanted.append((stats, feature_moments(x)))
    assert len(taps) == len(wanted) == 3
    for tap, (stats, features) in zip(taps, wanted, strict=True):
        assert stats.mean.shape == (8,)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), tap.stats, stats)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), tap.features, features)


@pytest.mark.slow
def test_half_way_the_net_is_linked_and_computes_the_same():
    model = small("revived")
    net = model, RULE.init(nnx.state(model, nnx.Param))
    for task, number in ((4, 0), (5, 1), (6, 0)):
        assert plasticity_net.link_half_way(net, Round(task, 10, number, BASE.images, jax.random.key(0))) is net
    now = Round(5, 10, 0, BASE.images, jax.random.key(0))
    linked, opt_state = plasticity_net.link_half_way(net, now)
    np.testing.assert_allclose(linked(BASE.images), model(BASE.images), atol=1e-6)
    assert [layer.arity for layer in linked.layers if isinstance(layer, Link)] == [2, 2, 2]
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (nnx.state(linked, nnx.Param), opt_state[0].mu)]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])


@pytest.mark.slow
def test_redo_brings_a_dead_unit_back():
    model = small("redo")
    model.layers[0].bias[...] = jnp.where(jnp.arange(8) == 3, -100.0, 0.0)
    net = model, RULE.init(nnx.state(model, nnx.Param))
    assert not taps_of(model, BASE.images)[1][0].stats.live[3]
    model, _ = METHODS["redo"].change(net, Round(0, 2, 0, BASE.images, jax.random.key(0)))
    assert taps_of(model, BASE.images)[1][0].stats.live.all()


@pytest.mark.slow
def test_what_is_measured_is_what_numpy_finds():
    model = small("relu", width=16)
    model.layers[2].bias[...] = jnp.where(jnp.arange(16) < 5, -100.0, 0.0)
    graph, state = nnx.split(model)
    key = tasks.task_key(7, 1)
    stacked = jax.tree.map(lambda leaf: leaf[None], (state, tasks.random_labels(BASE, key)))
    found = continual._measure(graph, *stacked)
    x, layers = np.asarray(BASE.images), []
    for layer in (0, 2, 4):
        x = np.maximum(x @ model.layers[layer].kernel[...] + model.layers[layer].bias[...], 0)
        layers.append(np.asarray(x))
    logits = x @ model.layers[6].kernel[...] + model.layers[6].bias[...]
    labels = tasks.random_labels(BASE, key).labels
    scores = [layer.mean(axis=0) / layer.mean() for layer in layers]
    singular = np.linalg.svd(layers[-1].astype(np.float64), compute_uv=False)
    p = singular[singular > 1e-4] / singular.sum()
    wanted = {
        "accuracy": (logits.argmax(axis=1) == labels).mean(),
        "dead": np.mean([(layer == 0).all(axis=0) for layer in layers]),
        "dormant": np.mean([score <= 0.025 for score in scores]),
        "rank": np.exp(-(p * np.log(p)).sum()),
        "finite": 1.0,
    }
    assert wanted["dead"] >= 5 / 48
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-2 if name == "rank" else 1e-6, err_msg=name)


@pytest.mark.slow
def test_training_is_optax_adam_on_whole_shuffled_batches():
    model, key, rate = small("lk_relu"), jax.random.key(5), 3e-3
    graph, state = nnx.split(model)
    loop = loop_for(model)
    found, _ = advance(loop, loop.start([model]), BASE, tasks.batches(key, 48, epochs=2, batch_size=20), key, lr=rate)
    rule = optax.adam(rate)
    opt_state = rule.init(state)
    for epoch in jax.random.split(key, 2):
        order = np.asarray(jax.random.permutation(epoch, 48))
        assert sorted(order) == list(range(48))
        for batch in (order[:20], order[20:40]):

            def loss(state, batch=batch):
                logits = nnx.merge(graph, state)(BASE.images[batch])
                chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), BASE.labels[batch][:, None], axis=1)
                return -chosen.mean()

            updates, opt_state = rule.update(jax.grad(loss)(state), opt_state)
            state = optax.apply_updates(state, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found.parameters, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["revived", "redo"])
def test_runs_that_are_computed_together_are_as_those_alone(name):
    plan = continual.Plan("random_labels", 2, 2, 1, 16)
    together = continual.learn(METHODS[name], 8, plan, BASE, [(0, 1e-3), (3, 2e-3)])
    (alone,) = continual.learn(METHODS[name], 8, plan, BASE, [(3, 2e-3)])
    assert together[0] != together[1]
    for measure, values in alone.items():
        np.testing.assert_allclose(together[1][measure], values, rtol=0.05, atol=0.05)
    assert all(len(values) == 2 for values in alone.values())


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_rate_is_the_best_mean_accuracy_of_seed_zero():
    lines = [line("a", 0.1, 0, [0.5] * 20), line("a", 0.2, 0, [0.9] * 10 + [0.2] * 10), line("a", 0.3, 1, [1.0] * 20)]
    assert plasticity_plots.chosen(lines) == [lines[1]]
    lines.append(line("a", 0.2, 1, [0.0] * 20))
    assert plasticity_plots.chosen(lines) == [lines[1], lines[3]]


def test_the_table_is_what_numpy_finds_in_the_lines():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(3, 20)), rng.uniform(size=20) / 4
    lines = [line("a", 0.1, seed, a[seed].tolist()) for seed in range(3)]
    lines += [line("a", 0.2, 0, [0.0] * 20), line("a", 0.1, 0, [1.0] * 20, width=9), line("b", 0.1, 0, b.tolist())]
    config = {"nets": [net("b"), net("a"), net("a", width=9, column="equal_parameters")]}
    first, second = plasticity_plots.table("permuted", "equal_width", config, lines)
    means = a[:, -2:].mean(axis=1), a[:, :2].mean(axis=1)
    wanted = (means[0], means[1], means[0] - means[1], a.mean(axis=1))
    for name, values in zip(("last tasks", "first tasks", "difference", "all tasks"), wanted, strict=True):
        assert first[name] == f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"
    assert (first["method"], first["seeds"], first["rate"], first["dormant, last"]) == (
        "a",
        "3",
        "0.1",
        "0.2500 ± 0.0000",
    )
    assert (second["method"], second["last tasks"]) == ("b", f"{b[-2:].mean():.4f}")
    (other,) = plasticity_plots.table("permuted", "equal_parameters", config, lines)
    assert (other["last tasks"], other["units"]) == ("1.0000", "9")
    (tried,) = [
        row for row in plasticity_plots.rates_table("permuted", "equal_width", config, lines) if row["method"] == "a"
    ]
    assert tried["rate 0.2"] == "0.0000 (last 0.0000)"


@pytest.mark.parametrize("rows", [["redo"], ["lk_relu", "fourier"], list(METHODS)], ids=len)
def test_the_picture_has_no_empty_panel(rows, tmp_path):
    """Matplotlib warns of one."""
    config = {"nets": [net(row) for row in rows], "data": {"name": "digits"}}
    config["protocol"] = {"streams": ["permuted"], "tasks": 20}
    lines = [line(row, 1e-3, seed, [0.5] * 20) for row in rows for seed in (0, 1)]
    assert plasticity_plots.picture("equal_width", config, lines, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_net_whose_outputs_are_no_numbers_is_marked():
    bad = line("a", 0.1, 0, [0.1] * 20) | {"finite": [1.0] * 19 + [0.0]}
    (row,) = plasticity_plots.table("permuted", "equal_width", {"nets": [net("a")]}, [bad])
    assert row["method"] == "a (diverged)"


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ("rleu",)}, "there is no 'rleu'; take of relu"),
        ({"streams": ("mnist",)}, "--streams: there is no 'mnist'"),
        ({"widths": ("wide",)}, "--widths: there is no 'wide'"),
        ({"methods": ()}, "at least one of relu"),
        ({"tasks": 1}, "--tasks is from 2 to 10,000, got 1"),
        ({"seeds": 0}, "--seeds is from 1 to 100, got 0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        plasticity.check(plasticity.Settings(**options))


def test_all_methods_and_each_name_once():
    settings = plasticity.check(plasticity.Settings(streams=("permuted", "permuted")))
    assert (settings.streams, settings.methods) == (("permuted",), tuple(METHODS))


run = functools.partial(command, "experiments.plasticity")


@pytest.mark.slow
def test_a_bad_command_ends_with_one_line_and_code_2(tmp_path):
    for arguments in (["--tasks", "0"], ["--dataset", "cifar10", "--data-dir", str(tmp_path / "none")]):
        code, _, error = run(*arguments, "--out", str(tmp_path / "run"))
        assert code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_leaves_a_record_that_resumes(tmp_path):
    folder = tmp_path / "run"
    arguments = ["--methods", "relu", "revived", "--streams", "random_labels", "--tasks", "2", "--seeds", "2"]
    arguments += ["--widths", "equal_width", "--out", str(folder)]
    code, _, error = run(*arguments)
    assert code == 0, error
    whole = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(text) for text in whole]
    assert [(each["row"], each["seed"]) for each in lines] == [
        (row, s) for row in ("relu", "revived") for s in (0, 0, 0, 1)
    ]
    page = (folder / "table.md").read_text(encoding="utf-8")
    assert page == plasticity_plots.markdown(json.loads((folder / "config.json").read_text(encoding="utf-8")), lines)
    assert (folder / "plasticity_equal_width.png").stat().st_size > 10_000
    (folder / "metrics.jsonl").write_text("\n".join(whole[:-1]) + "\n", encoding="utf-8")
    assert run(*arguments)[0] == 0
    again = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(text) | {"seconds": 0} for text in again] == [each | {"seconds": 0} for each in lines]
    code, _, error = run(*arguments, "--tasks", "3")
    assert (code, "another protocol" in error) == (2, True)
