"""Slowly changing regression: the stream is what it says, the learner is plain SGD, the record resumes."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.engine.errors import UsageError
from experiments.plasticity import __main__ as plasticity
from experiments.plasticity import regression
from experiments.plasticity.regression import BIN, FLIP_AFTER, SLOW, build, examples


@pytest.mark.slow
def test_one_slow_bit_flips_from_stretch_to_stretch_and_the_others_are_random():
    stretches = [np.asarray(examples(0, number, 200).inputs) for number in range(12)]
    assert all((x[:, :SLOW] == x[0, :SLOW]).all() for x in stretches)
    flips = [np.flatnonzero(a[0, :SLOW] != b[0, :SLOW]) for a, b in itertools.pairwise(stretches)]
    assert [flip.size for flip in flips] == [1] * 11
    assert len(set(np.concatenate(flips))) > 3
    noise = np.stack([x[:, SLOW:] for x in stretches])
    assert set(np.unique(noise)) == {0, 1}
    assert 0.4 < noise.mean() < 0.6
    assert (examples(1, 0, 200).inputs != stretches[0]).any()


@pytest.mark.slow
def test_targets_are_those_of_a_fixed_net_of_threshold_units():
    of_units, of_outputs, *_ = jax.random.split(jax.random.key(3), 5)
    v = np.asarray(jax.random.rademacher(of_units, (100, 21), jnp.float32), np.float64)
    w = np.asarray(jax.random.rademacher(of_outputs, (100,), jnp.float32), np.float64)
    for number in (0, 5):
        x, y = (np.asarray(part, np.float64) for part in examples(3, number, 50))
        threshold = 21 * 0.7 - (v == -1).sum(axis=1)
        wanted = [sum(w[i] for i in range(100) if v[i] @ [*row, 1] > threshold[i]) for row in x]
        np.testing.assert_allclose(y, wanted)
        assert np.unique(y).size > 3


@pytest.mark.slow
@pytest.mark.parametrize("row", ["relu", "lk_relu_ours"])
def test_the_learner_is_plain_descent_one_example_a_step(row, monkeypatch):
    monkeypatch.setattr(regression, "BIN", FLIP_AFTER)
    found, other = regression.learn(row, [(2, 0.003), (2, 0.001)], 1, lambda _: None)
    net = build(row, 2)
    k1, b1, k2, b2 = (
        np.asarray(leaf[...], np.float64)
        for layer in (net.layers[0], net.layers[2])
        for leaf in (layer.kernel, layer.bias)
    )
    errors = []
    for x, y in zip(*(np.asarray(part, np.float64) for part in examples(2, 0)), strict=True):
        z = x @ k1 + b1
        signs = np.array([1.0, -1.0][: 1 + (row != "relu")])[:, None]
        h = np.maximum(signs * z, 0).ravel()
        error = h @ k2[:, 0] + b2[0] - y
        errors.append(error**2)
        dz = (2 * error * k2[:, 0].reshape(signs.size, -1) * (signs * z > 0) * signs).sum(axis=0)
        k2, b2 = k2 - 0.003 * 2 * error * h[:, None], b2 - 0.003 * 2 * error
        k1, b1 = k1 - 0.003 * np.outer(x, dz), b1 - 0.003 * dz
    assert found["error"] == [pytest.approx(np.mean(errors), rel=1e-2)]
    assert other["error"] != found["error"]


def test_the_table_is_what_numpy_finds_in_the_lines():
    errors = np.random.default_rng(0).uniform(size=(3, 20)).round(5)
    lines = [{"row": "relu", "rate": 0.01, "seed": seed, "error": errors[seed].tolist()} for seed in range(3)]
    lines.append({"row": "lk_relu", "rate": 0.001, "seed": 0, "error": [0.5] * 20})
    relu, linked = regression.table(lines)
    last, first = errors[:, -2:].mean(axis=1), errors[:, :2].mean(axis=1)
    assert relu["rate 0.01"] == f"{last.mean():.4f} ± {last.std(ddof=1):.4f}"
    assert regression.table(lines, first=True)[0]["rate 0.01"] == f"{first.mean():.4f} ± {first.std(ddof=1):.4f}"
    assert linked == {"method": "lk_relu", "rate 0.01": "-", "rate 0.001": "0.5000", "seeds": "1"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ("layer_norm",)}, "--methods: there is no 'layer_norm'; take of relu"),
        ({"seeds": 0}, "--seeds is from 1"),
        ({"examples": BIN - 1}, "--examples is from 40,000"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        regression.check(regression.Settings(**options))


@pytest.mark.slow
def test_every_row_has_a_learner_of_five_units():
    for row in regression.ROWS:
        sizes = [
            leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda row=row: build(row, 0)), nnx.Param))
        ]
        assert sum(sizes) in (111, 116)


@pytest.mark.slow
def test_the_command_leaves_a_record_that_resumes(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    options = ["--protocol", "regression", "--methods", "relu", "--seeds", "2", "--examples", BIN, "--out", folder]
    monkeypatch.setattr("sys.argv", ["plasticity", *map(str, options)])
    plasticity.main()
    whole = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(text) for text in whole]
    assert [(each["rate"], each["seed"]) for each in lines] == [(r, s) for r in regression.RATES for s in (0, 1)]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (folder / "table.md").read_text(encoding="utf-8") == regression.page(config, lines)
    assert (folder / "regression.png").stat().st_size > 10_000
    (folder / "metrics.jsonl").write_text("\n".join(whole[:-1]) + "\n", encoding="utf-8")
    plasticity.main()
    again = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for one, other in zip(again, lines, strict=True):
        np.testing.assert_allclose(one["error"], other["error"], rtol=1e-3)


def test_a_learner_that_diverges_is_counted_and_is_in_no_mean():
    errors = [np.array([1.0, 2.0]), np.array([3.0, np.inf]), np.array([np.nan, 1e9])]
    lines = [
        {"row": "relu", "rate": 0.01, "seed": seed, "error": [regression._known(error) for error in of_seed]}
        for seed, of_seed in enumerate(errors)
    ]
    assert [line["error"] for line in lines] == [[1.0, 2.0], [3.0, None], [None, None]]
    (row,) = regression.table(lines)
    assert row == {"method": "relu", "rate 0.01": "2.0000 (2 of 3 diverged)", "seeds": "3"}
    assert regression.table(lines[1:])[0]["rate 0.01"] == "- (2 of 2 diverged)"
