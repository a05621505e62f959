import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from linked_jax.activations import ACTIVATIONS, lk_relu, min_max, relu
from linked_jax.layers import LinkedConv, LinkedLinear
from linked_jax.linking import Link
from linked_jax.remedies.enorm import Layer, balance, enorm
from tests.cases import first_fast

INTERLEAVED = Link(lk_relu.members, layout="interleaved")
LINKS = {
    "relu": relu,
    "lk_relu": lk_relu,
    "interleaved": INTERLEAVED,
    "leaky": ACTIVATIONS["leaky_relu"],
    "lk_leaky": ACTIVATIONS["lk_leaky_relu"],
    "min_max": min_max,
}
over_links = pytest.mark.parametrize("link", first_fast(LINKS.values()), ids=LINKS)
flattenings = pytest.mark.parametrize("flattened", first_fast(["before_link", "after_link"]))
seeds = st.integers(0, 2**31)
FLAT_CHAIN = [Layer("a"), Layer("b"), Layer("c")]


def dense_params(widths, arity=1, seed=0, use_bias=True, dtype=np.float64):
    """A dense net whose units have very different sizes."""
    rng, params = np.random.default_rng(seed), {}
    for name, (k, (c_in, c_out)) in zip("abcdefgh", enumerate(itertools.pairwise(widths)), strict=False):
        size = np.exp(rng.normal(size=c_out))
        kernel = rng.normal(size=(c_in * (arity if k else 1), c_out)) * size
        params[name] = {"kernel": kernel.astype(dtype)}
        if use_bias:
            params[name]["bias"] = rng.normal(size=c_out).astype(dtype)
    return params


def dense_net(params, x, link=relu):
    for k, layer in enumerate(params.values()):
        x = (link(x) if k else x) @ layer["kernel"] + layer.get("bias", 0)
    return x


def conv_params(link, seed=0):
    """conv 3x3 (2 -> 4), conv 3x3 (-> 3) with stride 2, flatten, dense (-> 5), dense (-> 2), on images of 4x4."""
    rng, d = np.random.default_rng(seed), link.arity
    shapes = {"conv1": (3, 3, 2, 4), "conv2": (3, 3, 4 * d, 3), "dense1": (4 * 3 * d, 5), "dense2": (5 * d, 2)}
    return {
        name: {"kernel": rng.normal(size=s) * np.exp(rng.normal(size=s[-1])), "bias": rng.normal(size=s[-1])}
        for name, s in shapes.items()
    }


def conv_net(params, x, link, flattened):
    def conv(x, p, strides):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["kernel"], strides, "SAME", dimension_numbers=dims) + p["bias"]

    x = conv(x, params["conv1"], (1, 1))
    x = conv(link(x), params["conv2"], (2, 2))
    x = link(x.reshape(len(x), -1)) if flattened == "before_link" else link(x).reshape(len(x), -1)
    x = x @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    return link(x) @ params["dense2"]["kernel"] + params["dense2"]["bias"]


def conv_chain(link):
    return [Layer("conv1"), *(Layer(name, link=link) for name in ("conv2", "dense1", "dense2"))]


def images(seed=1):
    return np.random.default_rng(seed).normal(size=(6, 4, 4, 2))


def same_output(actual, desired):
    assert float(jnp.abs(actual - desired).max()) < 1e-10 * float(jnp.abs(desired).max())


def sum_of_squares(params):
    return sum(float((layer["kernel"] ** 2).sum()) for layer in params.values())


# --- the function stays -------------------------------------------------------------------------------------------


@pytest.mark.slow
@over_links
@flattenings
def test_a_conv_net_computes_the_same(link, flattened):
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, conv_params(link))
        net = jax.jit(lambda params: conv_net(params, images(), link, flattened))
        step = jax.jit(lambda params: balance(params, conv_chain(link)))
        desired = net(params)
        sizes = [sum_of_squares(params)]
        for _ in range(3):
            params = step(params)
            same_output(net(params), desired)
            sizes.append(sum_of_squares(params))
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(sizes))
        assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("c", first_fast([1.0, 1.2]))
@pytest.mark.parametrize("widths", first_fast((each,) for each in [(3, 5, 4, 2), (1, 1, 3), (2, 7, 1, 4, 3)]))
@given(seeds)
def test_dense_nets_compute_the_same(widths, c, seed):
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, dense_params(widths, seed=seed))
        x = np.random.default_rng(seed).normal(size=(3, widths[0]))
        balanced = balance_once(params, c)
        same_output(dense_net(balanced, x), dense_net(params, x))
        np.testing.assert_array_equal(list(params.values())[-1]["bias"], list(balanced.values())[-1]["bias"])
        if c == 1:
            assert sum_of_squares(balanced) <= sum_of_squares(params) * (1 + 1e-12)


@functools.partial(jax.jit, static_argnums=1)
def balance_once(params, c):
    return balance(params, [Layer(name) for name in params], c=c)


@pytest.mark.slow
@pytest.mark.parametrize("link", [lk_relu, INTERLEAVED], ids=["blocked", "interleaved"])
def test_linked_layers_of_the_library_compute_the_same(link):
    rngs = nnx.Rngs(0)
    with jax.enable_x64(True):
        net = nnx.Sequential(
            nnx.Conv(2, 4, (3, 3), rngs=rngs, param_dtype=jnp.float64),
            LinkedConv(4, 3, (3, 3), link=link, rngs=rngs, param_dtype=jnp.float64),
            lambda z: z.reshape(len(z), -1),
            LinkedLinear(48, 2, link=link, rngs=rngs, param_dtype=jnp.float64),
        )
        graph, params, rest = nnx.split(net, nnx.Param, ...)
        chain = [Layer("layers.0"), Layer("layers.1.conv", link=link), Layer("layers.3.linear", link=link)]
        balanced = balance(params, chain)
        assert jax.tree.structure(balanced) == jax.tree.structure(params)
        assert float(jnp.abs(params["layers"][0]["kernel"][...] - balanced["layers"][0]["kernel"][...]).max()) > 1e-2
        same_output(nnx.merge(graph, balanced, rest)(images()), net(images()))


@pytest.mark.slow
def test_a_stack_of_layers_is_balanced_like_the_layers_apart():
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, dense_params([3, 4, 4, 4, 2], arity=2))
        apart = balance(params, [Layer("a"), *(Layer(name, link=lk_relu) for name in "bcd")])
        stacked = {
            "a": params["a"],
            "net": {"blocks": jax.tree.map(lambda *each: jnp.stack(each), params["b"], params["c"])},
            "d": params["d"],
        }
        chain = [Layer("a"), Layer("net.blocks", link=lk_relu, stacked=True), Layer("d", link=lk_relu)]
        together = balance(stacked, chain)
        for index, name in enumerate("bc"):
            of_one = jax.tree.map(lambda leaf, index=index: leaf[index], together["net"]["blocks"])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), of_one, apart[name])
        np.testing.assert_allclose(together["d"]["kernel"], apart["d"]["kernel"], rtol=1e-14)


# --- the equation -------------------------------------------------------------------------------------------------


def balanced_by_hand(params, c):
    """The paper's equation, a unit at a time."""
    params = {name: {key: leaf.copy() for key, leaf in layer.items()} for name, layer in params.items()}
    for before, after in itertools.pairwise(params.values()):
        for i in range(before["kernel"].shape[1]):
            right, left = np.linalg.norm(after["kernel"][i]), np.linalg.norm(before["kernel"][:, i])
            d = np.sqrt(right / (c * left)) if right > 0 and left > 0 else 1.0
            before["kernel"][:, i] *= d
            before["bias"][i] *= d
            after["kernel"][i] /= d
    return params


@pytest.mark.parametrize("c", first_fast([1.2, 1.0]))
@given(seeds)
def test_it_is_the_equation(c, seed):
    params = dense_params([3, 5, 4, 2], seed=seed)
    params["b"]["kernel"][1] = 0  # a unit that is not used
    params["a"]["kernel"][:, 3] = 0  # and one that sees nothing
    with jax.enable_x64(True):
        found = balance_once(jax.tree.map(jnp.asarray, params), c)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, balanced_by_hand(params, c))


@pytest.mark.slow
def test_norms_are_equal_at_the_fixed_point():
    with jax.enable_x64(True):
        params, chain = jax.tree.map(jnp.asarray, conv_params(lk_relu)), conv_chain(lk_relu)
        params = jax.lax.fori_loop(0, 300, lambda _, params: balance(params, chain), params)
        left = np.sqrt((np.asarray(params["conv1"]["kernel"]) ** 2).sum((0, 1, 2)))
        right = np.sqrt((np.asarray(params["conv2"]["kernel"]).reshape(3, 3, 2, 4, 3) ** 2).sum((0, 1, 2, 4)))
        np.testing.assert_allclose(left, right, rtol=1e-9)
        left = np.sqrt((np.asarray(params["conv2"]["kernel"]) ** 2).sum((0, 1, 2)))
        right = np.sqrt((np.asarray(params["dense1"]["kernel"]).reshape(2, 4, 3, 5) ** 2).sum((0, 1, 3)))
        np.testing.assert_allclose(left, right, rtol=1e-9)
        again = balance(params, chain)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), again, params)


@pytest.mark.slow
def test_without_biases_and_with_other_parameters_around():
    params = dense_params([3, 5, 4, 2], use_bias=False, dtype=np.float32)
    other = {"embedding": jnp.ones(3)}
    balanced = balance({"net": params, "other": other}, [Layer(f"net.{name}") for name in params])
    assert balanced["other"] is not None
    np.testing.assert_array_equal(balanced["other"]["embedding"], other["embedding"])
    x = np.ones((2, 3), np.float32)
    np.testing.assert_allclose(dense_net(balanced["net"], x), dense_net(params, x), rtol=1e-4, atol=1e-5)


# --- the optimiser ------------------------------------------------------------------------------------------------


def loss(params, x):
    return (dense_net(params, x) ** 2).mean()


def test_a_buffer_of_one_number_a_kernel_keeps_its_shape():
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.full((3, 1), 2.0)}}
    optimizer = enorm(optax.novograd(0.1), [Layer("a"), Layer("b")])
    state = optimizer.init(params)
    _, after = optimizer.update(params, state, params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [optax.sgd(0.01, momentum=0.9, nesterov=True), optax.adam(0.01)], ids=["sgd", "adam"])
def test_a_step_is_the_inner_step_and_then_balance_and_buffers_follow(inner):
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, dense_params([3, 5, 4, 2]))
        x = np.random.default_rng(3).normal(size=(4, 3))
        optimizer = enorm(inner, FLAT_CHAIN, c=1.2)
        gradients = jax.grad(loss)(params, x)
        updates, state = optimizer.update(gradients, optimizer.init(params), params)
        found = optax.apply_updates(params, updates)
        inner_updates, inner_state = inner.update(gradients, inner.init(params), params)
        stepped = optax.apply_updates(params, inner_updates)
        desired = balance(stepped, FLAT_CHAIN, c=1.2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, desired)
        # The gradient of the rescaled old parameters is what the buffers hold.
        rescaled = jax.tree.map(lambda p, new, old: p * new / old, params, desired, stepped)
        ratio = jax.tree.map(lambda a, b: a / b, jax.grad(loss)(rescaled, x), gradients)
        for buffer, power in (("trace", 1), ("mu", 1), ("nu", 2)):
            for after, before in zip(
                optax.tree_utils.tree_get_all_with_path(state, buffer),
                optax.tree_utils.tree_get_all_with_path(inner_state, buffer),
                strict=True,
            ):
                wanted = jax.tree.map(lambda b, r, power=power: b * r**power, before[1], ratio)
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), after[1], wanted)
        assert jax.tree.structure(state) == jax.tree.structure(inner_state)


@pytest.mark.slow
def test_it_keeps_a_nets_units_balanced_over_training_under_jit_and_scan():
    optimizer = enorm(optax.sgd(0.01, momentum=0.9), FLAT_CHAIN)
    params = jax.tree.map(jnp.asarray, dense_params([3, 5, 4, 2], dtype=np.float32))
    x = np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
        return (optax.apply_updates(params, updates), state), loss(params, x)

    start = params, optimizer.init(params)
    eager, _ = step(start, None)
    jitted, _ = jax.jit(step)(start, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jitted, eager)
    (params, _), losses = jax.lax.scan(step, start, length=200)
    assert losses[-1] < 0.1 * losses[0]
    left, right = (params["a"]["kernel"] ** 2).sum(0), (params["b"]["kernel"] ** 2).sum(1)
    np.testing.assert_allclose(left, right, rtol=0.05)


@pytest.mark.slow
def test_it_goes_through_vmap_and_partition_and_a_state_of_nnx():
    net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    params = nnx.state(net, nnx.Param)
    labels = jax.tree_util.tree_map_with_path(lambda path, _: "bias" if "bias" in str(path) else "kernel", params)
    inner = optax.partition({"kernel": optax.sgd(0.1, momentum=0.9), "bias": optax.sgd(0.1)}, labels)
    optimizer = enorm(inner, [Layer("layers.0"), Layer("layers.2")])

    def step(params, gradients):
        return optimizer.update(gradients, optimizer.init(params), params)

    updates, state = step(params, params)
    ratio = balance(optax.apply_updates(params, jax.tree.map(lambda p: -0.1 * p, params)), optimizer_chain())
    desired = ratio["layers"][0]["kernel"][...] / (0.9 * params["layers"][0]["kernel"][...])  # the factors
    trace = state.inner_states["kernel"].inner_state[0].trace["layers"][0]["kernel"][...]
    np.testing.assert_allclose(trace, params["layers"][0]["kernel"][...] / desired, rtol=1e-5)
    two = jax.tree.map(lambda p: jnp.stack([p, p]), params)
    many, _ = jax.vmap(step)(two, two)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-7), many, updates)


def optimizer_chain():
    return [Layer("layers.0"), Layer("layers.2")]


@pytest.mark.slow
def test_bfloat16_parameters_stay_so():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), dense_params([3, 5, 4, 2]))
    optimizer = enorm(optax.sgd(0.01, momentum=0.9), FLAT_CHAIN)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert {leaf.dtype for leaf in jax.tree.leaves((new, state))} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    stepped = jax.tree.map(lambda p: p - (jnp.bfloat16(0.01) * p.astype(jnp.bfloat16)).astype(jnp.float32), wide)
    desired = balance(stepped, FLAT_CHAIN)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.01), new, desired)


# --- bad inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "options", "message"),
    first_fast(
        [
            ([Layer("a"), Layer("bb")], {}, "no layer 'bb'.*nearest: b"),
            ([Layer("a"), Layer("c")], {}, "'a' has 5 units of 1 members, and 'c' a kernel of shape"),
            ([Layer("a"), Layer("b", link=lk_relu)], {}, "5 units of 2 members"),
            ([Layer("a")], {}, "at least two layers"),
            ([], {}, "at least two layers"),
            ([Layer("a"), Layer("b"), Layer("a")], {}, "'a' twice"),
            ([Layer("a"), Layer("b", stacked=True)], {}, "at least 3 axes"),
            (FLAT_CHAIN, {"c": 0.0}, "c is positive"),
        ]
    ),
)
def test_bad_chains(chain, options, message):
    params = dense_params([3, 5, 4, 2], dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        balance(params, chain, **options)
    with pytest.raises(ValueError, match=message):
        enorm(optax.sgd(0.1), chain, **options).init(params)


def test_a_chain_is_made_of_layers(unchecked):
    with pytest.raises(TypeError, match=r"made of Layer, got 'a'; pass e.g. Layer\('conv1'\)"):
        balance({"a": {"kernel": jnp.ones((2, 2))}}, ["a", "b"])


@pytest.mark.slow
def test_a_norm_beside_the_chain_is_refused_and_one_elsewhere_is_not():
    params = dense_params([3, 5, 4, 2], dtype=np.float32)
    with_norm = {**params, "norm": {"scale": jnp.ones(5), "bias": jnp.zeros(5)}}
    with pytest.raises(ValueError, match=r"got a norm's parameter 'norm.scale'"):
        balance(with_norm, FLAT_CHAIN)
    apart = {"net": params, "norm": with_norm["norm"]}
    assert balance(apart, [Layer(f"net.{name}") for name in "abc"])["norm"] is not None

    def net():
        layers = (
            nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
            nnx.Linear(4, 2, rngs=nnx.Rngs(0)),
        )
        return nnx.Sequential(*layers)

    with pytest.raises(ValueError, match=r"layers.1.scale"):
        enorm(optax.sgd(0.1), optimizer_chain()).init(nnx.state(nnx.eval_shape(net), nnx.Param))


@pytest.mark.parametrize("name", first_fast(["swish", "elu", "tanh", "lk_elu", "softplus"]))
def test_activations_that_are_not_homogeneous_are_refused(name):
    with pytest.raises(ValueError, match="g\\(a z\\) = a g\\(z\\)"):
        Layer("a", link=ACTIVATIONS[name])


@pytest.mark.slow
def test_the_inner_optimiser_gets_what_it_asks_for_and_optax_maps_over_the_state():
    params = jax.tree.map(jnp.asarray, dense_params((3, 4, 2), dtype=np.float32))
    inner = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=0, factor=0.5))
    optimizer, state = enorm(inner, FLAT_CHAIN[:2]), None
    for value in (1.0, 2.0):
        state = optimizer.init(params) if state is None else state
        _, state = optimizer.update(params, state, params, value=value)
    assert float(optax.tree_utils.tree_get(state, "scale")) == 0.5
    doubled = optax.tree_utils.tree_map_params(optimizer, lambda leaf: 2 * leaf, state)
    mu, before = (optax.tree_utils.tree_get(s, "mu")["a"]["kernel"] for s in (doubled, state))
    np.testing.assert_array_equal(mu, 2 * before)


def test_a_step_needs_the_parameters():
    optimizer = enorm(optax.sgd(0.1), FLAT_CHAIN)
    params = dense_params([3, 5, 4, 2], dtype=np.float32)
    with pytest.raises(ValueError, match="got None"):
        optimizer.update(params, optimizer.init(params))
