"""The laws of links, layers and initialisers hold under each of JAX' strict switches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax import certificates, diagnostics, initializers, layers, linen, signal_statistics, slopes
from linked_jax.activations import ACTIVATIONS, linked_prelu, lk_relu, lk_swish, prelu
from linked_jax.diagnostics import live_units
from linked_jax.histograms import log_histogram
from linked_jax.learned import ChannelPReLU, LinkedPReLU
from linked_jax.linking import Link, fourier, linked, min_max
from linked_jax.moments import expectation
from linked_jax.probe import Monitor, overview
from linked_jax.updates import update_ratios
from tests.cases import SWITCHES, first_fast

KEY = jax.random.key(0)
Z = jnp.array([[-2.0, 0.0, 0.5, 3.0], [1e3, -1e3, -0.0, -0.25]])


def laws_of(f, z):
    """Values and gradients, eagerly and compiled: the same, and finite."""

    def loss(z):
        h = f(z)
        return jnp.sum(h * h)

    h, slopes = f(z), jax.grad(loss)(z)
    assert h.dtype == z.dtype == slopes.dtype
    scale = 1 + float(jnp.max(jnp.abs(h)))
    np.testing.assert_allclose(jax.jit(f)(z), h, atol=2e-2 * scale if z.dtype == jnp.bfloat16 else 1e-5 * scale)
    assert np.isfinite(np.asarray(slopes, np.float64)).all()
    assert np.isfinite(np.asarray(jax.jvp(f, (z,), (jnp.ones_like(z),))[1], np.float64)).all()
    return h


def links():
    several = [*ACTIVATIONS.values(), linked(jnp.abs, lambda z: 2 * z)]
    for dtype in (jnp.float32, jnp.bfloat16):
        laws_of(lambda z: jnp.concatenate([link(z) for link in several], axis=-1), Z.astype(dtype))
        h = laws_of(linked(jax.nn.relu, jnp.sin, axis=0, layout="interleaved"), Z.astype(dtype))
        assert live_units(h).shape == (4,)


def prelus():
    for dtype in (jnp.float32, jnp.bfloat16):
        z = Z.astype(dtype)
        laws_of(lambda z: prelu(z, 0.25), z)
        laws_of(lambda z: linked_prelu(z, 0.25, jnp.full(4, 0.1), layout="interleaved"), z)
    for share, features in (("channel", 4), ("layer", 4), ("element", (2, 4))):
        for make in (ChannelPReLU, LinkedPReLU):
            module = make(features, share=share)
            laws_of(module, Z)
            graph, state = nnx.split(module)
            gradient = jax.grad(lambda state, graph=graph: jnp.sum(nnx.merge(graph, state)(Z)))(state)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def dense():
    for link in (lk_relu, lk_swish, fourier, LinkedPReLU(4), ChannelPReLU(4)):
        layer = layers.LinkedLinear(4, 3, link=link, rngs=nnx.Rngs(0))
        laws_of(layer, Z)
        graph, state = nnx.split(layer)
        gradient = jax.jit(jax.grad(lambda state, graph=graph: jnp.sum(nnx.merge(graph, state)(Z))))(state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    half = layers.LinkedLinear(4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    laws_of(half, Z.astype(jnp.bfloat16))


def convolutions():
    z = jnp.stack([Z, Z[::-1]])  # (2, 2, 4): one spatial axis
    grouped = linked(jax.nn.relu, layout="interleaved")
    laws_of(layers.LinkedConv(4, 6, 3, strides=2, rngs=nnx.Rngs(0)), z)
    laws_of(layers.LinkedConv(4, 4, 3, link=grouped, feature_group_count=4, rngs=nnx.Rngs(0)), z)
    laws_of(layers.LinkedConv(4, 4, 3, link=LinkedPReLU(4), padding="CIRCULAR", rngs=nnx.Rngs(0)), z)
    laws_of(layers.LinkedConvTranspose(4, 3, 2, strides=2, rngs=nnx.Rngs(0)), z)


def starts():
    for dtype in (jnp.float32, jnp.bfloat16):
        for make in (initializers.looks_linear, initializers.variance_preserving, initializers.default_kernel_init):
            kernel = make(min_max, strides=2)(KEY, (3, 3, 8, 4), dtype)
            assert kernel.dtype == dtype
            assert np.isfinite(np.asarray(kernel, np.float64)).all()
            init = make(linked(jax.nn.relu, layout="interleaved"), strides=2, feature_group_count=2, transpose=True)
            assert jax.jit(init, static_argnums=(1, 2))(KEY, (2, 8, 4), dtype).shape == (2, 8, 4)
        assert initializers.embed_plain_kernel(jnp.ones((2, 3), dtype), lk_relu).dtype == dtype
    fresh = Link((lambda z: jnp.maximum(z, 0), lambda z: jnp.minimum(z, 0)))  # measured under the switch
    assert initializers.read_out(fresh) == (1, 1)
    np.testing.assert_allclose(initializers.gain(fresh), 2**0.5)
    np.testing.assert_allclose(expectation(lambda z: z * z), 1)


def in_linen():
    z = jnp.stack([Z, Z[::-1]])
    for layer in (
        linen.LinkedDense(3),
        linen.LinkedConv(3, (3,), link=lk_swish),
        linen.LinkedConv(4, (3,), link=linen.LinkedPReLU(), strides=2),
        linen.ChannelPReLU(),
        linen.LinkedPReLU(share="layer", layout="interleaved"),
    ):
        variables = layer.init(KEY, z)
        laws_of(functools.partial(layer.apply, variables), z)


def certified():
    found = certificates.certify(linked(lambda z: jnp.where(z > 0, z, 0 * z)), jnp.float16)
    assert found.linked


def diagnosed():
    def everything(z):
        h, steepness = jax.jvp(lk_swish, (z,), (jnp.ones_like(z),))
        stats = diagnostics.unit_statistics(z, h, steepness, arity=2, where=jnp.array([True, True]))
        stats = diagnostics.combine(stats, stats)
        passed = slopes.slope_statistics(z, steepness, arity=2, where=jnp.array([True, True]))
        passed = slopes.combine_slopes(passed, passed)
        features = signal_statistics.feature_moments(h, where=jnp.array([True, True]))
        features = signal_statistics.combine_features(features, signal_statistics.feature_moments(h))
        return {
            "dead": [diagnostics.dead_units(stats), diagnostics.dead_links(stats)],
            "other verdicts": [diagnostics.dormant_units(stats), diagnostics.saturated_units(stats)],
            "linear": diagnostics.linearised_units(stats),
            "dormancy": [diagnostics.dormancy(stats), diagnostics.not_finite_units(stats)],
            "signal": [signal_statistics.mean_square(stats), signal_statistics.activation_shift(stats)],
            "drift": [signal_statistics.elimination(stats), signal_statistics.covariate_drift(stats, stats)],
            "ranks": [signal_statistics.effective_rank(features), signal_statistics.stable_rank(features)],
            "slopes": [slopes.effective_negative_slope(passed), slopes.dead_band(passed)],
            "histogram": log_histogram(z, where=jnp.array([[True], [True]])),
            "ratios": update_ratios({"w": z, "b": z[0]}, {"w": h[:, :4], "b": h[0, :4]}),
        }

    for dtype in (jnp.float32, jnp.bfloat16):
        z = Z.astype(dtype)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-2), jax.jit(everything)(z), everything(z))


def monitored():
    def net(w, x):
        h = jax.lax.scan(lambda x, w: (linked(jax.nn.relu)(x)[:, :4] @ w, None), x, w)[0]
        return jnp.tanh(h)

    monitor = Monitor([(Z, None)], every=1, call=net, loss_fn=lambda outputs, _: jnp.sum(outputs * outputs) / 2)
    for step in range(2):
        monitor(step, (1 + step) * jnp.stack([jnp.eye(4, dtype=Z.dtype)] * 2))
    assert [len(entry["layers"]) for entry in monitor.history] == [3, 3]
    assert monitor.report.layers[2].gradient_histogram.sum() == Z.size
    assert "dead_band" in overview(monitor.history)


LAWS = (prelus, links, dense, convolutions, starts, in_linen, certified, diagnosed, monitored)
LAWS = {law.__name__: law for law in LAWS}
CASES = [(switch, law) for switch in SWITCHES for law in LAWS]


@pytest.mark.slow
@pytest.mark.parametrize(("switch", "law"), first_fast(CASES), ids=[f"{law} under {switch}" for switch, law in CASES])
def test_laws_hold_under(switch, law):
    with SWITCHES[switch]():
        LAWS[law]()
