"""Linen's layers against the NNX ones with the same parameters: the numbers and the gradients are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from linked_jax import layers, learned, linen
from linked_jax.activations import lk_elu, lk_relu, lk_swish, relu
from linked_jax.initializers import default_kernel_init
from linked_jax.linking import fourier, linked
from tests.arrays import white
from tests.cases import first_fast

KEY = jax.random.key(0)
GROUPED = linked(jax.nn.silu, layout="interleaved")
dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), first_fast([(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)]), ids=["float32", "bfloat16"]
)


def dense(link_nnx, link_linen, dtype):
    ours = layers.LinkedLinear(3, 5, link=link_nnx, dtype=dtype, rngs=nnx.Rngs(0))
    return ours, linen.LinkedDense(5, link=link_linen, dtype=dtype), white(4, 3)


def conv(link_nnx, link_linen, dtype):
    options = {"strides": 2, "padding": "VALID", "kernel_dilation": 2, "use_bias": False, "dtype": dtype}
    ours = layers.LinkedConv(3, 4, (3, 3), link=link_nnx, rngs=nnx.Rngs(0), **options)
    return ours, linen.LinkedConv(4, (3, 3), link=link_linen, **options), white(2, 8, 8, 3)


def grouped(_nnx, _linen, dtype):
    options = {"link": GROUPED, "feature_group_count": 2, "precision": "highest", "dtype": dtype}
    ours = layers.LinkedConv(4, 6, (3,), rngs=nnx.Rngs(0), **options)
    return ours, linen.LinkedConv(6, (3,), **options), white(2, 5, 4)


def linen_params(tree):
    """NNX' parameters under Linen's names: the weights stand in the layer itself, slopes in one array each."""
    params = nnx.to_pure_dict(nnx.state(tree, nnx.Param))
    for name in ("linear", "conv"):
        params |= params.pop(name, {})
    if "link" in params and "positive" in params["link"]:
        params["link"] = {name: slopes["negative_slope"] for name, slopes in params["link"].items()}
    return params


def with_random_parameters(module):
    leaves, tree = jax.tree.flatten(nnx.state(module))
    nnx.update(module, tree.unflatten([white(*leaf.shape, seed=i).astype(leaf.dtype) for i, leaf in enumerate(leaves)]))
    return module


LINKS = {
    "relu": (relu, relu),
    "fourier": (fourier, fourier),
    "prelu": (learned.ChannelPReLU(3), linen.ChannelPReLU()),
    "lk_prelu": (learned.LinkedPReLU(3), linen.LinkedPReLU()),
}


def same_numbers_and_gradients(ours, theirs, z, tolerance):
    graph, state = nnx.split(with_random_parameters(ours))
    variables = {"params": linen_params(ours)}
    shapes = jax.eval_shape(theirs.init, KEY, z)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)

    def mean_square(h):
        return jnp.square(h.astype(jnp.float32)).mean()

    @jax.jit
    def numbers(state, variables, z):
        one = jax.value_and_grad(lambda state, z: mean_square(nnx.merge(graph, state)(z)), (0, 1))(state, z)
        other = jax.value_and_grad(lambda variables, z: mean_square(theirs.apply(variables, z)), (0, 1))(variables, z)
        return (nnx.merge(graph, state)(z), *one), (theirs.apply(variables, z), *other)

    (y, loss, (by_state, by_z)), (their_y, their_loss, (by_variables, their_by_z)) = numbers(state, variables, z)
    assert y.dtype == their_y.dtype
    gradients = {"params": linen_params(nnx.merge(graph, by_state))}
    for a, b in zip(
        jax.tree.leaves((y, loss, by_z, gradients)), jax.tree.leaves((their_y, their_loss, their_by_z, by_variables)),
        strict=True,
    ):  # fmt: skip
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


@dtypes
@pytest.mark.parametrize("make", first_fast([dense, conv, grouped]))
def test_linen_and_nnx_compute_the_same(make, dtype, tolerance):
    same_numbers_and_gradients(*make(lk_swish, lk_swish, dtype), tolerance)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("make", first_fast([dense, conv]))
@pytest.mark.parametrize("links", first_fast(map(pytest.param, LINKS.values())), ids=LINKS)
def test_linen_and_nnx_compute_the_same_after_every_link(links, make, dtype, tolerance):
    same_numbers_and_gradients(*make(*links, dtype), tolerance)


@pytest.mark.parametrize("share", first_fast(["channel", "layer", "element"]))
def test_slopes_are_those_of_nnx(share):
    features = (4, 3) if share == "element" else 3
    z = white(2, 4, 3).at[0, 0, 0].set(0)
    for name in ("ChannelPReLU", "LinkedPReLU"):
        ours = getattr(learned, name)(features, share=share, negative_slope=0.1)
        theirs = getattr(linen, name)(share=share, negative_slope=0.1)
        variables = theirs.init(KEY, z)
        slopes = jax.tree.leaves(nnx.state(ours))
        assert [leaf.tolist() for leaf in jax.tree.leaves(variables)] == [leaf.tolist() for leaf in slopes]
        np.testing.assert_array_equal(theirs.apply(variables, z), ours(z))
        assert theirs.arity == ours.arity
        assert theirs.link == ours.link


def test_slopes_have_their_own_dtype():
    assert linen.ChannelPReLU(param_dtype=jnp.bfloat16).init(KEY, white(2, 3))["params"]["negative_slope"].dtype == (
        jnp.bfloat16
    )


@pytest.mark.slow
@pytest.mark.parametrize("link", first_fast([lk_relu, lk_elu]), ids=["lk_relu", "lk_elu"])
def test_kernels_start_as_in_nnx(link):
    z = white(1, 6, 6, 4)
    interleaved = linked(*link.members, layout="interleaved")
    for options in ({}, {"strides": 2}, {"link": interleaved, "feature_group_count": 4}):
        options = {"link": link} | options
        found = linen.LinkedConv(8, (3, 3), **options).init(KEY, z)["params"]["kernel"]
        ours = layers.LinkedConv(4, 8, (3, 3), rngs=nnx.Rngs(0), **options).conv.kernel
        assert found.shape == ours.shape
        np.testing.assert_allclose(jnp.square(ours[...]).sum(), jnp.square(found).sum(), rtol=1e-5)
    kernel = linen.LinkedDense(4, link=lk_relu).init(KEY, white(2, 4))["params"]["kernel"]
    np.testing.assert_array_equal(kernel[:4], -kernel[4:])


def test_a_given_kernel_init_is_used():
    layer = linen.LinkedDense(4, link=fourier, kernel_init=nn.initializers.constant(2.0))
    assert (layer.init(KEY, white(2, 4))["params"]["kernel"] == 2).all()


@pytest.mark.slow
def test_the_backward_pass_keeps_z_and_nothing_of_its_size_beside_it():
    z = white(64, 3)
    for layer in (linen.LinkedDense(5), linen.LinkedConv(5, 3)):
        x = z if isinstance(layer, nn.Dense) else z[:, None]
        variables = layer.init(KEY, x)
        _, pull = jax.vjp(layer.apply, variables, x)
        assert [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size >= z.size] == [x.shape]


@pytest.mark.slow
def test_a_linen_net_trains():
    net = nn.Sequential([
        nn.Conv(4, (3, 3)), linen.LinkedConv(4, (3, 3), strides=2, link=linen.LinkedPReLU()),
        lambda z: z.mean((1, 2)), linen.LinkedDense(2, link=lk_swish),
    ])  # fmt: skip
    x, y = white(8, 4, 4, 1), white(8, 2, seed=1)
    variables = net.init(KEY, x)
    assert set(variables["params"]["layers_1"]) == {"kernel", "bias", "link"}
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, state):
        loss, grads = jax.value_and_grad(lambda variables: jnp.square(net.apply(variables, x) - y).mean())(variables)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(variables, updates), state, loss

    state, losses = optimizer.init(variables), []
    for _ in range(20):
        variables, state, loss = step(variables, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert (variables["params"]["layers_1"]["link"]["positive"] != 0.25).all()


def after_init(layer, channels, others):
    return layer.apply(layer.init(KEY, white(2, 8, channels)), white(2, 8, others))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "error", "words"),
    first_fast([
        (lambda: linen.LinkedDense(3, link=jax.nn.relu), TypeError, "link is a Link or a built module"),
        (lambda: linen.LinkedConv(3, 3, link="lk_relu"), TypeError, "link is a Link or a built module"),
        (lambda: linen.LinkedConv(3, 3, link=linen.LinkedPReLU), TypeError, "link is a Link or a built module"),
        (lambda: linen.LinkedDense(3, link=linked(jnp.sin, axis=0)), ValueError, "axis=0"),
        (lambda: linen.LinkedConv(4, 3, feature_group_count=2), ValueError, "layout='interleaved'"),
        (lambda: linen.LinkedConv(4, 3, link=GROUPED, feature_group_count=2).init(KEY, white(2, 5, 3)), ValueError,
         "2 groups divide the channels of z, got shape"),
        (lambda: after_init(linen.LinkedDense(3), 5, 6), ValueError, r"z has 5 channels .* got shape \(2, 8, 6\)"),
        (lambda: after_init(linen.LinkedConv(4, 3, link=GROUPED, feature_group_count=2), 4, 8), ValueError,
         "z has 4 channels on its last axis, as at init"),
        (lambda: linen.ChannelPReLU(share="pixel"), ValueError, "'pixel'"),
        (lambda: linen.LinkedPReLU(layout="sideways"), ValueError, "'sideways'"),
        (lambda: linen.ChannelPReLU().apply({"params": {"negative_slope": jnp.ones(3)}}, white(2, 1)), Exception,
         "shape"),
    ]),
)  # fmt: skip
def test_bad_input_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    "make", first_fast([linen.LinkedDense, lambda features, **kw: linen.LinkedConv(features, (3,), **kw)])
)
def test_layers_made_alike_are_equal_and_a_clone_starts_as_its_own_link_asks(make):
    assert make(4) == make(4)
    assert hash(make(4)) == hash(make(4))
    z, changed = white(2, 5, 3), make(4).clone(link=lk_elu)
    assert changed == make(4, link=lk_elu)
    kernels = [layer.init(KEY, z)["params"]["kernel"] for layer in (changed, make(4, link=lk_elu), make(4))]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()


class WithParameter(linen.LinkedDense):
    @nn.compact
    def __call__(self, z):
        self.param("other", None, z.shape)
        return super().__call__(z)


def test_only_a_kernel_without_an_initialiser_gets_the_links():
    with pytest.raises(TypeError, match="not callable"):
        WithParameter(8).init(KEY, white(2, 3))


def test_the_default_start_may_be_partitioned():
    start = nn.with_partitioning(default_kernel_init(lk_relu), ("in", "out"))
    layers_of = [linen.LinkedDense(8, kernel_init=init) for init in (start, None)]
    partitioned, plain = (layer.init(KEY, white(2, 3))["params"]["kernel"] for layer in layers_of)
    np.testing.assert_array_equal(partitioned.value, plain)
