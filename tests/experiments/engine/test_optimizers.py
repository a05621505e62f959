import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.engine.optimizers import OPTIMIZERS, adam, rmsprop, sgd
from linked_jax.schedules import inverse_time_decay
from tests.cases import first_fast

STEPS = 200


def keras_rates(kind):
    """The rate of each update, in NumPy."""
    iterations = np.arange(STEPS)
    if kind == "constant":
        return np.full(STEPS, 0.01)
    if kind == "decay":
        return 0.01 * (1.0 / (1.0 + 1e-3 * iterations))
    return np.where(iterations < 100, 0.01, 0.001)


LEARNING_RATES = {
    "constant": 0.01,
    "decay": inverse_time_decay(0.01, 1e-3),
    "drop": optax.join_schedules([optax.constant_schedule(0.01), optax.constant_schedule(0.001)], [100]),
}


def gradients(seed=0):
    """Random gradients (STEPS, 3, 11) whose columns have sizes from 1e-8 to 1e2, so that epsilon's place matters."""
    return np.random.default_rng(seed).normal(size=(STEPS, 3, 11)) * np.logspace(-8, 2, 11)


# Keras 2.0.8, keras/optimizers.py, get_updates, one update after the other. Each returns the parameters after each
# update, from zero.


def keras_sgd(grads, rates, momentum, nesterov):
    p, v, path = np.zeros(grads[0].shape), np.zeros(grads[0].shape), []
    for g, lr in zip(grads, rates, strict=True):
        v = momentum * v - lr * g
        p = p + momentum * v - lr * g if nesterov else p + v
        path.append(p)
    return np.array(path)


def keras_adam(grads, rates, beta_1=0.9, beta_2=0.999, epsilon=1e-8):
    p, m, v = (np.zeros(grads[0].shape) for _ in range(3))
    path = []
    for iterations, (g, lr) in enumerate(zip(grads, rates, strict=True)):
        t = iterations + 1
        lr_t = lr * (np.sqrt(1.0 - beta_2**t) / (1.0 - beta_1**t))
        m = (beta_1 * m) + (1.0 - beta_1) * g
        v = (beta_2 * v) + (1.0 - beta_2) * np.square(g)
        p = p - lr_t * m / (np.sqrt(v) + epsilon)
        path.append(p)
    return np.array(path)


def keras_rmsprop(grads, rates, rho=0.9, epsilon=1e-8):
    p, a, path = np.zeros(grads[0].shape), np.zeros(grads[0].shape), []
    for g, lr in zip(grads, rates, strict=True):
        a = rho * a + (1.0 - rho) * np.square(g)
        p = p - lr * g / (np.sqrt(a) + epsilon)
        path.append(p)
    return np.array(path)


CASES = {
    "adam": (adam, keras_adam),
    "adam, other averages": (
        functools.partial(adam, b1=0.5, b2=0.9, eps=1e-3),
        functools.partial(keras_adam, beta_1=0.5, beta_2=0.9, epsilon=1e-3),
    ),
    "rmsprop": (rmsprop, keras_rmsprop),
    "rmsprop, other averages": (
        functools.partial(rmsprop, decay=0.5, eps=1e-3),
        functools.partial(keras_rmsprop, rho=0.5, epsilon=1e-3),
    ),
    "sgd": (sgd, functools.partial(keras_sgd, momentum=0.0, nesterov=False)),
    "momentum": (functools.partial(sgd, momentum=0.9), functools.partial(keras_sgd, momentum=0.9, nesterov=False)),
    "nesterov": (OPTIMIZERS["nesterov"], functools.partial(keras_sgd, momentum=0.9, nesterov=True)),
}


def run(optimizer, grads, *, jit, dtype):
    """The parameters after each update, from zero: (STEPS, 3, 11); split into a small pytree on the way."""

    def step(carry, g):
        params, state = carry
        updates, state = optimizer.update({"kernel": g[:2], "rest": [g[2]]}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.concatenate([params["kernel"], params["rest"][0][None]])

    params = {"kernel": jnp.zeros((2, 11), dtype), "rest": [jnp.zeros(11, dtype)]}
    carry, grads = (params, optimizer.init(params)), jnp.asarray(grads, dtype)
    if jit:
        return np.asarray(jax.jit(lambda c, g: jax.lax.scan(step, c, g)[1])(carry, grads))
    path = []
    for g in grads:
        carry, params = step(carry, g)
        path.append(np.asarray(params))
    return np.array(path)


def relative_error(path, expected):
    """The largest distance between two paths, each parameter relative to the largest value it ever has."""
    return float(np.max(np.abs(path - expected) / np.max(np.abs(expected), axis=0)))


@pytest.mark.parametrize("kind", first_fast(LEARNING_RATES))
@pytest.mark.parametrize("case", first_fast(CASES))
def test_each_update_is_keras_update(case, kind):
    optimizer, keras = CASES[case]
    expected = keras(gradients(), keras_rates(kind))
    with jax.enable_x64(True):
        path = run(optimizer(LEARNING_RATES[kind]), gradients(), jit=True, dtype=jnp.float64)
    np.testing.assert_allclose(path, expected, rtol=1e-6, atol=0)
    assert relative_error(path, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("case", first_fast(CASES))
def test_eager_equals_jit(case):
    optimizer = CASES[case][0](LEARNING_RATES["drop"])
    grads = gradients()[90:110]
    with jax.enable_x64(True):
        paths = [run(optimizer, grads, jit=jit, dtype=jnp.float64) for jit in (False, True)]
    np.testing.assert_allclose(*paths, rtol=1e-9)


@pytest.mark.parametrize("kind", first_fast(LEARNING_RATES))
@pytest.mark.parametrize("case", first_fast(CASES))
def test_float32_follows_keras_too(case, kind):
    optimizer, keras = CASES[case]
    path = run(optimizer(LEARNING_RATES[kind]), gradients(), jit=True, dtype=jnp.float32)
    assert relative_error(path, keras(gradients(), keras_rates(kind))) < 1e-5


@pytest.mark.parametrize("x64", first_fast([False, True]))
@pytest.mark.parametrize("dtype", first_fast([jnp.float32, jnp.bfloat16]))
@pytest.mark.parametrize("kind", first_fast(LEARNING_RATES))
@pytest.mark.parametrize("case", first_fast(CASES))
def test_parameters_and_state_keep_their_dtype(case, kind, dtype, x64):
    with jax.enable_x64(x64):
        optimizer = CASES[case][0](LEARNING_RATES[kind])
        params = {"a": jnp.zeros(3, dtype), "b": jnp.zeros((), dtype)}
        state = optimizer.init(params)
        updates, new_state = jax.eval_shape(optimizer.update, params, state, params)
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        assert jax.tree.map(jnp.result_type, new_state) == jax.tree.map(jnp.result_type, state)
        floats = [leaf for leaf in jax.tree.leaves(new_state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        wide = jnp.promote_types(dtype, jnp.float32) if case.startswith(("adam", "rmsprop")) else dtype
        assert all(leaf.dtype == wide for leaf in floats)


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(["adam", "rmsprop", "sgd", "nesterov"]))
def test_half_precision_follows_float32(name):
    """Gradients from 1e-7, nearly the least of float16, to 1e4; the tolerance is rounding to float16."""
    grads = np.concatenate([[0.0], np.logspace(-7, 4, 12)]).astype(np.float16)
    updates = {}
    for dtype in (jnp.float16, jnp.float32):
        optimizer = OPTIMIZERS[name](1e-3)
        state = optimizer.init(jnp.zeros(13, dtype))
        for _ in range(3):
            update, state = optimizer.update(jnp.asarray(grads, dtype), state)
        updates[dtype] = update
    assert updates[jnp.float16].dtype == jnp.float16
    np.testing.assert_allclose(updates[jnp.float16], updates[jnp.float32], rtol=3e-3, atol=3e-7)


@pytest.mark.parametrize("case", first_fast(CASES))
def test_the_step_does_not_retrace(case):
    optimizer, traces = CASES[case][0](LEARNING_RATES["decay"]), []

    @jax.jit
    def step(grads, state):
        traces.append(grads)
        return optimizer.update(grads, state)

    state = optimizer.init(jnp.zeros(3))
    for _ in range(3):
        _, state = step(jnp.ones(3), state)
    assert len(traces) == 1


@pytest.mark.parametrize("name", first_fast(OPTIMIZERS))
def test_zero_gradients_do_not_move(name):
    optimizer = OPTIMIZERS[name](0.1)
    updates, state = optimizer.update(jnp.zeros(3), optimizer.init(jnp.ones(3)))
    assert np.all(np.asarray(updates) == 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


# The traps: what Optax offers under the same names is not what Keras computed.


@pytest.mark.parametrize(("kind", "least"), first_fast([("decay", 5e-3), ("drop", 0.05)]))
def test_optax_nesterov_is_not_keras_under_a_changing_rate(kind, least):
    # With gradients that keep their sign, as at the start of training: after a drop Optax shrinks the old velocity too.
    grads = np.abs(gradients())
    expected = keras_sgd(grads, keras_rates(kind), momentum=0.9, nesterov=True)
    schedule = LEARNING_RATES[kind]
    with jax.enable_x64(True):
        theirs = run(optax.sgd(schedule, momentum=0.9, nesterov=True), grads, jit=True, dtype=jnp.float64)
        ours = run(OPTIMIZERS["nesterov"](schedule), grads, jit=True, dtype=jnp.float64)
    moved = [np.diff(path, axis=0) for path in (theirs, ours, expected)]
    assert relative_error(moved[0][99:], moved[2][99:]) > least
    assert relative_error(moved[1][99:], moved[2][99:]) < 1e-9


def test_optax_nesterov_is_keras_under_a_constant_rate():
    expected = keras_sgd(gradients(), keras_rates("constant"), momentum=0.9, nesterov=True)
    with jax.enable_x64(True):
        path = run(optax.sgd(0.01, momentum=0.9, nesterov=True), gradients(), jit=True, dtype=jnp.float64)
    assert relative_error(path, expected) < 1e-12


@pytest.mark.parametrize(("theirs", "keras"), first_fast([(optax.adam, keras_adam), (optax.rmsprop, keras_rmsprop)]))
def test_optax_puts_epsilon_elsewhere(theirs, keras):
    expected = keras(gradients(), keras_rates("constant"))
    with jax.enable_x64(True):
        path = run(theirs(0.01), gradients(), jit=True, dtype=jnp.float64)
    assert relative_error(path[..., :1], expected[..., :1]) > 0.1  # gradients of epsilon's size
    assert relative_error(path[..., -1:], expected[..., -1:]) < 1e-6  # far above it


@pytest.mark.parametrize(
    ("make", "message"),
    first_fast(
        [
            (lambda: sgd(0.0), r"learning_rate is positive and finite, got 0\.0; pass"),
            (lambda: adam(-1e-3), "learning_rate is positive"),
            (lambda: rmsprop(math.nan), "learning_rate is positive"),
            (lambda: sgd(0.1, momentum=1.0), r"momentum is in \[0, 1\), got 1\.0; pass"),
            (lambda: sgd(0.1, momentum=-0.1), r"momentum is in \[0, 1\)"),
            (lambda: sgd(0.1, nesterov=True), r"nesterov needs momentum, got momentum=0\.0; pass"),
            (lambda: adam(0.1, b1=1.0), r"b1 is in \[0, 1\)"),
            (lambda: adam(0.1, b2=math.nan), r"b2 is in \[0, 1\)"),
            (lambda: adam(0.1, eps=0.0), "eps is positive"),
            (lambda: rmsprop(0.1, decay=1.5), r"decay is in \[0, 1\)"),
            (lambda: rmsprop(0.1, eps=-1e-8), "eps is positive"),
        ]
    ),
)
def test_bad_settings_are_refused_when_the_optimiser_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", first_fast(OPTIMIZERS))
def test_a_traced_learning_rate_is_accepted(name):
    @jax.jit
    def update(rate):
        optimizer = OPTIMIZERS[name](rate)
        return optimizer.update(jnp.ones(2), optimizer.init(jnp.zeros(2)))[0]

    optimizer = OPTIMIZERS[name](0.1)
    expected, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.zeros(2)))
    np.testing.assert_allclose(update(0.1), expected, rtol=1e-6)
