import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.activations import lk_relu
from linked_jax.layers import LinkedConv
from linked_jax.learned import ChannelPReLU, LinkedPReLU
from tests.arrays import close, laid_out, white
from tests.cases import first_fast

pytestmark = pytest.mark.optimised

layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))
SHARES = {"layer": (3, ()), "channel": (3, (3,)), "element": ((4, 4, 3), (4, 4, 3))}
over_shares = pytest.mark.parametrize(
    ("share", "features", "slopes"), first_fast([(k, *v) for k, v in SHARES.items()]), ids=SHARES
)
over_modules = pytest.mark.parametrize("make", first_fast([ChannelPReLU, LinkedPReLU]))


def with_random_slopes(module):
    state = nnx.state(module)
    keys = iter(jax.random.split(jax.random.key(5), 2))
    nnx.update(module, jax.tree.map(lambda leaf: jax.random.uniform(next(keys), leaf.shape, leaf.dtype, -1, 1), state))
    return module


def formula(z, slope):
    return np.maximum(z, 0) + np.asarray(slope) * np.minimum(z, 0)


@over_modules
@over_shares
def test_slopes_start_at_a_quarter_in_the_shape_that_is_shared(make, share, features, slopes):
    leaves = jax.tree.leaves(nnx.state(make(features, share=share)))
    assert [leaf.shape for leaf in leaves] == [slopes] * make.arity
    assert all((leaf == 0.25).all() for leaf in leaves)


@over_modules
@pytest.mark.parametrize("slope", first_fast([0.0, 0.01, -0.5]))
def test_given_slope_is_the_start(make, slope):
    leaves = jax.tree.leaves(nnx.state(make(3, negative_slope=slope)))
    assert all((leaf == jnp.float32(slope)).all() for leaf in leaves)


def test_prelu_refuses_a_z_of_other_features():
    for module in (ChannelPReLU(3), LinkedPReLU(3), ChannelPReLU((4, 3), share="element")):
        with pytest.raises(ValueError, match="do not fit"):
            module(jnp.ones((2, 1)))


@over_shares
def test_prelu_is_its_formula(share, features, slopes):
    module = with_random_slopes(ChannelPReLU(features, share=share))
    z = white(2, 4, 4, 3)
    close(module(z), jnp.asarray(formula(z, module.negative_slope[...])), 1e-6)


@layouts
@over_shares
def test_linked_prelu_is_two_prelus_on_z_and_minus_z(share, features, slopes, layout):
    module = with_random_slopes(LinkedPReLU(features, share=share, layout=layout))
    a, b = module.positive.negative_slope[...], module.mirrored.negative_slope[...]
    assert (a != b).any()
    z = white(2, 4, 4, 3)
    members = [jnp.asarray(formula(z, a)), jnp.asarray(formula(-z, b))]
    close(module(z), laid_out(members, layout), 1e-6)


@over_modules
@over_shares
def test_slope_gradients_are_finite_differences(make, share, features, slopes):
    graph, state = nnx.split(with_random_slopes(make(features, share=share)))
    weight = white(2, 4, 4, 3 * make.arity)

    @jax.jit
    def difference_and_derivative(state, direction):
        # Linear in the slopes, so a difference of size 1 is exact.
        moved = jax.tree.map(jnp.add, state, direction)
        f = lambda state: (weight * nnx.merge(graph, state)(white(2, 4, 4, 3, seed=1))).sum()  # noqa: E731
        slope = jax.tree.map(lambda g, v: (g * v).sum(), jax.grad(f)(state), direction)
        return f(moved) - f(state), sum(jax.tree.leaves(slope))

    direction = jax.tree.map(lambda leaf: white(*leaf.shape, seed=leaf.size), state)
    close(*difference_and_derivative(state, direction), 1e-4)


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("zero", first_fast([0.0, -0.0]))
def test_jacobian_of_linked_prelu_at_zero_is_the_limit_from_the_right(layout, zero):
    module = with_random_slopes(LinkedPReLU(3, layout=layout))
    jacobian = jax.jacobian(module)(jnp.full(3, zero))
    members = [jnp.eye(3), -jnp.diag(module.mirrored.negative_slope[...])]
    close(jacobian, laid_out(members, layout).T, 1e-6)


def test_jacobian_of_plain_prelu_at_zero_is_its_slope():
    module = with_random_slopes(ChannelPReLU(3))
    close(jax.jacobian(module)(jnp.zeros(3)), jnp.diag(module.negative_slope[...]), 1e-6)


@pytest.mark.parametrize("dtype", first_fast([jnp.float16, jnp.bfloat16, jnp.float32]))
def test_zeros_do_not_push_a_slope(dtype):
    zeros = jnp.zeros((10_000, 1), dtype)
    slopes = nnx.grad(lambda module: module(zeros).astype(jnp.float32).sum())(LinkedPReLU(1))
    assert max(float(jnp.abs(slope).max()) for slope in jax.tree.leaves(slopes)) < 2e-3


@pytest.mark.slow
@over_modules
def test_prelu_at_the_start_is_its_link(make):
    module = make(3, negative_slope=0.1)
    assert module.link.arity == module.arity == make.arity
    z = white(5, 3).at[0].set(0)
    np.testing.assert_array_equal(module(z), module.link(z))
    np.testing.assert_array_equal(jax.jacobian(module)(z), jax.jacobian(module.link)(z))


@pytest.mark.slow
def test_linked_prelu_with_zero_slopes_starts_as_lk_relu():
    z = white(5, 3).at[0].set(0)
    module = LinkedPReLU(3, negative_slope=0.0)
    np.testing.assert_array_equal(module(z), lk_relu(z))
    np.testing.assert_array_equal(jax.jacobian(module)(z), jax.jacobian(lk_relu)(z))


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("slope", first_fast([0.0, 0.25, 0.9]))
def test_layer_after_linked_prelu_starts_linear_and_isometric(slope, layout):
    link = LinkedPReLU(4, negative_slope=slope, layout=layout)
    layer = LinkedConv(4, 4, (3, 3), link=link, rngs=nnx.Rngs(0))
    z = white(3, 4, 4, 4)
    z = z.at[2].set(z[0] + z[1])
    y = layer(z)
    close(y[2], y[0] + y[1], 1e-5)
    close((y**2).sum(-1), (z**2).sum(-1), 1e-5)


# --- bad inputs ---------------------------------------------------------------------------------------------------


@over_modules
@pytest.mark.parametrize("features", first_fast([0, -1]))
@pytest.mark.parametrize("share", first_fast(["layer", "channel"]))
def test_prelu_without_features_is_refused(make, features, share):
    with pytest.raises(ValueError, match="features is at least 1"):
        make(features, share=share)


@over_modules
@pytest.mark.parametrize("features", first_fast(map(pytest.param, [(), (4, 0), (0,)])))
def test_prelu_of_an_empty_element_shape_is_refused(make, features):
    with pytest.raises(ValueError, match="features is at least 1"):
        make(features, share="element")


@over_modules
def test_slopes_per_channel_take_no_shape(make):
    with pytest.raises(ValueError, match="number of channels"):
        make((4, 4, 3), share="channel")


@over_modules
def test_unknown_share_is_refused(unchecked, make):
    with pytest.raises(ValueError, match="'pixel'"):
        make(3, share="pixel")


def test_unknown_layout_is_refused(unchecked):
    with pytest.raises(ValueError, match="'sideways'"):
        LinkedPReLU(3, layout="sideways")
