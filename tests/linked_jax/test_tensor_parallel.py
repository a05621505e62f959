"""A pair of layers whose hidden channels are split: Megatron's one all-reduce forward and one backward, linked or not.

On four virtual devices, in a process of its own: the suite has two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import collections, json, jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from benchmarks.sharded_steps import collectives
from linked_jax import Link, LinkedLinear, linked

LINKS = {
    "plain": Link((jax.nn.relu,)),
    "interleaved": linked(jax.nn.relu, layout="interleaved"),
    "blocked": linked(jax.nn.relu),
}
MESHES = {kind.name: jax.make_mesh((4,), ("model",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit)}
x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)

def run(link, mesh):
    rngs = nnx.Rngs(0)
    pair = nnx.List([nnx.Linear(32, 64, rngs=rngs), LinkedLinear(64, 32, link=link, rngs=rngs)])
    graph, state = nnx.split(pair)

    def net(state, x, **sharding):
        up, down = nnx.merge(graph, state)
        return down(up(x), **sharding)

    def loss(state, x, **sharding):
        y = net(state, x, **sharding)
        return (y * y).sum(), y

    (_, expected), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(state, x)
    specs = {(0, "kernel"): P(None, "model"), (0, "bias"): P("model"), (1, "linear", "kernel"): P("model", None)}
    flat = {path: jax.device_put(leaf, NamedSharding(mesh, specs.get(path, P())))
            for path, leaf in nnx.to_flat_state(state)}
    state = nnx.from_flat_state(list(flat.items()))
    explicit = mesh.axis_types == (AxisType.Explicit,)
    sharding = {"out_sharding": P(None, None)} if explicit else {}
    with jax.set_mesh(mesh):
        z = jax.device_put(x @ np.ones((32, 64), np.float32), NamedSharding(mesh, P(None, "model")))
        programs = {
            "link": jax.jit(link).lower(z).compile(),
            "forward": jax.jit(lambda s, x: net(s, x, **sharding)).lower(state, x).compile(),
            "both": jax.jit(jax.value_and_grad(lambda s, x: loss(s, x, **sharding), (0, 1), has_aux=True))
            .lower(state, x).compile(),
        }
        (_, y), found = programs["both"](state, x)
    def error(a, b):
        return float(np.abs(np.asarray(a) - np.asarray(b)).max())

    errors = jax.tree.map(error, (y, found), (expected, gradients))
    counts = {name: dict(collections.Counter(kind for kind, _ in collectives(p))) for name, p in programs.items()}
    return {**counts, "error": max(jax.tree.leaves(errors))}

print(json.dumps({f"{name} {kind}": run(link, mesh) for name, link in LINKS.items() for kind, mesh in MESHES.items()}))
"""


@pytest.fixture(scope="module")
def found():
    """Collectives of the compiled programs, and the greatest error of outputs and gradients, of each link and mesh."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=root, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["Auto", "Explicit"])
@pytest.mark.parametrize("link", ["plain", "interleaved"])
def test_a_link_that_stays_on_its_shard_costs_no_collective(link, mesh, found):
    assert found[f"{link} {mesh}"]["link"] == {}
    assert found[f"{link} {mesh}"]["forward"] == {"all-reduce": 1}
    assert found[f"{link} {mesh}"]["both"] == {"all-reduce": 2}  # the input's gradient is the other one


@pytest.mark.slow
def test_a_blocked_link_makes_the_shards_exchange_members(found):
    assert found["blocked Auto"]["forward"]["all-reduce"] == 1
    assert set(found["blocked Auto"]["forward"]) > {"all-reduce"}


@pytest.mark.slow
def test_the_numbers_are_those_of_one_device(found):
    assert max(case["error"] for case in found.values()) < 1e-3
