import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from linked_jax.activations import ACTIVATIONS
from linked_jax.linking import Link
from linked_jax.measurements import evaluate
from linked_jax.moments import expectation, mean_square, panels
from tests.cases import first_fast

MEMBERS = {name: link.members[0] for name, link in ACTIVATIONS.items() if isinstance(link, Link) and link.arity == 1}
over_members = pytest.mark.parametrize("g", first_fast(MEMBERS.values()), ids=MEMBERS)
# E[g(z)^2] as published or known in closed form, to the digits given.
MEAN_SQUARES = [
    (jax.nn.relu, 0.5),
    (jax.nn.silu, 0.355776),
    (functools.partial(jax.nn.gelu, approximate=False), 0.425221),
    (jax.nn.selu, 1.0),
    (jax.nn.elu, 0.644945),
    (jax.nn.softplus, 0.921246),
]
# The same functions, written again in NumPy.
IN_NUMPY = {
    "relu": lambda z: max(z, 0.0),
    "swish": lambda z: z * special.expit(z),
    "gelu": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "elu": lambda z: z if z > 0 else np.expm1(z),
    "softplus": lambda z: np.logaddexp(z, 0.0),
    "tanh": np.tanh,
    "sigmoid": special.expit,
    "leaky_relu": lambda z: max(z, 0.01 * z),
}


def double_factorial_moment(k):
    """E[z^k] of a standard normal: (k - 1)!! for even k."""
    return 0.0 if k % 2 else float(math.prod(range(1, k, 2)))


# --- expectation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "mean"),
    first_fast(
        [
            (jax.nn.relu, 1 / math.sqrt(2 * math.pi)),
            (jnp.abs, math.sqrt(2 / math.pi)),
            (lambda z: jnp.heaviside(z, 0.5), 0.5),
            (lambda z: jnp.where(z > 0, 1, 0), 0.5),
            (jnp.sign, 0.0),
            (jnp.cos, math.exp(-0.5)),
            (jnp.exp, math.exp(0.5)),
            (jnp.tanh, 0.0),
            (jax.nn.sigmoid, 0.5),
            (lambda z: jnp.maximum(z - 1.25, 0), stats.norm.pdf(1.25) - 1.25 * stats.norm.sf(1.25)),
        ]
    ),
    ids=["relu", "abs", "heaviside", "integer_step", "sign", "cos", "exp", "tanh", "sigmoid", "kink_at_5_quarters"],
)
def test_expectation_is_the_closed_form(f, mean):
    assert expectation(f) == pytest.approx(mean, abs=1e-12)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.lists(st.integers(-9, 9), min_size=1, max_size=9))
def test_expectation_of_polynomials_is_exact(coefficients):
    mean = sum(c * double_factorial_moment(k) for k, c in enumerate(coefficients))
    scale = sum(abs(c) * double_factorial_moment(2 * k) for k, c in enumerate(coefficients)) + 1
    found = expectation(lambda z: sum(c * z**k for k, c in enumerate(coefficients)))
    assert found == pytest.approx(mean, abs=1e-13 * scale)


@pytest.mark.parametrize("name", first_fast(IN_NUMPY))
def test_moments_agree_with_adaptive_quadrature(name):
    def moment(power):
        parts = [
            integrate.quad(lambda z: IN_NUMPY[name](z) ** power * stats.norm.pdf(z), *side, epsabs=1e-13)[0]
            for side in ((-np.inf, 0), (0, np.inf))
        ]
        return sum(parts)

    assert expectation(MEMBERS[name]) == pytest.approx(moment(1), abs=1e-10)
    assert mean_square(MEMBERS[name]) == pytest.approx(moment(2), abs=1e-10)


@over_members
def test_moments_agree_with_sampling(g):
    values = evaluate(g, np.random.default_rng(0).normal(size=200_000))
    error = 5 * np.std([values, values**2], axis=1) / math.sqrt(values.size)
    assert abs(values.mean() - expectation(g)) <= error[0]
    assert abs((values**2).mean() - mean_square(g)) <= error[1]


@pytest.mark.parametrize(("g", "known"), first_fast(MEAN_SQUARES))
def test_mean_square_is_the_known_one(g, known):
    assert mean_square(g) == pytest.approx(known, abs=6e-7)


def test_mean_square_of_elu_is_the_closed_form():
    below = math.exp(2) * stats.norm.cdf(-2) - 2 * math.exp(0.5) * stats.norm.cdf(-1) + 0.5
    assert mean_square(jax.nn.elu) == pytest.approx(0.5 + below, abs=1e-12)


def test_selu_keeps_mean_zero_and_variance_one():
    assert expectation(jax.nn.selu) == pytest.approx(0, abs=1e-7)
    assert mean_square(jax.nn.selu) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("kink", first_fast([0.1, -0.37, 1 / 3]))
def test_kink_off_the_panels_costs_what_the_docstring_says(kink):
    mean = stats.norm.pdf(kink) - kink * stats.norm.sf(kink)
    assert expectation(lambda z: jnp.maximum(z - kink, 0)) == pytest.approx(mean, abs=3e-5)


@pytest.mark.parametrize("f", first_fast([jnp.log, lambda z: jnp.exp(z**4)]), ids=["nan", "inf"])
@pytest.mark.parametrize("moment", first_fast([expectation, mean_square]))
def test_non_finite_function_is_refused(moment, f):
    with pytest.raises(ValueError, match="finite"):
        moment(f)


@pytest.mark.parametrize("moment", [expectation, mean_square])
def test_the_function_that_is_not_finite_is_named(moment):
    with pytest.raises(ValueError, match="got log not finite at -12; it is tried on"):
        moment(jnp.log)


def test_function_of_both_infinities_is_refused_without_a_warning():
    with pytest.raises(ValueError, match="finite"):
        expectation(lambda z: z / 0)


def test_evaluate_refuses_what_is_not_a_function():
    with pytest.raises(TypeError):
        evaluate(3.0, np.zeros(2))


# --- the quadrature ------------------------------------------------------------------------------------------------


def test_panels_integrate_polynomials_of_degree_31_exactly_on_each_panel():
    rng = np.random.default_rng(0)
    edges = np.sort(rng.uniform(-1, 1, 5))
    pieces = [np.polynomial.Polynomial(rng.normal(size=32)) for _ in range(4)]
    z, w = panels(edges)
    assert z.shape == w.shape == (4 * 16,)
    found = sum((w * f(z))[16 * k : 16 * (k + 1)].sum() for k, f in enumerate(pieces))
    wanted = sum(f.integ()(edges[k + 1]) - f.integ()(edges[k]) for k, f in enumerate(pieces))
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


# --- under tracing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform", first_fast([jax.jit, jax.vmap, lambda f: jax.grad(lambda z: f(z).sum())]), ids=["jit", "vmap", "grad"]
)
@pytest.mark.parametrize("g", first_fast([jax.nn.relu, jax.nn.selu, MEMBERS["gelu"], jnp.abs]))
def test_moment_inside_a_trace_is_the_same_python_float(g, transform):
    seen = []

    def f(z):
        seen.append((expectation(g), mean_square(g)))
        return z * seen[-1][1]

    transform(f)(jnp.ones(3))
    assert seen == [(expectation(g), mean_square(g))]
    assert all(type(moment) is float for moment in seen[0])


def test_moment_inside_scan_is_the_same():
    def total(z):
        return jax.lax.scan(lambda carry, z: (carry + mean_square(jax.nn.relu) * z, None), 0.0, z)[0]

    assert float(total(jnp.ones(4))) == pytest.approx(2.0)


# --- evaluate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x64", first_fast([False, True]))
def test_evaluate_is_float64_and_leaves_x64_as_it_was(x64):
    third = np.array([1 / 3])
    with jax.enable_x64(x64):
        doubled = evaluate(lambda z: z + z, third)
        assert jax.config.jax_enable_x64 is x64
        assert jnp.asarray(third).dtype == (jnp.float64 if x64 else jnp.float32)
    assert isinstance(doubled, np.ndarray)
    assert doubled.dtype == np.float64
    assert doubled[0] == 2 / 3  # float32 would miss it by 1e-8


def test_evaluate_leaves_x64_as_it_was_when_the_function_fails():
    def fail(z):
        raise RuntimeError("no value")

    with pytest.raises(RuntimeError, match="no value"):
        evaluate(fail, np.zeros(1))
    assert jnp.asarray(0.5).dtype == jnp.float32


@over_members
def test_evaluate_inside_jit_is_evaluate_outside(g):
    z = np.linspace(-3, 3, 7)
    inside = []
    jax.jit(lambda x: inside.append(evaluate(g, z)) or x)(1.0)
    np.testing.assert_array_equal(inside[0], evaluate(g, z))


@pytest.mark.parametrize("shape", first_fast((each,) for each in [(), (0,), (2, 3, 1)]))
def test_evaluate_keeps_the_shape(shape):
    assert evaluate(jax.nn.relu, np.zeros(shape)).shape == shape
