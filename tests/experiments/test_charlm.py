"""Characters: nets look back only and are of equal size, the text is split as said, the record resumes run by run."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.charlm import __main__ as charlm
from experiments.charlm import data as text_data
from experiments.charlm import table, training
from experiments.charlm.net import BLOCK, HEADS, ROWS, STD, WIDTH, CharTransformer, Row
from experiments.engine.errors import UsageError
from experiments.engine.tfds import tfds_folder
from tests.cases import first_fast
from tests.commands import command

ROOT = Path(__file__).parents[2]
WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "tis", "nobler", "slings", "arrows"]


def a_text(words=300):
    rng = np.random.default_rng(0)
    return " ".join(rng.choice(WORDS, words)) + "\n"


def net(row, depth=1, vocabulary=9, seed=0):
    return CharTransformer(ROWS[row], depth, vocabulary, rngs=nnx.Rngs(seed))


def codes(count, vocabulary=9, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocabulary, count), jnp.int32)


# --- nets ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("row", first_fast(ROWS))
def test_a_logit_depends_on_the_characters_up_to_its_own_and_on_all_of_them(row):
    model, seen = net(row), codes((1, 12))
    logits = model(seen)
    assert logits.shape == (1, 12, 9)
    for changed in (0, 7):
        other = model(seen.at[0, changed].set((seen[0, changed] + 1) % 9))
        np.testing.assert_allclose(other[:, :changed], logits[:, :changed], atol=1e-6)
        assert (np.abs(other - logits)[0, changed:].max(axis=1) > 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("row", first_fast(["lk_gelu", "lk_relu"]))
def test_a_linked_net_starts_with_linear_mlps_and_embeddings_of_mean_square_one(row):
    model, x = net(row, vocabulary=1000), jax.random.normal(jax.random.key(0), (2, 3, WIDTH))
    mlp = model.blocks[0].mlp
    assert float(jnp.abs(mlp(x)).mean()) > 0.1
    np.testing.assert_allclose(mlp(2 * x[:1] - x[1:]), 2 * mlp(x[:1]) - mlp(x[1:]), atol=1e-5)
    embedded = model.scale[...] * (model.tokens(jnp.arange(BLOCK)) + model.places(jnp.arange(BLOCK)))
    np.testing.assert_allclose((embedded**2).mean(), 1, atol=0.1)
    for signal in (mlp.wide(embedded), model.blocks[0].attention.qkv(embedded)):
        np.testing.assert_allclose((signal**2).mean(), WIDTH * STD**2, rtol=0.1)


def parameters(row, depth):
    model = nnx.eval_shape(lambda: net(row, depth, vocabulary=65))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if row.hidden is None])
def test_rows_have_as_many_parameters_as_nano_gpt(row):
    block = 4 * WIDTH * WIDTH + 8 * WIDTH * WIDTH + 2 * WIDTH
    wanted = 65 * WIDTH + BLOCK * WIDTH + 2 * block + WIDTH
    assert parameters("layer_norm", 2) == wanted
    assert abs(parameters(row, 2) / wanted - 1) < 0.003


@pytest.mark.parametrize(
    ("control", "units_of"), [("layer_norm_lk_gelu_wide", "gelu"), ("layer_norm_narrow", "lk_gelu")]
)
def test_the_controls_of_width_have_the_units_of_the_other_activation(control, units_of):
    assert ROWS[control].units == ROWS[units_of].units != Row("", ROWS[control].link).units
    more = (1 + ROWS[control].link.arity) * (ROWS[control].units - Row("", ROWS[control].link).units) * WIDTH
    assert parameters(control, 1) == parameters("layer_norm" if more < 0 else "layer_norm_lk_gelu", 1) + more


def layer_norm(x, gain):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain


@pytest.mark.slow
def test_the_layer_norm_net_is_nano_gpts():
    """Written out in NumPy, in float64."""
    model, seen = net("layer_norm", 2), codes((2, 5))
    x = np.asarray(model.tokens.embedding[...], np.float64)[seen] + np.asarray(model.places.embedding[...])[:5]
    for block in model.blocks:
        z = layer_norm(x, np.asarray(block.norms[0].scale[...])) @ np.asarray(block.attention.qkv.kernel[...])
        q, k, v = (part.reshape(2, 5, HEADS, -1).swapaxes(1, 2) for part in np.split(z, 3, axis=-1))
        scores = np.where(np.tri(5, dtype=bool), q @ k.swapaxes(2, 3) / np.sqrt(WIDTH / HEADS), -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        mixed = (weights @ v).swapaxes(1, 2).reshape(2, 5, WIDTH)
        x = x + mixed @ np.asarray(block.attention.out.kernel[...])
        z = layer_norm(x, np.asarray(block.norms[1].scale[...])) @ np.asarray(block.mlp.wide.kernel[...])
        hidden = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        x = x + hidden @ np.asarray(block.mlp.out.linear.kernel[...])
    wanted = layer_norm(x, np.asarray(model.norm.scale[...])) @ np.asarray(model.tokens.embedding[...]).T
    np.testing.assert_allclose(model(seen), wanted, atol=1e-5)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_matrices_decay_and_the_rate_warms_up_and_falls():
    rule = training.rule(100)
    parameters = {"matrix": jnp.ones((2, 2)), "gain": jnp.ones(2)}
    state, zero = rule.init(parameters), jax.tree.map(jnp.zeros_like, parameters)
    factors = []
    for _ in range(101):
        updates, state = rule.update(zero, state, parameters)
        assert (updates["gain"] == 0).all()
        factors.append(-float(updates["matrix"][0, 0]) / 0.1)
    np.testing.assert_allclose(factors[:6], np.arange(6) / 5, atol=1e-6)
    wanted = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(96) / 95)) / 2
    np.testing.assert_allclose(factors[5:], wanted, atol=1e-5)


@pytest.mark.slow
def test_a_windows_targets_are_the_characters_after_it():
    seen = []
    text = codes(200)

    def model(inputs):
        seen.append(inputs)
        return jax.nn.one_hot(inputs, 9)

    loss = training.cross_entropy(model, text, jnp.array([3, 100]))
    windows = np.stack([text[3 : 3 + BLOCK], text[100 : 100 + BLOCK]])
    targets = np.stack([text[4 : 4 + BLOCK], text[101 : 101 + BLOCK]])
    assert (seen[0] == windows).all()
    np.testing.assert_allclose(loss, np.log(np.e + 8) - (windows == targets).mean(), rtol=1e-6)


@pytest.mark.slow
def test_validation_is_the_mean_over_all_whole_windows():
    model, text = net("layer_norm"), codes(70 * BLOCK + 10)
    graph, state = nnx.split(model)
    logits = model(text[: 70 * BLOCK].reshape(70, BLOCK)).reshape(-1, 9)
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, text[1 : 70 * BLOCK + 1]).mean()
    np.testing.assert_allclose(training.validation_loss(graph, state, text), wanted, rtol=1e-5)
    whole = training.validation_loss(graph, state, text[: 2 * BLOCK])  # the last character has none after it
    first = training.cross_entropy(model, text, jnp.array([0]))
    np.testing.assert_allclose(whole, first, rtol=1e-5)


@pytest.mark.slow
def test_a_run_learns_and_another_seed_is_another_run():
    text = a_text()
    work = training.Work(text_data.split("words", text[:1200], text[1200:]), 30)
    found = [work.run("layer_norm", 1, 3e-3, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0]["validation_loss"] < np.log(len(work.text.vocabulary)) - 0.5
    assert (found[0]["units"], found[0]["dead"]) == (4 * WIDTH, 0)


@pytest.mark.slow
def test_a_run_that_diverges_says_when():
    text = a_text()
    work = training.Work(text_data.split("words", text[:1200], text[1200:]), 30)
    done = []
    line = work.run("gelu", 1, 1e30, 0, advance=done.append)
    assert 1 < line["diverged"] <= 30
    assert sum(done) == 30


# --- the text -----------------------------------------------------------------------------------------------------


def test_a_file_is_split_at_nine_tenths(tmp_path):
    (tmp_path / "own.txt").write_text("ab" * 400 + "ç\n" * 100, encoding="utf-8")
    text = text_data.load(str(tmp_path / "own.txt"), None, block=64)
    assert (len(text.train), len(text.validation), text.vocabulary) == (900, 100, "\nabç")
    whole = "".join(text.vocabulary[code] for code in [*text.train, *text.validation])
    assert whole == "ab" * 400 + "ç\n" * 100
    other = text_data.split("own.txt", whole[:899], whole[899:])
    assert other.fingerprint != text.fingerprint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read .* pass --text"),
        (b"\xff\xfe" * 900, "no text in UTF-8"),
        (b"", "0 characters in its smaller part"),
        (b"ab" * 300, "60 characters in its smaller part .* pass a --text of 650 or more"),
        (b"a" * 900, "90 characters in its smaller part and 1 different ones"),
    ],
)
def test_a_file_that_does_not_do_is_refused(tmp_path, content, said):
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as refused:
        text_data.load(str(path), None, block=64)
    assert "\n" not in str(refused.value)


def test_a_text_that_is_not_prepared_says_how_to(tmp_path):
    with pytest.raises(UsageError, match=r"experiments.prepare tiny_shakespeare`.*--data-dir.*--text"):
        text_data.load(None, str(tmp_path), block=64)


@pytest.mark.slow
def test_tiny_shakespeare_is_nano_gpts():
    if not any(tfds_folder(None).glob("tiny_shakespeare/*/dataset_info.json")):
        pytest.skip("tiny_shakespeare is not prepared")
    text = text_data.load(None, None, block=BLOCK)
    assert (len(text.train), len(text.validation), len(text.vocabulary)) == (1_003_854, 111_540, 65)
    assert "".join(text.vocabulary[code] for code in text.train[:14]) == "First Citizen:"


@pytest.mark.slow
def test_damaged_records_are_refused(tmp_path):
    folder = tmp_path / "tiny_shakespeare" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read"):
        text_data.load(None, str(tmp_path), block=64)


# --- tables -------------------------------------------------------------------------------------------------------


def line(row, rate, seed, loss, *, train=None, tenfold=False):
    key = {"kind": "run", "row": row, "depth": 4, "rate": rate, "tenfold": tenfold, "seed": seed, "seconds": 1.0}
    if loss is None:
        return key | {"diverged": 7}
    measures = {"train_loss": loss if train is None else train, "units": 8, "dead": 1, "linear": 2}
    return key | measures | {"validation_loss": loss}


LINES = [
    {"kind": "net", "row": "gelu", "depth": 4, "parameters": 1000, "temporary_bytes": 2e6, "step_seconds": 0.0125},
    *(line("gelu", 0.1, 0, 2.0, train=1.5), line("gelu", 0.2, 0, 1.8, train=1.6), line("gelu", 0.1, 1, 2.1)),
    *(line("gelu", 1.0, 0, 3.0, tenfold=True), line("gelu", 2.0, 0, 4.0, tenfold=True)),
    *(line("dyt", 0.1, 0, None), line("dyt", 0.2, 0, 1.0), line("dyt", 0.2, 1, None)),
]


def test_the_rate_is_that_of_the_least_training_loss_and_the_tenfold_one_goes_with_it():
    dyt, gelu = sorted(table.table(4, LINES), key=lambda row: row["row"])
    assert gelu["validation loss"] == "2.0500 ± 0.0707"
    assert (gelu["rate"], gelu["seeds"], gelu["rate x10"], gelu["ms a step"]) == ("0.1", "2", "3.0000", "12.5")
    assert (dyt["validation loss"], dyt["rate x10"], dyt["ms a step"]) == ("1.0000 (1 of 2 diverged)", "-", "-")
    assert table.rates_table(4, LINES)[0] == {"row": "gelu", "rate 0.1": "2.0000", "rate 0.2": "1.8000"}


def test_every_row_has_a_style():
    assert table.STYLES.keys() == ROWS.keys()


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": ("layernorm",)}, "there is no 'layernorm'; take of layer_norm"),
        ({"depths": (4, 0)}, "--depths takes values from 1 to 1000"),
        ({"rates": ()}, r"--rates takes values from 1e-09 to 1, got \(\)"),
        ({"rates": (float("nan"),)}, "--rates takes values"),
        ({"seeds": 0}, "--seeds is from 1 to 100, got 0"),
        ({"iterations": 0}, "--iterations is from 1 to 1,000,000, got 0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        charlm.check(charlm.Settings(**options))


def test_all_rows_and_each_value_once():
    settings = charlm.check(charlm.Settings(depths=(4, 4), rates=(0.1, 0.1)))
    assert (settings.rows, settings.depths, settings.rates) == (tuple(ROWS), (4,), (0.1,))


run = functools.partial(command, "experiments.charlm")


@pytest.mark.slow
def test_without_data_the_command_ends_with_one_line_and_code_2(tmp_path):
    code, _, error = run("--out", str(tmp_path / "run"), TFDS_DATA_DIR=str(tmp_path))
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: tiny_shakespeare is not in ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_leaves_a_record_that_resumes_and_grows(tmp_path):
    folder, own = tmp_path / "run", tmp_path / "own.txt"
    own.write_text(a_text(), encoding="utf-8")
    arguments = ["--text", str(own), "--depths", "1", "--rates", "1e-3", "--iterations", "8", "--time-steps", "1"]
    arguments += ["--out", str(folder), "--tenfold-seeds", "0"]
    code, _, error = run(*arguments, "--rows", "layer_norm", "--seeds", "2")
    assert code == 0, error
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text(encoding="utf-8").splitlines()
    assert [json.loads(text).get("seed") for text in whole] == [None, 0, 1]
    metrics.write_text("\n".join(whole[:-1]) + '\n{"kind": "ru', encoding="utf-8")  # killed while it wrote
    assert run(*arguments, "--rows", "layer_norm", "lk_relu", "--seeds", "2")[0] == 0
    lines = [json.loads(text) for text in metrics.read_text(encoding="utf-8").splitlines()]
    assert [json.dumps(line) for line in lines[:2]] == whole[:2]
    again = next(line for line in lines if (line["row"], line.get("seed")) == ("layer_norm", 1))
    assert again | {"seconds": 0} == json.loads(whole[2]) | {"seconds": 0}
    assert [(line["row"], line.get("seed")) for line in lines if line["row"] == "lk_relu"] == [
        ("lk_relu", seed) for seed in (None, 0, 1)
    ]
    page = (folder / "table.md").read_text(encoding="utf-8")
    assert page == table.markdown(json.loads((folder / "config.json").read_text(encoding="utf-8")), lines)
    assert (folder / "charlm.png").stat().st_size > 10_000
    code, _, error = run(*arguments, "--iterations", "9")
    assert (code, "another protocol" in error) == (2, True)
