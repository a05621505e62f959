import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.activations import ACTIVATIONS, elu, lk_elu, lk_relu, lk_selu, lk_sigmoid, lk_softplus, lk_tanh, relu
from linked_jax.initializers import (
    default_kernel_init,
    embed_plain_kernel,
    gain,
    looks_linear,
    read_out,
    variance_preserving,
)
from linked_jax.learned import LinkedPReLU
from linked_jax.linking import Link, fourier, linked, min_max
from linked_jax.measurements import evaluate, weights_of_z
from tests.arrays import white
from tests.cases import first_fast

LINKS = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link) and name != "crelu"}
READ_OUTS = {
    "lk_relu": (1, -1),
    "lk_swish": (1, -1),
    "lk_gelu": (1, -1),
    "lk_softplus": (1, -1),
    "lk_leaky_relu": (1 / 1.01, -1 / 1.01),
    "min_max": (1, 1),
}
LINEAR = {name: LINKS[name] for name in READ_OUTS}
over_links = pytest.mark.parametrize("link", first_fast(LINKS.values()), ids=LINKS)
over_linear_links = pytest.mark.parametrize("link", first_fast(LINEAR.values()), ids=LINEAR)
layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))
KEY, OTHER_KEY = jax.random.split(jax.random.key(0))
QUICK_KEY = jax.random.key(0, impl="rbg")  # half the compile time, which is most of the time where each shape is new


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def leaky(slope):
    return functools.partial(jax.nn.leaky_relu, negative_slope=slope)


def laid_out(link, layout):
    return Link(link.members, layout=layout)


def conv(h, kernel, strides=1, padding="SAME"):
    """h (N, *space, C) * kernel (*window, C, C_out), written with JAX's own convolution."""
    space = kernel.ndim - 2
    letters = "DHW"[3 - space :]
    steps = (strides,) * space if isinstance(strides, int) else strides
    return jax.lax.conv_general_dilated(
        h, kernel, steps, padding, dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C")
    )


def member_kernels(kernel, link):
    """(d, *window, C_in, C_out): the part of a linked kernel that each member meets."""
    *window, linked_in, c_out = kernel.shape
    if link.layout == "blocked":
        return jnp.moveaxis(kernel.reshape(*window, link.arity, linked_in // link.arity, c_out), -3, 0)
    return jnp.moveaxis(kernel.reshape(*window, linked_in // link.arity, link.arity, c_out), -2, 0)


def close(actual, desired, tolerance=2e-5):
    np.testing.assert_allclose(actual, desired, atol=tolerance * float(jnp.abs(desired).max()), rtol=0)


def mean_square_of(x):
    return float(jnp.mean(jnp.square(x)))


# --- gain ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "link", first_fast([relu, lk_relu, Link((jax.nn.relu,) * 3)]), ids=["relu", "lk_relu", "three"]
)
def test_gain_of_relu_is_the_root_of_two_linked_or_not(link):
    assert gain(link) == pytest.approx(math.sqrt(2), rel=1e-12)


@over_links
def test_gain_normalises_the_sampled_mean_square(link):
    h = np.stack([evaluate(g, np.random.default_rng(1).normal(size=50_000)) for g in link.members])
    assert gain(link) ** 2 * np.mean(h**2) == pytest.approx(1, abs=0.03)


def test_gain_of_fourier_is_exact():
    assert gain(fourier) == pytest.approx(math.sqrt(2), rel=1e-12)  # sin^2 + cos^2 = 1


def test_gain_of_a_zero_link_is_refused():
    with pytest.raises(ValueError, match="no gain"):
        gain(Link((jnp.zeros_like,)))


def test_gain_of_an_exploding_link_is_refused():
    with pytest.raises(ValueError, match="finite"):
        gain(Link((lambda z: jnp.exp(z**4),)))


# --- variance_preserving ------------------------------------------------------------------------------------------


@pytest.mark.slow
@over_links
def test_variance_preserving_dense_keeps_the_forward_mean_square(link):
    # As many outputs as inputs: the kernel loses no direction, so one draw of it is enough.
    kernel = variance_preserving(link)(KEY, (link.arity * 32, link.arity * 32))
    links = [laid_out(link, layout) for layout in ("blocked", "interleaved")]
    mean_squares = jax.jit(lambda z: [jnp.square(f(z) @ kernel).mean() for f in links])
    assert mean_squares(white(2048, 32)) == pytest.approx([1, 1], abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("link", first_fast([relu, lk_relu, laid_out(min_max, "interleaved")]), ids=str)
def test_variance_preserving_conv_keeps_the_forward_mean_square_on_average(link):
    @jax.jit
    def mean_square(z, keys):
        kernels = jax.vmap(lambda key: variance_preserving(link)(key, (3, 3, link.arity * 8, 4)))(keys)
        wide = jnp.moveaxis(kernels, 0, -1).reshape(*kernels.shape[1:4], -1)
        return jnp.square(conv(link(z), wide, padding="VALID")).mean()

    assert mean_square(white(16, 6, 6, 8), jax.random.split(KEY, 200)) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("link", first_fast([relu, lk_relu, lk_elu]), ids=["relu", "lk_relu", "lk_elu"])
def test_variance_preserving_kernel_is_orthogonal_times_the_gain(link):
    kernel = variance_preserving(link)(KEY, (3, link.arity * 4, 6)).reshape(-1, 6)
    close(kernel.T @ kernel, gain(link) ** 2 * jnp.eye(6))


# --- read_out -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_read_out_exists_for_exactly_these_named_links():
    def has_one(link):
        try:
            return bool(read_out(link))
        except ValueError:
            return False

    assert {name for name, link in LINKS.items() if has_one(link)} == set(READ_OUTS)


@pytest.mark.parametrize("name", first_fast(READ_OUTS))
def test_read_out_is_the_known_one(name):
    assert read_out(LINKS[name]) == pytest.approx(READ_OUTS[name], abs=1e-9)


@pytest.mark.parametrize("factor", first_fast([1e13, 3e6, 1e-9]))
def test_read_out_of_a_large_or_small_link_is_exact(factor):
    found = read_out(linked(lambda z: factor * jax.nn.relu(z)))
    assert found == pytest.approx((1 / factor, -1 / factor), rel=1e-11)


@over_linear_links
def test_read_out_sums_to_z_in_float64(link):
    z = np.random.default_rng(2).normal(scale=50, size=1000)
    total = sum(a * evaluate(g, z) for a, g in zip(read_out(link), link.members, strict=True))
    np.testing.assert_allclose(total, z, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("slope", first_fast([-0.5, 0.0, 0.01, 0.25, 0.9, 3.0]))
def test_read_out_of_leaky_relu_divides_by_one_plus_slope(slope):
    assert read_out(linked(leaky(slope))) == pytest.approx((1 / (1 + slope), -1 / (1 + slope)), abs=1e-9)


@pytest.mark.parametrize(
    ("link", "coefficients"),
    first_fast(
        [
            (Link((lambda z: z,)), (1,)),
            (Link((lambda z: -4 * z,)), (-0.25,)),
            (linked(lambda z: z), (0.5, -0.5)),  # of all that sum to z, the smallest
            (linked(jax.nn.relu, lambda z: jnp.minimum(z, 0), jnp.sin), (1, 1, 0)),
            (linked(functools.partial(jax.nn.gelu, approximate=False)), (1, -1)),
            (linked(lambda z: (z + jnp.sqrt(z * z + 4)) / 2), (1, -1)),
        ]
    ),
    ids=["identity", "scaled", "mirrored_identity", "three_members", "erf_gelu", "squareplus"],
)
def test_read_out_of_links_made_by_hand(link, coefficients):
    assert read_out(link) == pytest.approx(coefficients, abs=1e-6)


@pytest.mark.parametrize(
    "link",
    first_fast(
        [
            linked(jax.nn.relu6),
            lk_elu,
            lk_selu,
            lk_tanh,
            lk_sigmoid,
            fourier,
            relu,
            linked(jax.nn.mish),
            linked(jnp.abs),
        ]
    ),
    ids=["relu6", "lk_elu", "lk_selu", "lk_tanh", "lk_sigmoid", "fourier", "relu", "lk_mish", "abs"],
)
def test_link_without_read_out_is_refused_with_the_measured_deviation(link):
    with pytest.raises(ValueError, match="variance_preserving") as error:
        looks_linear(link)
    deviation = float(re.search(r"miss z by (\S+)", str(error.value))[1])
    assert 1e-6 < deviation < 10


def test_measured_deviation_of_plain_relu_is_one():
    with pytest.raises(ValueError, match=r"miss z by 1 "):  # exact above 0, and nothing of z below
        read_out(relu)


def test_read_out_of_a_non_finite_link_is_refused():
    with pytest.raises(ValueError, match="miss z by inf"):
        read_out(linked(jnp.log))


# --- looks_linear: linear -----------------------------------------------------------------------------------------


@pytest.mark.slow
@layouts
@over_linear_links
def test_dense_layer_is_linear_and_its_half_orthogonal(link, layout):
    link = laid_out(link, layout)
    kernel = looks_linear(link)(KEY, (16, 8))
    z = white(8, 8)
    half = member_kernels(kernel, link)[0] / read_out(link)[0]
    close(half.T @ half, jnp.eye(8), 1e-5)
    close(link(z) @ kernel, z @ half)


@pytest.mark.slow
@layouts
@over_linear_links
def test_conv_layer_is_a_pointwise_rotation(link, layout):
    link = laid_out(link, layout)
    kernel = looks_linear(link)(KEY, (3, 3, 8, 4))
    z = white(3, 4, 4, 4)
    half = member_kernels(kernel, link)[0] / read_out(link)[0]
    assert (jnp.abs(half).sum((-2, -1)) > 0).tolist() == [[False] * 3, [False, True, False], [False] * 3]
    close(half[1, 1].T @ half[1, 1], jnp.eye(4), 1e-5)
    close(conv(link(z), kernel), z @ half[1, 1])


@pytest.mark.slow
@layouts
@over_linear_links
def test_every_member_meets_the_same_half_times_its_coefficient(link, layout):
    link = laid_out(link, layout)
    parts = member_kernels(looks_linear(link)(KEY, (3, 3, 8, 4)), link)
    for part, a in zip(parts, read_out(link), strict=True):
        close(part / a, parts[0] / read_out(link)[0], 1e-6)


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("strides", first_fast([1, 2]))
@pytest.mark.parametrize("link", first_fast([lk_relu, min_max]), ids=["lk_relu", "min_max"])
def test_layer_is_additive(link, strides, layout):
    link = laid_out(link, layout)
    z = white(3, 4, 4, 4)
    z = z.at[2].set(z[0] + z[1])
    y = conv(link(z), looks_linear(link, strides=strides)(KEY, (3, 3, 8, 4)), strides)
    close(y[2], y[0] + y[1], 5e-3)


@pytest.mark.parametrize(("space", "size"), first_fast([(1, 1), (1, 5), (2, 1), (2, 2), (2, 3), (3, 1), (3, 3)]))
def test_square_layer_is_isometric_in_any_number_of_axes(space, size):
    z = white(2, *(6,) * space, 4)
    kernel = looks_linear(lk_relu)(KEY, (size,) * space + (8, 4))
    y = jax.jit(lambda z: conv(lk_relu(z), kernel))(z)
    assert y.shape == z.shape
    close(jnp.square(y).sum(-1), jnp.square(z).sum(-1))  # at every pixel


# --- looks_linear: not square -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("c_in", "c_out"), first_fast([(8, 16), (8, 12), (16, 8), (8, 8)]))
def test_changing_width_keeps_forward_signals_and_scales_gradients(c_in, c_out):
    kernel = looks_linear(lk_relu)(QUICK_KEY, (2 * c_in, c_out))

    @jax.jit
    def forward_and_back(z, g):
        y, pull = jax.vjp(lambda z: lk_relu(z) @ kernel, z)
        return y, pull(g)[0]

    z, g = white(4096, c_in), white(4096, c_out, seed=1)
    y, back = forward_and_back(z, g)
    assert mean_square_of(y) / mean_square_of(z) == pytest.approx(1, abs=0.06)
    assert mean_square_of(back) / mean_square_of(g) == pytest.approx(c_out / c_in, rel=0.06)


@pytest.mark.slow
def test_widening_keeps_the_norm_of_every_input_exactly():
    kernel = looks_linear(lk_relu)(QUICK_KEY, (16, 20))
    z = white(8, 8)
    close(jnp.square(lk_relu(z) @ kernel).mean(-1), jnp.square(z).mean(-1))


STRIDES = {
    "2x2": ((2, 2), 2),
    "3x3": ((3, 3), 2),
    "4x4": ((4, 4), 2),
    "5x5": ((5, 5), 2),
    "7x7": ((7, 7), 2),
    "2x5_by_2": ((2, 5), 2),
    "3x3_by_3": ((3, 3), 3),
    "5x5_by_3": ((5, 5), 3),
    "3x3_by_1_2": ((3, 3), (1, 2)),
    "1d": ((3,), 2),
    "1d_even": ((4,), 3),
    "3d": ((3, 3, 3), 2),
}
over_strides = pytest.mark.parametrize("case", first_fast(map(pytest.param, STRIDES.values())), ids=STRIDES)


@pytest.mark.slow
@over_strides
def test_strided_layer_with_room_for_all_pixels_keeps_the_norm_exactly(case):
    window, strides = case
    link = laid_out(lk_relu, "interleaved")
    steps = (strides,) * len(window) if isinstance(strides, int) else strides
    c_out = 2 * math.prod(steps)

    kernel = looks_linear(link, strides=strides)(QUICK_KEY, (*window, 4, c_out))
    run = jax.jit(lambda images: [conv(link(z), kernel, strides) for z in images])
    images = [white(2, *(side,) * len(window), 2) for side in (6, 7)]
    for z, y in zip(images, run(images), strict=True):
        assert y.shape == (2, *(-(-z.shape[1] // step) for step in steps), c_out)
        np.testing.assert_allclose(*(np.square(x).sum(tuple(range(1, x.ndim))) for x in (y, z)), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", first_fast([2, 3, 4, 5, 7]))
def test_strided_layer_gives_every_pixel_a_gradient(window):
    kernel = looks_linear(lk_relu, strides=2)(KEY, (window, window, 8, 4))
    gradient = jax.jit(jax.grad(lambda z: (conv(lk_relu(z), kernel, 2) ** 2).sum()))(white(1, 6, 6, 4))
    assert (jnp.abs(gradient).max(-1) > 1e-3).all()


@pytest.mark.slow
def test_delta_kernel_at_stride_two_would_drop_three_quarters_of_the_pixels():
    kernel = looks_linear(lk_relu)(KEY, (3, 3, 8, 4))
    gradient = jax.jit(jax.grad(lambda z: (conv(lk_relu(z), kernel, 2) ** 2).sum()))(white(1, 8, 8, 4))
    assert (jnp.abs(gradient).max(-1) == 0).mean() == 0.75


@pytest.mark.slow
@pytest.mark.parametrize(("c_in", "c_out"), first_fast([(4, 4), (4, 32), (8, 4)]))
def test_strided_layer_keeps_forward_signals_of_white_inputs(c_in, c_out):
    kernel = looks_linear(lk_relu, strides=2)(QUICK_KEY, (3, 3, 2 * c_in, c_out))

    @jax.jit
    def forward_and_back(z, g):
        y, pull = jax.vjp(lambda z: conv(lk_relu(z), kernel, 2), z)
        return y, pull(g)[0]

    y, back = forward_and_back(white(64, 8, 8, c_in), white(64, 4, 4, c_out, seed=1))
    assert mean_square_of(y) == pytest.approx(1, abs=0.06)
    assert mean_square_of(back) == pytest.approx(c_out / (c_in * 4), rel=0.06)


# --- grouped, depthwise, dilated and transposed: the table at the top of initializers.py ---------------------------

GEOMETRY = {  # c_in, c_out, window, stride, groups, dilation
    "grouped": (8, 16, 3, 1, 4, 1),
    "plain": (8, 8, 3, 1, 1, 1),
    "strided": (4, 16, 3, 2, 1, 1),
    "depthwise": (8, 8, 3, 1, 8, 1),
    "depthwise_multiplied": (8, 24, 3, 1, 8, 1),
    "depthwise_strided": (8, 16, 3, 2, 8, 1),
    "dilated": (8, 8, 3, 1, 1, 2),
    "dilated_strided": (8, 8, 3, 2, 1, 3),
    "all": (8, 16, 3, 2, 2, 2),
}
TRANSPOSED = {  # c_in, c_out, window, stride, groups
    "window_4_by_2": (8, 4, 4, 2, 1),
    "window_2_by_2": (8, 4, 2, 2, 1),
    "window_3_by_2": (4, 8, 3, 2, 1),
    "window_5_by_3": (4, 4, 5, 3, 1),
    "window_3_by_1": (4, 4, 3, 1, 1),
    "groups": (8, 4, 4, 2, 4),
}
STARTS = {
    "looks_linear": (looks_linear, laid_out(lk_relu, "interleaved")),
    "variance_preserving": (variance_preserving, laid_out(lk_elu, "interleaved")),
}
over_starts = pytest.mark.parametrize(("start", "link"), first_fast(STARTS.values()), ids=STARTS)
IMAGES = ("NHWC", "HWIO", "NHWC")


def conv_of_all_kinds(h, kernel, stride, groups, dilation):
    """In two axes, on images that go on beyond their borders, so that no border changes a mean square."""
    reach = dilation * (kernel.shape[0] - 1)
    h = jnp.pad(h, ((0, 0), (reach // 2, reach - reach // 2), (reach // 2, reach - reach // 2), (0, 0)), mode="wrap")
    return jax.lax.conv_general_dilated(
        h, kernel, (stride, stride), "VALID", rhs_dilation=(dilation, dilation), dimension_numbers=IMAGES,
        feature_group_count=groups,
    )  # fmt: skip


def transposed(h, kernel, stride, groups=1):
    parts = zip(jnp.split(h, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    outputs = [jax.lax.conv_transpose(x, k, (stride, stride), "SAME", dimension_numbers=IMAGES) for x, k in parts]
    return jnp.concatenate(outputs, -1)


def transposed_without_borders(h, kernel, stride, groups):
    border = kernel.shape[0]
    y = transposed(jnp.pad(h, ((0, 0), (border,) * 2, (border,) * 2, (0, 0)), mode="wrap"), kernel, stride, groups)
    return y[:, border * stride : -border * stride, border * stride : -border * stride]


def mean_squares(layer, init, shape, link, z):
    """Forward and backward, over four kernels."""

    @jax.jit
    def forward_and_back(key):
        y, pull = jax.vjp(lambda z: layer(link(z), init(key, shape)), z)
        return jnp.square(y).mean(), jnp.square(pull(jax.random.normal(key, y.shape))[0]).mean()

    return np.mean([forward_and_back(key) for key in jax.random.split(QUICK_KEY, 4)], axis=0)


@pytest.mark.slow
@over_starts
@pytest.mark.parametrize("geometry", first_fast(map(pytest.param, GEOMETRY.values())), ids=GEOMETRY)
def test_every_convolution_keeps_forward_signals_and_scales_gradients_as_the_table_says(start, link, geometry):
    c_in, c_out, window, stride, groups, dilation = geometry
    init = start(link, strides=stride, feature_group_count=groups)
    layer = functools.partial(conv_of_all_kinds, stride=stride, groups=groups, dilation=dilation)
    found = mean_squares(layer, init, (window, window, 2 * c_in // groups, c_out), link, white(16, 12, 12, c_in))
    assert found == pytest.approx([1, c_out / (c_in * stride**2)], rel=0.08)


@over_starts
@pytest.mark.parametrize("geometry", first_fast(map(pytest.param, TRANSPOSED.values())), ids=TRANSPOSED)
def test_every_transposed_convolution_does_what_the_table_says(start, link, geometry):
    c_in, c_out, window, stride, groups = geometry
    init = start(link, strides=stride, feature_group_count=groups, transpose=True)
    layer = functools.partial(transposed_without_borders, stride=stride, groups=groups)
    found = mean_squares(layer, init, (window, window, 2 * c_in // groups, c_out), link, white(16, 8, 8, c_in))
    assert found == pytest.approx([1, c_out * stride**2 / c_in], rel=0.08)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "stride"), first_fast([(4, 2), (2, 2), (3, 2), (5, 3), (3, 1), (7, 2)]))
def test_a_transposed_layer_is_an_isometry_up_to_its_scale_borders_included(window, stride):
    kernel = looks_linear(lk_relu, strides=stride, transpose=True)(QUICK_KEY, (window, window, 8, 4))
    z = white(3, 5, 6, 4)
    z = z.at[2].set(z[0] + z[1])
    y = jax.jit(lambda z: transposed(lk_relu(z), kernel, stride))(z)
    assert y.shape == (3, 5 * stride, 6 * stride, 4)
    np.testing.assert_allclose(jnp.square(y).sum((1, 2, 3)), stride**2 * jnp.square(z).sum((1, 2, 3)), rtol=2e-5)
    close(y[2], y[0] + y[1], 1e-5)


@pytest.mark.slow
def test_each_group_has_its_own_orthogonal_kernel():
    link = laid_out(lk_relu, "interleaved")
    kernel = looks_linear(link, feature_group_count=2)(KEY, (1, 8, 8))[0]
    for half in (kernel[::2, :4], kernel[::2, 4:]):
        close(half.T @ half, jnp.eye(4), 1e-5)
    assert (jnp.abs(kernel[:, :4] - kernel[:, 4:]) > 1e-3).any()


@pytest.mark.parametrize("start", first_fast([looks_linear, variance_preserving, default_kernel_init]))
def test_groups_that_split_a_unit_or_the_outputs_are_refused(start):
    with pytest.raises(ValueError, match=r"2 groups split a unit's members in the blocked layout.*'interleaved'"):
        start(lk_relu, feature_group_count=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        start(lk_relu, feature_group_count=0)
    link = Link(lk_softplus.members, layout="interleaved")
    with pytest.raises(ValueError, match=re.escape("3 groups divide the outputs of a kernel, got (3, 4, 8)")):
        start(link, feature_group_count=3)(KEY, (3, 4, 8))


# --- looks_linear: a thousand layers ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "space"), first_fast([((32,), (64, 32)), ((8, 8, 4), (3, 3, 8, 4))]), ids=["dense_32", "conv_8x8x4"]
)
@over_linear_links
def test_a_thousand_layers_keep_signals_and_gradients_and_stay_linear(link, shape, space):
    kernels = jax.vmap(lambda key: looks_linear(link)(key, space))(jax.random.split(KEY, 1000))
    layer = jnp.matmul if len(shape) == 1 else conv

    @jax.jit
    def run(z, g):
        y, pull = jax.vjp(lambda z: jax.lax.scan(lambda z, k: (layer(link(z), k), None), z, kernels)[0], z)
        return y, pull(g)[0]

    z, g = white(3, *shape), white(3, *shape, seed=1)
    z = z.at[2].set(z[0] + z[1])
    y, back = run(z, g)
    assert mean_square_of(y) / mean_square_of(z) == pytest.approx(1, abs=1e-4)
    assert mean_square_of(back) / mean_square_of(g) == pytest.approx(1, abs=1e-4)
    close(y[2], y[0] + y[1], 5e-3)


# --- default_kernel_init ------------------------------------------------------------------------------------------


@over_links
def test_default_is_looks_linear_where_there_is_a_read_out_and_else_variance_preserving(link):
    shape = (3, 3, link.arity * 4, 4)
    name = next(name for name, other in LINKS.items() if other is link)
    expected = looks_linear(link, strides=2) if name in READ_OUTS else variance_preserving(link)
    np.testing.assert_array_equal(default_kernel_init(link, strides=2)(KEY, shape), expected(KEY, shape))


# --- what every init obeys ----------------------------------------------------------------------------------------

INITS = {
    "looks_linear": lambda: looks_linear(lk_relu),
    "strided": lambda: looks_linear(lk_softplus, strides=2),
    "interleaved": lambda: looks_linear(laid_out(min_max, "interleaved")),
    "variance_preserving": lambda: variance_preserving(lk_elu),
    "default": lambda: default_kernel_init(fourier),
    "transposed": lambda: looks_linear(lk_relu, strides=2, transpose=True),
    "grouped": lambda: looks_linear(laid_out(lk_relu, "interleaved"), feature_group_count=1),
}
over_inits = pytest.mark.parametrize("init", first_fast(INITS), indirect=True)


@pytest.fixture
def init(request):
    return INITS[request.param]()


@over_inits
def test_same_key_same_kernel_and_another_key_another(init):
    kernel = init(KEY, (3, 3, 8, 4))
    np.testing.assert_array_equal(kernel, init(KEY, (3, 3, 8, 4)))
    assert (kernel != init(OTHER_KEY, (3, 3, 8, 4))).any()


@pytest.mark.slow
@over_inits
def test_init_under_jit_and_vmap_is_init_outside(init):
    keys = jnp.stack([KEY, OTHER_KEY])
    one_by_one = jnp.stack([init(key, (3, 3, 8, 4)) for key in keys])
    close(jax.jit(jax.vmap(lambda key: init(key, (3, 3, 8, 4))))(keys), one_by_one, 1e-5)
    close(jax.jit(init, static_argnums=1)(KEY, (3, 3, 8, 4)), one_by_one[0], 1e-5)


@pytest.mark.parametrize("link", first_fast([lk_relu, lk_elu, fourier]), ids=["lk_relu", "lk_elu", "fourier"])
def test_init_may_be_built_inside_jit(link):
    weights_of_z.cache_clear()
    shape = (2 * 4, 4)
    inside = jax.jit(lambda key: default_kernel_init(link)(key, shape))(KEY)
    close(inside, default_kernel_init(link)(KEY, shape), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", first_fast([jnp.bfloat16, jnp.float16]))
@over_inits
def test_init_in_half_precision_is_orthogonal_to_its_rounding(init, dtype):
    kernel = init(KEY, (1, 1, 8, 4), dtype)
    assert kernel.dtype == dtype
    half = kernel[0, 0].astype(jnp.float32)
    close(half.T @ half, (half.T @ half)[0, 0] * jnp.eye(4), 0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), first_fast([(jnp.float32, 1e-5), (jnp.float64, 1e-12)]))
@over_inits
def test_init_obeys_its_dtype_and_is_orthogonal_to_its_rounding(init, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        kernel = init(KEY, (1, 1, 8, 4), dtype)
        assert kernel.dtype == dtype
        gram = np.asarray(kernel[0, 0].T @ kernel[0, 0])
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(4), atol=tolerance)


@pytest.mark.parametrize("shape", first_fast(map(pytest.param, [(3, 3, 7, 4), (7, 4), (4,), ()])))
@over_inits
def test_shape_that_does_not_fit_the_link_is_refused(init, shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
        init(KEY, shape)


@pytest.mark.parametrize("strides", first_fast(map(pytest.param, [(2,), (2, 2, 2), ()])))
def test_strides_of_the_wrong_length_are_refused(strides):
    with pytest.raises(ValueError, match="one per spatial axis"):
        looks_linear(lk_relu, strides=strides)(KEY, (3, 3, 8, 4))


# --- embed_plain_kernel -------------------------------------------------------------------------------------------


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("member", first_fast([0, 1]))
@pytest.mark.parametrize("link", first_fast([lk_relu, lk_selu, fourier]), ids=["lk_relu", "lk_selu", "fourier"])
def test_embedded_kernel_computes_what_the_plain_layer_did(link, member, layout):
    link = laid_out(link, layout)
    g = link.members[member]
    dense, window = white(4, 5, seed=1), white(3, 3, 4, 5, seed=2)
    z = white(2, 6, 6, 4)
    close(link(z) @ embed_plain_kernel(dense, link, member=member), g(z) @ dense, 1e-6)
    close(conv(link(z), embed_plain_kernel(window, link, member=member), 2), conv(g(z), window, 2), 1e-6)


@layouts
def test_embedding_in_a_plain_link_changes_nothing(layout):
    kernel = white(3, 4, 5)
    np.testing.assert_array_equal(embed_plain_kernel(kernel, laid_out(elu, layout)), kernel)


def test_embedding_keeps_the_dtype():
    assert embed_plain_kernel(jnp.ones((2, 2), jnp.bfloat16), lk_relu).dtype == jnp.bfloat16


@pytest.mark.parametrize("member", first_fast([-1, 2]))
def test_embedding_refuses_a_member_that_the_link_has_not(member):
    with pytest.raises(ValueError, match=f"member={member}"):
        embed_plain_kernel(jnp.ones((2, 2)), lk_relu, member=member)


def test_embedding_refuses_a_kernel_without_channels(unchecked):
    with pytest.raises(ValueError, match="got \\(3,\\)"):
        embed_plain_kernel(jnp.ones(3), lk_relu)


# --- what is no link ----------------------------------------------------------------------------------------------

GIVEN_A_LINK = {
    "gain": gain,
    "read_out": read_out,
    "variance_preserving": variance_preserving,
    "looks_linear": looks_linear,
    "default_kernel_init": default_kernel_init,
    "embed_plain_kernel": lambda link: embed_plain_kernel(jnp.ones((2, 2)), link),
}
over_given = pytest.mark.parametrize("call", GIVEN_A_LINK.values(), ids=GIVEN_A_LINK)


@over_given
@pytest.mark.parametrize("wrong", [jax.nn.relu, jnp.tanh, LinkedPReLU, nnx.PReLU(), "lk_relu", None])
def test_a_function_where_a_link_is_due_is_refused(unchecked, call, wrong):
    with pytest.raises(
        TypeError, match=r"pass a Link, e.g. linked\(jax.nn.relu\) or Link\(\(jax.nn.relu,\)\)"
    ) as raised:
        call(wrong)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.slow
@over_given
def test_a_module_is_taken_for_the_link_that_it_starts_as(unchecked, call):
    module = LinkedPReLU(2, negative_slope=0.5, layout="interleaved")
    found, wanted = call(module), call(module.link)
    if callable(found):
        found, wanted = found(KEY, (4, 3)), wanted(KEY, (4, 3))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("make", [looks_linear, variance_preserving])
@pytest.mark.parametrize(
    ("strides", "error"), [(0, ValueError), ((2, 0), ValueError), (None, TypeError), (1.5, TypeError)]
)
def test_strides_are_whole_and_positive(unchecked, make, strides, error):
    with pytest.raises(error, match="strides"):
        make(lk_relu, strides=strides)


def test_a_padding_has_a_known_name():
    with pytest.raises(ValueError, match=r"padding is one of SAME, .*, or numbers, got 'SAM'"):
        looks_linear(lk_relu, padding="SAM")
