import functools
import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax.activations import ACTIVATIONS, lk_relu, relu
from linked_jax.diagnostics import (
    combine,
    dead_links,
    dead_units,
    dormancy,
    dormant_units,
    linearised_units,
    live_units,
    not_finite_units,
    saturated_units,
    unit_statistics,
)
from linked_jax.linking import Link, fourier, linked
from linked_jax.signal_statistics import combine_features, feature_moments
from linked_jax.slopes import slope_statistics
from tests.cases import first_fast

layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))
LINKS = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link) and name != "crelu"}
# Mostly zeros, so that dead units occur; both zeros, and values that are live although a sum would hide them.
VALUES = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, -1.0, 1e-30, float("inf"), float("nan")])

TANH = linked(jnp.tanh)

COMBINE = jax.jit(combine)


@functools.partial(jax.jit, static_argnums=0)
def statistics(link, z):
    h, slopes = jax.jvp(link, (z,), (jnp.ones_like(z),))
    return unit_statistics(z, h, slopes, arity=link.arity, layout=link.layout)


def brute_force(h, arity, layout):
    channels = h.shape[-1] // arity
    live = []
    for c in range(channels):
        positions = [c + i * channels if layout == "blocked" else c * arity + i for i in range(arity)]
        live.append(any(value != 0 for position in positions for value in h[..., position].flat))
    return live


@st.composite
def link_outputs(draw):
    arity = draw(st.integers(1, 4))
    lead = draw(st.lists(st.integers(0, 3), max_size=3))
    shape = (*lead, arity * draw(st.integers(0, 3)))
    return draw(hnp.arrays(np.float32, shape, elements=VALUES)), arity


@pytest.mark.slow
@layouts
@hypothesis.settings(max_examples=6)
@hypothesis.given(link_outputs())
def test_live_units_is_the_brute_force_loop(layout, outputs):
    h, arity = outputs
    found = live_units(jnp.asarray(h), arity=arity, layout=layout)
    assert found.dtype == bool
    assert found.tolist() == brute_force(h, arity, layout)


@layouts
@pytest.mark.parametrize("alive_member", first_fast([None, 0, 1]))
def test_dead_unit_is_one_with_all_members_zero(layout, alive_member):
    link = linked(
        lambda z: z * (alive_member == 0), lambda z: z * (alive_member == 1), lambda z: jnp.zeros_like(z), layout=layout
    )
    live = live_units(link(jnp.ones((2, 4))), arity=3, layout=layout)
    assert live.tolist() == [alive_member is not None] * 4


@layouts
def test_only_the_unit_with_an_output_is_live(layout):
    link = Link(lk_relu.members, layout=layout)
    z = jnp.zeros((5, 3, 6)).at[2, 1, 4].set(-1.0)
    assert live_units(link(z), arity=2, layout=layout).tolist() == [False] * 4 + [True, False]


def test_plain_relu_dies_where_its_mirror_link_lives():
    z = -jnp.ones((4, 3))
    assert not live_units(relu(z)).any()
    assert live_units(lk_relu(z), arity=2).all()


@pytest.mark.parametrize("link", first_fast(LINKS.values()), ids=LINKS)
def test_units_count_pre_activations_for_every_link(link):
    live = live_units(link(jnp.tile(jnp.array([[1.0], [-1.0]]), 5)), arity=link.arity)
    assert live.tolist() == [True] * 5


@pytest.mark.slow
@layouts
def test_batches_combine_with_a_logical_or(layout):
    h = (jax.random.uniform(jax.random.key(1), (6, 12)) < 0.1).astype(jnp.float32)
    halves = [live_units(part, arity=2, layout=layout) for part in (h[:3], h[3:])]
    assert (halves[0] | halves[1]).tolist() == live_units(h, arity=2, layout=layout).tolist()
    assert (halves[0] != halves[1]).any()  # or one half would have been enough


@layouts
def test_jit_is_eager(layout):
    h = (jax.random.uniform(jax.random.key(1), (4, 12)) < 0.1).astype(jnp.bfloat16)
    compiled = jax.jit(live_units, static_argnames=("arity", "layout"))
    assert compiled(h, arity=3, layout=layout).tolist() == brute_force(np.asarray(h), 3, layout)


@pytest.mark.parametrize("arity", first_fast([0, -1, 2, 4]))
def test_arity_that_does_not_divide_the_channels_is_refused(arity):
    with pytest.raises(ValueError, match=f"arity {arity}"):
        live_units(jnp.ones((2, 5)), arity=arity)


def test_unknown_layout_is_refused(unchecked):
    with pytest.raises(ValueError, match="'sideways'"):
        live_units(jnp.ones((2, 4)), arity=2, layout="sideways")


def test_scalar_is_refused(unchecked):
    with pytest.raises((ValueError, IndexError)):
        live_units(jnp.float32(1.0))


# --- streamed statistics ------------------------------------------------------------------------------------------


def reference(members, slopes, z):
    """All of it in NumPy float64, unit by unit: `members` and `slopes` are lists of functions of z."""
    z = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
    outputs, steepness = (np.stack([np.abs(g(z)) for g in functions]) for functions in (members, slopes))
    return {
        "count": len(z),
        "live": outputs.any((0, 1)),
        "steepest": steepness.max((0, 1), initial=0),
        "negative": (z < 0).any(0),
        "active": (z > 0).sum(0),
        "mean": z.mean(0) if len(z) else np.zeros(z.shape[-1]),
        "m2": z.var(0) * len(z) if len(z) else np.zeros(z.shape[-1]),
        "magnitude": outputs.mean(0).sum(0),
    }


NUMPY_TANH = (
    [np.tanh, lambda z: np.tanh(-z)],
    [lambda z: 1 - np.tanh(z) ** 2] * 2,
)
TOLERANCES = {jnp.bfloat16: 0.02, jnp.float32: 2e-5, jnp.float64: 1e-12}


def assert_statistics(found, wanted, tolerance):
    for name, value in found._asdict().items():
        assert np.isfinite(value).all()
        scale = max(1, np.abs(np.float64(wanted[name])).max(initial=0))
        np.testing.assert_allclose(np.float64(value), wanted[name], atol=tolerance * scale, rtol=0, err_msg=name)


def over_batches(link, z, cuts):
    edges = [0, *sorted(cuts), len(z)]
    total = statistics(link, z[:0])
    for start, stop in itertools.pairwise(edges):
        total = COMBINE(total, statistics(link, z[start:stop]))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("dtype", first_fast(TOLERANCES), ids=lambda dtype: dtype.__name__)
@layouts
@hypothesis.settings(max_examples=5)
@hypothesis.given(
    seed=st.integers(0, 99),
    shape=st.sampled_from([(4, 3), (3, 2, 3, 4)]),
    offset=st.sampled_from([0.0, 1.0, -3.0]),
    cuts=st.lists(st.integers(0, 3), max_size=3),
)
def test_statistics_of_any_split_are_those_of_all_data(layout, dtype, seed, shape, offset, cuts):
    link = Link(TANH.members, layout=layout)
    with jax.enable_x64(dtype == jnp.float64):
        z = jnp.asarray(np.random.default_rng(seed).normal(offset, 2.0, shape), dtype)
        total = over_batches(link, z, [min(cut, len(z)) for cut in cuts])
        assert total.mean.dtype == total.count.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
        # a bfloat16 link rounds its own outputs; the statistics of z alone keep float32's accuracy
        assert_statistics(total, reference(*NUMPY_TANH, z), TOLERANCES[dtype])


def test_bfloat16_data_is_summed_in_float32():
    z = jnp.asarray(np.random.default_rng(0).normal(100.0, 1.0, (4096, 2)), jnp.bfloat16)
    stats, wanted = statistics(relu, z), np.asarray(z, np.float64)
    np.testing.assert_allclose(stats.mean, wanted.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.m2 / stats.count, wanted.var(0), rtol=1e-3)
    np.testing.assert_allclose(stats.magnitude, wanted.sum(0), rtol=1e-5)


def test_an_offset_does_not_swallow_the_variance():
    z = jnp.asarray(np.random.default_rng(0).normal(1e4, 1.0, (1000, 2)), jnp.float32)
    total = over_batches(relu, z, [500])
    np.testing.assert_allclose(total.m2 / 1000, np.asarray(z, np.float64).var(0), rtol=0.01)


@layouts
def test_combine_is_commutative_and_associative(layout):
    link = Link(lk_relu.members, layout=layout)
    z = jnp.asarray(np.random.default_rng(2).normal(1.0, 2.0, (8, 5)), jnp.float32)
    a, b, c = statistics(link, z[:2]), statistics(link, z[2:4]), statistics(link, z[4:])
    assert_statistics(COMBINE(a, b), COMBINE(b, a)._asdict(), 1e-6)
    assert_statistics(COMBINE(COMBINE(a, b), c), COMBINE(a, COMBINE(b, c))._asdict(), 1e-6)
    assert_statistics(COMBINE(COMBINE(a, b), c), statistics(link, z)._asdict(), 1e-6)


def test_statistics_stream_through_a_compiled_scan_from_zeros():
    z = jnp.asarray(np.random.default_rng(3).normal(size=(4, 6, 2, 3)), jnp.float32)

    @jax.jit
    def stream(z):
        nothing = jax.tree.map(jnp.zeros_like, statistics(lk_relu, z[0]))
        return jax.lax.scan(lambda total, batch: (combine(total, statistics(lk_relu, batch)), None), nothing, z)[0]

    assert_statistics(stream(z), statistics(lk_relu, z)._asdict(), 1e-6)


def test_units_without_data_are_not_said_to_be_anything():
    none = statistics(lk_relu, jnp.zeros((0, 2)))
    for verdict in (dead_units, dead_links, dormant_units, linearised_units, saturated_units, not_finite_units):
        assert not verdict(none).any()


def test_no_data_is_the_neutral_element():
    some, none = statistics(lk_relu, jnp.array([[1.0, -3.0]])), statistics(lk_relu, jnp.zeros((0, 2)))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(none))
    for total in (COMBINE(none, some), COMBINE(some, none)):
        jax.tree.map(np.testing.assert_array_equal, total, some)


@pytest.mark.parametrize(
    ("h", "slopes", "arity"),
    first_fast([((2, 4), (2, 4), 1), ((2, 4), (2, 2), 2), ((3, 4), (3, 4), 2), ((2, 6), (2, 6), 2)]),
)
def test_shapes_that_do_not_fit_are_refused(unchecked, h, slopes, arity):
    with pytest.raises(ValueError, match=f"arity {arity}, got"):
        unit_statistics(jnp.ones((2, 2)), jnp.ones(h), jnp.ones(slopes), arity=arity)


def test_statistics_of_an_unknown_layout_are_refused(unchecked):
    with pytest.raises(ValueError, match="'sideways'"):
        unit_statistics(jnp.ones((2, 2)), jnp.ones((2, 4)), jnp.ones((2, 4)), arity=2, layout="sideways")


# --- verdicts -----------------------------------------------------------------------------------------------------

#                  always < 0  always > 0  both signs  always 0
DATA = jnp.array([[-1.0, 1.0, -2.0, 0.0], [-3.0, 2.0, 4.0, 0.0]])
VERDICTS = {
    "relu": (relu, [True, False, False, True], [True, False, False, True], [False, True, False, False]),
    "lk_relu": (lk_relu, [False, False, False, True], [False] * 4, [True, True, False, False]),
    "tanh": (Link((jnp.tanh,)), [False, False, False, True], [False] * 4, [True, True, False, False]),
    "fourier": (fourier, [False] * 4, [False] * 4, [True, True, False, True]),
}


@layouts
@pytest.mark.parametrize(("link", "dead", "no_gradient", "linear"), first_fast(VERDICTS.values()), ids=VERDICTS)
def test_verdicts_on_units_that_one_can_see(link, dead, no_gradient, linear, layout):
    stats = statistics(Link(link.members, layout=layout), DATA)
    assert dead_units(stats).tolist() == dead
    assert dead_links(stats).tolist() == no_gradient
    assert linearised_units(stats).tolist() == linear


@layouts
@pytest.mark.parametrize("g", first_fast([relu, jnp.tanh]), ids=["relu", "tanh"])
def test_a_mirrored_layer_is_not_half_anything(g, layout):
    z = jnp.tile(jnp.array([[1.0], [2.0]]), 6)  # one member of each mirrored relu is always 0
    stats = statistics(linked(g, layout=layout), z)
    for verdict in (dead_units, dead_links, dormant_units, saturated_units):
        assert not verdict(stats).any()
    np.testing.assert_allclose(dormancy(stats), 1.0, rtol=1e-6)


def test_dead_link_and_dead_unit_agree_for_relu_and_not_for_tanh():
    z = jnp.array([[-1.0, 100.0, 0.5], [-2.0, 200.0, -0.5]])
    assert dead_links(statistics(relu, z)).tolist() == dead_units(statistics(relu, z)).tolist() == [True, False, False]
    assert dead_links(statistics(TANH, z)).tolist() == [False, True, False]
    assert not dead_units(statistics(TANH, z)).any()


def test_verdicts_need_all_batches():
    first, second = (statistics(relu, jnp.array([row])) for row in ([-1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]))
    both = COMBINE(first, second)
    assert dead_units(both).tolist() == dead_links(both).tolist() == [True, False, False]
    assert linearised_units(first).tolist() == [False, True, True]
    assert linearised_units(both).tolist() == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", first_fast([0.01, 0.5, 0.0]))
def test_saturated_is_flat_on_all_data(epsilon):
    z = jnp.linspace(0.0, 12.0, 50)[None]
    wanted = 1 - np.tanh(np.float64(z[0])) ** 2 <= epsilon
    near = np.abs(1 - np.tanh(np.float64(z[0])) ** 2 - epsilon) < 1e-6  # decided by rounding
    assert ((np.asarray(saturated_units(statistics(TANH, z), epsilon)) == wanted) | near).all()
    assert wanted[~near].any() == (epsilon > 0)
    assert not saturated_units(statistics(TANH, jnp.array([[50.0], [0.0]])), epsilon).any()


@layouts
@pytest.mark.parametrize("tau", first_fast([0.0, 0.025, 0.5]))
def test_dormancy_is_the_definition_over_the_whole_link(tau, layout):
    rng = np.random.default_rng(4)
    z = rng.normal(size=(8, 3, 10)) * np.array([0, 0, 1e-3, 0.01, 0.02, 0.05, 0.3, 0.5, 1, 2])
    score = np.abs(z).mean((0, 1))  # a mirrored relu: |relu(z)| + |relu(-z)| = |z|
    score /= score.mean()
    stats = statistics(linked(jax.nn.relu, layout=layout), jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(dormancy(stats), score, rtol=1e-5)
    assert dormant_units(stats, tau).tolist() == (score <= tau).tolist()
    assert 2 <= dormant_units(stats, tau).sum() < 10


def test_dormancy_knows_no_scale_and_its_mean_is_one():
    z = jnp.asarray(np.random.default_rng(5).normal(size=(9, 7)), jnp.float32)
    np.testing.assert_allclose(dormancy(statistics(relu, z)), dormancy(statistics(relu, 1e3 * z)), rtol=1e-5)
    np.testing.assert_allclose(dormancy(statistics(relu, z)).mean(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("tau", first_fast([0.0, 0.025]))
def test_every_unit_of_a_silent_layer_is_dormant(tau):
    stats = statistics(relu, -jnp.ones((3, 4)))
    assert dormancy(stats).tolist() == [0.0] * 4
    assert dormant_units(stats, tau).all()


@pytest.mark.slow
@pytest.mark.parametrize("bad", first_fast([float("nan"), float("inf"), -float("inf")]))
def test_a_unit_that_is_not_finite_leaves_the_others_their_scores(bad):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    spoilt = statistics(lk_relu, z.at[3, 1].set(bad))
    assert not_finite_units(spoilt).tolist() == [False, True, False, False]
    others = jnp.array([0, 2, 3])
    np.testing.assert_allclose(dormancy(spoilt)[others], dormancy(statistics(lk_relu, z[:, others])), rtol=1e-6)


@pytest.mark.slow
def test_an_output_alone_may_not_be_finite():
    z = jnp.zeros((2, 1))
    assert not_finite_units(unit_statistics(z, jnp.array([[0.0], [jnp.inf]]), z)).all()
    assert not not_finite_units(unit_statistics(z, z, z)).any()


def nothing_like(statistics):
    return jax.tree.map(jnp.zeros_like, statistics)


@pytest.mark.parametrize("z", [1e20, jnp.inf, -jnp.inf])
def test_no_data_and_more_of_the_same_change_no_verdict(z):
    for link in (relu, linked(jnp.tanh)):
        one = statistics(link, jnp.full((3, 2), z))
        for stats in (combine(one, nothing_like(one)), combine(nothing_like(one), one), combine(one, one)):
            np.testing.assert_array_equal(stats.mean, one.mean)
            np.testing.assert_array_equal(stats.m2, one.m2)
            for verdict in (dead_units, dead_links, not_finite_units):
                np.testing.assert_array_equal(verdict(stats), verdict(one))
    features = feature_moments(jnp.full((3, 2), 1e17).at[0].set(0))
    for both in (
        combine_features(features, nothing_like(features)),
        combine_features(nothing_like(features), features),
    ):
        jax.tree.map(np.testing.assert_array_equal, both, features)


def test_nan_is_no_verdict():
    stats = statistics(lk_relu, jnp.array([[jnp.nan, 1.0], [jnp.nan, -1.0]]))
    for verdict in (dead_units, dead_links, dormant_units, linearised_units, saturated_units):
        assert not verdict(stats)[0]
    assert np.isnan(stats.mean[0])


@pytest.mark.parametrize("bad", first_fast([-0.1, float("nan")]))
def test_negative_thresholds_are_refused(bad):
    stats = statistics(relu, DATA)
    with pytest.raises(ValueError, match=f"tau is at least 0, got {bad}"):
        dormant_units(stats, bad)
    with pytest.raises(ValueError, match=f"epsilon is at least 0, got {bad}"):
        saturated_units(stats, bad)


def test_a_unit_whose_outputs_are_nan_is_neither_dead_nor_linear():
    z = jnp.ones((4, 3))
    stats = unit_statistics(z, h := jnp.full_like(z, jnp.nan), h)
    for question in (dead_units, dead_links, dormant_units, linearised_units, saturated_units):
        assert not question(stats).any()
    assert not_finite_units(stats).all()


@pytest.mark.parametrize(
    "where", first_fast([jnp.ones((5, 4), bool), jnp.ones(1, bool), jnp.ones((4,), bool), jnp.ones((4, 5))])
)
def test_where_that_does_not_fit_is_refused(unchecked, where):
    z = jnp.ones((4, 5, 3))
    for statistics_of in (
        lambda: unit_statistics(z, z, z, where=where),
        lambda: slope_statistics(z, z, where=where),
        lambda: feature_moments(z[:, 0], where=where[:, None] if where.ndim == 1 else where),
    ):
        with pytest.raises(ValueError, match=r"where has a boolean for each sample .* got (bool|float32) of shape"):
            statistics_of()
