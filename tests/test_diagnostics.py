import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax.activations import ACTIVATIONS, lk_relu, relu
from linked_jax.diagnostics import live_units
from linked_jax.linking import Link, linked

layouts = pytest.mark.parametrize("layout", ["blocked", "interleaved"])
LINKS = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link) and name != "crelu"}
# Mostly zeros, so that dead units occur; both zeros, and values that are live although a sum would hide them.
VALUES = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, -1.0, 1e-30, float("inf"), float("nan")])


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


@layouts
@hypothesis.settings(max_examples=6)
@hypothesis.given(link_outputs())
def test_live_units_is_the_brute_force_loop(layout, outputs):
    h, arity = outputs
    found = live_units(jnp.asarray(h), arity=arity, layout=layout)
    assert found.dtype == bool
    assert found.tolist() == brute_force(h, arity, layout)


@layouts
@pytest.mark.parametrize("alive_member", [None, 0, 1])
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


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_units_count_pre_activations_for_every_link(link):
    live = live_units(link(jnp.tile(jnp.array([[1.0], [-1.0]]), 5)), arity=link.arity)
    assert live.tolist() == [True] * 5


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


@pytest.mark.parametrize("arity", [0, -1, 2, 4])
def test_arity_that_does_not_divide_the_channels_is_refused(arity):
    with pytest.raises(ValueError, match=f"arity {arity}"):
        live_units(jnp.ones((2, 5)), arity=arity)


def test_unknown_layout_is_refused(unchecked):
    with pytest.raises(ValueError, match="'sideways'"):
        live_units(jnp.ones((2, 4)), arity=2, layout="sideways")


def test_scalar_is_refused(unchecked):
    with pytest.raises((ValueError, IndexError)):
        live_units(jnp.float32(1.0))
