"""What the tests of the probe share: data, small nets, and what a report must say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.arrays import white

KILL = -1e3


def mean_of_squares(outputs, _labels):
    return (outputs**2).mean()


def agrees(layer, z, members=(jax.nn.relu,), layout="blocked", tolerance=2e-5, rank=True):
    """The layer's report is what NumPy makes of the pre-activations z and the members."""
    z = jnp.asarray(z).reshape(-1, z.shape[-1])
    h = np.stack([np.asarray(jax.vmap(jax.vmap(g))(z), np.float64) for g in members])
    slopes = np.stack([np.asarray(jax.vmap(jax.vmap(jax.grad(g)))(z), np.float64) for g in members])
    z = np.asarray(z, np.float64)
    assert (layer.arity, layer.units, layer.samples) == (len(members), z.shape[1], z.shape[0])
    np.testing.assert_array_equal(layer.dead, (h == 0).all((0, 1)))
    np.testing.assert_array_equal(layer.dead_link, (slopes == 0).all((0, 1)))
    np.testing.assert_array_equal(layer.saturated, (np.abs(slopes) <= 0.01).all((0, 1)))
    changes = (z > 0).any(0) & (z < 0).any(0)
    np.testing.assert_array_equal(layer.linearised, ~changes & ~layer.dead)
    np.testing.assert_allclose(layer.dead_band, (np.abs(slopes) < 1e-3).all(0).mean(0), rtol=1e-6)
    below = np.asarray(z) < 0
    if below.any():
        negative = np.sort(slopes[:, below].mean(-1))  # a link may be found in another order of its members
        np.testing.assert_allclose(np.sort(layer.negative_slope), negative, rtol=1e-4, atol=1e-6)
    score = np.abs(h).mean((0, 1))
    np.testing.assert_allclose(layer.dormancy, score / score.mean(), rtol=1e-4, atol=1e-6)
    scale = np.abs(z).max()
    np.testing.assert_allclose(layer.mean, z.mean(0), atol=tolerance * scale)
    np.testing.assert_allclose(layer.std, z.std(0), atol=tolerance * scale)
    np.testing.assert_allclose(layer.activation_shift, z.mean(), atol=tolerance * scale)
    np.testing.assert_allclose(layer.mean_square, (z**2).mean(), rtol=100 * tolerance)
    if rank:
        h = np.concatenate(h, -1) if layout == "blocked" else np.stack(h, -1).reshape(len(z), -1)
        p = np.linalg.svd(h, compute_uv=False)
        np.testing.assert_allclose(layer.stable_rank, (p**2).sum() / p.max() ** 2, rtol=1e-2)
        p = p / p.sum()
        np.testing.assert_allclose(layer.effective_rank, np.exp(-(p * np.log(p + 1e-30)).sum()), rtol=1e-2)


def same(a, b, tolerance=1e-5):
    """Two reports hold the same numbers."""
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers, strict=True):
        for field in dataclasses.fields(x):
            one, other = getattr(x, field.name), getattr(y, field.name)
            if field.name in ("name", "source", "activation") or one is None or other is None:
                assert (one is None) == (other is None)
            elif field.name in ("effective_rank", "stable_rank"):
                np.testing.assert_allclose(one, other, rtol=1e-3)
            else:
                np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def mlp(weights, x):
    for w in weights:
        x = jax.nn.relu(x @ w)
    return x


def custom(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: (f(*args), args), lambda args, g: jax.vjp(f, *args)[1](g))
    return g


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


WEIGHTS = [white(4, 4, seed=seed) for seed in range(3)]
