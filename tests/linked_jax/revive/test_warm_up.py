import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.warm_up import Bench, Settings
from linked_jax.activations import lk_relu
from linked_jax.revive import link_sequential, warm_up_new


@pytest.mark.parametrize("steps", [1, 4])
def test_new_weights_start_slowly_and_others_do_not_notice(steps):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jax.nn.relu, nnx.Linear(4, 2, rngs=rngs))
    params = nnx.state(link_sequential(model, lk_relu), nnx.Param)
    tx, updates = warm_up_new(steps), jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    assert {path[1] for path, new in nnx.to_flat_state(state.new) if new[...].any()} == {0, 2}  # biases are 0 too
    update = jax.jit(tx.update)
    for t in range(1, 7):
        slow, state = update(updates, state)
        np.testing.assert_array_equal(slow["layers"][0]["kernel"], 1)
        np.testing.assert_array_equal(slow["layers"][2]["kernel"][:4], 1)
        np.testing.assert_allclose(slow["layers"][2]["kernel"][4:], min(1, t / steps), rtol=1e-6)


def test_dtypes_stay_and_it_ends():
    tx = warm_up_new(3)
    params = {"a": jnp.zeros(2, jnp.float16), "b": jnp.ones(2, jnp.bfloat16)}
    state = tx.init(params)._replace(t=jnp.asarray(2, jnp.int32))
    for _ in range(3):
        updates, state = tx.update(params, state)
        assert jax.tree.map(lambda a: a.dtype, updates) == jax.tree.map(lambda a: a.dtype, params)
    assert state.t == 3


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3"])
def test_bad_steps(unchecked, steps):
    with pytest.raises(ValueError, match="steps is an integer of at least 1, got"):
        warm_up_new(steps)


@pytest.mark.slow
def test_the_loss_of_a_net_in_good_health_rises_less():
    bench = Bench(Settings(rounds=3, before=1500, after=200))
    found = [bench.measure(seed) for seed in range(3)]
    at_once, slowly, never = (np.median([each[way]["largest"] for each in found]) for way in ("0", "300", "not linked"))
    assert slowly < at_once
    assert slowly < 1.5 * never


def test_a_chain_of_both_is_one_transformation():
    params = {"new": jnp.zeros(3), "old": jnp.ones(3)}
    tx = optax.chain(optax.adam(0.1), warm_up_new(10))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["old"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["new"], -0.01, rtol=1e-5)
