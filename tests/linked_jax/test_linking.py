import copy
import dataclasses
import functools
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import linen, nnx

from linked_jax.activations import ACTIVATIONS, prelu
from linked_jax.layers import LinkedConv, LinkedConvTranspose, LinkedLinear
from linked_jax.learned import LinkedPReLU
from linked_jax.linking import Link, Mirrored, linked
from linked_jax.remedies.normprop import normalized
from tests.cases import first_fast

pytestmark = pytest.mark.optimised

LINKS = {n: f for n, f in ACTIVATIONS.items() if isinstance(f, Link) and f.arity > 1 and n != "crelu"}  # lk_relu again


def where_relu(z):
    return jnp.where(z > 0, z, 0)


def faint_relu(z):
    return 1e-10 * jax.nn.relu(z)


KINKED = {
    "relu": linked(jax.nn.relu),
    "relu6": linked(jax.nn.relu6),
    "where_relu": linked(where_relu),
    "abs": linked(jnp.abs),
    "faint_relu": linked(faint_relu),
    "clip": linked(lambda z: jnp.clip(z, 0, 1)),
    "prelu": linked(lambda z: prelu(z, 0.25)),
}
AT_ZERO = {**LINKS, **KINKED}

over_links = pytest.mark.parametrize("link", first_fast(LINKS.values()), ids=LINKS)
ZEROS = jnp.array([0.0, -0.0])
layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))


def for_all(links, f, *args):
    """{name: f(link, *args)} for a table of links, compiled as one program: compiling is what takes the time."""
    return jax.jit(lambda *args: {name: f(link, *args) for name, link in links.items()})(*args)


def leaky(slope):
    return functools.partial(jax.nn.leaky_relu, negative_slope=slope)


# --- identity -----------------------------------------------------------------------------------------------------


@over_links
def test_link_is_frozen(link):
    with pytest.raises(dataclasses.FrozenInstanceError):
        link.axis = 1


@over_links
def test_rebuilt_link_is_equal_and_the_same_key(link):
    rebuilt = Link(link.members, axis=link.axis, layout=link.layout)
    assert rebuilt == link
    assert hash(rebuilt) == hash(link)
    assert {link: "found"}[rebuilt] == "found"


def test_named_links_differ_from_one_another():
    assert len(set(LINKS.values())) == len(LINKS)


def test_equal_partials_give_equal_links_and_mirrors():
    assert linked(leaky(0.1)) == linked(leaky(0.1))
    assert hash(linked(leaky(0.1))) == hash(linked(leaky(0.1)))
    assert Mirrored(leaky(0.1)) == Mirrored(leaky(0.1))
    assert hash(Mirrored(leaky(0.1))) == hash(Mirrored(leaky(0.1)))
    assert len({linked(leaky(0.1)): 1, linked(leaky(0.1)): 2}) == 1


@pytest.mark.parametrize(
    "other",
    first_fast(
        [
            linked(leaky(0.2)),
            linked(functools.partial(jax.nn.elu, 0.1)),
            Link((leaky(0.1),)),
            linked(leaky(0.1), axis=1),
            linked(leaky(0.1), layout="interleaved"),
            Link(linked(leaky(0.1)).members[::-1]),
            leaky(0.1),
        ]
    ),
    ids=["slope", "function", "arity", "axis", "layout", "order", "not a link"],
)
def test_unequal_links_differ(other):
    assert linked(leaky(0.1)) != other


@pytest.mark.parametrize("other", first_fast([Mirrored(leaky(0.2)), Mirrored(jnp.sin), leaky(0.1)]))
def test_unequal_mirrors_differ(other):
    assert Mirrored(leaky(0.1)) != other


def test_partial_over_arrays_equals_only_itself():
    member = functools.partial(jnp.multiply, jnp.ones(3))
    assert linked(member) == linked(member)
    assert linked(member) != linked(functools.partial(jnp.multiply, jnp.ones(3)))


def test_equal_links_as_static_arguments_trace_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(link, z):
        traces.append(link)
        return link(z)

    for _ in range(2):
        apply(linked(leaky(0.1)), jnp.ones(3))
    assert len(traces) == 1
    apply(linked(leaky(0.2)), jnp.ones(3))
    assert len(traces) == 2


@pytest.mark.slow
def test_link_as_a_closure_of_jit():
    z = jnp.linspace(-3.0, 3.0, 7)
    for name, actual in for_all(LINKS, lambda link, z: link(z), z).items():
        np.testing.assert_allclose(actual, LINKS[name](z), rtol=1e-6, atol=1e-6, err_msg=name)


SAVED = {
    **ACTIVATIONS,
    "partial": linked(leaky(0.1)),
    "partial of a partial": linked(functools.partial(functools.partial(jax.nn.elu, alpha=0.5))),
    "slope": linked(functools.partial(prelu, negative_slope=0.3), jnp.sin),
    "options": linked(jax.nn.mish, axis=1, layout="interleaved"),
    "of Linen": Link((linen.relu6, jax.lax.tanh)),
    "normalised": normalized(linked(jax.nn.relu)),
}


def by_cloudpickle(value):
    import cloudpickle

    return cloudpickle.loads(cloudpickle.dumps(value))


COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "cloudpickle": by_cloudpickle,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
over_copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@over_copies
def test_a_copy_of_a_link_is_equal(copied):
    for name, link in SAVED.items():
        assert copied(link) == link, name
        assert hash(copied(link)) == hash(link), name


@pytest.mark.slow
@over_copies
def test_a_copy_of_a_layer_has_the_same_graph(copied):
    rngs = nnx.Rngs(0)
    for layer in (
        LinkedLinear(4, 3, rngs=rngs),
        LinkedLinear(4, 3, link=LinkedPReLU(4), rngs=rngs),
        LinkedConv(4, 3, (3,), rngs=rngs),
        LinkedConvTranspose(4, 3, (3,), rngs=rngs),
    ):
        assert nnx.graphdef(copied(layer)) == nnx.graphdef(layer)
        z = jnp.ones((2, 5, 4))
        np.testing.assert_array_equal(copied(layer)(z), layer(z))


def test_a_link_of_a_lambda_is_copied_but_not_pickled_by_name():
    link = linked(lambda z: z)
    assert copy.deepcopy(link) == link
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(link)
    np.testing.assert_array_equal(by_cloudpickle(link)(jnp.ones(2)), link(jnp.ones(2)))


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scalar_gives_one_value_a_member():
    for name, (scalar, vector) in for_all(LINKS, lambda link, z: (link(z), link(z[None])), jnp.float32(0.7)).items():
        assert scalar.shape == (LINKS[name].arity,)
        np.testing.assert_allclose(scalar, vector, rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(linked(jax.nn.relu)(1.0), [1, 0])


@layouts
@pytest.mark.parametrize("axis", first_fast([0, 1, 2, 3, -1, -2, -3, -4]))
def test_axis_and_layout_match_numpy(axis, layout):
    z = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    parts = [z**2, -z, np.abs(z)]
    members_last = np.stack([np.moveaxis(part, axis, -1) for part in parts], axis=-1 if layout == "interleaved" else -2)
    expected = np.moveaxis(members_last.reshape(*members_last.shape[:3], -1), -1, axis)
    actual = Link((jnp.square, jnp.negative, jnp.abs), axis=axis, layout=layout)(jnp.asarray(z))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "layout",
    first_fast(
        [
            "blocked",
            "interleaved",
        ]
    ),
)
def test_empty_batch_keeps_its_shape(layout):
    assert linked(jax.nn.relu, layout=layout)(jnp.zeros((0, 3))).shape == (0, 6)


@pytest.mark.parametrize("arity", first_fast([1, 2, 3]))
def test_arity_is_the_number_of_members(arity):
    link = Link((jnp.sin,) * arity)
    assert link.arity == arity
    assert link(jnp.zeros((4, 5))).shape == (4, 5 * arity)


@layouts
def test_arity_one_is_the_function_itself(layout):
    z = jnp.linspace(-2.0, 2.0, 6).reshape(2, 3)
    np.testing.assert_array_equal(Link((jnp.sin,), layout=layout)(z), jnp.sin(z))


def test_linked_mirrors_one_and_takes_several_as_given():
    z = jnp.array([-2.0, 0.5])
    np.testing.assert_array_equal(linked(jnp.exp)(z), jnp.concatenate([jnp.exp(z), jnp.exp(-z)]))
    np.testing.assert_array_equal(linked(jnp.exp, jnp.sin)(z), jnp.concatenate([jnp.exp(z), jnp.sin(z)]))


def test_linked_unwraps_links_of_one_member():
    assert linked(Link((jnp.sin,))) == linked(jnp.sin)
    assert linked(Link((jnp.sin,)), jnp.cos) == linked(jnp.sin, jnp.cos)


# --- validation ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "error", "words"),
    first_fast(
        [
            (lambda: linked(linked(jax.nn.relu)), ValueError, "a link of 2"),
            (lambda: linked(Link((jnp.sin,), axis=1)), ValueError, "along axis 1, got axis=-1; pass axis=1"),
            (lambda: linked(), ValueError, "at least one member"),
            (lambda: Link(()), ValueError, "at least one member"),
            (lambda: linked(3), TypeError, "got 3"),
            (lambda: Link(("relu",)), TypeError, "got 'relu'"),
            (lambda: linked(jnp.sin, axis=1.0), TypeError, "axis is an integer, got 1.0"),
            (lambda: linked(jnp.sin, axis=True), TypeError, "axis is an integer, got True"),
            (lambda: linked(jnp.sin, axis=None), TypeError, "axis is an integer, got None"),
            (lambda: linked(jnp.sin, layout="rows"), ValueError, "'interleaved', got 'rows'"),
            (
                lambda: linked(lambda z: z if z > 0 else -z),
                TypeError,
                r"with an if on z; write jnp.where\(z > 0, ...\)",
            ),
            (lambda: linked(lambda z: jax.lax.top_k(z, z.shape[-1])[0]), ValueError, "members are elementwise"),
            (
                lambda: linked(lambda z: jax.lax.pad(z, 0.0, [(0, 0, 0)] * (z.ndim - 1) + [(1, -1, 0)])),
                ValueError,
                "members are elementwise",
            ),
        ]
    ),
)
def test_a_bad_link_fails_when_built(build, error, words):
    with pytest.raises(error, match=words):
        build()


@dataclasses.dataclass
class Leaky:
    slope: float = 0.1

    def __call__(self, z):
        return prelu(z, self.slope)


@dataclasses.dataclass(frozen=True)
class FrozenLeaky:
    slope: float = 0.1

    def __call__(self, z):
        return jnp.where(z > 0, z, self.slope * z)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("member", "error", "words"),
    [
        (jax.nn.softmax, ValueError, "are elementwise .* got softmax(z)"),
        (functools.partial(jax.nn.softmax, axis=0), ValueError, "got softmax(z, axis=0)"),
        (jax.nn.standardize, ValueError, "got standardize(z)"),
        (lambda z: z / jnp.maximum(1.0, jnp.linalg.norm(z) / 1e5), ValueError, "elementwise"),
        (lambda z: z / jnp.sum(z), ValueError, "elementwise"),
        (lambda z: z * jnp.max(jnp.abs(z)), ValueError, "elementwise"),
        (jnp.cumsum, ValueError, "elementwise and keep z's shape, got cumsum(z)"),
        (functools.partial(jnp.cumsum, axis=0), ValueError, "elementwise"),
        (functools.partial(jnp.sort, axis=0), ValueError, "elementwise"),
        (jnp.sort, ValueError, "elementwise"),
        (jnp.flip, ValueError, "elementwise"),
        (functools.partial(jnp.roll, shift=1, axis=-1), ValueError, "elementwise"),
        (jax.nn.glu, ValueError, "elementwise"),
        (jnp.sum, ValueError, "elementwise"),
        (linked(jax.nn.relu).__call__, ValueError, "elementwise"),
        (np.tanh, TypeError, "built from jax.numpy, got NumPy's tanh(z); pass jax.numpy's"),
        (np.sinc, TypeError, "NumPy's sinc(z)"),
        (functools.partial(np.maximum, 0), TypeError, "NumPy's maximum(0, z)"),
        (Leaky(), TypeError, "is hashable, got Leaky.*frozen"),
        (nnx.PReLU(), TypeError, "got PReLU with arrays of its own; .*LinkedPReLU"),
        (nnx.BatchNorm(3, rngs=nnx.Rngs(0)), TypeError, "got BatchNorm with arrays"),
        (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), TypeError, "got Dropout with arrays"),
        (LinkedPReLU(3), TypeError, "pass link=LinkedPReLU"),
        (nnx.PReLU, TypeError, "a function of z, got <class"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,  # a repr has an address: other ids in each worker
)
def test_what_is_no_member_is_refused(member, error, words):
    words = words.replace("(", r"\(").replace(")", r"\)")
    for build in (linked, lambda g: Link((jnp.sin, g)), lambda g: jax.eval_shape(lambda z: linked(g)(z), 1.0)):
        with pytest.raises(error, match=words) as raised:
            build(member)
        assert len(str(raised.value).splitlines()) == 1


STACKED = (lambda z: jnp.stack([z, 0 * z]).max(0), lambda z: jnp.polyval(jnp.ones(3), z))


@pytest.mark.parametrize(
    "member",
    [
        FrozenLeaky(),
        lambda z: prelu(z, jnp.full(6, 0.1)),
        lambda z: prelu(z, jnp.full(7, 0.1)),
        lambda z: prelu(z, jnp.full((7, 1, 1), 0.1)),
        jax.vmap(jax.vmap(jax.nn.relu)),
        functools.partial(jnp.where, True),  # cannot be called with z alone
        jnp.vectorize(lambda z: z + 1),
        jax.tree_util.Partial(jnp.multiply, jnp.ones(3)),
        nnx.relu,
        jax.nn.relu6,
        jnp.log,
        *STACKED,
    ],
)
def test_what_may_be_a_member_is_taken(member):
    assert linked(member).arity == 2
    jax.eval_shape(lambda z: (linked(member), z)[1], 1.0)


@pytest.mark.slow
def test_the_named_links_are_made_without_a_device():
    code = (
        "import linked_jax, linked_jax.linen, jax; linked_jax.linked(jax.nn.mish);"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("z", first_fast([3, True, jnp.arange(3), jnp.array([True]), np.arange(3)]), ids=str)
def test_integer_z_is_refused_with_the_remedy(z):
    with pytest.raises(TypeError, match=re.escape("pass z.astype")):
        linked(jax.nn.relu)(z)


def test_integer_z_is_refused_by_the_type_checker_too():
    with pytest.raises(TypeError, match="Float"):
        linked(jax.nn.relu)(jnp.arange(3))


@pytest.mark.parametrize("arity", first_fast([1, 2]))
@pytest.mark.parametrize("axis", first_fast([2, -3]))
def test_axis_outside_z_is_refused(axis, arity):
    with pytest.raises(ValueError, match=f"axis {axis} is outside"):
        Link((jnp.sin,) * arity, axis=axis)(jnp.zeros((2, 3)))


@pytest.mark.parametrize(
    "member", first_fast([jnp.sum, lambda z: z[..., None], lambda z: jnp.concatenate([z[None], -z[None]])])
)
def test_a_member_that_changes_the_shape_is_refused(member):
    with pytest.raises(ValueError, match="shape"):
        linked(member)(jnp.zeros((2, 3)))


# --- the derivative at zero ---------------------------------------------------------------------------------------


def slope_at(g, z, step):
    return (g(z + step) - g(z)) / step


@pytest.mark.slow
def test_jacobian_at_zero_is_the_limit_from_the_right():
    """Against finite differences in float64 of the members, without autodiff, at 0.0 and -0.0."""
    with jax.enable_x64(True):
        limits = for_all(AT_ZERO, lambda link, z: jnp.stack([slope_at(g, z, 1e-9) for g in link.members]), 0.0)
    forward = for_all(AT_ZERO, lambda link, z: jax.vmap(jax.jacfwd(link))(z), ZEROS)
    reverse = for_all(AT_ZERO, lambda link, z: jax.vmap(jax.jacrev(link))(z), ZEROS)
    for name, limit in limits.items():
        assert np.any(limit), name
        np.testing.assert_allclose(forward[name], [limit, limit], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(reverse[name], [limit, limit], rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", first_fast([jnp.float16, jnp.bfloat16, jnp.float64]))
def test_jacobian_at_zero_is_that_of_the_members_next_to_it(dtype):
    def slopes(g, z):
        return jax.jvp(g, (z,), (jnp.ones_like(z),))[1].astype(jnp.float32).reshape(-1, z.size)

    links = {name: link for name, link in AT_ZERO.items() if name != "faint_relu" or dtype != jnp.float16}
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    with jax.enable_x64(dtype == jnp.float64):
        near = jnp.full(2, tiny, dtype)
        plain = for_all(links, lambda link, z: jnp.concatenate([slopes(g, z) for g in link.members]), near)
        actual = for_all(links, slopes, ZEROS.astype(dtype))
    for name in links:
        assert np.any(actual[name], axis=0).all(), name
        np.testing.assert_allclose(actual[name], plain[name], rtol=4 * eps, atol=2 * tiny, err_msg=name)


@pytest.mark.slow
def test_jacobian_at_zero_of_an_eager_call():
    for zero in (0.0, -0.0):
        np.testing.assert_array_equal(jax.jacfwd(linked(jax.nn.relu))(zero), [1, 0])
        np.testing.assert_array_equal(jax.jacrev(linked(jax.nn.relu))(zero), [1, 0])


@pytest.mark.slow
def test_second_derivatives_at_zero_are_finite():
    for name, hessian in for_all(AT_ZERO, lambda link, z: jax.vmap(jax.hessian(link))(z), ZEROS).items():
        assert np.isfinite(hessian).all(), name


@pytest.mark.parametrize(("g", "second"), first_fast([(jax.nn.silu, 0.5), (jax.nn.gelu, 0.7978846), (jnp.square, 2.0)]))
def test_smooth_second_derivatives_survive_at_zero(g, second):
    hessian = jax.jit(lambda z: jax.vmap(jax.hessian(linked(g)))(z))(ZEROS)
    np.testing.assert_allclose(hessian, np.full((2, 2), second), rtol=1e-6)


def power_1_5(z):
    safe = jnp.where(z == 0, 1, z)
    return jnp.where(z == 0, 0, jnp.abs(safe) ** 1.5)


@pytest.mark.parametrize("jacobian", first_fast([jax.jacfwd, jax.jacrev]))
@pytest.mark.parametrize("g", first_fast([jnp.square, jnp.cos, power_1_5]))
def test_smooth_flat_mirrors_stay_dead_at_zero(g, jacobian):
    np.testing.assert_array_equal(jax.vmap(jacobian(linked(g)))(ZEROS), np.zeros((2, 2)))


@pytest.mark.parametrize("g", first_fast([jax.nn.relu, jax.nn.relu6, where_relu, jnp.abs, lambda z: jnp.maximum(z, 0)]))
def test_one_member_keeps_its_own_derivative_at_zero(g):
    assert jax.jacobian(Link((g,)))(0.0)[0] == jax.grad(g)(0.0)


def test_plain_relu_keeps_derivative_zero_at_zero():
    assert jax.grad(lambda z: Link((jax.nn.relu,))(z).sum())(0.0) == 0


@pytest.mark.slow
def test_member_that_needs_an_axis():
    gradient = jax.grad(lambda z: linked(jax.vmap(jax.nn.relu))(z)[:2].sum())(ZEROS)
    np.testing.assert_array_equal(gradient, [1, 1])


def loss(link, z):
    weights = jnp.arange(1.0, 1 + link.arity * z.shape[-1])
    return (link(z) * weights).sum()


@pytest.mark.parametrize("slope", first_fast([0.25, -0.5]))
def test_member_over_a_traced_value_has_both_gradients(slope):
    z = jnp.array([-2.0, -0.0, 0.0, 3.0])
    weights = np.arange(1.0, 9.0)
    gradients = jax.jit(jax.grad(lambda a, z: loss(linked(lambda z: prelu(z, a)), z), argnums=(0, 1)))
    by_slope, by_z = gradients(jnp.float32(slope), z)
    negative = np.array([-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -3.0])  # where a member is on its slope: slope * this
    np.testing.assert_allclose(by_slope, negative @ weights, rtol=1e-6)
    jacobian = np.array([[slope, 1, 1, 1], [-1, -slope, -slope, -slope]])
    np.testing.assert_allclose(by_z, (jacobian * weights.reshape(2, 4)).sum(0), rtol=1e-6)


@pytest.mark.slow
def test_member_over_a_vmapped_value_has_both_gradients():
    slopes = jnp.array([0.25, 0.0, -0.5])
    jacobian = jax.vmap(lambda a: jax.jacobian(linked(lambda z: prelu(z, a)))(0.0))(slopes)
    np.testing.assert_allclose(jacobian, np.stack([np.ones(3), -slopes], axis=-1), rtol=1e-6)


# --- transformations ----------------------------------------------------------------------------------------------


def by_jit(f):
    f = jax.jit(f)
    return lambda rows: jnp.stack([f(rows[0]), f(rows[1])])


def by_shard_map(f):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    return jax.jit(jax.shard_map(jax.vmap(f), mesh=mesh, in_specs=spec, out_specs=spec))


TRANSFORMS = {
    "jit": by_jit,
    "vmap": lambda f: jax.jit(jax.vmap(f)),
    "scan": lambda f: lambda rows: jax.lax.scan(lambda _, row: (None, f(row)), None, rows)[1],
    "checkpoint": lambda f: jax.jit(jax.checkpoint(jax.vmap(f))),
    "shard_map": by_shard_map,
    "pmap": lambda f: jax.pmap(f),
}
over_transforms = pytest.mark.parametrize("transform", first_fast(TRANSFORMS.values()), ids=TRANSFORMS)
ROWS = jnp.array([[-2.0, 0.0, 0.3], [1.0, -0.0, -0.4]])


def expected_gradient(link, z):
    """Of `loss`, from each member's plain derivative, with the limit from the right at zero."""
    z = jnp.where(z == 0, jnp.finfo(z.dtype).tiny, z)
    slopes = jnp.concatenate([jax.jvp(member, (z,), (jnp.ones_like(z),))[1] for member in link.members])
    return (slopes * jnp.arange(1.0, 1 + slopes.size)).reshape(link.arity, -1).sum(0)


@functools.cache
def expected_gradients():
    return for_all(LINKS, lambda link, rows: jnp.stack([expected_gradient(link, row) for row in rows]), ROWS)


def test_there_are_two_devices():
    assert len(jax.devices("cpu")) == 2


@pytest.mark.slow
@over_transforms
def test_gradient_through_a_transformation(transform):
    names = ("lk_relu", "lk_elu", "lk_swish", "min_max", "fourier")  # kinked in each way, smooth, and not a mirror

    def losses(z):
        return jnp.stack([loss(LINKS[name], z) for name in names])

    actual = jax.jacrev(lambda rows: transform(losses)(rows).sum(0))(ROWS)
    for name, gradient in zip(names, actual, strict=True):
        np.testing.assert_allclose(gradient, expected_gradients()[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
@over_transforms
@pytest.mark.parametrize("g", first_fast([where_relu, jnp.abs, jax.nn.silu]))
def test_gradient_inside_a_transformation_of_a_new_member(g, transform):
    link = linked(lambda z: g(z))  # a function not seen before: its derivative at zero is measured inside the trace
    gradient = transform(jax.grad(functools.partial(loss, link)))(ROWS)
    np.testing.assert_allclose(gradient, [expected_gradient(link, z) for z in ROWS], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_jvp_agrees_with_the_gradient():
    tangent = jnp.array([[0.5, -1.5, 2.0], [1.0, 1.0, -3.0]])

    def directional(link, rows):
        return jax.jvp(jax.vmap(functools.partial(loss, link)), (rows,), (tangent,))[1]

    for name, actual in for_all(LINKS, directional, ROWS).items():
        expected = (expected_gradients()[name] * tangent).sum(-1)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_hessian_is_diagonal_and_matches_differences():
    def hessian_and_differences(link, z, step=1e-5):
        gradient = jax.grad(functools.partial(loss, link))
        return jax.jacfwd(gradient)(z), (gradient(z + step) - gradient(z - step)) / (2 * step)

    with jax.enable_x64(True):
        results = for_all(LINKS, hessian_and_differences, jnp.array([-1.7, 0.6, 2.3]))
    for name, (hessian, differences) in results.items():
        np.testing.assert_allclose(hessian, np.diag(differences), rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.slow
def test_jacobian_matches_finite_differences():
    @jax.jit
    def every_value(z):
        return jnp.concatenate([link(z) for link in LINKS.values()])

    with jax.enable_x64(True):
        z = jnp.array([-3.1, -0.7, 0.4, 2.9])  # away from kinks
        jax.test_util.check_grads(every_value, (z,), order=1, modes=("fwd", "rev"))


def test_gradient_is_finite_far_out():
    far = for_all(LINKS, lambda link, z: jax.grad(functools.partial(loss, link))(z), jnp.array([-1e3, 1e3]))
    for name, gradient in far.items():
        assert np.isfinite(gradient).all(), name
