"""Padded steps are left out of all statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.activations import lk_relu
from linked_jax.diagnostics import unit_statistics
from linked_jax.probe import Monitor, observe, probe
from linked_jax.signal_statistics import feature_moments
from tests.arrays import white
from tests.linked_jax.probe.common import agrees

X = white(6, 5, 4)
LENGTHS = jnp.array([5, 3, 1, 4, 2, 5])
MASK = jnp.arange(5) < LENGTHS[:, None]
W = white(4, 7)
PADDED = jnp.where(MASK[..., None], X, jnp.nan)
"""What is padded is not a number: it would be seen in any statistic."""


def valid(_inputs):
    return MASK


def gates(w, x):
    return jax.lax.scan(lambda h, x: (h, jnp.tanh(x @ w)), x[:, 0], x.swapaxes(0, 1))[1]


FORMS = {
    "tokens": (lambda w, x: jax.nn.relu(x @ w), [jax.nn.relu]),
    "a link": (lambda w, x: lk_relu(x @ w), [jax.nn.relu, lambda z: jax.nn.relu(-z)]),
    "merged": (lambda w, x: jax.nn.relu(x.reshape(-1, 4) @ w), [jax.nn.relu]),
    "vmapped": (lambda w, x: jax.vmap(jax.vmap(lambda x: jax.nn.relu(w.T @ x)))(x), [jax.nn.relu]),
    "time first": (lambda w, x: jax.nn.relu(x.swapaxes(0, 1) @ w), [jax.nn.relu]),
    "in a scan over time": (gates, [jnp.tanh]),
    "one by one": (lambda w, x: jax.lax.map(lambda x: jax.nn.relu(x @ w), x), [jax.nn.relu]),
    "flattened": (lambda w, x: jax.nn.relu((x @ w).reshape(len(x), -1)), [jax.nn.relu]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_padded_steps_do_not_count(name):
    call, members = FORMS[name]
    (layer,) = probe(W, [PADDED], call=call, mask=valid).layers
    agrees(layer, X[MASK] @ W, members)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_there_may_be_as_many_steps_as_samples(name):
    call, members = FORMS[name]
    (layer,) = probe(W, [PADDED[:5]], call=call, mask=lambda _: MASK[:5]).layers
    agrees(layer, X[:5][MASK[:5]] @ W, members)


@pytest.mark.slow
def test_what_is_pooled_counts_by_sample_and_a_mask_of_samples_counts_all_of_one():
    (layer,) = probe(W, [X], call=lambda w, x: jax.nn.relu(x.mean(1) @ w), mask=valid).layers
    agrees(layer, X.mean(1) @ W)
    (layer,) = probe(W, [X], call=lambda w, x: jax.nn.relu(x @ w), mask=lambda _: LENGTHS > 2).layers
    agrees(layer, X[LENGTHS > 2] @ W)


@pytest.mark.slow
def test_a_recurrent_net_and_its_gradients():
    rnn = nnx.RNN(nnx.SimpleCell(4, 4, rngs=nnx.Rngs(0)))

    def loss_fn(outputs, _):
        return outputs.sum() / len(outputs)  # of the padded steps too

    monitor = Monitor([(X, None)], every=1, loss_fn=loss_fn, mask=valid)
    (layer,) = monitor(0, rnn).layers
    assert layer.samples == MASK.sum()
    w = jnp.eye(4)
    report = probe(w, [(X, None)], call=lambda w, x: jnp.tanh(x @ w), loss_fn=loss_fn, mask=valid)
    wanted = np.square(1 - np.tanh(np.asarray(X[MASK])) ** 2).mean()
    np.testing.assert_allclose(report.layers[0].gradient_mean_square, wanted, rtol=1e-4)


FRAMES = white(2, 4, 8, 2, 3)
OF_FRAMES = jnp.array([[1, 1, 0, 0], [0, 1, 0, 0]], bool)
V = white(3, 5)
KEPT = FRAMES[OF_FRAMES].reshape(-1, 3) @ V
MERGED = {
    "eight steps in all, and eight rows of pixels": lambda w, x: jax.nn.relu(x @ w),
    "samples with steps": lambda w, x: jax.nn.relu(x.reshape(8, 8, 2, 3) @ w),
    "with steps and pixels": lambda w, x: jax.nn.relu(x.reshape(-1, 3) @ w),
    "with pixels before the steps": lambda w, x: jax.nn.relu(x.transpose(0, 3, 2, 1, 4).reshape(-1, 4, 3) @ w),
    "with steps, time first": lambda w, x: jax.nn.relu(x.swapaxes(0, 1).reshape(-1, 3) @ w),
    "one after the other": lambda w, x: jax.nn.relu(jnp.concatenate(list(x.reshape(2, -1, 3))) @ w),
}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", MERGED)
def test_steps_that_are_merged_with_samples_are_left_out(name):
    (layer,) = probe(V, [FRAMES], call=MERGED[name], mask=lambda _: OF_FRAMES).layers
    agrees(layer, KEPT)


def test_samples_that_are_merged_with_others_are_left_out():
    for mask in (jnp.array([False, True]), jnp.array([[False] * 4, [True] * 4])):
        (layer,) = probe(V, [FRAMES], call=MERGED["with steps and pixels"], mask=lambda _, mask=mask: mask).layers
        assert layer.samples == FRAMES[1].size / 3


def test_a_mask_that_cannot_be_laid_on_a_layer_is_refused():
    def with_one_more(w, x):
        return jnp.tanh(jnp.concatenate([x, jnp.ones((1, 4))]) @ w)

    with pytest.raises(ValueError, match=r"mask is of 6 samples, and .* has 7 rows, which are no multiple"):
        probe(W, [X[:, 0]], call=with_one_more, mask=lambda _: MASK[:, 0])


@pytest.mark.slow
def test_a_mask_in_observe():
    _, (tap,) = jax.jit(lambda x: observe(lambda w, x: jnp.tanh(x @ w), W, x, mask=MASK))(PADDED)
    z = X[MASK] @ W
    wanted = unit_statistics(z, jnp.tanh(z), 1 - jnp.tanh(z) ** 2), feature_moments(jnp.tanh(z))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (tap.stats, tap.features), wanted)


@pytest.mark.parametrize(
    "mask", [MASK, lambda x: MASK[:3], lambda x: MASK * 1.0, lambda x: MASK[..., None], lambda x: MASK[:, 1:3]]
)
def test_other_masks_are_refused(mask, unchecked):
    with pytest.raises(ValueError, match="mask"):
        probe(W, [X], call=lambda w, x: jnp.tanh(x @ w), mask=mask)
