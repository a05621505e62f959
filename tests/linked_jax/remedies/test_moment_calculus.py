import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from linked_jax.activations import ACTIVATIONS, lk_relu, lk_swish, prelu, relu
from linked_jax.linking import Link, fourier, linked, min_max
from linked_jax.remedies.moment_calculus import (
    Moments,
    piecewise_linear,
    through_flatten,
    through_kernel,
    through_link,
    through_pool,
)
from tests.cases import first_fast

LINKS = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link) and name != "crelu"}
CLOSED = ("relu", "leaky_relu", "lk_relu", "lk_leaky_relu", "min_max")
PANELS = np.concatenate([-np.geomspace(1e-9, 1, 120)[::-1], [0], np.geomspace(1e-9, 1, 120)])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def moments(mean, std):
    return Moments(jnp.asarray(mean, float), jnp.asarray(std, float) ** 2)


def numpy_moments(g, mu, sigma):
    """E[g] and Var[g] on N(mu, sigma^2): dense panels of x around the mean and around 0, by NumPy."""
    x, w = np.polynomial.legendre.leggauss(24)
    edges = np.concatenate([mu + sigma * np.linspace(-12, 12, 161), PANELS * (abs(mu) + 12 * sigma)])
    edges = np.sort(np.clip(edges, mu - 12 * sigma, mu + 12 * sigma))
    half = np.diff(edges)[:, None] / 2
    z = (edges[:-1, None] + half * (1 + x)).ravel()
    w = (half * w).ravel() * np.exp(-(((z - mu) / sigma) ** 2) / 2) / np.sqrt(2 * np.pi) / sigma
    values = np.asarray(g(jnp.asarray(z)))
    mean = w @ values
    return mean, w @ (values - mean) ** 2, w @ values**2


# --- activations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))
@pytest.mark.parametrize("name", first_fast(["lk_relu", *(name for name in LINKS if name != "lk_relu")]))
def test_every_link_has_the_moments_of_numpy_quadrature(name, layout):
    link = Link(LINKS[name].members, layout=layout)
    mu, sigma = np.array([-4.0, -0.3, 0.0, 0.01, 2.0, 5.0]), np.array([1.0, 0.5, 3.0, 2.0, 0.7, 2.5])
    found = jax.jit(through_link, static_argnums=1)(moments(mu, sigma), link)
    wanted = np.array(
        [[numpy_moments(g, m, s) for m, s in zip(mu, sigma, strict=True)] for g in link.members]
    )  # member, channel, (mean, variance, mean square)
    wanted = (wanted if layout == "blocked" else wanted.swapaxes(0, 1)).reshape(-1, 3)
    size = np.sqrt(wanted[:, 2])
    assert np.abs((found.mean - wanted[:, 0]) / size).max() < 1e-8
    assert np.abs((found.variance - wanted[:, 1]) / size**2).max() < 1e-8


@settings(max_examples=10)
@given(st.floats(-6, 6), st.floats(0.05, 20), st.floats(-2, 2), st.floats(-2, 2))
def test_the_closed_form_is_the_integral(mu, sigma, a, b):
    found = jax.jit(piecewise_linear)(moments([mu], [sigma]), a, b)
    mean, variance, _ = numpy_moments(lambda z: jnp.where(z > 0, a * z, b * z), mu, sigma)
    size = (abs(mu) + sigma) * (abs(a) + abs(b))
    assert abs(found.mean[0] - mean) <= 1e-11 * size
    assert abs(found.variance[0] - variance) <= 1e-11 * size**2


@pytest.mark.parametrize("name", first_fast(CLOSED))
def test_links_that_are_linear_on_both_sides_of_zero_integrate_nothing(name):
    program = str(jax.make_jaxpr(lambda m: through_link(m, LINKS[name]))(moments(np.zeros(3), np.ones(3))))
    assert "224" not in program  # nodes
    assert "224" in str(jax.make_jaxpr(lambda m: through_link(m, lk_swish))(moments(np.zeros(3), np.ones(3))))


@pytest.mark.slow
def test_a_function_that_only_starts_as_relu_is_integrated():
    relu6 = linked(jax.nn.relu6)
    wanted = numpy_moments(lambda z: jnp.clip(z, 0, 6), 5.0, 2.0)
    found = through_link(moments([5.0], [2.0]), relu6)
    np.testing.assert_allclose(found.mean[0], wanted[0], rtol=1e-3)  # its kink at 6 is not on the cut
    assert abs(found.mean[0] - through_link(moments([5.0], [2.0]), lk_relu).mean[0]) > 0.1


@pytest.mark.slow
def test_members_that_close_over_traced_slopes_and_unhashable_ones_work():
    @jax.jit
    def mean(slope):
        return through_link(moments([0.0], [1.0]), Link((functools.partial(prelu, negative_slope=slope),))).mean[0]

    np.testing.assert_allclose(mean(0.25), 0.75 / np.sqrt(2 * np.pi), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(mean)(0.25), -1 / np.sqrt(2 * np.pi), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("link", [lk_relu, lk_swish, min_max, fourier], ids=["lk_relu", "lk_swish", "min_max", "four"])
def test_gradients_are_those_of_finite_differences(link):
    check_grads(
        jax.jit(lambda m: through_link(m, link)), (moments([-1.0, 0.0, 0.6], [0.8, 1.0, 2.0]),), order=1, modes=["rev"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("link", [lk_relu, lk_swish], ids=["lk_relu", "lk_swish"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_extreme_moments_give_finite_values_and_gradients(dtype, link):
    mean = jnp.array([0.0, 1e3, -1e3, 30.0, 1e8, -1e8, 0.0, -6.0], dtype)
    variance = jnp.array([0.0, 0.0, 1e-10, 1.0, 1.0, 1.0, 1e8, 1.0], dtype)

    def total(m):
        out = through_link(m, link)
        return out.mean.sum() + out.variance.sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(Moments(mean, variance))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradient)))
    assert (out.variance >= 0).all()
    assert out.mean.dtype == out.variance.dtype == dtype


@pytest.mark.slow
def test_a_variance_far_below_the_mean_survives_float32():
    """E[g^2] - E[g]^2 would lose it: 1e6 + 1 and 1e6 are five digits apart from their difference."""
    out = through_link(Moments(jnp.array([1000.0], jnp.float32), jnp.array([1e-2], jnp.float32)), relu)
    np.testing.assert_allclose(out.variance, 1e-2, rtol=1e-5)


@pytest.mark.slow
def test_jit_equals_eager_and_a_vmap_over_layers_is_a_loop():
    many = moments(np.linspace(-2, 2, 6).reshape(3, 2), np.full((3, 2), 0.7))
    eager = [through_link(Moments(mean, variance), lk_swish) for mean, variance in zip(*many, strict=True)]
    mapped = jax.jit(jax.vmap(lambda m: through_link(m, lk_swish)))(many)
    for number, out in enumerate(eager):
        np.testing.assert_allclose(mapped.mean[number], out.mean, rtol=1e-12)
        np.testing.assert_allclose(mapped.variance[number], out.variance, rtol=1e-12)


# --- kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.sampled_from([(), (3,), (3, 2), (2, 1, 3)]))
def test_kernel_moments_are_those_of_a_sum_of_independent_numbers(seed, c_in, c_out, window):
    rng = np.random.default_rng(seed)
    kernel, mean, std = rng.normal(size=(*window, c_in, c_out)), rng.normal(size=c_in), rng.uniform(0.1, 2, c_in)
    out = through_kernel(moments(mean, std), jnp.asarray(kernel))
    for unit in range(c_out):
        taps = [(position, channel) for position in np.ndindex(window) for channel in range(c_in)]
        wanted_mean = sum(kernel[(*p, c, unit)] * mean[c] for p, c in taps)
        wanted_variance = sum(kernel[(*p, c, unit)] ** 2 * std[c] ** 2 for p, c in taps) + 1e-10
        np.testing.assert_allclose(out.mean[unit], wanted_mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(out.variance[unit], wanted_variance, rtol=1e-12)


def test_kernel_moments_of_a_convolution_sum_over_its_positions():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4, 5)))
    out = through_kernel(moments([1.0, -2.0, 0.5, 3.0], [0.3, 1.0, 2.0, 0.7]), kernel)
    mean, variance = np.array([1.0, -2.0, 0.5, 3.0]), np.array([0.3, 1.0, 2.0, 0.7]) ** 2
    np.testing.assert_allclose(out.mean, np.einsum("hwio,i->o", kernel, mean), rtol=1e-10)
    np.testing.assert_allclose(out.variance, np.einsum("hwio,hwio,i->o", kernel, kernel, variance) + 1e-10, rtol=1e-12)


def test_a_linear_chain_has_its_exact_moments():
    """Orthogonal kernels, each times a number, keep independent inputs independent: nothing is approximate."""
    rng, mean, covariance = np.random.default_rng(0), np.arange(6.0), 4 * np.eye(6)
    out = moments(mean, np.full(6, 2.0))
    for _ in range(30):
        kernel = rng.uniform(0.5, 1.5) * np.linalg.qr(rng.normal(size=(6, 6)))[0]
        mean, covariance = mean @ kernel, kernel.T @ covariance @ kernel
        out = through_kernel(out, jnp.asarray(kernel))
    np.testing.assert_allclose(out.mean, mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(out.variance, np.diag(covariance), rtol=1e-6)  # 30 times 1e-10 is added


@pytest.mark.slow
@pytest.mark.parametrize("link", [relu, lk_swish], ids=["relu", "lk_swish"])
def test_moments_of_a_layer_are_those_of_samples(link):
    """Mean: within 5 standard errors. Variance: of one member exact; a link's members are not independent."""
    rng, samples = np.random.default_rng(0), 200_000
    mean, std, kernel = rng.normal(size=4), rng.uniform(0.5, 2, 4), rng.normal(size=(4 * link.arity, 3))
    y = np.asarray(link(jnp.asarray(mean + std * rng.normal(size=(samples, 4))))) @ kernel
    out = through_kernel(through_link(moments(mean, std), link), jnp.asarray(kernel))
    assert (np.abs(y.mean(0) - out.mean) < 5 * y.std(0) / np.sqrt(samples)).all()
    if link.arity == 1:
        errors = np.sqrt(((y - y.mean(0)) ** 4).mean(0) / samples)
        assert (np.abs(y.var(0) - out.variance) < 5 * errors).all()


@pytest.mark.slow
def test_a_mean_and_a_variance_go_into_a_relu_network_of_samples():
    """What is counted as independent and Gaussian is nearly so in a wide random network."""
    rng, width = np.random.default_rng(0), 256
    x, out = rng.normal(size=(4000, width)), moments(np.zeros(width), np.ones(width))
    for _ in range(3):
        kernel = rng.normal(size=(width, width)) * np.sqrt(2 / width)
        x, out = np.maximum(x @ kernel, 0), through_link(through_kernel(out, jnp.asarray(kernel)), relu)
    ratio = np.asarray(out.variance).mean() / x.var(0).mean()
    assert 0.8 < ratio < 1.25
    assert np.corrcoef(out.mean, x.mean(0))[0, 1] > 0.9


# --- pools --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("positions", [1, 4, 9])
@pytest.mark.parametrize("kind", ["max", "average"])
def test_pools_of_independent_pixels_are_those_of_samples(kind, positions):
    pixels = 2 + 3 * np.random.default_rng(0).normal(size=(200_000, positions))
    y = pixels.max(1) if kind == "max" else pixels.mean(1)
    out = through_pool(moments([2.0], [3.0]), positions, kind=kind)
    assert abs(out.mean[0] - y.mean()) < 5 * y.std() / np.sqrt(len(y))
    assert abs(out.variance[0] / y.var() - 1) < 0.02


def test_max_pools_have_the_known_order_statistics():
    """The mean of the larger of two is 1/sqrt(pi), its variance 1 - 1/pi."""
    out = through_pool(moments([0.0], [1.0]), 2, kind="max")
    np.testing.assert_allclose(out.mean[0], 1 / np.sqrt(np.pi), rtol=1e-12)
    np.testing.assert_allclose(out.variance[0], 1 - 1 / np.pi, rtol=1e-12)


def test_flatten_repeats_the_channels_as_reshape_does():
    image = np.broadcast_to(np.arange(3.0), (1, 2, 2, 3))
    np.testing.assert_array_equal(through_flatten(moments(np.arange(3.0), np.ones(3)), 4).mean, image.reshape(-1))


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_a_kernel_of_other_inputs_and_unknown_pools_are_refused():
    unit = moments(np.zeros(2), np.ones(2))
    for shape in ((3, 2), (2,)):
        with pytest.raises(ValueError, match="takes moments of its inputs"):
            through_kernel(unit, jnp.ones(shape))
    with pytest.raises(ValueError, match="'median' over 4"):
        through_pool(unit, 4, kind="median")
    with pytest.raises(ValueError, match="over 0"):
        through_pool(unit, 0)
