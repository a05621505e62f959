import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from linked_jax import Link, fourier, linked, lk_relu, lk_swish, prelu, relu
from linked_jax.activations import ACTIVATIONS
from linked_jax.remedies.normprop import (
    NormPropConv,
    NormPropLinear,
    max_moments,
    normalized,
    normalized_max_pool,
    unit_filters,
)
from tests.cases import first_fast

LINKS = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link) and name != "crelu"}
over_links = pytest.mark.parametrize("link", first_fast(LINKS.values()), ids=LINKS)
seeds = st.integers(0, 2**32 - 1)
GEOMETRIES = {
    "linear": (functools.partial(NormPropLinear, 3, 5), functools.partial(nnx.Linear, 3, 5), (2, 4, 3)),
    "conv": (functools.partial(NormPropConv, 3, 5, (3, 3)), functools.partial(nnx.Conv, 3, 5, (3, 3)), (2, 6, 7, 3)),
    "strided, padded": (
        functools.partial(NormPropConv, 3, 5, (3, 2), strides=(1, 2), padding=[(1, 0), (2, 1)]),
        functools.partial(nnx.Conv, 3, 5, (3, 2), strides=(1, 2), padding=[(1, 0), (2, 1)]),
        (2, 6, 7, 3),
    ),
    "one axis": (
        functools.partial(NormPropConv, 3, 5, 3, strides=2, padding="VALID"),
        functools.partial(nnx.Conv, 3, 5, 3, strides=2, padding="VALID"),
        (2, 9, 3),
    ),
}
over_geometries = pytest.mark.parametrize(("make", "plain", "shape"), first_fast(GEOMETRIES.values()), ids=GEOMETRIES)
over_layers = pytest.mark.parametrize(
    ("make", "shape"), first_fast([(g[0], g[2]) for g in list(GEOMETRIES.values())[:2]])
)


def white(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(0.3, 2.0, shape).astype(dtype)


# --- the links ----------------------------------------------------------------------------------------------------


def test_relu_has_the_constants_of_the_paper():
    (member,) = normalized(relu).members
    assert math.isclose(member.mean, math.sqrt(1 / (2 * math.pi)), rel_tol=1e-12)
    assert math.isclose(member.std, math.sqrt((1 - 1 / math.pi) / 2), rel_tol=1e-12)


@over_links
def test_each_member_has_mean_0_and_variance_1(link):
    """Against adaptive quadrature, split at the kink."""
    with jax.enable_x64(True):
        for member in normalized(link).members:
            f = jax.jit(member)

            def integral(power, f=f):
                def integrand(z):
                    return float(f(z)) ** power * scipy.stats.norm.pdf(z)

                return sum(scipy.integrate.quad(integrand, *ends, epsabs=1e-11)[0] for ends in ((-9, 0), (0, 9)))

            np.testing.assert_allclose([integral(1), integral(2)], [0, 1], atol=1e-9)


@pytest.mark.slow
@over_links
def test_values_and_derivatives_are_those_of_the_link_moved_and_scaled(link):
    with jax.enable_x64(True):
        found = normalized(link)
        z = jnp.asarray([-3.0, -0.4, -0.0, 0.0, 0.7, 2.0])
        stds = np.asarray([member.std for member in found.members])
        means = np.asarray([member.mean for member in found.members])
        np.testing.assert_allclose(
            jax.vmap(found)(z), (np.asarray(jax.vmap(link)(z)) - means) / stds, rtol=1e-12, atol=1e-12
        )
        jacobians = [np.asarray(jax.vmap(jax.jacfwd(f))(z)) for f in (found, link)]
        np.testing.assert_allclose(jacobians[0], jacobians[1] / stds, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@over_links
def test_jacobian_at_zero_is_the_links_in_half_precision_too(link):
    found = normalized(link)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        zero = jnp.zeros((), dtype)
        scaled = jax.jacrev(link)(zero) / jnp.asarray([member.std for member in found.members])
        np.testing.assert_allclose(
            np.asarray(jax.jacrev(found)(zero), np.float32), np.asarray(scaled, np.float32), rtol=0.02, atol=0.02
        )


@pytest.mark.slow
def test_a_mirror_link_at_zero_takes_the_limit_from_the_right():
    c2 = math.sqrt((1 - 1 / math.pi) / 2)
    np.testing.assert_allclose(jax.jacobian(normalized(lk_relu))(0.0), [1 / c2, 0], rtol=1e-6)
    np.testing.assert_allclose(jax.jacobian(normalized(relu))(0.0), [0.0])  # JAX's own for one member


@pytest.mark.slow
def test_normalized_links_are_links_frozen_hashable_and_equal_to_their_like():
    found = normalized(lk_swish)
    assert isinstance(found, Link)
    assert (found.arity, found.axis, found.layout) == (2, -1, "blocked")
    assert found == normalized(linked(jax.nn.silu))
    assert hash(found) == hash(normalized(linked(jax.nn.silu)))
    assert found not in {lk_swish, normalized(lk_relu), normalized(fourier)}
    assert found.members[0] != jax.nn.silu
    assert "silu(z)" in repr(found)
    with pytest.raises(AttributeError):
        found.axis = 0
    slopes = [normalized(linked(functools.partial(prelu, negative_slope=slope))) for slope in (0.1, 0.1, 0.2)]
    assert slopes[0] == slopes[1] != slopes[2]
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(link, z):
        traced.append(link)
        return link(z)

    for link in (slopes[0], slopes[1]):
        np.testing.assert_array_equal(apply(link, jnp.ones(2)), link(jnp.ones(2)))
    assert len(traced) == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["blocked", "interleaved"])
def test_axis_and_layout_stay(layout):
    link = linked(jnp.sin, jnp.cos, axis=1, layout=layout)
    z = jnp.asarray(white(2, 3, 4), jnp.float32)
    members = [normalized(Link((g,)))(z) for g in link.members]
    wanted = jnp.concatenate(members, 1) if layout == "blocked" else jnp.stack(members, 2).reshape(2, 6, 4)
    np.testing.assert_allclose(normalized(link)(z), wanted, atol=1e-6)


@pytest.mark.slow
def test_links_keep_bfloat16_and_are_made_while_tracing():
    z = jnp.asarray(white(8), jnp.bfloat16)
    found = jax.jit(lambda z: normalized(lk_relu)(z))(z)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), normalized(lk_relu)(z.astype(jnp.float32)), rtol=2**-6, atol=2**-6
    )


# --- the layers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@over_geometries
def test_layer_is_flax_own_with_unit_filters(make, plain, shape):
    layer, wanted = make(rngs=nnx.Rngs(0)), plain(rngs=nnx.Rngs(1))
    np.testing.assert_allclose(layer.scale[...], 1 / 1.21, rtol=1e-6)
    np.testing.assert_array_equal(layer.bias[...], 0)
    gamma = np.arange(1.0, 6.0)
    layer.scale[...], layer.bias[...] = jnp.asarray(gamma, jnp.float32), jnp.arange(5.0)
    kernel = np.asarray(layer.kernel[...], np.float64)
    for o in range(5):
        kernel[..., o] *= gamma[o] / np.sqrt((kernel[..., o] ** 2).sum())
    wanted.kernel[...], wanted.bias[...] = jnp.asarray(kernel, jnp.float32), jnp.arange(5.0)
    x = jnp.asarray(white(*shape), jnp.float32)
    found = layer(x)
    np.testing.assert_allclose(found, wanted(x), atol=1e-4)
    np.testing.assert_allclose(jax.jit(layer)(x), found, atol=1e-4)
    for n in range(len(x)):  # an example alone
        np.testing.assert_allclose(layer(x[n : n + 1]), found[n : n + 1], atol=1e-5)


@given(seeds, st.floats(1e-3, 1e3))
def test_unit_filters_have_norm_1_at_any_scale(seed, scale):
    w = white(3, 2, 4, seed=seed)
    with jax.enable_x64(True):
        found = np.asarray(unit_filters(jnp.asarray(scale * w)))
        np.testing.assert_allclose(found, unit_filters(jnp.asarray(w)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found.reshape(-1, 4), axis=0), 1, atol=1e-12)


@pytest.mark.slow
def test_gradient_goes_through_the_norm():
    with jax.enable_x64(True):
        w, g = jnp.asarray(white(4, 3)), white(4, 3, seed=1)
        check_grads(jax.jit(unit_filters), (w,), order=1, modes=("fwd", "rev"))
        found = np.asarray(jax.vjp(unit_filters, w)[1](jnp.asarray(g))[0])
    np.testing.assert_allclose((found * np.asarray(w)).sum(0), 0, atol=1e-12)  # it is at right angles to the filter


@pytest.mark.slow
def test_a_filter_of_zeros_gives_zero_and_finite_gradients():
    f = lambda w: unit_filters(w).sum()  # noqa: E731
    for value, derivative in ((0.0, 1e12), (1e-20, 1e12)):
        w = jnp.full((4, 2), value)
        np.testing.assert_allclose(unit_filters(w), value * 1e12, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(f)(w), derivative, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("link", [relu, lk_relu, lk_swish, fourier], ids=str)
def test_units_have_mean_0_and_variance_1_at_gamma_1_and_not_at_the_start(link):
    x = jax.random.normal(jax.random.key(0), (100_000, 8))
    moments = []
    for scale_init in (1.0, 1 / 1.21):
        layer = NormPropLinear(8, 4, scale_init=scale_init, rngs=nnx.Rngs(0))
        y = np.asarray(normalized(link)(layer(x)), np.float64)
        moments.append((y.mean(0), y.var(0)))
    (means, variances), (_, shrunk) = moments
    np.testing.assert_allclose(means, 0, atol=0.015)
    np.testing.assert_allclose(variances, 1, atol=0.03)  # of 100,000 draws of a distribution with a tail
    assert np.abs(shrunk - 1).max() > 0.1


@pytest.mark.slow
def test_layer_gradients_are_right():
    with jax.enable_x64(True):
        layer = NormPropConv(2, 3, (2, 2), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        graph, state = nnx.split(layer)
        f = jax.jit(lambda state, x: jnp.sin(nnx.merge(graph, state)(x)))
        check_grads(f, (state, jnp.asarray(white(1, 3, 3, 2))), order=1, modes=("rev",))


@pytest.mark.slow
@over_layers
def test_bfloat16(make, shape):
    x = jnp.asarray(white(*shape), jnp.bfloat16)
    exact = make(rngs=nnx.Rngs(0))
    wanted = exact(x.astype(jnp.float32))
    for options in ({"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}):
        layer = make(rngs=nnx.Rngs(0), **options)
        layer.kernel[...] = exact.kernel[...].astype(layer.kernel.dtype)
        u = layer(x)
        assert u.dtype == jnp.bfloat16
        assert layer.scale.dtype == layer.kernel.dtype == options.get("param_dtype", jnp.float32)
        np.testing.assert_allclose(u.astype(jnp.float32), wanted, atol=0.15)
    assert exact(x).dtype == jnp.float32


@pytest.mark.slow
def test_there_is_no_state_but_parameters():
    layer = NormPropConv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    x = jnp.asarray(white(2, 5, 5, 2), jnp.float32)
    assert len(jax.tree.leaves(nnx.state(layer))) == len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 3
    trained = layer(x)
    layer.eval()
    np.testing.assert_array_equal(layer(x), trained)


# --- the pools ----------------------------------------------------------------------------------------------------


def test_max_moments_are_the_constants_of_2x2_and_3x3_windows():
    np.testing.assert_allclose(max_moments(4), (1.0293754, 0.7012241), atol=5e-8)
    np.testing.assert_allclose(max_moments(9), (1.4850132, 0.5977904), atol=5e-8)


@pytest.mark.slow
def test_max_moments_of_few_numbers_are_known_exactly():
    np.testing.assert_allclose(max_moments(1), (0, 1), atol=1e-12)
    np.testing.assert_allclose(max_moments(2), (math.pi**-0.5, math.sqrt(1 - 1 / math.pi)), atol=1e-12)
    np.testing.assert_allclose(max_moments(3)[0], 1.5 * math.pi**-0.5, atol=1e-12)


@pytest.mark.parametrize("n", first_fast([9, 5, 49, 12_544]))
def test_max_moments_against_the_tails(n):
    """E[M] = int_0^inf P(M > t) - P(M < -t) dt, and likewise with 2t for E[M^2]."""

    def above(t):
        return -math.expm1(n * scipy.stats.norm.logcdf(t))

    def below(t):
        return scipy.stats.norm.cdf(-t) ** n

    mean = scipy.integrate.quad(lambda t: above(t) - below(t), 0, 12, points=(3, 5), epsabs=1e-10)[0]
    square = scipy.integrate.quad(lambda t: 2 * t * (above(t) + below(t)), 0, 12, points=(3, 5), epsabs=1e-10)[0]
    np.testing.assert_allclose(max_moments(n), (mean, math.sqrt(square - mean**2)), atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("window", [(2, 2), (3, 3), (1, 4)])
def test_pools_of_independent_normals_have_mean_0_and_variance_1(window):
    x = jax.random.normal(jax.random.key(0), (64, 36, 36, 4))
    y = np.asarray(normalized_max_pool(x, window, strides=window), np.float64)
    np.testing.assert_allclose(y.mean(), 0, atol=0.02)
    np.testing.assert_allclose(y.var(), 1, atol=0.03)


@pytest.mark.parametrize("strides", first_fast((each,) for each in [None, (2, 1), (1, 3)]))
def test_pools_by_hand(strides):
    x = white(2, 5, 6, 3)
    down, right = strides or (1, 1)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 2), (1, 2))[:, ::down, ::right]
    mean, std = max_moments(6)
    with jax.enable_x64(True):
        found = normalized_max_pool(jnp.asarray(x), (3, 2), strides=strides)
    np.testing.assert_allclose(found, (windows.max((-1, -2)) - mean) / std, atol=1e-12)


@pytest.mark.slow
def test_pools_in_bfloat16_under_jit_and_grad():
    pool = functools.partial(normalized_max_pool, window_shape=(2, 2))
    x = jnp.asarray(white(2, 4, 4, 3), jnp.bfloat16)
    y = jax.jit(lambda x: pool(x))(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), pool(x.astype(jnp.float32)), rtol=0.02, atol=0.03)
    with jax.enable_x64(True):
        check_grads(jax.jit(lambda x: pool(x)), (jnp.asarray(white(1, 3, 3, 1)),), order=1, modes=("rev",))


def test_bad_inputs_are_refused(unchecked):
    with pytest.raises(ValueError, match="constant member"):
        normalized(Link((jnp.zeros_like,)))
    with pytest.raises(ValueError, match="finite"):
        normalized(Link((jnp.log,)))
    with pytest.raises(ValueError, match="n is at least 1, got 0"):
        max_moments(0)
    with pytest.raises(ValueError, match="window_shape is at least 1"):
        normalized_max_pool(jnp.ones((1, 4, 4, 1)), (2, 0))
    with pytest.raises(ValueError, match="strides is at least 1"):
        normalized_max_pool(jnp.ones((1, 4, 4, 1)), (2, 2), strides=(0, 1))
    with pytest.raises(ValueError, match=r"takes .* c_in = 3"):
        NormPropLinear(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 4)))
    for bad in ({"in_features": 0}, {"out_features": 0}, {"kernel_size": (3, 0)}, {"strides": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is at least 1"):
            NormPropConv(**({"in_features": 2, "out_features": 2, "kernel_size": (3, 3)} | bad), rngs=nnx.Rngs(0))
