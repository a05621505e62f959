import functools
import inspect
import itertools
import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

import linked_jax.linen
from linked_jax.activations import ACTIVATIONS, lk_relu, lk_swish, relu
from linked_jax.convolution import conv_general_dilated
from linked_jax.initializers import variance_preserving
from linked_jax.layers import (
    ConvOptions,
    ConvTransposeOptions,
    LinearOptions,
    LinkedConv,
    LinkedConvTranspose,
    LinkedLinear,
)
from linked_jax.learned import ChannelPReLU, LinkedPReLU
from linked_jax.linking import Link, fourier, linked, min_max
from tests.arrays import close, laid_out, white
from tests.cases import first_fast

pytestmark = pytest.mark.optimised

LINKS = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link) and name != "crelu"}
FEW = {"relu": relu, "lk_relu": lk_relu, "lk_swish": lk_swish, "fourier": fourier}
over_links = pytest.mark.parametrize("link", first_fast(LINKS.values()), ids=LINKS)
over_few_links = pytest.mark.parametrize("link", first_fast(FEW.values()), ids=FEW)
layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))
precisions = pytest.mark.parametrize(("dtype", "tolerance"), first_fast([(jnp.float32, 1e-6), (jnp.float64, 1e-12)]))
LAYERS = {
    "linear": (functools.partial(LinkedLinear, 3, 5), (2, 3)),
    "conv": (functools.partial(LinkedConv, 3, 5, (3, 3)), (2, 6, 6, 3)),
    "conv_transpose": (functools.partial(LinkedConvTranspose, 3, 5, (3, 3)), (2, 6, 6, 3)),
}
over_layers = pytest.mark.parametrize(("make", "shape"), first_fast(LAYERS.values()), ids=LAYERS)


def plain_layer(layer):
    return layer.linear if isinstance(layer, LinkedLinear) else layer.conv


def naive(plain, link):
    return lambda z: plain(laid_out([g(z) for g in link.members], link.layout))


def gradients(model, z, forward=lambda model, z: model(z)):
    """The outputs, and the gradients of their mean square for the parameters and for z."""
    graph, state = nnx.split(model)

    def loss(state, z):
        out = forward(nnx.merge(graph, state), z)
        return (out**2).mean(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, z)
    return out, *grads


# --- the layer is Flax' own on the link ---------------------------------------------------------------------------


@pytest.mark.slow
@over_links
def test_linear_equals_flax_on_the_concatenated_link(link):
    layer = LinkedLinear(3, 5, link=link, rngs=nnx.Rngs(0))
    plain = nnx.Linear(link.arity * 3, 5, rngs=nnx.Rngs(1))
    nnx.update(plain, nnx.state(layer.linear))
    pulled = jax.jit(lambda z, g: [(y, *pull(g)) for y, pull in (jax.vjp(f, z) for f in (layer, naive(plain, link)))])
    close(*pulled(white(2, 3), white(2, 5, seed=1)), 1e-6)


@pytest.mark.slow
@layouts
@precisions
@over_layers
def test_values_and_gradients_equal_flax_in_both_layouts_and_precisions(make, shape, dtype, tolerance, layout):
    link = Link(lk_swish.members, layout=layout)
    with jax.enable_x64(dtype == jnp.float64):
        layer = make(link=link, param_dtype=dtype, rngs=nnx.Rngs(0))
        z = white(*shape, dtype=dtype)
        found = gradients(layer, z)
        wanted = gradients(plain_layer(layer), z, lambda plain, z: naive(plain, link)(z))
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
        close(jax.tree.leaves(found), jax.tree.leaves(wanted), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "padding", first_fast(map(pytest.param, ["SAME", "VALID", "CIRCULAR", ((1, 0), (2, 1))])), ids=str
)
@pytest.mark.parametrize(("kernel_size", "strides"), first_fast([((3, 2), (1, 2)), ((3, 3), 1)]))
def test_conv_passes_its_geometry_to_flax(kernel_size, strides, padding):
    options = {"strides": strides, "padding": padding}
    layer = LinkedConv(3, 5, kernel_size, link=lk_relu, rngs=nnx.Rngs(0), **options)
    plain = nnx.Conv(6, 5, kernel_size, rngs=nnx.Rngs(1), **options)
    nnx.update(plain, nnx.state(layer.conv))
    z = white(2, 6, 7, 3)
    close(layer(z), naive(plain, lk_relu)(z), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("space", first_fast([1, 2, 3]))
def test_conv_takes_any_number_of_spatial_axes(space):
    layer = LinkedConv(2, 3, (3,) * space, strides=2, rngs=nnx.Rngs(0))
    assert layer.conv.kernel.shape == (3,) * space + (4, 3)
    assert layer(white(2, *(5,) * space, 2)).shape == (2, *(3,) * space, 3)


@pytest.mark.slow
def test_conv_with_an_integer_kernel_size_has_one_spatial_axis():
    assert LinkedConv(2, 3, 3, rngs=nnx.Rngs(0))(white(2, 5, 2)).shape == (2, 5, 3)


@pytest.mark.parametrize("lead", first_fast(map(pytest.param, [(), (4,), (2, 3)])))
@over_few_links
def test_linear_takes_any_leading_axes(link, lead):
    layer = LinkedLinear(3, 5, link=link, rngs=nnx.Rngs(0))
    assert layer.linear.kernel.shape == (link.arity * 3, 5)
    assert layer(white(*lead, 3)).shape == (*lead, 5)


@over_layers
def test_bias_is_zero_at_the_start_or_absent(make, shape):
    assert not plain_layer(make(rngs=nnx.Rngs(0))).bias[...].any()
    assert plain_layer(make(use_bias=False, rngs=nnx.Rngs(0))).bias is None


@pytest.mark.slow
@over_layers
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(make, shape):
    layer = make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    z = white(*shape)
    assert layer(z).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(layer)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients(layer, z)[1:]))
    close(layer(z).astype(jnp.float32), make(rngs=nnx.Rngs(0))(z), 0.05)


@over_layers
def test_parameters_may_be_bfloat16(make, shape):
    layer = make(param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(nnx.state(layer)))


@over_layers
def test_given_kernel_init_is_used_for_the_whole_kernel(make, shape):
    layer = make(link=fourier, kernel_init=nnx.initializers.constant(2.0), rngs=nnx.Rngs(0))
    assert (plain_layer(layer).kernel[...] == 2).all()


MASK = jnp.asarray(np.random.default_rng(7).integers(0, 2, (3, 3, 6, 5)), jnp.float32)


def promote_to_float32(arrays, *, dtype=None, **_):
    return tuple(None if x is None else x.astype(jnp.float32) for x in arrays)


WEIGHT_OPTIONS = {
    "use_bias": False,
    "bias_init": nnx.initializers.constant(3.0),
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.bfloat16,
    "precision": "highest",
    "promote_dtype": promote_to_float32,
    "preferred_element_type": jnp.float32,
    "kernel_metadata": {"note": "kernel"},
    "bias_metadata": {"note": "bias"},
}
CONV_TRANSPOSE_OPTIONS = WEIGHT_OPTIONS | {"padding": ((1, 0), (2, 1)), "kernel_dilation": (1, 2), "mask": MASK}
CONV_OPTIONS = CONV_TRANSPOSE_OPTIONS | {
    "input_dilation": 2,
    "feature_group_count": 1,
    "conv_general_dilated": functools.partial(jax.lax.conv_general_dilated),
}
OPTIONS = {
    LinkedLinear: (nnx.Linear, (), WEIGHT_OPTIONS | {"dot_general": jax.lax.dot_general}),
    LinkedConv: (nnx.Conv, ((3, 3),), CONV_OPTIONS),
    LinkedConvTranspose: (nnx.ConvTranspose, ((3, 3),), CONV_TRANSPOSE_OPTIONS),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name"), [(make, name) for make, (*_, options) in OPTIONS.items() for name in options]
)
def test_every_option_of_flax_goes_through(make, name):
    flax_layer, size, given = OPTIONS[make]
    options = {name: given[name]} | ({"padding": [(2, 2)] * 2} if name == "input_dilation" else {})
    layer = make(3, 5, *size, link=lk_swish, rngs=nnx.Rngs(0), **options)
    plain = flax_layer(6, 5, *size, rngs=nnx.Rngs(1), **options)
    nnx.update(plain, nnx.state(plain_layer(layer)))
    z = white(2, 6, 6, 3)
    y = naive(plain, lk_swish)(z)
    assert layer(z).dtype == y.dtype
    close(layer(z).astype(jnp.float32), y.astype(jnp.float32), 0.02 if y.dtype == jnp.bfloat16 else 1e-5)
    if name == "bias_init":
        assert (plain.bias[...] == 3).all()
    if name.endswith("metadata"):
        assert getattr(plain_layer(layer), given[name]["note"]).note == given[name]["note"]


def test_our_options_are_those_of_flax():
    for typed, (flax_layer, _, options) in zip(
        (LinearOptions, ConvOptions, ConvTransposeOptions), OPTIONS.values(), strict=True
    ):
        assert (
            typed.__annotations__.keys() == options.keys() <= inspect.signature(flax_layer.__init__).parameters.keys()
        )


def test_an_option_that_flax_does_not_have_is_refused():
    for make, (_, size, _) in OPTIONS.items():
        with pytest.raises(TypeError, match="kernel_dilatation"):
            make(3, 5, *size, kernel_dilatation=2, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_grouped_layer_is_a_layer_for_each_group():
    link = Link(lk_swish.members, layout="interleaved")
    layer = LinkedConv(4, 6, (3, 3), link=link, feature_group_count=2, rngs=nnx.Rngs(0))
    z = white(2, 4, 4, 4)
    parts = []
    for group in range(2):
        one = LinkedConv(2, 3, (3, 3), link=link, rngs=nnx.Rngs(0))
        one.conv.kernel[...] = layer.conv.kernel[..., 3 * group : 3 * group + 3]
        parts.append(one(z[..., 2 * group : 2 * group + 2]))
    close(layer(z), jnp.concatenate(parts, -1), 1e-5)


GROUPABLE = {
    "relu": relu,
    "lk_relu": Link(lk_relu.members, layout="interleaved"),
    "lk_prelu": LinkedPReLU(4, layout="interleaved"),
}


@pytest.mark.slow
@pytest.mark.parametrize("link", first_fast(GROUPABLE.values()), ids=GROUPABLE)
def test_groups_fit_links_that_keep_a_unit_together(link):
    layer = LinkedConv(4, 4, (3, 3), link=link, feature_group_count=4, rngs=nnx.Rngs(0))
    assert layer.conv.kernel.shape == (3, 3, link.arity, 4)
    assert layer(white(1, 5, 5, 4)).shape == (1, 5, 5, 4)


def test_groups_that_do_not_fit_are_refused():
    zeros = nnx.initializers.zeros
    for link in (lk_relu, LinkedPReLU(4)):
        with pytest.raises(ValueError, match="2 groups split a unit's members in the blocked layout"):
            LinkedConv(4, 4, (3, 3), link=link, feature_group_count=2, kernel_init=zeros, rngs=nnx.Rngs(0))
    for c_in, c_out in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match=f"got 2 groups of {c_in} and {c_out}; change feature_group_count"):
            LinkedConv(c_in, c_out, (3, 3), link=relu, feature_group_count=2, rngs=nnx.Rngs(0))


def test_a_transposed_kernel_is_refused():
    with pytest.raises(ValueError, match="leave out transpose_kernel"):
        LinkedConvTranspose(4, 4, (3, 3), transpose_kernel=True, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("dilated", first_fast([False, True]))
def test_a_layer_that_enlarges_an_image_starts_as_an_isometry_up_to_its_scale(dilated):
    if dilated:  # the same as a convolution whose input has a zero after each pixel
        layer = LinkedConv(4, 4, (4, 4), input_dilation=2, padding=[(2, 2)] * 2, rngs=nnx.Rngs(0))
    else:
        layer = LinkedConvTranspose(4, 4, (4, 4), strides=2, rngs=nnx.Rngs(0))
    z = white(3, 4, 4, 4)
    z = z.at[2].set(z[0] + z[1])
    y = layer(z)
    assert y.shape == (3, 8, 8, 4)
    close(y[2], y[0] + y[1], 1e-5)
    np.testing.assert_allclose(jnp.square(y).sum((1, 2, 3)), 4 * jnp.square(z).sum((1, 2, 3)), rtol=1e-5)


PADDINGS = {
    "SAME": ((3, 3), "SAME"),
    "1": ((3, 3), 1),
    "(1, 1)": ((3, 3), (1, 1)),
    "pairs": ((3, 4), [(1, 0), (2, 0)]),
    "VALID": ((2, 2), "VALID"),
    "CIRCULAR": ((3, 3), "CIRCULAR"),
    "REFLECT": ((3, 3), "REFLECT"),
    "SAME_LOWER": ((3, 3), "SAME_LOWER"),
}


@pytest.mark.parametrize("name", first_fast(PADDINGS))
def test_a_layer_with_a_stride_starts_as_an_isometry_whatever_the_padding(name):
    window, padding = PADDINGS[name]
    options, z = {"strides": 2, "padding": padding}, white(3, 8, 8, 2)
    theirs = linked_jax.linen.LinkedConv(8, window, **options)
    theirs = theirs.apply(theirs.init(jax.random.key(0), z), z)
    for y in (LinkedConv(2, 8, window, **options, rngs=nnx.Rngs(0))(z), theirs):
        assert y.shape == (3, 4, 4, 8)
        np.testing.assert_allclose(jnp.square(y).sum((1, 2, 3)), jnp.square(z).sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("padding", first_fast(["CAUSAL", [(2, 0)], [(0, 2)], 1]), ids=str)
def test_a_layer_without_a_stride_starts_as_an_isometry_whatever_the_padding(padding):
    layer, z = LinkedConv(4, 4, (3,), padding=padding, rngs=nnx.Rngs(0)), white(3, 8, 4)
    np.testing.assert_allclose(jnp.square(layer(z)).sum((1, 2)), jnp.square(z).sum((1, 2)), rtol=1e-5)


DILATED = [
    (padding, window, dilation)
    for padding, window, dilation in itertools.product(
        ["numbers", "SAME", "SAME_LOWER", "CAUSAL"], (3, 2, 4), (2, 1, 3)
    )
    if dilation == 1 or window % 2 or not padding.startswith("SAME")  # else no tap lies on the pixel itself
]


@pytest.mark.parametrize(("padding", "window", "dilation"), first_fast(DILATED))
def test_a_layer_with_a_dilated_kernel_starts_as_an_isometry_whatever_the_padding(padding, window, dilation):
    low = (window - 1) // 2 * dilation
    pads = [(low, (window - 1) * dilation - low)] if padding == "numbers" else padding
    options, z = {"kernel_dilation": dilation, "padding": pads}, white(3, 12, 4)
    theirs = linked_jax.linen.LinkedConv(4, (window,), **options)
    theirs = theirs.apply(theirs.init(jax.random.key(0), z), z)
    for y in (LinkedConv(4, 4, (window,), **options, rngs=nnx.Rngs(0))(z), theirs):
        assert y.shape == z.shape
        np.testing.assert_allclose(jnp.square(y).sum((1, 2)), jnp.square(z).sum((1, 2)), rtol=1e-5)


def test_a_member_with_a_number_for_each_channel_needs_a_kernel_init():
    slopes = np.array([0.1, 0.2], np.float32)
    link = linked(lambda z: jnp.where(z > 0, z, slopes * z))
    with pytest.raises(ValueError, match=r"cannot be evaluated at any number of z .*kernel_init"):
        LinkedLinear(2, 3, link=link, rngs=nnx.Rngs(0))
    init = nnx.initializers.orthogonal()
    assert LinkedLinear(2, 3, link=link, kernel_init=init, rngs=nnx.Rngs(0))(white(5, 2)).shape == (5, 3)


def test_sizes_may_be_numpys(unchecked):
    sizes = {"strides": np.int64(2), "padding": np.int64(1)}
    assert LinkedConv(2, 4, np.int64(3), **sizes, rngs=nnx.Rngs(0))(white(1, 8, 2)).shape == (1, 4, 4)
    enlarged = LinkedConvTranspose(2, 4, np.int64(2), strides=np.int64(2), rngs=nnx.Rngs(0))(white(1, 4, 2))
    assert enlarged.shape == (1, 8, 4)


@pytest.mark.parametrize("padding", ["CAUSAL", "SAME_LOWER", "REFLECT"])
def test_a_transposed_layer_names_the_paddings_that_it_takes(padding):
    with pytest.raises(ValueError, match=f"padding is one of SAME, VALID, CIRCULAR, or numbers, got '{padding}'"):
        LinkedConvTranspose(2, 4, (3,), padding=padding, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("strides", first_fast([1, 2]))
@pytest.mark.parametrize("link", first_fast([min_max, Link(lk_swish.members, layout="interleaved")]), ids=str)
def test_layer_starts_linear(link, strides):
    layer = LinkedConv(4, 4, (3, 3), link=link, strides=strides, rngs=nnx.Rngs(0))
    z = white(3, 6, 6, 4)
    y = layer(z.at[2].set(z[0] + z[1]))
    close(y[2], y[0] + y[1], 5e-3)


@pytest.mark.slow
def test_strided_layer_drops_no_pixel_at_the_start():
    layer = LinkedConv(2, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
    z = white(2, 6, 6, 2)
    close((layer(z) ** 2).sum((1, 2, 3)), (z**2).sum((1, 2, 3)), 1e-5)


# --- in Flax, Optax and Orbax -------------------------------------------------------------------------------------


def pool(z):
    return z.mean((1, 2))


def small_net(link=lk_relu, seed=0):
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(
        nnx.Conv(1, 4, (3, 3), rngs=rngs),
        LinkedConv(4, 4, (3, 3), link=link, strides=2, rngs=rngs),
        pool,
        LinkedLinear(4, 2, link=link, rngs=rngs),
    )


@pytest.mark.slow
def test_sequential_is_one_layer_after_the_other():
    net = small_net()
    z = white(2, 4, 4, 1)
    h = pool(net.layers[1](net.layers[0](z)))
    np.testing.assert_array_equal(net(z), net.layers[3](h))


@pytest.mark.slow
@over_few_links
def test_nnx_jit_is_eager(link):
    net = small_net(link)
    z = white(2, 4, 4, 1)
    close(nnx.jit(lambda net, z: net(z))(net, z), net(z), 1e-6)


@pytest.mark.slow
def test_second_call_does_not_retrace():
    traces = []

    @nnx.jit
    def run(net, z):
        traces.append(1)
        return net(z)

    for seed in range(2):
        run(small_net(seed=seed), white(2, 4, 4, 1, seed=seed))
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("link", first_fast([lk_relu, LinkedPReLU(4)]), ids=["lk_relu", "lk_prelu"])
def test_scan_over_stacked_layers_is_a_loop(link):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return LinkedConv(4, 4, (3, 3), link=link if isinstance(link, Link) else LinkedPReLU(4), rngs=rngs)

    layers = stack(nnx.Rngs(0))
    assert layers.conv.kernel.shape == (3, 3, 3, 8, 4)
    assert (layers.conv.kernel[0] != layers.conv.kernel[1]).any()
    z = white(2, 4, 4, 4)
    run = nnx.scan(lambda z, layer: layer(z), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    graph, state = nnx.split(layers)
    expected = z
    for i in range(3):
        expected = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(expected)
    close(run(z, layers), expected, 1e-6)


@pytest.mark.slow
@over_few_links
def test_optax_steps_lower_the_loss(link):
    net = small_net(link)
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
    z, y = white(8, 4, 4, 1), white(8, 2, seed=1)

    @nnx.jit
    def step(net, optimizer):
        loss, grads = nnx.value_and_grad(lambda net: ((net(z) - y) ** 2).mean())(net)
        optimizer.update(net, grads)
        return loss

    losses = [float(step(net, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_orbax_checkpoint_restores_the_net(tmp_path):
    net = small_net(LinkedPReLU(4), seed=0)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "net", nnx.state(net))
        checkpointer.wait_until_finished()
        graph, abstract = nnx.split(nnx.eval_shape(lambda: small_net(LinkedPReLU(4), seed=1)))
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "net", abstract))
    z = white(2, 4, 4, 1)
    np.testing.assert_array_equal(restored(z), net(z))
    assert (small_net(LinkedPReLU(4), seed=1)(z) != net(z)).any()


@pytest.mark.slow
@over_layers
@pytest.mark.parametrize("link", first_fast(FEW.values()), ids=FEW)
def test_hessian_and_jvp_go_through_a_layer(link, make, shape):
    layer = make(link=link, rngs=nnx.Rngs(0))
    z, tangent = white(*shape), white(*shape, seed=1)
    few = z[0].reshape(-1)[:3]  # of a few inputs, to keep the Hessian small

    def loss(z, f):
        return (f(z) ** 2).sum()

    def loss_of_few(f):
        return lambda few: loss(z.at[0].set(z[0].reshape(-1).at[:3].set(few).reshape(shape[1:])), f)

    plain = naive(plain_layer(layer), link)
    close(jax.jvp(layer, (z,), (tangent,)), jax.jvp(plain, (z,), (tangent,)), 1e-5)
    hessians = jax.jit(lambda few: [jax.hessian(loss_of_few(f))(few) for f in (layer, plain)])(few)
    assert jnp.abs(hessians[0]).max() > 0
    close(*hessians, 1e-5)


@pytest.mark.slow
@over_few_links
def test_link_is_an_activation_of_linen(link):
    class Net(flax.linen.Module):
        activation: Link

        @flax.linen.compact
        def __call__(self, x):
            z = flax.linen.Dense(4)(x)
            return flax.linen.Dense(2)(self.activation(z))

    net = Net(link)
    x = white(3, 5)
    variables = net.init(jax.random.key(0), x)
    first, second = variables["params"]["Dense_0"], variables["params"]["Dense_1"]
    assert second["kernel"].shape == (4 * link.arity, 2)
    h = laid_out([g(x @ first["kernel"] + first["bias"]) for g in link.members], "blocked")
    close(net.apply(variables, x), h @ second["kernel"] + second["bias"], 1e-5)
    grads = jax.grad(lambda variables: (net.apply(variables, x) ** 2).sum())(variables)
    assert all(bool(jnp.isfinite(g).all() and (g != 0).any()) for g in jax.tree.leaves(grads))


# --- memory: only z is kept ---------------------------------------------------------------------------------------


@over_layers
@over_few_links
def test_backward_pass_keeps_z_and_nothing_of_its_size_beside_it(link, make, shape):
    layer = make(link=link, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    z = white(64, *shape[1:])  # larger than the kernel
    _, pull = jax.vjp(lambda state, z: nnx.merge(graph, state)(z), state, z)
    large = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size >= z.size]
    assert large == [z.shape]


@over_layers
@pytest.mark.parametrize("link", [LinkedPReLU(3), ChannelPReLU(3)], ids=["LinkedPReLU", "ChannelPReLU"])
def test_backward_pass_after_slopes_keeps_z_and_nothing_of_its_size_beside_it(link, make, shape):
    layer = make(link=link, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    z = white(64, *shape[1:])
    _, pull = jax.vjp(lambda state, z: nnx.merge(graph, state)(z), state, z)
    assert [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size >= z.size] == [z.shape]


def temporary_memory(make):
    """Bytes for the gradient of 50 scanned layers, batch 128, 32x32x4: compiled, not run."""
    graph, _ = nnx.split(make(nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(0), 50)
    states = jax.eval_shape(jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key)))), keys)
    z = jax.ShapeDtypeStruct((128, 32, 32, 4), jnp.float32)

    def loss(states, z):
        return (jax.lax.scan(lambda z, state: (nnx.merge(graph, state)(z), None), z, states)[0] ** 2).mean()

    return jax.jit(jax.grad(loss)).lower(states, z).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_linked_net_needs_less_memory_than_a_naive_linked_and_a_plain_one():
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)

        def __call__(self, h):
            return jax.nn.relu(self.conv(h))

    class Naive(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(8, 4, (3, 3), rngs=rngs)

        def __call__(self, z):
            return self.conv(jnp.concatenate([jax.nn.relu(z), jax.nn.relu(-z)], -1))

    def linked_with(conv):
        return temporary_memory(lambda rngs: LinkedConv(4, 4, (3, 3), conv_general_dilated=conv, rngs=rngs))

    naive, plain, ours = temporary_memory(Naive), temporary_memory(Plain), linked_with(jax.lax.conv_general_dilated)
    assert ours <= 0.45 * naive
    assert ours <= 0.9 * plain
    assert linked_with(conv_general_dilated) <= 0.6 * naive  # fast on a CPU: the patches of one layer are extra


@pytest.mark.slow
@pytest.mark.parametrize("module", first_fast([ChannelPReLU, LinkedPReLU]))
@pytest.mark.parametrize("layer", first_fast([LinkedLinear, functools.partial(LinkedConv, kernel_size=(3, 3))]))
def test_slopes_inside_a_layer_are_trained(layer, module):
    layer = layer(in_features=3, out_features=5, link=module(3), rngs=nnx.Rngs(0))
    z = white(2, 6, 6, 3)
    found = gradients(layer, z)
    wanted = gradients(layer, z, lambda layer, z: plain_layer(layer)(layer.link(z)))
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(found[1]["link"]))
    close(found, wanted, 1e-6)


class WithState(nnx.Module):
    """Batch norm, a link, dropout: running means, parameters and counts."""

    arity = 2

    def __init__(self, features, *, rngs):
        self.norm, self.dropout = nnx.BatchNorm(features, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, z):
        return self.dropout(lk_relu(self.norm(z)))


@pytest.mark.slow
@over_layers
def test_a_link_with_state_is_updated(make, shape):
    layer = make(link=WithState(3, rngs=nnx.Rngs(1)), kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    z = white(*shape)
    for call in (lambda layer: layer(z), nnx.jit(lambda layer: layer(z)), nnx.grad(lambda layer: layer(z).sum())):
        mean, count = layer.link.norm.mean[...], layer.link.dropout.rngs.count[...]
        call(layer)
        assert layer.link.dropout.rngs.count[...] == count + 1
        assert (layer.link.norm.mean[...] != mean).all()


@pytest.mark.slow
def test_a_link_with_state_computes_and_learns_as_before_a_plain_layer():
    def plain(net, z):
        return jnp.square(net.linear(net.link(z))).sum()

    def ours(net, z):
        return jnp.square(net(z)).sum()

    options = {"kernel_init": nnx.initializers.lecun_normal()}
    nets = [LinkedLinear(3, 5, link=WithState(3, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(0), **options) for _ in range(2)]
    for z in white(3, 8, 3):
        found, wanted = (nnx.jit(nnx.value_and_grad(f))(net, z) for f, net in zip((ours, plain), nets, strict=True))
        close(jax.tree.leaves(found), jax.tree.leaves(wanted), 1e-5)
    counts = [net.link.dropout.rngs.count[...] for net in nets]
    assert counts == [3, 3]
    close(nets[0].link.norm.mean[...], nets[1].link.norm.mean[...], 1e-6)
    assert (nets[0].link.norm.mean[...] != 0).all()


def test_a_link_module_may_come_from_outside_a_trace():
    layer = LinkedLinear(3, 5, link=LinkedPReLU(3), rngs=nnx.Rngs(0))
    frozen = LinkedLinear(
        3, 5, link=WithState(3, rngs=nnx.Rngs(1)), kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0)
    )
    frozen.eval()
    for net in (layer, frozen):
        close(jax.jit(lambda z, net=net: net(z))(white(2, 3)), net(white(2, 3)), 1e-6)


# --- bad inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c_in", "c_out"), first_fast([(0, 2), (2, 0), (-1, 2)]))
def test_layer_without_features_is_refused(c_in, c_out):
    with pytest.raises(ValueError, match=f"got {c_in} and {c_out}"):
        LinkedLinear(c_in, c_out, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"got {c_in} and {c_out}"):
        LinkedConv(c_in, c_out, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"got {c_in} and {c_out}"):
        LinkedConvTranspose(c_in, c_out, (3, 3), rngs=nnx.Rngs(0))


@over_layers
@pytest.mark.parametrize("link", first_fast([jax.nn.relu, LinkedPReLU, "lk_relu"]), ids=["function", "class", "name"])
def test_what_is_not_a_built_link_is_refused(unchecked, link, make, shape):
    with pytest.raises(TypeError, match="link is a Link or a built module"):
        make(link=link, rngs=nnx.Rngs(0))


@over_layers
@pytest.mark.parametrize("axis", first_fast([0, 1, -2]))
def test_link_along_another_axis_is_refused(axis, make, shape):
    with pytest.raises(ValueError, match=f"axis={axis}"):
        make(link=linked(jax.nn.relu, axis=axis), rngs=nnx.Rngs(0))


@pytest.mark.slow
@over_layers
def test_module_without_a_link_needs_a_kernel_init(make, shape):
    class Doubled(nnx.Module):
        arity = 2

        def __call__(self, z):
            return jnp.concatenate([z, z], -1)

    with pytest.raises(TypeError, match="pass kernel_init"):
        make(link=Doubled(), rngs=nnx.Rngs(0))
    layer = make(link=Doubled(), kernel_init=variance_preserving(lk_relu), rngs=nnx.Rngs(0))
    z = white(*shape)
    close(layer(z), plain_layer(layer)(jnp.concatenate([z, z], -1)), 1e-6)


@over_layers
@pytest.mark.parametrize("link", [lk_relu, LinkedPReLU(3)], ids=["Link", "module"])
def test_z_with_other_channels_or_too_few_axes_is_refused(unchecked, link, make, shape):
    layer = make(link=link, rngs=nnx.Rngs(0))
    for wrong in ((*shape[:-1], 2), (*shape[:-1], 6), ()):
        with pytest.raises(ValueError, match=re.escape(f"3 channels on the last of {len(shape) - 1} ")) as raised:
            layer(white(*wrong))
        assert f"got shape {wrong}" in str(raised.value)


@over_layers
@pytest.mark.parametrize("link", [lk_relu, LinkedPReLU(3)], ids=["Link", "module"])
def test_z_of_integers_is_refused(unchecked, link, make, shape):
    with pytest.raises(TypeError, match="floating-point z, got int32; pass z"):
        make(link=link, rngs=nnx.Rngs(0))(jnp.ones(shape, int))


@pytest.mark.parametrize("features", [None, 3.0, "3", True])
def test_features_are_integers(unchecked, features):
    for make in (
        lambda: LinkedLinear(features, 3, rngs=nnx.Rngs(0)),
        lambda: LinkedConv(3, features, 3, rngs=nnx.Rngs(0)),
        lambda: LinkedConvTranspose(features, 3, 3, rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(TypeError, match=f"is an integer, got {features!r}"):
            make()


@pytest.mark.parametrize("groups", [None, 2.0, (2,)])
def test_groups_are_an_integer(unchecked, groups):
    with pytest.raises(TypeError, match="feature_group_count is an integer, got"):
        LinkedConv(4, 4, 3, feature_group_count=groups, rngs=nnx.Rngs(0))


def test_strides_that_do_not_fit_the_kernel_are_refused():
    with pytest.raises(ValueError, match="one per spatial axis"):
        LinkedConv(4, 4, (3, 3), strides=(2,), rngs=nnx.Rngs(0))
