import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from linked_jax.activations import fourier, lk_leaky_relu, lk_relu, relu
from linked_jax.layers import LinkedLinear
from linked_jax.linking import Link
from linked_jax.revive import link_sequential, link_sequential_opt_state, redo, warm_up_new
from linked_jax.revive.joints import apart, is_activation
from tests.arrays import white
from tests.cases import first_fast

layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))


def flatten(x):
    return x.reshape(len(x), -1)


def pool(x):
    return nnx.avg_pool(x, (2, 2), strides=(2, 2))


def network(*, dead=(1, 3), flatten_first=False, norm=False):
    """A small net whose units in `dead` never fire, but for a link's mirrored members."""
    rngs = nnx.Rngs(0)
    flat = [flatten, jax.nn.relu] if flatten_first else [jax.nn.relu, pool, flatten]
    model = nnx.Sequential(
        nnx.Conv(2, 5, (3, 3), rngs=rngs),
        *[nnx.BatchNorm(5, rngs=rngs)] * norm,
        *flat,
        nnx.Linear(5 * (24 if flatten_first else 6), 7, rngs=rngs),
        jax.nn.relu,
        nnx.Linear(7, 3, rngs=rngs),
    )
    hit = jnp.isin(jnp.arange(5), jnp.array(dead))
    target = model.layers[1] if norm else model.layers[0]
    target.bias[...] = jnp.where(hit, -100.0, 0.3)
    return model


def fill(tree):
    """Moments that are nowhere 0."""
    return jax.tree.map(lambda a: a + 1 if jnp.issubdtype(a.dtype, jnp.floating) else a + 3, tree)


def state_of(model, tx):
    return fill(tx.init(nnx.state(model, nnx.Param)))


def scores(model, x, index, members):
    """mean|h| per unit over the layer's mean, unit by unit; members(k) are the channels of unit k."""
    evaluated = nnx.clone(model)
    evaluated.eval()
    h = x
    for layer in list(evaluated.layers)[: index + 1]:
        h = layer(h)
    h = np.abs(np.asarray(h, np.float64)).reshape(-1, h.shape[-1])
    each = np.array([h[:, channels].mean() for channels in members])
    return each / each.mean()


X = white(16, 4, 6, 2)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0.025, 0.8])
def test_conv_to_dense_against_a_reference_unit_by_unit(tau):
    model, tx = network(), optax.adam(1e-3)
    opt_state = state_of(model, tx)
    new, new_state, count = redo(model, opt_state, X, tau=tau, key=jax.random.key(7), tx=tx)
    conv = np.flatnonzero(scores(model, X, 1, [[c] for c in range(5)]) <= tau)
    dense = np.flatnonzero(scores(model, X, 5, [[c] for c in range(7)]) <= tau)
    assert {1, 3} <= set(conv)
    assert len(conv) < 5
    assert len(dense) < 7
    assert int(count) == len(conv) + len(dense)

    touched = {  # layer -> which entries of kernel and bias change
        0: (np.zeros((3, 3, 2, 5), bool), np.zeros(5, bool)),
        4: (np.zeros((5 * 6, 7), bool), np.zeros(7, bool)),
        6: (np.zeros((7, 3), bool), np.zeros(3, bool)),
    }
    rows = {0: [], 4: [position * 5 + unit for position in range(6) for unit in conv], 6: list(dense)}
    for layer, units in ((0, conv), (4, dense)):
        touched[layer][0][..., units] = True
        touched[layer][1][units] = True
    for layer, (kernel, _) in touched.items():
        old, fresh = (np.asarray(m.layers[layer].kernel[...]) for m in (model, new))
        incoming = kernel.copy()
        kernel[..., rows[layer], :] = True
        np.testing.assert_array_equal(fresh[~kernel], old[~kernel])
        assert not fresh[..., rows[layer], :].any()
        incoming[..., rows[layer], :] = False
        assert (fresh[incoming] != old[incoming]).all()
        old, fresh = (np.asarray(m.layers[layer].bias[...]) for m in (model, new))
        np.testing.assert_array_equal(fresh, np.where(touched[layer][1], 0, old))
        for moment in ("mu", "nu"):
            for field, where in zip(("kernel", "bias"), touched[layer], strict=True):
                old, fresh = (
                    np.asarray(getattr(s[0], moment)["layers"][layer][field][...]) for s in (opt_state, new_state)
                )
                np.testing.assert_array_equal(fresh, np.where(where, 0, old))
    assert int(new_state[0].count) == int(opt_state[0].count)


@pytest.mark.slow
def test_new_weights_are_lecun_normal():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(300, 400, rngs=rngs), jax.nn.relu, nnx.Linear(400, 2, rngs=rngs))
    model.layers[0].bias[...] = jnp.full(400, -1000.0)
    new, _, count = redo(model, (), white(8, 300), key=jax.random.key(7))
    kernel = np.asarray(new.layers[0].kernel[...])
    assert int(count) == 400  # a silent layer: all of it
    assert abs(kernel.std() * 300**0.5 - 1) < 0.02
    assert abs(kernel.mean()) < 0.001


@pytest.mark.slow
@pytest.mark.parametrize("flatten_first", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_at_tau_zero_outputs_stay_and_dead_units_fire_again(norm, flatten_first):
    model, tx = network(norm=norm, flatten_first=flatten_first), optax.adam(1e-3)
    model.eval()
    new, new_state, count = redo(model, state_of(model, tx), X, tau=0.0, key=jax.random.key(7), tx=tx)
    channels = [[c + 5 * p for p in range(24 if flatten_first else 1)] for c in range(5)]
    layers = list(model.layers)
    index = layers.index(jax.nn.relu)
    dense = scores(model, X, len(layers) - 2, [[c] for c in range(7)])
    assert set(np.flatnonzero(scores(model, X, index, channels) == 0)) == {1, 3}
    assert int(count) == 2 + (dense == 0).sum()
    np.testing.assert_allclose(new(X), model(X), atol=1e-5)
    assert (scores(new, X, index, channels) > 0).all()
    if norm:
        for name, start in {"mean": 0, "var": 1, "scale": 1, "bias": 0}.items():
            assert getattr(new.layers[1], name)[...][jnp.array([1, 3])].tolist() == [start, start]
        assert new_state[0].mu["layers"][1]["scale"][...].tolist() == [1, 0, 1, 0, 1]


@pytest.mark.slow
@layouts
def test_a_link_is_scored_as_one_and_all_its_members_reset(layout):
    link, tx = Link(lk_relu.members, layout=layout), optax.adam(1e-3)
    model = network(dead=())
    model.layers[0].bias[...] = jnp.array([0.0, -100.0, 0.0, 100.0, 0.0])  # half of the members of 1 and 3 are silent
    opt_state = link_sequential_opt_state(state_of(model, tx), model, link, tx=tx)
    model = link_sequential(model, link)
    _, _, count = redo(model, opt_state, X, tau=0.0, key=jax.random.key(7), tx=tx)
    assert int(count) == 0
    new, _, count = redo(model, opt_state, X, tau=0.3, key=jax.random.key(7), tx=tx)
    quiet, dense = [0, 2, 4], [[c, c + 7] if layout == "blocked" else [2 * c, 2 * c + 1] for c in range(7)]
    assert int(count) == 3 + (scores(model, X, 5, dense) <= 0.3).sum()
    kernel = np.asarray(new.layers[4].kernel[...]).reshape(6, 10, 7)
    channel = (lambda c, m: m * 5 + c) if layout == "blocked" else (lambda c, m: 2 * c + m)
    for unit in range(5):
        for member in range(2):
            assert kernel[:, channel(unit, member)].any() == (unit not in quiet and member == 0)


@pytest.mark.slow
def test_a_batch_norm_after_the_activation_restarts_too():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(2, 5, (3, 3), rngs=rngs),
        relu,
        flatten,
        nnx.BatchNorm(5 * 24, rngs=rngs),
        nnx.Linear(120, 3, rngs=rngs),
    )
    model.layers[0].bias[...] = jnp.array([0.0, -100.0, 0.0, 0.0, 0.0])
    model.layers[3].var[...] = jnp.full(120, 7.0)
    new, _, count = redo(model, (), X, key=jax.random.key(7))
    assert int(count) == 1
    np.testing.assert_array_equal(new.layers[3].var[...], np.tile([7, 1, 7, 7, 7], 24))


@pytest.mark.slow
def test_nothing_of_the_old_model_changes_and_modes_and_statistics_stay():
    model = network(norm=True)
    before = jax.tree.map(np.asarray, nnx.state(model))
    new, *_ = redo(model, (), X, key=jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    assert not model.layers[1].use_running_average
    assert not new.layers[1].use_running_average


@pytest.mark.slow
def test_under_jit_it_is_the_same():
    model, tx = network(norm=True), optax.adam(1e-3)
    arguments = (model, state_of(model, tx), X)
    eager = redo(*arguments, key=jax.random.key(7), tx=tx)
    compiled = jax.jit(functools.partial(redo, tx=tx))(*arguments, key=jax.random.key(7))
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_units_that_are_not_finite_are_not_dormant():
    model = network(dead=(1,))
    model.layers[0].kernel[...] = model.layers[0].kernel[...].at[..., 0].set(jnp.nan)
    revived, _, count = redo(model, (), X, key=jax.random.key(7))
    assert int(count) == 1  # the dead unit beside it; behind them all units see NaN
    assert jnp.isnan(revived.layers[0].kernel[..., 0]).all()


@pytest.mark.slow
def test_it_trains_on():
    model, tx = network(), optax.adam(1e-2)
    model, opt_state, _ = redo(model, tx.init(nnx.state(model, nnx.Param)), X, key=jax.random.key(7), tx=tx)
    graph, params = nnx.split(model)
    grads = jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(X) - 1).mean())(params)
    updates, _ = tx.update(grads, opt_state, params)
    moved = updates["layers"][4]["kernel"][...].reshape(6, 5, 7)
    assert jnp.abs(moved[:, jnp.array([1, 3])]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("link", [fourier, lk_leaky_relu])
def test_links_that_always_give_something_have_no_dormant_units(link):
    model = link_sequential(
        nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), link.members[0], nnx.Linear(4, 2, rngs=nnx.Rngs(1))), link
    )
    assert int(redo(model, (), white(64, 3), tau=0.1, key=jax.random.key(7))[2]) == 0


@pytest.mark.slow
def test_bad_input(unchecked):
    rngs, key = nnx.Rngs(0), jax.random.key(7)
    first, last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
    with pytest.raises(ValueError, match="tau is at least 0, got -1"):
        redo(nnx.Sequential(first, relu, last), (), white(2, 3), tau=-1, key=key)
    for x in (white(0, 3), white(2, 3).at[1, 0].set(jnp.nan)):
        with pytest.raises(ValueError, match="x is a batch of finite numbers, got shape"):
            redo(nnx.Sequential(first, relu, last), (), x, key=key)
    other = optax.adam(1e-3).init({"a": white(2, 3)})
    for tx, message in ((None, "pass tx="), (optax.adam(1e-3), r"no state of tx.init\(params\)")):
        with pytest.raises(ValueError, match=message):
            redo(nnx.Sequential(first, relu, last), other, white(2, 3), key=key, tx=tx)
    with pytest.raises(ValueError, match="no activation between two layers"):
        redo(nnx.Sequential(first, last, jnp.tanh), (), white(2, 3), key=key)
    with pytest.raises(ValueError, match=r"layers\[1\], a LayerNorm before an activation"):
        redo(nnx.Sequential(first, nnx.LayerNorm(4, rngs=rngs), relu, last), (), white(2, 3), key=key)


@pytest.mark.slow
def test_under_vmap_no_layer_is_left_out():
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(3, 5, rngs=rngs), jax.nn.relu, nnx.Linear(5, 6, rngs=rngs), jax.nn.silu]
    model = nnx.Sequential(*layers, nnx.Linear(6, 2, rngs=rngs))
    model.layers[0].bias[...] = jnp.full(5, -100.0)
    count = lambda key: redo(model, (), white(8, 3), tau=0.0, key=key)[2]  # noqa: E731
    keys = jax.random.split(jax.random.key(7), 2)
    assert jax.vmap(count)(keys).tolist() == [int(count(key)) for key in keys]
    assert int(count(keys[0])) >= 5


@pytest.mark.slow
def test_a_known_batch_in_a_traced_function_is_fine_and_its_size_is_checked():
    model = network()
    counts = jax.lax.map(lambda key: redo(model, (), X, key=key)[2], jax.random.split(jax.random.key(7), 2))
    assert (counts >= 2).all()
    with pytest.raises(ValueError, match="x is a batch of finite numbers, got shape"):
        jax.jit(lambda x: redo(model, (), x, key=jax.random.key(7))[2])(X[:0])


def test_a_layer_with_a_link_of_its_own_is_not_left_out():
    layers = [nnx.Linear(3, 4, rngs=nnx.Rngs(0)), LinkedLinear(4, 2, rngs=nnx.Rngs(0))]
    with pytest.raises(ValueError, match=r"layers\[1\], a LinkedLinear, is already linked"):
        redo(nnx.Sequential(*layers), (), white(2, 3), key=jax.random.key(7))


# --- layers whose weights are not all in their kernel -----------------------------------------------------------------


def linear(a, b, **options):
    return nnx.Linear(a, b, rngs=nnx.Rngs(0), **options)


def lora_linear():
    layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    layer.lora.lora_b[...] = jnp.full((2, 4), -50.0)
    return layer


NOT_REVIVED = {
    "LoRALinear before": lambda: (
        [lora_linear(), relu, linear(4, 2)],
        r"layers\[0\], a LoRALinear, may add to its kernel",
    ),
    "LoRALinear after": lambda: (
        [linear(3, 3), relu, lora_linear(), relu, linear(4, 2)],
        r"layers\[2\] is a LoRALinear",
    ),
    "LoRA": lambda: (
        [nnx.LoRA(3, 2, 4, base_module=linear(3, 4), rngs=nnx.Rngs(0)), relu, linear(4, 2)],
        r"layers\[0\], a LoRA, has",
    ),
    "WeightNorm": lambda: (
        [nnx.WeightNorm(linear(3, 4), rngs=nnx.Rngs(0)), relu, linear(4, 2)],
        r"layers\[0\], a WeightNorm, has",
    ),
    "masked": lambda: (
        [nnx.Conv(3, 4, (1,), mask=jnp.ones((1, 3, 4)), rngs=nnx.Rngs(0)), relu, linear(4, 2)],
        r"layers\[0\], a masked convolution",
    ),
    "several axes": lambda: (
        [
            nnx.LinearGeneral(3, (4, 5), rngs=nnx.Rngs(0)),
            relu,
            nnx.LinearGeneral((4, 5), 2, axis=(-2, -1), rngs=nnx.Rngs(0)),
        ],
        r"layers\[0\], an nnx.LinearGeneral with a kernel of shape \(3, 4, 5\)",
    ),
}


@pytest.mark.parametrize("case", first_fast(NOT_REVIVED.values()), ids=NOT_REVIVED)
def test_units_that_could_stay_dead_are_refused(case):
    layers, message = case()
    with pytest.raises(ValueError, match=message):
        redo(nnx.Sequential(*layers), (), white(2, 3), key=jax.random.key(7))


def test_a_dropout_may_stand_in_two_places():
    drop = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
    model = nnx.Sequential(linear(3, 4), relu, drop, linear(4, 4), relu, drop, linear(4, 2))
    model.eval()
    np.testing.assert_allclose(link_sequential(model, lk_relu)(white(2, 3)), model(white(2, 3)), rtol=1e-6)


def test_shared_weights_are_refused():
    first, second, last = linear(3, 4), linear(4, 3), linear(4, 2)
    tied = nnx.Sequential(first, relu, second, relu, linear(3, 4), relu, last)
    tied.layers[4].kernel = first.kernel
    attend = nnx.Embed(4, 4, rngs=nnx.Rngs(0)).attend
    for model, message in (
        (tied, r"layers\[0\] and layers\[4\] share weights"),
        (nnx.Sequential(first, relu, last, attend), r"layers\[3\] is a function that holds an Embed"),
        (
            nnx.Sequential(first, relu, last, lambda h: h @ first.kernel[:2]),
            r"layers\[3\] is a function that holds an? L",
        ),
        (nnx.Sequential(first, relu, last, functools.partial(jnp.dot, b=last.kernel)), r"holds an? Param"),
        (
            nnx.Sequential(first, relu, last, jax.jit(lambda h: h @ first.kernel[:2])),
            r"layers\[3\] .* holds an? Linear",
        ),
    ):
        for f in (
            lambda model: redo(model, (), white(2, 3), key=jax.random.key(7)),
            lambda model: link_sequential(model, lk_relu),
        ):
            with pytest.raises(ValueError, match=message):
                f(model)


@pytest.mark.slow
def test_two_silent_layers_in_a_row_come_back():
    model = nnx.Sequential(linear(3, 5), relu, nnx.LinearGeneral(5, 6, rngs=nnx.Rngs(0)), relu, linear(6, 2))
    model.layers[0].bias[...] = jnp.full(5, -100.0)
    model.layers[2].bias[...] = jnp.full(6, -100.0)
    x = white(64, 3)
    new, _, count = redo(model, (), x, tau=0.0, key=jax.random.key(7))
    assert int(count) == 11
    np.testing.assert_array_equal(new(x), model(x))
    assert (jax.nn.relu(new.layers[2](jax.nn.relu(new.layers[0](x)))) > 0).any(0).sum() >= 4
    grads = nnx.grad(lambda m: jnp.square(m(x) - 1).mean())(new)
    assert jnp.any(grads["layers"][4]["kernel"][...] != 0)


@pytest.mark.slow
def test_prelus_and_nested_models_are_units_too():
    inner = nnx.Sequential(linear(3, 4), nnx.PReLU(0.0))
    model = nnx.Sequential(inner, nnx.Sequential(linear(4, 2)))
    inner.layers[0].bias[...] = jnp.array([-100.0, 0, 0, 0])
    new, _, count = redo(model, (), white(64, 3), tau=0.0, key=jax.random.key(7))
    assert int(count) == 1
    assert not new.layers[1].layers[0].kernel[0].any()
    np.testing.assert_array_equal(new.layers[0].layers[0].kernel[:, 1:], inner.layers[0].kernel[:, 1:])
    assert (new.layers[0].layers[0].kernel[:, 0] != inner.layers[0].kernel[:, 0]).all()


# --- states that are no moments ---------------------------------------------------------------------------------------

RULES = {
    "rprop": optax.rprop(1e-2),
    "adagrad": optax.adagrad(1e-2, initial_accumulator_value=0.1),
    "copies": optax.contrib.schedule_free_sgd(1e-2),
    "adam and a warm-up": optax.chain(optax.adam(1e-2), warm_up_new(9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_new_weights_start_as_in_init_and_others_stay(name):
    tx, model = RULES[name], nnx.Sequential(linear(3, 4), relu, linear(4, 2))
    model.layers[0].bias[...] = jnp.array([-100.0, 0, 0, 0])
    old_state = fill(tx.init(nnx.state(model, nnx.Param)))
    new, state, count = redo(model, old_state, white(64, 3), tau=0.0, key=jax.random.key(7), tx=tx)
    assert int(count) == 1
    for old, now, fresh in zip(
        *map(jax.tree.leaves, (old_state, state, tx.init(nnx.state(new, nnx.Param)))), strict=True
    ):
        where = {(4, 2): np.s_[:1], (3, 4): np.s_[:, :1], (4,): np.s_[:1]}.get(now.shape)
        expected = np.array(old)
        if where is not None:
            expected[where] = fresh[where]
        np.testing.assert_array_equal(now, expected)


@pytest.mark.slow
def test_what_is_of_many_weights_starts_anew_or_is_refused():
    model = nnx.Sequential(linear(3, 200), relu, linear(200, 200))
    tx = optax.adafactor(1e-3)
    state = state_of(model, tx)
    _, now, _ = redo(model, state, white(64, 3), key=jax.random.key(7), tx=tx)
    fresh = tx.init(nnx.state(model, nnx.Param))
    assert int(now[0].count) == int(fresh[0].count) == 0
    jax.tree.map(np.testing.assert_array_equal, now[0], fresh[0])
    tx = optax.contrib.acprop(1e-3)
    with pytest.raises(ValueError, match=r"would move by .* start the optimiser anew"):
        redo(model, state_of(model, tx), white(64, 3), key=jax.random.key(7), tx=tx)


class Relu(nnx.Module):
    def __call__(self, x):
        return jax.nn.relu(x)


@pytest.mark.slow
def test_activations_that_are_modules_are_compiled_once():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 5, rngs=rngs), Relu(), nnx.Linear(5, 2, rngs=rngs))
    x = jnp.asarray(white(8, 3, dtype=np.float32))
    assert is_activation(Relu(), "layers[1]")
    compiled = apart(Relu())
    redo(model, {}, x, key=jax.random.key(0))
    assert apart(Relu()) is compiled
