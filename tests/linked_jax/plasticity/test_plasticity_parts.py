"""Parts that keep nets learning, against NumPy: what they add, whom they replace, what they forget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from linked_jax import lk_relu
from linked_jax.plasticity import Units, continual_backprop, l2_init, recycle_dormant, shrink_and_perturb

KEY = jax.random.key(0)
UNITS = [Units("a", "b"), Units("b", "c")]
SHAPES = {"a": (3, 4), "b": (2 * 4, 5), "c": (2 * 3 * 5, 2)}
"""Links of two members; 3 positions are flattened before the last layer."""


def draw(key):
    keys = jax.random.split(key, len(SHAPES))
    return {
        name: {"kernel": jax.random.normal(k, shape), "bias": jax.random.normal(jax.random.fold_in(k, 1), shape[-1:])}
        for k, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def gradients(number):
    return draw(jax.random.key(100 + number))


def magnitudes(number):
    rng = np.random.default_rng(number)
    return [rng.uniform(size=4).astype(np.float32), rng.uniform(size=5).astype(np.float32)]


def run(tx, steps, **more):
    params = draw(KEY)
    state = tx.init(params)

    @jax.jit
    def step(g, state, params, extra):
        updates, state = tx.update(g, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        params, state = step(gradients(number), state, params, {name: value(number) for name, value in more.items()})
    return params, state


def numpy(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, np.float64), tree)


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, wanted)


# --- L2 Init --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_l2_init_is_the_gradient_of_its_penalty():
    start, params = draw(KEY), draw(jax.random.key(1))
    tx = l2_init(0.3)
    added, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(start), params)

    def penalty(params):
        return 0.3 * sum(jnp.sum((p - s) ** 2) for p, s in zip(*map(jax.tree.leaves, (params, start)), strict=True))

    close(added, jax.grad(penalty)(params))


def test_l2_init_with_descent_is_what_numpy_computes():
    params, _ = run(optax.chain(l2_init(0.3), optax.sgd(0.1)), 4)
    start = wanted = numpy(draw(KEY))
    for number in range(4):
        wanted = jax.tree.map(
            lambda p, g, s: p - 0.1 * (g + 2 * 0.3 * (p - s)), wanted, numpy(gradients(number)), start
        )
    close(params, wanted)


# --- shrink and perturb ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_shrink_and_perturb_is_what_numpy_computes():
    tx = optax.chain(optax.sgd(0.1), shrink_and_perturb(0.2, 0.5, draw, key=KEY))
    params, _ = run(tx, 3)
    wanted, key = numpy(draw(KEY)), KEY
    for number in range(3):
        key, now = jax.random.split(key)
        step = lambda p, g, e: 0.8 * (p - 0.1 * g) + 0.5 * e  # noqa: E731
        wanted = jax.tree.map(step, wanted, numpy(gradients(number)), numpy(draw(now)))
    close(params, wanted)


def test_a_seed_has_its_own_perturbations_by_the_key_in_the_state():
    tx = shrink_and_perturb(0.0, 1.0, draw, key=KEY)
    params, zeros = draw(KEY), jax.tree.map(jnp.zeros_like, draw(KEY))
    states = [optax.tree_utils.tree_set(tx.init(params), key=jax.random.key(seed)) for seed in (1, 2)]
    first, second = (tx.update(zeros, state, params)[0]["a"]["kernel"] for state in states)
    assert (first != second).all()


@pytest.mark.parametrize("donated", [False, True])
def test_the_start_is_kept_where_parameters_change_in_place(donated):
    tx = optax.chain(l2_init(0.5), optax.sgd(0.1))
    if donated:
        params = {"w": jnp.ones(1)}
        state = tx.init(params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state):
            updates, state = tx.update({"w": jnp.ones(1)}, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(3):
            params, state = step(params, state)
        (found,) = params["w"]
    else:
        net = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
        net.kernel[...] = jnp.ones((1, 1))
        state = tx.init(nnx.state(net, nnx.Param))
        for _ in range(3):
            grads = nnx.grad(lambda net: net(jnp.ones((1, 1))).sum())(net)
            updates, state = tx.update(grads, state, nnx.state(net, nnx.Param))
            nnx.update(net, optax.apply_updates(nnx.state(net, nnx.Param), updates))
        found = net.kernel[0, 0]
    np.testing.assert_allclose(found, 0.729, rtol=1e-6)  # 1 - 0.1 (1 + 0.9 + 0.81): the pull is towards 1


@pytest.mark.parametrize("make", [l2_init, lambda strength: shrink_and_perturb(strength, strength, draw, key=KEY)])
def test_a_strength_may_be_traced(make):
    params = draw(KEY)

    def of(strength):
        tx = make(strength)
        return tx.update(gradients(0), tx.init(params), params)[0]

    strengths = jnp.array([0.1, 0.5])
    together = jax.vmap(of)(strengths)
    for place, strength in enumerate((0.1, 0.5)):
        close(jax.tree.map(lambda leaf, place=place: leaf[place], together), of(strength))


# --- units that start anew --------------------------------------------------------------------------------------------


def rows_of(kernel, unit, units):
    """The rows of a unit's outgoing weights, in NumPy's own words: (members * positions, units) flattened."""
    return [row for row in range(kernel.shape[0]) if row % units == unit]


def renew(params, moments, fresh, chosen):
    """Layers in order: incoming weights of all first, then outgoing ones; a weight's moments go wherever it changes."""
    for name, unit in chosen:
        for leaf in ("kernel", "bias"):
            params[name][leaf][..., unit] = fresh[name][leaf][..., unit]
            for moment in moments:
                moment[name][leaf][..., unit] = 0
    for name, unit in chosen:
        after = {"a": "b", "b": "c"}[name]
        rows = rows_of(params[after]["kernel"], unit, params[name]["bias"].size)
        for tree in (params, *moments):
            tree[after]["kernel"][rows] = 0


def adam(params, moments, g, count, rate=0.01):
    m, v = moments
    for name, leaves in params.items():
        for leaf in leaves:
            m[name][leaf] = 0.9 * m[name][leaf] + 0.1 * g[name][leaf]
            v[name][leaf] = 0.999 * v[name][leaf] + 0.001 * g[name][leaf] ** 2
            m_hat, v_hat = m[name][leaf] / (1 - 0.9**count), v[name][leaf] / (1 - 0.999**count)
            params[name][leaf] = leaves[leaf] - rate * m_hat / (np.sqrt(v_hat) + 1e-8)


def zeros_like(params):
    return jax.tree.map(np.zeros_like, params)


@pytest.mark.slow
def test_continual_backprop_is_what_numpy_computes():
    rate, maturity, decay, steps = 0.4, 3, 0.9, 40  # more than one unit a step at times
    tx = continual_backprop(
        optax.adam(0.01), UNITS, draw, key=KEY, replacement_rate=rate, maturity=maturity, decay=decay
    )
    params, state = run(tx, steps, magnitudes=magnitudes)

    wanted, key, replaced = numpy(draw(KEY)), KEY, 0
    moments = zeros_like(wanted), zeros_like(wanted)
    utility, age, due = [np.zeros(4), np.zeros(5)], [np.zeros(4), np.zeros(5)], [0.0, 0.0]
    for number in range(steps):
        chosen = []
        for i, (name, after) in enumerate((("a", "b"), ("b", "c"))):
            kernel = wanted[after]["kernel"]
            for unit in range(age[i].size):
                size = np.abs(kernel[rows_of(kernel, unit, age[i].size)]).sum()
                utility[i][unit] = decay * utility[i][unit] + (1 - decay) * magnitudes(number)[i][unit] * size
            age[i] += 1
            mature = np.flatnonzero(age[i] > maturity)
            due[i] += rate * len(mature)
            corrected = utility[i][mature] / (1 - decay ** age[i][mature])
            for unit in mature[np.argsort(corrected)[: int(due[i])]]:
                chosen.append((name, unit))
                utility[i][unit] = age[i][unit] = 0
                due[i] -= 1
        key, now = jax.random.split(key)
        adam(wanted, moments, numpy(gradients(number)), number + 1)
        renew(wanted, moments, numpy(draw(jax.random.fold_in(now, 1))), chosen)
        replaced += len(chosen)
    assert replaced > 40
    close(params, wanted)
    close(list(state.utility), utility)
    close(list(state.age), age)


@pytest.mark.slow
def test_recycling_is_what_numpy_computes():
    few = [np.array([0.001, 1, 1, 2], np.float32), np.array([1, 1, 0, 0.05, 1], np.float32)]
    tx = recycle_dormant(optax.adam(0.01), UNITS, draw, key=KEY, period=3, tau=0.1)
    params, _ = run(tx, 7, magnitudes=lambda _: few)
    wanted, key = numpy(draw(KEY)), KEY
    moments = zeros_like(wanted), zeros_like(wanted)
    for number in range(7):
        key, now = jax.random.split(key)
        adam(wanted, moments, numpy(gradients(number)), number + 1)
        if number in (2, 5):
            renew(wanted, moments, numpy(draw(jax.random.fold_in(now, 1))), [("a", 0), ("b", 2), ("b", 3)])
    close(params, wanted)


@pytest.mark.slow
def test_outputs_change_by_what_the_unit_gave_and_a_new_unit_learns():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), lk_relu, nnx.Linear(8, 2, rngs=rngs))
    graph, params = nnx.split(net, nnx.Param)
    fresh = nnx.state(nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), lk_relu, nnx.Linear(8, 2, rngs=rngs)), nnx.Param)
    tx = continual_backprop(
        optax.adam(0.1), [Units("layers/0", "layers/2")], lambda _: fresh, key=KEY, replacement_rate=0.25, maturity=0
    )
    x, state = jax.random.normal(KEY, (6, 3)), tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, state, params, magnitudes=[jnp.array([1.0, 1.0, 0.0, 1.0])])
    new = optax.apply_updates(params, updates)
    h = np.array(lk_relu(net.layers[0](x)))
    h[:, [2, 6]] = 0
    np.testing.assert_allclose(nnx.merge(graph, new)(x), net.layers[2](jnp.asarray(h)), atol=1e-6)
    gradient = jax.grad(lambda p: (nnx.merge(graph, p)(x) ** 2).sum())(new)
    moved, _ = optax.adam(0.1).update(gradient, optax.adam(0.1).init(new))
    assert (jnp.abs(moved["layers"][2]["kernel"][...][jnp.array([2, 6])]) > 0.01).all()


def test_units_of_one_worth_are_replaced_by_turns():
    units, params = [Units("a", "b")], {"a": {"kernel": jnp.ones((1, 8))}, "b": {"kernel": jnp.ones((8, 1))}}
    options = {"replacement_rate": 0.01, "maturity": 20, "key": KEY}
    tx = continual_backprop(optax.sgd(0.0), units, lambda _: params, **options)

    def step(carry, _):
        state, ages = carry
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, magnitudes=[jnp.ones(8)])
        return (state, ages + (state.age[0] == 0)), None

    (_, times), _ = jax.jit(lambda start: jax.lax.scan(step, start, None, 2000))((tx.init(params), jnp.zeros(8)))
    assert times.sum() > 80
    assert times.min() > 0  # without the division by 1 - decay^a it is one unit again and again
    assert times.max() < times.sum() / 2


@pytest.mark.slow
def test_a_net_of_dead_layers_comes_back_at_once():
    def net(params, x):
        for name in ("a", "b", "c"):
            x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
        return x @ params["d"]["kernel"]

    def fresh(key):
        keys = jax.random.split(key, 4)
        kernels = {name: jax.random.normal(k, (5, 5)) for name, k in zip("abcd", keys, strict=True)}
        return {name: {"kernel": kernel, "bias": jnp.zeros(5)} for name, kernel in kernels.items()}

    dead = fresh(KEY)
    for name in ("a", "b", "c"):
        dead[name]["bias"] = jnp.full(5, -1e3)
    tx = recycle_dormant(optax.sgd(0.1), [Units("a", "b"), Units("b", "c"), Units("c", "d")], fresh, key=KEY, period=1)
    zeros = jax.tree.map(jnp.zeros_like, dead)
    updates, _ = tx.update(zeros, tx.init(dead), dead, magnitudes=[jnp.zeros(5)] * 3)
    new, x = optax.apply_updates(dead, updates), jax.random.normal(KEY, (8, 5))
    np.testing.assert_array_equal(net(new, x), net(dead, x))
    gradient = jax.grad(lambda params: (net(params, x) - 1).mean() ** 2)(new)
    assert (jnp.abs(gradient["d"]["kernel"]) > 0).any()


@pytest.mark.parametrize("make", ["continual_backprop", "recycle_dormant", "shrink_and_perturb"])
def test_the_state_may_be_donated_and_the_key_lives_on(make):
    key = jax.random.key(7)
    tx = {
        "continual_backprop": lambda: continual_backprop(optax.adam(0.1), UNITS, draw, key=key),
        "recycle_dormant": lambda: recycle_dormant(optax.adam(0.1), UNITS, draw, key=key, period=2),
        "shrink_and_perturb": lambda: optax.with_extra_args_support(shrink_and_perturb(0.1, 0.1, draw, key=key)),
    }[make]()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(gradients(0), state, params, magnitudes=magnitudes(0))
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params = draw(KEY)
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
    assert jnp.isfinite(jax.random.normal(key))


def test_two_parts_of_one_key_draw_other_numbers():
    parts = recycle_dormant(optax.sgd(0.0), UNITS, draw, key=KEY, period=1), shrink_and_perturb(0.0, 1.0, draw, key=KEY)
    params, zeros = draw(KEY), jax.tree.map(jnp.zeros_like, draw(KEY))
    few = [jnp.array([0.0, 1, 1, 1]), jnp.ones(5)]
    renewed, _ = parts[0].update(zeros, parts[0].init(params), params, magnitudes=few)
    epsilon, _ = parts[1].update(zeros, parts[1].init(params), params)
    new = params["a"]["kernel"][:, 0] + renewed["a"]["kernel"][:, 0]
    assert (jnp.abs(new - epsilon["a"]["kernel"][:, 0]) > 1e-3).all()


@pytest.mark.slow
def test_one_part_within_another_and_optax_maps_over_their_states():
    options = {"key": KEY, "period": 1}
    tx = recycle_dormant(continual_backprop(optax.adam(0.1), UNITS, draw, key=KEY), UNITS, draw, **options)
    params = draw(KEY)
    state = tx.init(params)
    updates, state = tx.update(gradients(0), state, params, magnitudes=magnitudes(0))
    assert state.inner.age[0].tolist() == [1.0] * 4
    marked = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf + 1, state)
    adam, before = (optax.tree_utils.tree_get(s, "mu") for s in (marked, state))
    close(adam, jax.tree.map(lambda leaf: leaf + 1, before))
    assert updates.keys() == params.keys()


@pytest.mark.parametrize("inner", [optax.rprop(0.1), optax.contrib.schedule_free_sgd(0.1), optax.adam(0.1)])
def test_a_new_unit_has_the_optimisers_state_of_a_start(inner):
    tx = recycle_dormant(inner, UNITS, draw, key=KEY, period=1, tau=0.1)
    params, few = draw(KEY), [jnp.array([0.0, 1, 1, 1]), jnp.ones(5)]
    updates, state = tx.update(gradients(0), tx.init(params), params, magnitudes=few)
    params = optax.apply_updates(params, updates)
    fresh = inner.init(params)
    rows = rows_of(params["b"]["kernel"], 0, 4)
    trees = zip(*(trees_like(s, params) for s in (state.inner, fresh)), strict=True)
    for found, wanted in trees:
        close(found["a"]["kernel"][:, 0], wanted["a"]["kernel"][:, 0])
        close(found["a"]["bias"][0], wanted["a"]["bias"][0])
        close(found["b"]["kernel"][np.array(rows)], wanted["b"]["kernel"][np.array(rows)])


OTHERS = {
    "partition": lambda: optax.partition(
        {"one": optax.adam(0.1), "other": optax.sgd(0.1)}, {"a": "one", "b": "other", "c": "one"}
    ),
    "masked": lambda: optax.masked(optax.adam(0.1), {"a": True, "b": True, "c": False}),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "novograd": lambda: optax.novograd(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_units_start_anew_beside_any_optimiser(name):
    tx, params = recycle_dormant(OTHERS[name](), UNITS, draw, key=KEY, period=1, tau=0.1), draw(KEY)
    few = [jnp.array([0.0, 1, 1, 1]), jnp.ones(5)]
    state = tx.init(params)
    for _ in range(2):
        updates, after = jax.jit(tx.update)(gradients(0), state, params, magnitudes=few)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        params, state = optax.apply_updates(params, updates), after
        assert not params["b"]["kernel"][np.array(rows_of(params["b"]["kernel"], 0, 4))].any()


@pytest.mark.slow
def test_units_of_a_torso_are_cut_from_both_heads():
    keys = jax.random.split(KEY, 3)
    shapes = {"torso": (3, 4), "policy": (4, 2), "value": (4, 1)}
    params = {name: {"kernel": jax.random.normal(k, s)} for k, (name, s) in zip(keys, shapes.items(), strict=True)}
    units = [Units("torso", ("policy", "value"))]
    tx = continual_backprop(optax.sgd(0.0), units, lambda _: params, key=KEY, replacement_rate=0.25, maturity=0)
    sizes = jnp.abs(params["policy"]["kernel"]).sum(1) + jnp.abs(params["value"]["kernel"]).sum(1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, magnitudes=[jnp.ones(4)])
    new = optax.apply_updates(params, updates)
    for head in ("policy", "value"):
        silent = ~np.asarray(new[head]["kernel"]).any(1)
        assert silent.tolist() == [i == int(sizes.argmin()) for i in range(4)]


def test_one_nan_is_not_remembered():
    units, params = [Units("a", "b")], {"a": {"kernel": jnp.ones((1, 3))}, "b": {"kernel": jnp.ones((3, 1))}}
    tx = continual_backprop(optax.sgd(0.0), units, lambda _: params, key=KEY, replacement_rate=0.0)
    state = tx.init(params)
    for sizes in ([1.0, 1.0, 1.0], [1.0, jnp.nan, jnp.inf], [1.0, 1.0, 1.0]):
        _, state = tx.update(params, state, params, magnitudes=[jnp.array(sizes)])
    assert jnp.isfinite(state.utility[0]).all()


@pytest.mark.slow
def test_a_fresh_nnx_model_is_a_draw_in_flax_optimizer():
    def net(key):
        rngs = nnx.Rngs(params=key)
        return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), lk_relu, nnx.Linear(8, 2, rngs=rngs))

    def fresh(key):
        return nnx.state(net(key), nnx.Param)

    units, model = [Units("layers/0", "layers/2")], net(KEY)
    tx = optax.chain(
        recycle_dormant(optax.adam(0.1), units, fresh, key=KEY, period=1), shrink_and_perturb(0.1, 0.1, fresh, key=KEY)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(jnp.ones((1, 3))).sum())(model)
    before = model.layers[0].kernel[...].copy()
    optimizer.update(model, grads, magnitudes=[jnp.array([0.0, 1, 1, 1])])
    assert (jnp.abs(model.layers[0].kernel[...] - before) > 1e-3).all()


def trees_like(state, params):
    """The parts of an optimiser's state that are like the parameters."""
    like = jax.tree.structure(params)
    parts = jax.tree.leaves(state, is_leaf=lambda part: jax.tree.structure(part) == like)
    found = [part for part in parts if jax.tree.structure(part) == like]
    assert found
    return found


def test_gradients_may_be_more_precise_than_parameters():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw(KEY))
    tx = recycle_dormant(optax.sgd(0.1), UNITS, draw, key=KEY, period=1)
    few = [jnp.array([0.0, 1, 1, 1]), jnp.ones(5)]
    updates, _ = jax.jit(tx.update)(gradients(0), tx.init(half), half, magnitudes=few)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("make", [continual_backprop, recycle_dormant])
def test_seeds_at_once_are_what_each_is_alone(make):
    options = {"period": 2, "tau": 0.5} if make is recycle_dormant else {"replacement_rate": 0.3, "maturity": 1}
    tx = make(optax.adam(0.01), UNITS, draw, key=KEY, **options)

    def learn(key):
        def step(carry, number):
            params, state = carry
            sizes = [jax.random.uniform(jax.random.fold_in(key, number), (n,)) for n in (4, 5)]
            updates, state = tx.update(draw(jax.random.fold_in(key, number)), state, params, magnitudes=sizes)
            return (optax.apply_updates(params, updates), state), None

        start = draw(KEY), optax.tree_utils.tree_set(tx.init(draw(KEY)), key=key)
        return jax.lax.scan(step, start, jnp.arange(12))[0][0]

    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(learn))(keys)
    for place, key in enumerate(keys):
        close(jax.tree.map(lambda leaf, place=place: leaf[place], together), jax.jit(learn)(key))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: l2_init(-1.0), "at least 0, got -1"),
        (lambda: l2_init(float("nan")), "at least 0, got nan"),
        (lambda: shrink_and_perturb(1.5, 0.0, draw, key=KEY), "shrink is from 0 to 1, got 1.5"),
        (lambda: shrink_and_perturb(0.5, -1.0, draw, key=KEY), "perturb is at least 0"),
        (lambda: continual_backprop(optax.sgd(1.0), UNITS, draw, key=KEY, replacement_rate=2.0), "from 0 to 1, got 2"),
        (lambda: continual_backprop(optax.sgd(1.0), UNITS, draw, key=KEY, maturity=-1), "at least 0 steps"),
        (lambda: continual_backprop(optax.sgd(1.0), UNITS, draw, key=KEY, decay=1.0), "below 1, got 1.0"),
        (lambda: recycle_dormant(optax.sgd(1.0), UNITS, draw, key=KEY, period=0), "at least 1 step, got 0"),
        (lambda: recycle_dormant(optax.sgd(1.0), UNITS, draw, key=KEY, period=1, tau=-1.0), "tau is at least 0"),
        (lambda: recycle_dormant(optax.sgd(1.0), [], draw, key=KEY, period=1), r"one or more hidden layers, got \[\]"),
        (lambda: continual_backprop(optax.sgd(1.0), [], draw, key=KEY), r"got \[\]; pass \[Units"),
    ],
)
def test_numbers_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_what_is_missing_is_named():
    params = draw(KEY)
    for tx in (l2_init(0.1), shrink_and_perturb(0.1, 0.1, draw, key=KEY)):
        with pytest.raises(ValueError, match="got params=None"):
            tx.update(params, tx.init(params))
    wrong = continual_backprop(optax.sgd(1.0), [Units("a", "z")], draw, key=KEY)
    with pytest.raises(ValueError, match="no kernel at 'z'; there are: a, b, c"):
        wrong.init(params)
    uneven = continual_backprop(optax.sgd(1.0), [Units("b", "a")], draw, key=KEY)
    with pytest.raises(ValueError, match="'a' has 3 rows, no multiple of the 5 units"):
        uneven.init(params)
    tx = recycle_dormant(optax.sgd(1.0), UNITS, draw, key=KEY, period=1)
    with pytest.raises(ValueError, match="units of 2 layers, in their order, got 0"):
        tx.update(params, tx.init(params), params)
    for wrong, said in (
        ({"a": jnp.ones(4), "b": jnp.ones(5)}, "2 layers, in their order, got a dict"),
        ([jnp.ones(4), jnp.ones(10)], r"magnitudes of 'b' have shape \(5,\), one a unit, got \(10,\)"),
        ([jnp.ones(()), jnp.ones(5)], r"magnitudes of 'a' have shape \(4,\), one a unit, got \(\)"),
    ):
        with pytest.raises(ValueError, match=said):
            tx.update(params, tx.init(params), params, magnitudes=wrong)
    for other, got in (({}, "got none"), ({**draw(KEY), "a": {"bias": 0.0, "kernel": 0.0}}, r"got one of \(\)")):
        wrong = shrink_and_perturb(0.1, 0.1, lambda _, other=other: other, key=KEY)
        with pytest.raises(ValueError, match=rf"draw gives an array of \(4,\) at 'a/bias', .*{got}"):
            wrong.update(params, wrong.init(params), params)


def test_what_are_no_units_is_refused(unchecked):
    sgd = optax.sgd(1.0)
    for units, said in (
        (Units("a", "b"), "units are a list of Units, got Units"),
        (["a"], "units are a list of Units"),
    ):
        with pytest.raises(TypeError, match=said):
            recycle_dormant(sgd, units, draw, key=KEY, period=1)
    with pytest.raises(TypeError, match="draw is a function"):
        recycle_dormant(sgd, UNITS, None, key=KEY, period=1)
    with pytest.raises(TypeError, match="a layer's path is a string"):
        Units(("a",), "b")
    with pytest.raises(ValueError, match=r"got 'a' 2 times; .* Units\('a', \('a', 'b'\)\)"):
        recycle_dormant(sgd, [Units("a", "b"), Units("a", "c")], draw, key=KEY, period=1)
