"""The convolution with a fast derivative is `jax.lax`'s in value and in every derivative."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from linked_jax import LinkedConv, convolution
from linked_jax import linen as linked_linen
from linked_jax.convolution import banded, conv_general_dilated, patched, winograd
from linked_jax.convolution.geometry import Geometry
from linked_jax.linking import linked
from linked_jax.probe import probe
from tests.cases import SWITCHES, first_fast

pytestmark = pytest.mark.optimised

NUMBERS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Tests have two devices, and where there are several a wide layer is JAX' own."""
    monkeypatch.setattr(convolution, "_several_devices", lambda: False)


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def close(found, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, float(jnp.abs(b).max())))


def both(channels, image, window, padding, count=6, strides=None):
    """Ours and JAX' convolution of one geometry, and their arguments; ours must not be JAX'."""
    x, kernel = arrays((count, *image, channels[0]), (*window, *channels))
    strides, options = strides or (1,) * len(window), {"dimension_numbers": NUMBERS[len(window)]}
    convs = (
        lambda x, k: convolution.conv_general_dilated(x, k, strides, padding, **options),
        lambda x, k: lax.conv_general_dilated(x, k, strides, padding, **options),
    )
    assert "fast_convolution" in str(jax.make_jaxpr(convs[0])(x, kernel))
    return convs, x, kernel / 10


NARROW, MIDDLE, WIDE = (4, 3), (16, 17), (36, 64)

GEOMETRIES = [
    ((7, 6), (3, 3), "SAME"),
    ((7, 6), (3, 2), "SAME"),
    ((7, 6), (3, 3), "VALID"),
    ((5, 6), (2, 3), ((1, 0), (2, 1))),
    ((9,), (4,), "SAME"),
    ((9,), (3,), ((2, 0),)),
    ((3, 4, 5), (2, 3, 3), "SAME"),
    ((2, 2), (5, 5), "SAME"),
]
OF_WIDE = [
    ((7, 6), (3, 3), "SAME"),
    ((7, 6), (3, 3), "VALID"),
    ((5, 7), (3, 3), ((1, 0), (2, 1))),
    ((1, 1), (3, 3), "SAME"),
    ((3, 3), (3, 3), "VALID"),
    ((33, 65), (3, 3), "SAME"),
]
STRIDED = [
    ((7, 6), (3, 3), "SAME", (2, 2)),
    ((7, 8), (3, 3), "VALID", (2, 3)),
    ((5, 7), (2, 3), ((1, 0), (2, 1)), (1, 2)),
    ((9,), (3,), "SAME", (2,)),
    ((8, 8), (2, 2), "VALID", (3, 4)),
    ((3, 4, 5), (2, 3, 3), "SAME", (2, 2, 2)),
]
CASES = [
    *((NARROW, *geometry, None) for geometry in GEOMETRIES),
    *((MIDDLE, *geometry, None) for geometry in OF_WIDE),
    *((WIDE, *geometry, None) for geometry in OF_WIDE),
    *((WIDE, *geometry) for geometry in STRIDED),
]


@pytest.mark.parametrize(("channels", "image", "window", "padding", "strides"), first_fast(CASES))
@pytest.mark.parametrize("count", first_fast([6, 1, 8]))
def test_values_and_gradients_are_those_of_jax(channels, image, window, padding, strides, count):
    convs, x, kernel = both(channels, image, window, padding, count, strides)
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda x, k, conv=conv: jnp.sin(conv(x, k)).sum(), argnums=(0, 1)))(x, kernel)
        for conv in convs
    )
    close(ours, theirs, 1e-4)


TRANSFORMATIONS = {
    "jvp": lambda conv, x, k: jax.jvp(conv, (x, k), (x, k)),
    "linearize": lambda conv, x, k: jax.linearize(conv, x, k)[1](x, k),
    "jacfwd": lambda conv, x, k: jax.jacfwd(lambda a: conv(x, a * k).sum((0, 1)))(jnp.ones(k.shape[-1])),
    "forward over reverse": lambda conv, x, k: jax.jvp(jax.grad(lambda k: jnp.sin(conv(x, k)).sum()), (k,), (k,)),
    "reverse over reverse": lambda conv, x, k: jax.grad(
        lambda x: (jax.grad(lambda k: jnp.sin(conv(x, k)).sum())(k) ** 2).sum()
    )(x),
    "vmap over kernels": lambda conv, x, k: jax.vmap(jax.grad(lambda k: jnp.sin(conv(x, k)).sum()))(
        jnp.stack([k, 2 * k])
    ),
    "gradient of each example": lambda conv, x, k: jax.vmap(
        lambda x: jax.grad(lambda k: jnp.sin(conv(x[None], k)).sum())(k)
    )(x),
    "checkpoint": lambda conv, x, k: jax.grad(jax.checkpoint(lambda k: jnp.sin(conv(x, k)).sum()))(k),
    "scan": lambda conv, x, k: jax.grad(
        lambda ks: lax.scan(lambda z, k: (jnp.tile(conv(z, k), z.shape[-1]), None), x, ks)[0].sum()
    )(jnp.stack([k[..., :1], -k[..., :1]])),
}


forms = pytest.mark.parametrize(
    ("channels", "strides"), [(NARROW, (1, 1)), (WIDE, (1, 1)), (WIDE, (1, 2))], ids=["banded", "winograd", "patched"]
)


@pytest.mark.slow
@forms
@pytest.mark.parametrize("name", first_fast(TRANSFORMATIONS))
def test_under_a_transformation_it_is_jaxs(name, channels, strides):
    if name == "scan" and max(strides) > 1:
        pytest.skip("a layer that shrinks its input is no body of a scan")
    (ours, theirs), x, kernel = both(channels, (4, 5), (3, 3), "SAME", count=2, strides=strides)
    close(TRANSFORMATIONS[name](ours, x, kernel), TRANSFORMATIONS[name](theirs, x, kernel), 1e-4)


@pytest.mark.slow
@forms
@pytest.mark.parametrize("switch", SWITCHES)
def test_under_a_strict_switch_it_is_jaxs(switch, channels, strides):
    with SWITCHES[switch]():
        (ours, theirs), x, kernel = both(channels, (4, 4), (3, 3), "SAME", count=2, strides=strides)
        close(*(jax.grad(lambda k, conv=conv: jnp.sin(conv(x, k)).sum())(kernel) for conv in (ours, theirs)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("channels", "strides"), [(NARROW, (1, 1)), (WIDE, (2, 2))], ids=["banded", "patched"])
def test_half_precision(dtype, channels, strides):
    (ours, theirs), x, kernel = both(channels, (4, 4), (3, 3), "SAME", count=2, strides=strides)
    half = jax.grad(lambda k: ours(x.astype(dtype), k).astype(jnp.float32).sum())(kernel.astype(dtype))
    assert half.dtype == dtype
    close(half.astype(jnp.float32), jax.grad(lambda k: theirs(x, k).sum())(kernel), 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_sum_over_many_images_in_half_precision_is_not_biased(dtype):
    layer = LinkedConv(24, 48, (3, 3), strides=2, dtype=dtype, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    z = jax.random.normal(jax.random.key(0), (63, 8, 8, 24))

    def gradient(conv):
        def loss(params):
            net = nnx.merge(graph, params)
            net.conv.conv_general_dilated = conv
            return net(z).astype(jnp.float32).sum()

        return jax.grad(loss)(params)["conv"]["kernel"][...]

    ours, theirs = gradient(conv_general_dilated), gradient(jax.lax.conv_general_dilated)
    ratio = (ours * theirs).sum() / jnp.square(theirs).sum()
    assert abs(ratio - 1) < 2e-3
    assert jnp.abs(ours - theirs).max() < 0.01 * jnp.abs(theirs).max()


@pytest.mark.slow
@pytest.mark.parametrize("strides", [1, 2, (3, 1)])
def test_a_window_of_one_pixel_is_a_product(strides):
    ours = LinkedConv(4, 5, (1, 1), strides=strides, rngs=nnx.Rngs(0))
    plain = LinkedConv(4, 5, (1, 1), strides=strides, conv_general_dilated=lax.conv_general_dilated, rngs=nnx.Rngs(0))
    (z,) = arrays((2, 7, 6, 4))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(ours)(z))

    def gradients(layer):
        graph, state = nnx.split(layer)
        return jax.value_and_grad(lambda s, z: jnp.sin(nnx.merge(graph, s)(z)).sum(), argnums=(0, 1))(state, z)

    close(gradients(ours), gradients(plain))


OTHERS = {
    "strides": {"strides": 2},
    "dilation": {"kernel_dilation": 2},
    "a dilated input": {"input_dilation": 2, "padding": ((1, 1), (1, 1))},
    "groups": {"feature_group_count": 2, "link": linked(jax.nn.relu, layout="interleaved")},
    "a padded window of one pixel": {"kernel_size": (1, 1), "padding": ((1, 1), (1, 1))},
    "neither few nor many channels": {"in_features": 20},
    "many channels in half precision": {"in_features": 600, "dtype": jnp.bfloat16},
    "many channels and another window": {"in_features": 600, "kernel_size": (3, 2)},
    "an image smaller than the window": {"kernel_size": (7, 7), "padding": "VALID"},
    "padding beyond the window": {"padding": ((4, 4), (4, 4))},
    "negative padding": {"padding": ((-1, 0), (0, 0))},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_handed_to_jax(name):
    sizes = {"in_features": 4, "kernel_size": (3, 3), **OTHERS[name]}
    ours = LinkedConv(out_features=4, rngs=nnx.Rngs(0), **sizes)
    plain = LinkedConv(out_features=4, rngs=nnx.Rngs(0), conv_general_dilated=lax.conv_general_dilated, **sizes)
    (z,) = arrays((2, 6, 6, sizes["in_features"]))
    assert str(jax.make_jaxpr(ours)(z)) == str(jax.make_jaxpr(plain)(z))


def test_other_axes_are_handed_to_jax():
    x, kernel = arrays((2, 4, 5, 5), (4, 4, 3, 3))
    jaxpr = jax.make_jaxpr(lambda x, k: convolution.conv_general_dilated(x, k, (1, 1), "SAME"))(x, kernel)
    assert "fast_convolution" not in str(jaxpr)


def test_where_images_may_be_split_it_is_jaxs(monkeypatch):
    monkeypatch.undo()
    assert jax.device_count() == 2
    (z,) = arrays((2, 6, 6, 300))
    layer = LinkedConv(300, 4, (3, 3), rngs=nnx.Rngs(0))
    assert "fast_convolution" not in str(jax.make_jaxpr(layer)(z))


@pytest.mark.parametrize("check_vma", first_fast([True, False]))
def test_gradients_of_images_split_by_shard_map_are_those_of_all(check_vma):
    mesh, rows = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), P("data")
    graph, state = nnx.split(LinkedConv(3, 4, (3, 3), rngs=nnx.Rngs(0)))
    (z,) = arrays((4, 5, 5, 3))

    def loss(state, z):
        return jnp.sin(nnx.merge(graph, state)(z)).sum()

    def of_a_shard(state, z):
        grads = jax.grad(lambda state: jax.lax.psum(loss(state, z), "data") if check_vma else loss(state, z))(state)
        return grads if check_vma else jax.lax.psum(grads, "data")

    split = jax.shard_map(of_a_shard, mesh=mesh, in_specs=(P(), rows), out_specs=P(), check_vma=check_vma)
    close(jax.jit(split)(state, z), jax.jit(jax.grad(loss))(state, z))
    assert ("fast_convolution" in str(jax.make_jaxpr(split)(state, z))) == (not check_vma)


@pytest.mark.slow
@pytest.mark.parametrize("padding", first_fast(["SAME", "VALID", "CIRCULAR", "REFLECT"]))
@pytest.mark.parametrize("channels", [4, 300])
def test_both_kinds_of_layers_have_it(padding, channels):
    (z,) = arrays((2, 6, 6, channels))
    layer = LinkedConv(channels, 4, (3, 3), padding=padding, rngs=nnx.Rngs(0))
    assert "fast_convolution" in str(jax.make_jaxpr(layer)(z))
    (found,) = probe(layer, [z]).layers
    assert (found.activation, len(found.dead)) == ("relu(z), relu(-z)", channels)
    in_linen = linked_linen.LinkedConv(4, (3, 3), padding=padding)
    variables = {"params": {"kernel": layer.conv.kernel[...], "bias": layer.conv.bias[...]}}
    assert "fast_convolution" in str(jax.make_jaxpr(lambda z: in_linen.apply(variables, z))(z))
    plain = linen.Conv(4, (3, 3), padding=padding, use_bias=True)

    def gradients(f):
        return jax.grad(lambda variables: jnp.sin(f(variables)).sum())(variables)

    close(
        gradients(lambda v: in_linen.apply(v, z)),
        gradients(lambda v: plain.apply(v, in_linen.link(z))),
    )


def test_on_other_platforms_it_is_jaxs(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (z,) = arrays((2, 6, 6, 4))
    assert "fast_convolution" not in str(jax.make_jaxpr(LinkedConv(4, 4, (3, 3), rngs=nnx.Rngs(0)))(z))


@pytest.mark.slow
def test_rounding_is_of_the_size_of_the_direct_sums_own():
    at = Geometry((16, 16), winograd.WINDOW, (1, 1), ((1, 1), (1, 1)))
    rng = np.random.default_rng(0)
    x, kernel, g = (rng.normal(size=shape) for shape in ((4, 16, 16, 64), (3, 3, 64, 64), (4, 16, 16, 64)))

    def direct(x, kernel):
        return lax.conv_general_dilated(x, kernel, at.strides, at.pads, dimension_numbers=NUMBERS[2])

    def direct_gradient(x, g):
        return jax.linear_transpose(lambda kernel: direct(x, kernel), jax.ShapeDtypeStruct(kernel.shape, x.dtype))(g)[0]

    pairs = (
        (direct, functools.partial(winograd.convolve, at=at), (x, kernel)),
        (direct_gradient, functools.partial(winograd.kernel_gradient, at=at), (x, g)),
    )
    for plain, ours, arguments in pairs:
        with jax.enable_x64(True):
            exact = np.asarray(plain(*map(jnp.asarray, arguments)))
        single = [jnp.asarray(a, jnp.float32) for a in arguments]
        errors = [np.square(np.asarray(f(*single), np.float64) - exact).mean() ** 0.5 for f in (plain, ours)]
        assert 0 < errors[1] < 2 * errors[0]


@hypothesis.given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(*[st.integers(0, 3)] * 4), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 8),
    st.integers(1, 8), st.integers(1, 5),
)  # fmt: skip
@hypothesis.settings(max_examples=30)
@hypothesis.example((5, 4), (3, 3), (1, 1, 2, 0), (1, 1), 3, 4, 2)
@pytest.mark.slow
def test_any_geometry(space, window, pads, strides, c, c_out, count):
    pads = ((pads[0] % window[0], pads[1] % window[0]), (pads[2] % window[1], pads[3] % window[1]))
    at = Geometry(space, window, strides, pads)
    hypothesis.assume(min(n + sum(pad) - k for n, pad, k in zip(space, pads, window, strict=True)) >= 0)
    x, kernel = arrays((count, *space, c), (*window, c, c_out))

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NUMBERS[2])

    wanted = plain(x, kernel)
    assert wanted.shape[1:3] == at.outputs
    (dx,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(wanted)
    (dkernel,) = jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(wanted)
    single = strides == (1, 1)
    for form in (patched, *[banded] * single, *[winograd] * (single and window == winograd.WINDOW)):
        close(form.convolve(x, kernel, at), wanted)
        close(form.image_gradient(wanted, kernel, at), dx)
        close(form.kernel_gradient(x, wanted, at), dkernel)
