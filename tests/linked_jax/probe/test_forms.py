"""However an activation is written, it is seen once, with its value, its derivative, and the name of what it is."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.nn import sigmoid

from linked_jax.activations import lk_relu
from linked_jax.probe import observe, probe
from tests.arrays import white
from tests.cases import first_fast
from tests.linked_jax.probe.common import custom, custom_jvp

relu = jax.nn.relu
A, TWO_PI = 0.2, jnp.sqrt(2 / jnp.pi)


def surrogate_jvp(g, derivative):
    f = jax.custom_jvp(g)
    f.defjvp(lambda primals, tangents: (g(*primals), tangents[0] * derivative(*primals)))
    return f


def surrogate_vjp(g, derivative):
    f = jax.custom_vjp(g)
    f.defvjp(lambda z: (g(z), z), lambda z, cotangent: (cotangent * derivative(z),))
    return f


def spike(z):
    return (z > 0).astype(z.dtype)


def by_hand(z):
    return jnp.where(z > 0, z, 0.0)


PRELU = jnp.full(64, 0.1)
FORMS = {
    # --- functions of jax.nn, Flax and NumPy
    "jax.nn.relu": (jax.nn.relu, "relu"),
    "jax.nn.relu6": (jax.nn.relu6, "relu6"),
    "jax.nn.leaky_relu": (jax.nn.leaky_relu, "leaky_relu"),
    "jax.nn.elu": (jax.nn.elu, "elu"),
    "jax.nn.elu of 0.5": (lambda z: jax.nn.elu(z, 0.5), "unknown"),
    "jax.nn.celu": (jax.nn.celu, "elu"),
    "jax.nn.selu": (jax.nn.selu, "selu"),
    "jax.nn.gelu": (jax.nn.gelu, "gelu"),
    "jax.nn.gelu, exact": (lambda z: jax.nn.gelu(z, approximate=False), "gelu"),
    "jax.nn.silu": (jax.nn.silu, "silu"),
    "jax.nn.mish": (jax.nn.mish, "mish"),
    "jax.nn.sigmoid": (jax.nn.sigmoid, "sigmoid"),
    "jax.nn.log_sigmoid": (jax.nn.log_sigmoid, "log_sigmoid"),
    "jax.nn.softplus": (jax.nn.softplus, "softplus"),
    "jax.nn.soft_sign": (jax.nn.soft_sign, "soft_sign"),
    "jax.nn.squareplus": (jax.nn.squareplus, "squareplus"),
    "jax.nn.hard_tanh": (jax.nn.hard_tanh, "hard_tanh"),
    "jax.nn.hard_sigmoid": (jax.nn.hard_sigmoid, "hard_sigmoid"),
    "jax.nn.hard_silu": (jax.nn.hard_silu, "hard_silu"),
    "jax.nn.sparse_plus": (jax.nn.sparse_plus, "sparse_plus"),
    "jax.nn.sparse_sigmoid": (jax.nn.sparse_sigmoid, "sparse_sigmoid"),
    "nnx.tanh": (nnx.tanh, "tanh"),
    "nnx.PReLU": (nnx.PReLU(), "leaky_relu"),
    "linen.PReLU": (flax.linen.PReLU().bind({"params": {"negative_slope": 0.01}}), "leaky_relu"),
    "linen.swish": (flax.linen.swish, "silu"),
    "jnp.sin": (jnp.sin, "sin"),
    "jnp.square": (jnp.square, "square"),
    "lax.erf": (lax.erf, "erf"),
    # --- relu
    "maximum": (lambda z: jnp.maximum(z, 0), "relu"),
    "maximum of zeros": (lambda z: jnp.maximum(jnp.zeros_like(z), z), "relu"),
    "where >": (by_hand, "relu"),
    "where <": (lambda z: jnp.where(z < 0, 0, z), "relu"),
    "select": (lambda z: lax.select(z > 0, z, jnp.zeros_like(z)), "relu"),
    "product": (lambda z: z * (z > 0), "relu"),
    "half of a sum": (lambda z: (z + jnp.abs(z)) / 2, "relu"),
    "clip below": (lambda z: jnp.clip(z, min=0), "relu"),
    "minus minimum": (lambda z: z - jnp.minimum(z, 0), "relu"),
    "relu in jit": (jax.jit(by_hand), "relu"),
    "relu in remat": (jax.checkpoint(by_hand), "relu"),
    "relu in custom_jvp": (custom_jvp(by_hand), "relu"),
    "relu in custom_vjp": (custom(by_hand), "relu"),
    "relu of -z": (lambda z: relu(-z), "relu"),
    "squared relu": (lambda z: jnp.square(relu(z)), "relu²"),
    "squared relu, a product": (lambda z: relu(z) * relu(z), "relu²"),
    "relu times z": (lambda z: z * relu(z), "relu²"),
    "star relu": (lambda z: 0.8944 * relu(z) ** 2 - 0.4472, "unknown"),
    "relu of a threshold": (lambda z: jnp.where(z > 0.5, z, 0), "unknown"),
    "shrunk": (lambda z: jnp.sign(z) * relu(jnp.abs(z) - 0.5), "unknown"),
    # --- leaky relu
    "leaky sum": (lambda z: jnp.maximum(z, 0) + A * jnp.minimum(z, 0), "leaky_relu"),
    "leaky difference": (lambda z: relu(z) - A * relu(-z), "leaky_relu"),
    "leaky where <": (lambda z: jnp.where(z < 0, A * z, z), "leaky_relu"),
    "leaky where <=": (lambda z: jnp.where(z <= 0, A * z, z), "leaky_relu"),
    "leaky where >=": (lambda z: jnp.where(z >= 0, z, A * z), "leaky_relu"),
    "leaky maximum": (lambda z: jnp.maximum(z, A * z), "leaky_relu"),
    "leaky select": (lambda z: lax.select(z > 0, z, A * z), "leaky_relu"),
    "leaky product": (lambda z: z * jnp.where(z > 0, 1.0, A), "leaky_relu"),
    "leaky by abs": (lambda z: 0.6 * z + 0.4 * jnp.abs(z), "leaky_relu"),
    "prelu by hand": (lambda z: jnp.where(z > 0, z, PRELU * z), "leaky_relu"),
    "prelu as a sum": (lambda z: relu(z) + PRELU * jnp.minimum(z, 0), "leaky_relu"),
    # --- elu and other exponentials
    "elu sum": (lambda z: relu(z) + jnp.minimum(jnp.exp(z) - 1, 0.0), "elu"),
    "elu where": (lambda z: jnp.where(z > 0, z, jnp.expm1(jnp.minimum(z, 0))), "elu"),
    "selu by hand": (lambda z: 1.0507 * jnp.where(z > 0, z, 1.67326 * jnp.expm1(jnp.minimum(z, 0))), "selu"),
    "elu plus one": (lambda z: jax.nn.elu(z) + 1, "unknown"),
    "softplus by hand": (lambda z: jnp.log(1 + jnp.exp(z)), "softplus"),
    "softplus, stable": (lambda z: jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z))), "softplus"),
    "softplus as logaddexp": (lambda z: jnp.logaddexp(z, 0.0), "softplus"),
    "softplus of beta": (lambda z: jnp.log1p(jnp.exp(3 * z)) / 3, "0.333 softplus"),
    "shifted softplus": (lambda z: jax.nn.softplus(z) - jnp.log(2.0), "unknown"),
    "gaussian": (lambda z: jnp.exp(-z * z), "unknown"),
    # --- sigmoid, silu, mish
    "sigmoid by exp": (lambda z: 1 / (1 + jnp.exp(-z)), "sigmoid"),
    "sigmoid by tanh": (lambda z: 0.5 * (jnp.tanh(z / 2) + 1), "sigmoid"),
    "tanh by exp": (lambda z: (jnp.exp(z) - jnp.exp(-z)) / (jnp.exp(z) + jnp.exp(-z)), "tanh"),
    "tanh by sigmoid": (lambda z: 2 * sigmoid(2 * z) - 1, "tanh"),
    "hard sigmoid by hand": (lambda z: jnp.clip(z / 6 + 0.5, 0, 1), "hard_sigmoid"),
    "hard swish by hand": (lambda z: z * jnp.clip(z + 3, 0, 6) / 6, "hard_silu"),
    "silu by hand": (lambda z: z * sigmoid(z), "silu"),
    "silu as a quotient": (lambda z: z / (1 + jnp.exp(-z)), "silu"),
    "swish of 1.5": (lambda z: z * sigmoid(1.5 * z), "unknown"),
    "mish by hand": (lambda z: z * jnp.tanh(jnp.log1p(jnp.exp(z))), "mish"),
    "tanhshrink": (lambda z: z - jnp.tanh(z), "tanhshrink"),
    "softsign by hand": (lambda z: z / (1 + jnp.abs(z)), "soft_sign"),
    "lisht": (lambda z: z * jnp.tanh(z), "unknown"),
    "scaled tanh": (lambda z: 1.7159 * jnp.tanh(2 / 3 * z), "1.72 tanh"),
    # --- gelu
    "gelu of GPT-2": (lambda z: 0.5 * z * (1 + jnp.tanh(TWO_PI * (z + 0.044715 * jnp.power(z, 3)))), "gelu"),
    "gelu by Horner": (lambda z: 0.5 * z * (1 + jnp.tanh(z * 0.7978845608 * (1 + 0.044715 * z * z))), "gelu"),
    "gelu by erf": (lambda z: z * 0.5 * (1.0 + lax.erf(z / jnp.sqrt(2.0))), "gelu"),
    "gelu by the normal law": (lambda z: z * jax.scipy.stats.norm.cdf(z), "gelu"),
    "quick gelu": (lambda z: z * sigmoid(1.702 * z), "quick_gelu"),
    # --- bounded, periodic, others
    "clip": (lambda z: jnp.clip(z, 0, 2), "clip"),
    "minimum of maximum": (lambda z: jnp.minimum(jnp.maximum(z, -1), 1), "hard_tanh"),
    "relu6 by hand": (lambda z: jnp.minimum(jnp.maximum(z, 0), 6), "relu6"),
    "snake": (lambda z: z + jnp.sin(3 * z) ** 2 / 3, "unknown"),
    "siren": (lambda z: jnp.sin(30 * z), "sin"),
    "cubic": (lambda z: z**3, "unknown"),
    "surrogate spike, jvp": (surrogate_jvp(spike, lambda z: 1 / (1 + 10 * jnp.abs(z)) ** 2), "unknown"),
    "surrogate spike, vjp": (surrogate_vjp(spike, lambda z: sigmoid(z) * (1 - sigmoid(z))), "unknown"),
    "straight-through sign": (surrogate_vjp(jnp.sign, lambda z: (jnp.abs(z) < 1).astype(z.dtype)), "unknown"),
    "surrogate relu, jvp": (surrogate_jvp(by_hand, sigmoid), "relu"),
    "surrogate relu, vjp": (surrogate_vjp(by_hand, sigmoid), "relu"),
    "stop_gradient": (lambda z: z + lax.stop_gradient(jnp.round(z) - z), "unknown"),
}  # fmt: skip

X = jnp.linspace(-4.1, 4.2, 64)[None]  # one sample: a unit's statistics are those of one z


def agrees(g, name):
    """The tap of tanh(g(x @ 1) @ w) is that of g, up to the affine function that z is of x."""
    weights = jnp.eye(64)[::-1], white(64, 3)
    taps = observe(lambda w, x: jnp.tanh(g(x @ w[0]) @ w[1]), weights, X)[1]
    assert [tap.activation for tap in taps] == [name, "tanh"]
    stats, x = taps[0].stats, X[0, ::-1]
    h, pull = jax.vjp(g, X[:, ::-1])
    (slopes,) = pull(jnp.ones_like(h))
    change = (stats.mean[1] - stats.mean[0]) / (x[1] - x[0])
    np.testing.assert_allclose(stats.magnitude, jnp.abs(h[0]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.steepest * jnp.abs(change), jnp.abs(slopes[0]), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(stats.live, h[0] != 0)


def test_there_are_more_than_sixty_forms():
    assert len(FORMS) > 60


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FORMS)[::10])
def test_a_form_is_seen_once_with_its_value_its_derivative_and_its_name(name):
    agrees(*FORMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for i, name in enumerate(FORMS) if i % 10])
def test_every_other_form_is_too(name):
    agrees(*FORMS[name])


LINKS = {
    "crelu by hand": (lambda z: jnp.concatenate([relu(z), relu(-z)], -1), "relu(z), relu(-z)"),
    "stacked": (lambda z: jnp.stack([jnp.sin(z), jnp.cos(z)], -1).reshape(len(z), -1), "sin(z), cos(z)"),
    "with z itself": (lambda z: jnp.concatenate([z, jnp.abs(z)], -1), "z, abs(z)"),
    "lk_relu": (lk_relu, "relu(z), relu(-z)"),
    "lk_relu behind a relu that was left in": (lambda z: lk_relu(relu(z)), "relu(z), 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINKS)
def test_what_is_concatenated_is_a_link(name):
    g, activation = LINKS[name]
    (tap,) = observe(lambda w, x: g(x @ w), jnp.eye(64), X)[1]
    assert (tap.arity, tap.stats.mean.size, tap.activation) == (2, 64, activation)


def softmax_by_hand(z):
    e = jnp.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


NO_ACTIVATION = {
    "softmax": jax.nn.softmax,
    "softmax by hand": softmax_by_hand,
    "masked softmax": lambda z: jax.nn.softmax(jnp.where(jnp.arange(64) < 9, z, -1e9)),
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": lambda z: z - jax.nn.logsumexp(z, -1, keepdims=True),
    "standardize": jax.nn.standardize,
    "rms": lambda z: z * lax.rsqrt((z**2).mean(-1, keepdims=True) + 1e-5),
    "norm": lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True),
    "guarded norm": lambda z: z / jnp.maximum(jnp.sqrt((z * z).sum(-1, keepdims=True)), 1e-6),
    "norm of absolute values": lambda z: z / (jnp.abs(z).sum(-1, keepdims=True) + 1e-6),
    "power of a variance": lambda z: (z - z.mean(-1, keepdims=True)) * (z.var(-1, keepdims=True) + 1e-5) ** -0.5,
    "largest": lambda z: z / z.max(-1, keepdims=True),
    "one hot": lambda z: jax.nn.one_hot(z.argmax(-1), 64),
    "nan_to_num": jnp.nan_to_num,
    "identity with another gradient": surrogate_vjp(lambda z: z, lambda z: -jnp.ones_like(z)),
    "weight of softplus": lambda z: z * jax.nn.softplus(PRELU),
    "cast": lambda z: z.astype(jnp.bfloat16).astype(jnp.float32),
    "dropout": lambda z: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, z.shape), z / 0.5, 0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_ACTIVATION)
def test_what_is_no_activation_is_none(name):
    taps = observe(lambda w, x: jnp.tanh(NO_ACTIVATION[name](x @ w[0]) @ w[1]), (jnp.eye(64), white(64, 3)), X)[1]
    assert [tap.activation for tap in taps] == ["tanh"]


POOLED = {
    "gelu": jax.nn.gelu,
    "softplus by hand": lambda z: jnp.log(1 + jnp.exp(z)),
    "silu as a quotient": lambda z: z / (1 + jnp.exp(-z)),
    "a learned scale": lambda z: jnp.tanh(z / PRELU),
    "radial": lambda z: jnp.exp(-z / 9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLED)
def test_an_activation_of_a_sum_over_positions_is_one(name):
    (tap,) = observe(lambda w, x: POOLED[name](x.mean(1)) @ w, white(64, 3), white(4, 7, 64))[1]
    assert tap.stats.mean.shape == (64,)


NOT_SEEN = {
    "piecewise": lambda z: jnp.piecewise(z, [z < -1, z > 1], [-1.0, 1.0, lambda z: z]),
    "the largest alone": lambda z: jnp.where(z >= lax.top_k(z, 5)[0][:, -1:], z, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_SEEN)
def test_what_may_be_an_activation_and_is_not_elementwise_is_named(name):
    report = probe(lambda x: jnp.tanh(NOT_SEEN[name](x) @ white(64, 3)), [X, X])
    assert [layer.activation for layer in report.layers] == ["tanh"]
    (unseen,) = report.not_seen
    assert unseen.startswith("select_n in test_forms.py:")


BENT = {
    "small": (lambda z: 1e-4 * jnp.tanh(z), "0.0001 tanh"),
    "smaller": (lambda z: 1e-5 * relu(z), "1e-05 relu"),
    "far clip": (lambda z: jnp.maximum(z, -25), "clip"),
    "clip of an offset": (lambda z: jnp.clip(z + 900, -20, 20), "clip"),
    "jump": (lambda z: jnp.where(z > 50, 0, z), "unknown"),
}


@pytest.mark.parametrize(("g", "name"), first_fast(BENT.values()), ids=BENT)
def test_activations_that_are_small_or_bend_far_from_zero_are_seen(g, name):
    w, x = white(4, 4), white(8, 4, seed=1)
    (layer,) = probe(lambda x: g(x @ w) @ w, [x]).layers
    assert layer.activation == name


AFFINE = (lambda z: 1e6 + 1e4 * z, lambda z: 1e-6 * z + 1, lambda z: z.astype(jnp.bfloat16))


@pytest.mark.parametrize("g", first_fast(AFFINE))
def test_what_is_affine_at_any_size_is_no_activation(g):
    w, x = white(4, 4), white(8, 4, seed=1)
    with pytest.raises(ValueError, match="no activation was found"):
        probe(lambda x: g(x @ w) @ w, [x])


@pytest.mark.parametrize("dtype", first_fast([jnp.float16, jnp.float32]))
def test_guards_against_numbers_that_are_not_finite_are_no_activations(dtype):
    w, x = white(4, 4).astype(dtype), white(8, 4, seed=1).astype(dtype)
    for guard in (
        jnp.nan_to_num,
        lambda z: jnp.where(jnp.isfinite(z), z, 0),
        lambda z: jnp.clip(z, jnp.finfo(dtype).min + 1000, jnp.finfo(dtype).max - 1000),
    ):
        (layer,) = probe(lambda x, g=guard: g(relu(x @ w) @ w) @ w, [x]).layers
        assert layer.activation == "relu"


@pytest.mark.parametrize("surrogate", first_fast([surrogate_vjp, surrogate_jvp]))
def test_activations_of_equal_source_and_other_derivatives_are_two(surrogate):
    w, x = white(4, 4), white(8, 4, seed=1)
    flat, steep = (surrogate(spike, lambda z, slope=slope: slope + 0 * z) for slope in (0.0, 1.0))
    first, second = probe(lambda x: flat(x @ w) @ w + steep(x @ w), [x]).layers
    assert first.dead_link.all()
    assert not second.dead_link.any()
    assert len(probe(lambda x: steep(x @ w) @ w + steep(x @ w), [x]).layers) == 1


def test_callbacks_on_one_value_stay_apart():
    w, x = white(4, 4), white(8, 4, seed=1)

    def on_host(g, z):
        return jax.pure_callback(g, jax.ShapeDtypeStruct(z.shape, z.dtype), z)

    def model(w, x):
        h = relu(x @ w)
        return on_host(lambda z: np.sin(z), h) + on_host(lambda z: np.cos(z), h)

    np.testing.assert_allclose(observe(model, w, x)[0], model(w, x), rtol=1e-6)
