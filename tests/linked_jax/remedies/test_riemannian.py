import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from linked_jax.remedies.riemannian import (
    adam_g,
    orthogonality_penalty,
    riemannian,
    scale_invariant,
    sgd_g,
    to_sphere,
)
from linked_jax.remedies.sphere import geodesic, tangent
from tests.cases import first_fast

SHAPES = {"conv": (3, 3, 2, 4), "dense": (5, 3)}
OPTIMIZERS = {"sgd_g": sgd_g, "adam_g": adam_g}
over_optimizers = pytest.mark.parametrize("make", first_fast(OPTIMIZERS.values()), ids=OPTIMIZERS)
seeds = st.integers(0, 2**31)


def white(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def on_sphere(*shape, seed=0):
    y = white(*shape, seed=seed)
    return y / np.sqrt((y**2).sum(tuple(range(y.ndim - 1))))


def columns(kernel):
    return np.asarray(kernel).reshape(-1, kernel.shape[-1]).T


# The methods in NumPy, a column at a time. Each returns the columns after each gradient.


def clipped(y, g, clip):
    h = g - (y @ g) * y
    return h * min(1, clip / np.linalg.norm(h))


def sgd_by_hand(y, gradients, rates, momentum=0.9, clip=0.1):
    path, m = [], np.zeros_like(y)
    for g, eta in zip(gradients, rates, strict=True):
        y = y / np.linalg.norm(y)
        m = momentum * m - eta * clipped(y, g, clip)
        n = np.linalg.norm(m)
        u = m / n
        y, m = y * np.cos(n) + u * np.sin(n), n * (u * np.cos(n) - y * np.sin(n))
        path.append(y)
    return path


def adam_by_hand(y, gradients, rates, b1=0.9, b2=0.99, clip=0.1):
    path, m, v = [], np.zeros_like(y), 0.0
    for t, (g, eta) in enumerate(zip(gradients, rates, strict=True), 1):
        y = y / np.linalg.norm(y)
        h = clipped(y, g, clip)
        m = b1 * m + (1 - b1) * h
        v = b2 * v + (1 - b2) * (h @ h)
        delta = -eta * np.sqrt(1 - b2**t) / (1 - b1**t) * m / np.sqrt(v + 1e-8)
        n = np.linalg.norm(delta)
        u = delta / n
        m = m - (u @ m) * (np.sin(n) * y + (1 - np.cos(n)) * u)
        y = y * np.cos(n) + u * np.sin(n)
        path.append(y)
    return path


def walk(optimizer, kernel, gradients):
    """The kernels and what is kept after each gradient."""

    def step(carry, g):
        params, state = carry
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state.kept)

    return jax.lax.scan(step, (kernel, optimizer.init(kernel)), gradients)[1]


@pytest.mark.parametrize("scheduled", first_fast([True, False]))
@pytest.mark.parametrize(
    ("make", "by_hand"), first_fast([(sgd_g, sgd_by_hand), (adam_g, adam_by_hand)]), ids=["sgd", "adam"]
)
def test_each_column_goes_as_in_the_paper(make, by_hand, scheduled):
    start, gradients = white(3, 3, 2, 4), white(30, 3, 3, 2, 4, seed=1) * np.logspace(-3, 1, 4)
    rates = 0.2 * 0.9 ** np.arange(30) if scheduled else np.full(30, 0.2)
    with jax.enable_x64(True):
        optimizer = make((lambda count: 0.2 * jnp.asarray(0.9) ** count) if scheduled else 0.2)
        path, _ = jax.jit(functools.partial(walk, optimizer))(jnp.asarray(start), jnp.asarray(gradients))
        for c in range(4):
            desired = by_hand(columns(start)[c], gradients[..., c].reshape(30, -1), rates)
            np.testing.assert_allclose(np.asarray(path)[..., c].reshape(30, -1), desired, atol=1e-12)


WALKS = {make: jax.jit(functools.partial(walk, make(0.2))) for make in OPTIMIZERS.values()}


@pytest.mark.slow
@over_optimizers
@pytest.mark.parametrize("shape", first_fast((each,) for each in SHAPES.values()), ids=SHAPES)
@given(seeds, st.floats(-6, 3))
def test_columns_stay_on_the_sphere_and_momenta_tangent(make, shape, seed, size):
    gradients = white(100, *shape, seed=seed, dtype=np.float32) * np.float32(10**size)
    path, (m, *_) = WALKS[make](to_sphere(jnp.asarray(white(*shape, dtype=np.float32)), True), gradients)
    axes = tuple(range(1, len(shape)))
    np.testing.assert_allclose((path**2).sum(axes), 1, atol=2e-6)
    assert float(jnp.abs((path * m).sum(axes)).max()) < 1e-6
    assert jnp.isfinite(path).all()


@pytest.mark.slow
@over_optimizers
def test_zero_gradient_and_zero_momentum_change_nothing(make):
    with jax.enable_x64(True):
        y = jnp.asarray(on_sphere(3, 3, 2, 4)).at[..., 0].set(0)  # a column of zeros does no harm either
        optimizer = make(0.2)
        updates, state = optimizer.update(jnp.zeros_like(y), optimizer.init(y), y)
        np.testing.assert_allclose(optax.apply_updates(y, updates), y, atol=1e-15)
        assert all(not leaf.any() for leaf in jax.tree.leaves(state.kept))


@over_optimizers
def test_a_gradient_along_the_kernel_moves_it_nowhere_off_the_sphere(make):
    """Then the tangent part is rounding, which Adam-G blows up."""
    y = to_sphere(jnp.asarray(white(3, 3, 2, 4, dtype=np.float32)), True)
    path, (m, *_) = WALKS[make](y, jnp.stack([y, -y, 5 * y]))
    np.testing.assert_allclose((path**2).sum((1, 2, 3)), 1, atol=2e-6)
    assert float(jnp.abs((path * m).sum((1, 2, 3))).max()) < 1e-6


@pytest.mark.slow
@over_optimizers
def test_kernels_off_the_sphere_are_brought_there_and_their_length_is_nothing(make):
    optimizer, kernel = make(0.1), jnp.asarray(white(5, 3, dtype=np.float32))
    g = jnp.asarray(white(5, 3, seed=1, dtype=np.float32))
    found = [optax.apply_updates(p, optimizer.update(g, optimizer.init(p), p)[0]) for p in (kernel, 7 * kernel)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.slow
@over_optimizers
def test_it_finds_the_first_axis(make):
    """The least y.a on the sphere is at -a / ||a||."""
    a = jnp.asarray(white(5, 3, dtype=np.float32))
    optimizer = make(optax.exponential_decay(0.2, 100, 0.5))
    start = to_sphere(jnp.asarray(white(5, 3, seed=1, dtype=np.float32)), True)
    path, _ = walk(optimizer, start, jnp.broadcast_to(a, (800, 5, 3)))
    np.testing.assert_allclose(path[-1], -to_sphere(a, True), atol=0.01)


@given(seeds)
def test_geodesics_are_great_circles(seed):
    y = on_sphere(5, 3, seed=seed)
    delta = white(5, 3, seed=seed + 1) * 3
    delta -= (delta * y).sum(0) * y
    with jax.enable_x64(True):
        new, there = jax.jit(geodesic)(jnp.asarray(y), jnp.asarray(delta))
        length = np.sqrt((delta**2).sum(0))
        np.testing.assert_allclose((new**2).sum(0), 1, atol=1e-12)
        np.testing.assert_allclose((there**2).sum(0), length**2, rtol=1e-12)
        np.testing.assert_allclose((new * there).sum(0), 0, atol=1e-12)
        np.testing.assert_allclose((new * y).sum(0), np.cos(length), atol=1e-12)


jitted_tangent = jax.jit(tangent, static_argnames="clip")


@pytest.mark.slow
@pytest.mark.parametrize("clip", first_fast([0.1, 3.0]))
@given(seeds)
def test_tangents_are_orthogonal_and_clipped(clip, seed):
    y, g = on_sphere(3, 3, 2, 4, seed=seed), white(3, 3, 2, 4, seed=seed + 1)
    with jax.enable_x64(True):
        h = jitted_tangent(jnp.asarray(y), jnp.asarray(g), clip=clip)
        for c in range(4):
            np.testing.assert_allclose(columns(h)[c], clipped(columns(y)[c], columns(g)[c], clip), atol=1e-12)
        np.testing.assert_array_equal(tangent(jnp.asarray(y), jnp.zeros_like(y), clip=0.1), 0)


# --- masks and the whole optimiser --------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.Conv(16, 4, (3, 3), rngs=rngs)])
        self.norms = nnx.List([nnx.BatchNorm(16, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.dense(x.mean((1, 2)))


def named(mask):
    found = jax.tree_util.tree_flatten_with_path(mask)[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, on in found if on}


def test_the_mask_has_named_kernels_with_more_rows_than_columns():
    params = nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)
    assert named(scale_invariant(params, ["convs"])) == {"convs.1.kernel.value"}  # 9 rows and 16 columns: not convs.0
    assert named(scale_invariant(params, ["convs.1", "dense"])) == {"convs.1.kernel.value", "dense.kernel.value"}
    linen = {"params": {"Conv_0": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.ones(4)}}}
    assert named(scale_invariant(linen, ["params.Conv_0"])) == {"params.Conv_0.kernel"}
    with pytest.raises(ValueError, match=r"'conv' has no kernel in params; the nearest layers: convs"):
        scale_invariant(params, ["conv"])
    with pytest.raises(ValueError, match="more rows than columns, got none"):
        scale_invariant(params, ["convs.0"])
    with pytest.raises(ValueError, match="more rows than columns, got none"):
        scale_invariant(params, [])
    with pytest.raises(ValueError, match="the mask holds no parameter"):
        riemannian(sgd_g(0.2), optax.sgd(0.1), jax.tree.map(lambda _: False, params))


@pytest.mark.slow
@over_optimizers
def test_the_two_parts_go_their_own_ways_in_a_net(make):
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    mask = scale_invariant(params, ["convs"])
    params = to_sphere(params, mask)
    optimizer = riemannian(make(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True), mask)
    x, labels = white(8, 6, 6, 1, dtype=np.float32), np.arange(8) % 3

    def loss(params):
        logits = nnx.merge(graph, params, rest, copy=True)(x)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return cross_entropy + orthogonality_penalty(params, mask)

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = params, optimizer.init(params)
    (after, _), losses = jax.jit(lambda start: jax.lax.scan(step, start, length=60))(start)
    assert losses[-1] < 0.8 * losses[0]
    kernel = after["convs"][1]["kernel"][...]
    np.testing.assert_allclose((kernel**2).sum((0, 1, 2)), 1, atol=1e-5)
    assert float(jnp.abs(kernel - params["convs"][1]["kernel"][...]).max()) > 1e-2
    alone = optax.sgd(0.1, momentum=0.9, nesterov=True)
    gradients = jax.grad(loss)(params)
    desired = alone.update(gradients, alone.init(params), params)[0]["dense"]["kernel"][...]
    found = optimizer.update(gradients, start[1], params)[0]["dense"]["kernel"][...]
    np.testing.assert_allclose(found, desired, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("make", [sgd_g, adam_g])
def test_the_state_keeps_its_structure_in_flax_optimizer(make):
    net = Net(nnx.Rngs(0))
    mask = scale_invariant(nnx.state(net, nnx.Param), ["convs"])
    tx = optax.apply_if_finite(optax.MultiSteps(riemannian(make(0.1), optax.sgd(0.1), mask), 2), 3)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    x = white(4, 6, 6, 1, dtype=np.float32)
    graph, state = nnx.split((net, optimizer))

    def step(state, _):
        net, optimizer = nnx.merge(graph, state)
        optimizer.update(net, nnx.grad(lambda net: (net(x) ** 2).sum())(net))
        return nnx.state((net, optimizer)), None

    after, _ = jax.lax.scan(step, state, None, length=4)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def arrays(state):
    """The state with arrays for variables, as flax.nnx.Optimizer has it."""
    return jax.tree.map(lambda variable: variable[...], state, is_leaf=lambda x: isinstance(x, nnx.Variable))


@pytest.mark.slow
@pytest.mark.parametrize("pure", [False, True])
def test_flax_optimizer_takes_the_mask_of_a_state(pure):
    net = Net(nnx.Rngs(0))
    params = nnx.state(net, nnx.Param)
    mask = scale_invariant(arrays(params) if pure else params, ["convs"])
    nnx.update(net, to_sphere(params, mask))
    optimizer = nnx.Optimizer(net, riemannian(adam_g(0.1), optax.sgd(0.1), mask), wrt=nnx.Param)
    before = net.convs[1].kernel[...].copy()
    x = white(4, 6, 6, 1, dtype=np.float32)
    optimizer.update(net, nnx.grad(lambda net: (net(x) ** 2).sum())(net))
    kernel = net.convs[1].kernel[...]
    np.testing.assert_allclose((kernel**2).sum((0, 1, 2)), 1, atol=1e-5)
    assert float(jnp.abs(kernel - before).max()) > 1e-3
    penalties = [
        orthogonality_penalty(tree, mask) for tree in (nnx.state(net, nnx.Param), arrays(nnx.state(net, nnx.Param)))
    ]
    np.testing.assert_allclose(*penalties, rtol=1e-6)


def test_what_is_no_kernel_and_what_the_mask_does_not_name_is_refused():
    for leaf, shape in ((jnp.ones(3), r"\(3,\)"), (jnp.ones(()), r"\(\)")):
        with pytest.raises(ValueError, match=rf"only kernels are on a sphere, got 'bias' of shape {shape}; use riem"):
            sgd_g(0.1).init({"kernel": jnp.ones((2, 2)), "bias": leaf})
    with pytest.raises(ValueError, match=r"the mask says nothing of 'dense.kernel'; make it of these parameters"):
        to_sphere({"dense": {"kernel": jnp.ones((2, 2))}}, {"conv": {"kernel": True}})


@over_optimizers
def test_precision_is_kept_where_float64_is_on(make):
    with jax.enable_x64(True):
        p = jnp.asarray(white(4, 3, dtype=np.float32))

        def step(carry, _):
            p, state = carry
            updates, state = make(0.1).update(p, state, p)
            return (optax.apply_updates(p, updates), state), None

        (p, state), _ = jax.lax.scan(step, (p, make(0.1).init(p)), length=2)
        assert {leaf.dtype for leaf in jax.tree.leaves((p, state.kept))} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_the_penalty_is_its_formula_with_its_gradient():
    with jax.enable_x64(True):
        params = {"conv": jnp.asarray(white(3, 3, 2, 4)), "dense": jnp.asarray(white(5, 3))}
        mask = {"conv": True, "dense": False}
        y = np.asarray(params["conv"]).reshape(18, 4)
        desired = 0.1 / 2 * np.linalg.norm(y.T @ y - np.eye(4)) ** 2
        value, gradient = jax.value_and_grad(orthogonality_penalty)(params, mask)
        np.testing.assert_allclose(value, desired, rtol=1e-12)
        np.testing.assert_allclose(gradient["conv"].reshape(18, 4), 0.2 * y @ (y.T @ y - np.eye(4)), rtol=1e-10)
        assert not gradient["dense"].any()
        q = np.linalg.qr(y)[0].reshape(3, 3, 2, 4)
        assert float(orthogonality_penalty({"conv": jnp.asarray(q)}, {"conv": True})) < 1e-20


@pytest.mark.slow
def test_to_sphere_leaves_the_rest():
    params = {"kernel": jnp.asarray(white(5, 3, dtype=np.float32)).at[:, 1].set(0), "bias": jnp.ones(3)}
    found = to_sphere(params, {"kernel": True, "bias": False})
    np.testing.assert_allclose((found["kernel"] ** 2).sum(0), [1, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(found["bias"], params["bias"])


@pytest.mark.slow
@over_optimizers
def test_bfloat16_kernels_stay_so_and_jit_and_vmap_change_nothing(make):
    optimizer = make(0.1)
    kernel = jnp.asarray(white(2, 5, 3), jnp.bfloat16)
    g = jnp.asarray(white(2, 5, 3, seed=1), jnp.bfloat16)

    def step(p, g):
        updates, state = optimizer.update(g, optimizer.init(p), p)
        return optax.apply_updates(p, updates), state.kept

    new, (m, *_) = jax.jit(jax.vmap(step))(kernel, g)
    assert new.dtype == jnp.bfloat16
    assert m.dtype == jnp.float32
    np.testing.assert_allclose((new.astype(jnp.float32) ** 2).sum(1), 1, atol=0.02)
    eager, _ = step(kernel[0], g[0])
    np.testing.assert_allclose(new[0].astype(jnp.float32), eager.astype(jnp.float32), atol=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    first_fast(
        [
            (lambda: sgd_g(0.0), "learning_rate is positive"),
            (lambda: sgd_g(0.1, momentum=1.0), "momentum is at least 0 and below 1"),
            (lambda: sgd_g(0.1, clip=-1.0), "clip is positive"),
            (lambda: adam_g(0.1, b1=-0.1), "b1 is at least 0 and below 1"),
            (lambda: adam_g(0.1, b2=1.5), "b2 is at least 0 and below 1"),
        ]
    ),
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [sgd_g, adam_g])
def test_a_rate_may_be_injected(make):
    params = {"w": jnp.array([[0.6, 0.0], [0.8, 1.0]])}
    injected = optax.inject_hyperparams(make)(learning_rate=0.2)
    found, _ = jax.jit(injected.update)(jax.tree.map(jnp.ones_like, params), injected.init(params), params)
    plain = make(0.2)
    wanted, _ = plain.update(jax.tree.map(jnp.ones_like, params), plain.init(params), params)
    np.testing.assert_allclose(found["w"], wanted["w"], rtol=1e-6)


def test_a_step_needs_the_kernels():
    y = jnp.asarray(on_sphere(5, 3), jnp.float32)
    with pytest.raises(ValueError, match="got None"):
        sgd_g(0.1).update(y, sgd_g(0.1).init(y))
