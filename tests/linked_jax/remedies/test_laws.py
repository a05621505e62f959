"""What all remedies that are layers have in common: dtypes, transformations, state, batches of one, several devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from linked_jax import lk_relu, remedies
from tests.cases import SWITCHES, first_fast


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of 4 channels in and out."""

    make: Callable[..., nnx.Module]
    shape: tuple[int, ...] = (5, 5, 4)  # of one example
    call: Callable[..., Any] = lambda layer, x: layer(x)
    carries: bool = False  # the output can be the input of the next layer
    sees_batch: bool = False  # in training


MOMENTS = remedies.Moments(jnp.zeros(4), jnp.ones(4))
LAYERS = {
    "lcw_conv": Case(lambda **k: remedies.LCWConv(4, 4, (3, 3), **k), carries=True),
    "lcw_dense": Case(lambda **k: remedies.LCWLinear(4, 4, **k), shape=(4,), carries=True),
    "normprop_conv": Case(lambda **k: remedies.NormPropConv(4, 4, (3, 3), **k), carries=True),
    "normprop_dense": Case(lambda **k: remedies.NormPropLinear(4, 4, **k), shape=(4,), carries=True),
    "ws_conv": Case(lambda **k: remedies.WSConv(4, 4, (3, 3), **k), carries=True),
    "bcn": Case(lambda **k: remedies.BatchChannelNorm(4, 2, **k), carries=True, sees_batch=True),
    "bcn_estimated": Case(
        lambda **k: remedies.BatchChannelNorm(4, 2, estimate=True, **k), carries=True, sees_batch=True
    ),
    "ic": Case(lambda **k: remedies.IndependentComponent(4, **k), carries=True, sees_batch=True),
    "bkn": Case(
        lambda **k: remedies.BatchKalmanNorm(4, **k), call=lambda layer, x: layer(x)[0], carries=True, sees_batch=True
    ),
    "vp_conv": Case(
        lambda **k: remedies.VPConv(4, 4, (3, 3), **k), call=lambda layer, x: layer(x, MOMENTS)[0], carries=True
    ),
    "vp_dense": Case(
        lambda **k: remedies.VPLinear(4, 4, **k),
        shape=(4,),
        call=lambda layer, x: layer(x, MOMENTS)[0],
        carries=True,
    ),
    "quasi_recurrent": Case(
        lambda **k: remedies.QuasiRecurrent(4, 4, candidate="drelu", **k), shape=(6, 4), carries=True, sees_batch=True
    ),
    "quasi_recurrent_linked": Case(
        lambda **k: remedies.QuasiRecurrent(4, 4, candidate=lk_relu, **k), shape=(6, 4), sees_batch=True
    ),
}
cases = pytest.mark.parametrize("name", first_fast(LAYERS))


def build(name, seed=0, **kwargs):
    return LAYERS[name].make(rngs=nnx.Rngs(seed), **kwargs)


def examples(name, count=4, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(1, 2, (count, *LAYERS[name].shape)), jnp.float32)


def step(name, graph, state, x):
    """The output and the new state."""
    layer = nnx.merge(graph, state, copy=True)
    return LAYERS[name].call(layer, x), nnx.state(layer)


@pytest.mark.slow
@cases
def test_half_precision_in_half_precision_out(name):
    x = examples(name)
    y = LAYERS[name].call(build(name, dtype=jnp.bfloat16), x)
    assert y.dtype == jnp.bfloat16
    exact = LAYERS[name].call(build(name), x)
    assert exact.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.06 * float(abs(exact).max()))


@pytest.mark.slow
@cases
def test_jit_equals_eager_state_included(name):
    graph, state = nnx.split(build(name))
    x = examples(name)
    jitted = jax.jit(lambda state, x: step(name, graph, state, x))(state, x)
    chex.assert_trees_all_close(_numbers(jitted), _numbers(step(name, graph, state, x)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@cases
def test_vmap_over_seeds_is_each_by_itself(name):
    graph = nnx.graphdef(build(name))
    states = [nnx.state(build(name, seed)) for seed in range(2)]
    x = examples(name)
    together = jax.vmap(lambda state: step(name, graph, state, x))(jax.tree.map(lambda *s: jnp.stack(s), *states))
    for seed, state in enumerate(states):
        alone = step(name, graph, state, x)
        of_seed = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together)
        chex.assert_trees_all_close(_numbers(of_seed), _numbers(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast([name for name, case in LAYERS.items() if case.carries]))
def test_a_scan_over_layers_is_the_layers_in_turn(name):
    graph = nnx.graphdef(build(name))
    states = [nnx.state(build(name, seed)) for seed in range(3)]
    x = examples(name)

    def layer(x, state):
        return step(name, graph, state, x)

    y, scanned = jax.lax.scan(layer, x, jax.tree.map(lambda *s: jnp.stack(s), *states))
    for number, state in enumerate(states):
        x, new = layer(x, state)
        at = jax.tree.map(lambda leaf, number=number: leaf[number], scanned)
        chex.assert_trees_all_close(_numbers(at), _numbers(new), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-4)


@cases
def test_state_survives_a_checkpoint(name, tmp_path):
    layer = build(name)
    LAYERS[name].call(layer, examples(name))  # statistics and random counts move
    graph, state = nnx.split(layer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", state)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "saved", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    x = examples(name, seed=1)
    chex.assert_trees_all_equal(_numbers(step(name, graph, found, x)), _numbers(step(name, graph, state, x)))


@pytest.mark.slow
@cases
@pytest.mark.parametrize("switch", SWITCHES)
def test_it_trains_under(switch, name):
    with SWITCHES[switch]():
        graph, params, rest = nnx.split(build(name), nnx.Param, ...)

        def loss(params):
            layer = nnx.merge(graph, params, rest, copy=True)
            return jnp.square(LAYERS[name].call(layer, examples(name))).sum()

        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss)(params)))


@pytest.mark.slow
@cases
def test_one_example_trains(name):
    graph, params, rest = nnx.split(build(name), nnx.Param, ...)

    def loss(params):
        layer = nnx.merge(graph, params, rest, copy=True)
        return jnp.square(LAYERS[name].call(layer, examples(name, 1))).sum()

    gradients = jax.tree.leaves(jax.grad(loss)(params))
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)
    assert any((gradient != 0).any() for gradient in gradients)


@cases
def test_which_layers_see_the_batch_in_training(name):
    """The others give an example the same numbers at any batch size."""
    x = examples(name)
    together = LAYERS[name].call(build(name), x)
    alone = jnp.concatenate([LAYERS[name].call(build(name), x[i : i + 1]) for i in range(len(x))])
    assert np.allclose(together, alone, rtol=1e-4, atol=1e-4) != LAYERS[name].sees_batch


@cases
def test_in_evaluation_an_example_does_not_see_the_others(name):
    layer = build(name)
    for seed in range(3):
        LAYERS[name].call(layer, examples(name, seed=seed))
    layer.eval()
    before = _numbers(nnx.state(layer))
    x = examples(name, seed=9)
    together = LAYERS[name].call(layer, x)
    alone = jnp.concatenate([LAYERS[name].call(layer, x[i : i + 1]) for i in range(len(x))])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(_numbers(nnx.state(layer)), before)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@cases
def test_a_batch_over_two_devices_is_the_whole_batch(name, axis_type):
    if name.startswith("quasi_recurrent") and axis_type == AxisType.Explicit:
        pytest.skip("JAX 0.10 cannot give nnx.Conv's kernel a gradient there once the outputs are sliced")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    graph, params, rest = nnx.split(build(name), nnx.Param, ...)

    def loss(params, x):
        layer = nnx.merge(graph, params, rest, copy=True)
        y = LAYERS[name].call(layer, x)
        return jnp.square(y).mean(), nnx.state(layer, nnx.BatchStat)

    x = examples(name, 8)
    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    whole = both(params, x)
    with jax.set_mesh(mesh):
        spread = both(params, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    chex.assert_trees_all_close(jax.device_get(spread), jax.device_get(whole), rtol=1e-4, atol=1e-5)


def _numbers(tree):
    """Keys as their data: they cannot be compared."""
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, tree
    )
