"""The names of rows: what they stand for, what is refused, and how wide and normalised a row's net is."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.engine.errors import UsageError
from experiments.engine.rows import INITS, Row, batch_norm, check_init, identity, normalised, stem_init
from linked_jax import ACTIVATION_NAMES, Link, activation_arity, get_activation, relu


def test_every_row_has_one_name_and_it_is_read_back():
    rows = [Row(*row) for row in itertools.product(ACTIVATION_NAMES, (False, True), ("none", "batch"))]
    names = [row.name for row in rows]
    assert [Row.parse(name) for name in names] == rows
    assert len(set(names)) == len(names)


def test_the_grammar():
    assert Row.parse("lk_relu") == Row("lk_relu")
    assert Row.parse("relu_sqrt2") == Row("relu", sqrt2=True)
    assert Row.parse("lk_prelu_sqrt2_bn") == Row("lk_prelu", sqrt2=True, norm="batch")
    assert Row.parse("bn") == Row.parse("relu_bn") == Row("relu", norm="batch")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lk_rleu", "lk_relu"),
        ("", None),
        ("_bn", None),
        ("_sqrt2", None),
        ("lk_bn", None),  # bn alone is relu_bn, and no activation
        ("relu_bn_sqrt2", "relu"),  # the wrong way round
        ("relu_bn_bn", None),
        ("relu_sqrt2_sqrt2", "relu"),
        ("relu_sqrt3", "relu"),
        ("all", None),
        ("RELU", None),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(name, nearest):
    with pytest.raises(UsageError, match=r"^--act: .*_sqrt2 or _bn") as caught:
        Row.parse(name)
    assert "\n" not in str(caught.value)
    assert nearest is None or f"'{nearest}'" in str(caught.value)
    assert "lk_swish" in str(caught.value)  # the list


def test_the_wider_net_has_the_whole_part_of_width_times_root_2():
    for width in range(1, 3000):
        assert Row("relu", sqrt2=True).units(width) == math.isqrt(2 * width**2)
        assert Row("lk_relu").units(width) == width


@pytest.mark.parametrize("name", ["relu", "lk_relu", "prelu", "lk_prelu"])
def test_an_activation_is_a_link_or_a_new_module_of_that_many_features(name):
    one, other = (Row.parse(name).activation(3) for _ in range(2))
    assert one.arity == (2 if name.startswith("lk_") else 1)
    assert one(jnp.zeros((5, 3))).shape == (5, 3 * one.arity)
    if isinstance(one, Link):
        assert one is other
    else:
        assert one is not other  # each layer has its own slopes
        assert {leaf.shape[-1] for leaf in jax.tree.leaves(nnx.state(one))} == {3}


@pytest.mark.slow
def test_the_plain_form_of_a_link_is_its_first_member():
    z = jnp.linspace(-3, 3, 101)[:, None]
    for name in ACTIVATION_NAMES:
        plain = Row(name).plain(1)
        assert plain.arity == 1
        if name.startswith("lk_"):
            np.testing.assert_array_equal(plain(z), Row(name).activation(1)(z)[:, :1])
        elif activation_arity(name) == 1:
            np.testing.assert_array_equal(plain(z), Row(name).activation(1)(z))
        else:
            assert plain is relu


# --- where kernels start


@pytest.mark.slow
def test_an_initialiser_that_a_link_does_not_allow_is_refused_by_name():
    for name in ("auto", "glorot", "glorot_normal", "he"):
        for act in ACTIVATION_NAMES:
            check_init(name, Row(act))
    for act in ("lk_relu", "lk_prelu", "lk_swish", "min_max"):
        check_init("looks_linear", Row(act))
    for act in ("relu", "selu", "lk_selu", "tanh"):
        with pytest.raises(UsageError, match=rf"--init looks_linear does not fit --act {act}.*--init auto$"):
            check_init("looks_linear", Row(act))


@pytest.mark.parametrize("name", INITS)
def test_the_variance_that_the_literature_says(name):
    """He: 2 / fan in. Glorot: 2 / (fan in + fan out). The linear ones: 2 / fan in, half of it for each mirror."""
    link = get_activation("lk_relu")
    kernel = np.asarray(INITS[name](link)(jax.random.key(0), (400, 200), jnp.float32))
    variance = 2 / 600 if name.startswith("glorot") else 2 / 400
    assert np.square(kernel).mean() == pytest.approx(variance, rel=0.02)
    mirrored = np.allclose(kernel[:200], -kernel[200:])
    assert mirrored == (name in ("auto", "looks_linear"))
    bound = math.sqrt(6 / 600)
    assert (abs(kernel) <= bound).all() == (name == "glorot")  # uniform; the others have longer tails


@pytest.mark.slow
def test_the_stem_sees_no_link():
    kernel = np.asarray(stem_init("auto")(jax.random.key(0), (3, 3, 2, 18), jnp.float32)).reshape(18, 18)
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(18), atol=1e-5)
    for name in ("glorot", "glorot_normal", "he"):
        ours, plain = (
            init(jax.random.key(0), (3, 3, 2, 18), jnp.float32) for init in (stem_init(name), INITS[name](identity))
        )
        np.testing.assert_array_equal(ours, plain)


# --- batch norm


def test_batch_norm_has_the_defaults_of_keras():
    random = np.random.default_rng(0)
    z = jnp.asarray(random.normal(3, 0.05, size=(50, 4)), jnp.float32)
    norm = batch_norm(4, "batch", nnx.Rngs(0))
    mean, variance = np.asarray(z).mean(axis=0), np.asarray(z).var(axis=0)
    trained = normalised(z, norm, True)
    np.testing.assert_allclose(trained, (z - mean) / np.sqrt(variance + 1e-3), rtol=2e-3, atol=2e-3)
    moved_mean, moved_variance = 0.01 * mean, 0.99 + 0.01 * variance
    np.testing.assert_allclose(normalised(z, norm, False), (z - moved_mean) / np.sqrt(moved_variance + 1e-3), rtol=1e-4)
    np.testing.assert_allclose(norm.mean[...], moved_mean, rtol=1e-5)  # testing moved nothing


def test_no_norm_is_nothing():
    z = jnp.ones((2, 3))
    assert batch_norm(3, "none", nnx.Rngs(0)) is None
    assert normalised(z, None, True) is z
