import functools
import unittest

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import parameterized

from linked_jax import read_out
from linked_jax.activations import ACTIVATIONS, crelu, lk_relu, prelu, smooth_leaky
from linked_jax.linking import Link, linked
from tests.cases import first_fast

pytestmark = pytest.mark.optimised

# A variant that cannot run is a failure, not a skip.
flags.FLAGS["chex_assert_multiple_cpu_devices"].value = True
flags.FLAGS["chex_skip_pmap_variant_if_single_device"].value = False

NAMED = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link)}
LINKED = {n: f for n, f in NAMED.items() if f.arity > 1 and n not in ("lk_tanh", "lk_sigmoid")}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

PLAIN = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "swish": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def mirror(g):
    return lambda z: jnp.concatenate([g(z), g(-z)])


FORMULAS = {
    **PLAIN,
    **{f"lk_{name}": mirror(g) for name, g in PLAIN.items()},
    "crelu": mirror(jax.nn.relu),
    "min_max": lambda z: jnp.concatenate([jnp.maximum(z, 0), jnp.minimum(z, 0)]),
    "fourier": lambda z: jnp.concatenate([jnp.sin(z), jnp.cos(z)]),
}


def awkward(dtype):
    """Zeros, denormals, the least normal, the values around an ulp, and the largest finite one; both signs."""
    info = jnp.finfo(dtype)
    values = [0, info.smallest_subnormal, 3 * info.smallest_subnormal, info.tiny, 2 * info.tiny, info.eps]
    values += [1, 6, 10, 256, 1e3, info.max]
    values = np.asarray(values, info.dtype)
    return np.concatenate([values, -values])


def finite_arrays(dtype, size=24):
    """The awkward values, and random bit patterns: as many denormals and huge values as ordinary ones."""

    def finite(bits):
        z = bits.view(jnp.dtype(dtype))
        with np.errstate(invalid="ignore"):  # bfloat16 warns of signalling NaNs
            return np.concatenate([awkward(dtype), np.where(np.isfinite(z), z, z.dtype.type(1))])

    return hnp.arrays(np.dtype(f"uint{jnp.finfo(dtype).bits}"), size).map(finite)


# --- values -------------------------------------------------------------------------------------------------------


def test_every_named_link_has_its_formula_here():
    assert set(NAMED) <= set(FORMULAS)


def values_of(table, names):
    return lambda z: {name: table[name](z) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", first_fast([jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]))
@pytest.mark.parametrize("transform", first_fast([lambda f: f, jax.jit]), ids=["eager", "jit"])
def test_values_are_exactly_the_formulas(transform, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        links, formulas = (transform(values_of(table, NAMED)) for table in (NAMED, FORMULAS))

        @hypothesis.settings(max_examples=25 if transform is jax.jit else 2)
        @hypothesis.given(finite_arrays(dtype))
        def check(z):
            actual, expected = links(jnp.asarray(z)), formulas(jnp.asarray(z))
            for name in NAMED:
                assert actual[name].dtype == dtype, name
                np.testing.assert_array_equal(
                    np.asarray(actual[name], np.float64), np.asarray(expected[name], np.float64), err_msg=name
                )

        check()


def test_a_member_of_another_dtype_is_cast_back():
    widening = Link((lambda z: jnp.sin(z.astype(jnp.float32)),))
    assert widening(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", first_fast(PLAIN))
def test_plain_activation_keeps_the_derivative_of_its_function_at_zero(name):
    for zero in (0.0, -0.0):
        assert jax.jacobian(NAMED[name])(zero)[0] == jax.grad(PLAIN[name])(zero)


# --- the linked property, by sampling (test_certificates.py has the proof) ----------------------------------------


class LinkedPropertyTest(chex.TestCase):
    def skipTest(self, reason):
        self.fail(f"a variant was skipped: {reason}")

    @chex.all_variants
    @parameterized.parameters(*DTYPES)
    def test_some_member_has_a_gradient(self, dtype):
        @self.variant
        def gradients(z):
            return {n: jax.jvp(f, (z,), (jnp.ones_like(z),))[1].reshape(f.arity, -1) for n, f in LINKED.items()}

        @hypothesis.settings(max_examples=4)
        @hypothesis.given(finite_arrays(dtype))
        def check(z):
            for name, actual in gradients(z).items():
                actual = np.asarray(actual, np.float64)
                assert np.isfinite(actual).all(), (name, z[~np.isfinite(actual).all(0)])
                assert (actual != 0).any(0).all(), (name, z[(actual == 0).all(0)])

        check()


def test_every_chex_variant_runs():
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(LinkedPropertyTest)
    assert suite.countTestCases() == 5 * len(DTYPES)
    assert jax.device_count("cpu") == 2


def test_crelu_is_lk_relu():
    assert crelu == lk_relu == linked(jax.nn.relu)


# --- prelu --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slope", first_fast([np.float32(0.25), np.array([0.25, 0.0, -1.5], np.float32)]), ids=["scalar", "channel"]
)
def test_prelu_values(slope):
    z = np.array([[-2.0, -0.5, 3.0], [1.0, -4.0, 0.0]], np.float32)
    np.testing.assert_array_equal(prelu(jnp.asarray(z), slope), np.where(z > 0, z, slope * z))


@pytest.mark.parametrize("dtype", first_fast(DTYPES))
def test_prelu_keeps_the_dtype(dtype):
    assert prelu(jnp.ones(3, dtype), jnp.float32(0.25)).dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("slope", first_fast([0.25, 0.0, -1.5]))
def test_prelu_derivative_at_zero_is_its_slope_and_1_when_mirrored(slope):
    for zero in (0.0, -0.0):
        assert jax.grad(lambda z: prelu(z, slope))(jnp.float32(zero)) == slope
        mirrored = linked(lambda z: prelu(z, slope))
        np.testing.assert_array_equal(jax.jacobian(mirrored)(jnp.float32(zero)), [1, -slope])


def test_prelu_gradient_of_the_slopes():
    z = jnp.array([[-2.0, -0.5, 3.0], [1.0, -4.0, -1.0]])
    gradient = jax.grad(lambda slopes: prelu(z, slopes).sum())(jnp.full(3, 0.25))
    np.testing.assert_array_equal(gradient, np.minimum(z, 0).sum(0))


@pytest.mark.slow
@pytest.mark.parametrize("slope", [0.0, 0.3, 0.7])
def test_smooth_leaky_is_its_formula_and_its_mirror_reads_z_back(slope):
    z = np.linspace(-30, 30, 61)
    wanted = slope * z + (1 - slope) * z / (1 + np.exp(-5 * z))
    np.testing.assert_allclose(smooth_leaky(jnp.float32(z), slope), wanted, atol=1e-5)
    assert float(jax.grad(smooth_leaky)(0.0, slope)) == pytest.approx((1 + slope) / 2)
    mirror = linked(functools.partial(smooth_leaky, negative_slope=slope))
    np.testing.assert_allclose(read_out(mirror), [1 / (1 + slope), -1 / (1 + slope)], atol=1e-6)


@pytest.mark.parametrize("name", first_fast(["gelu", "lk_gelu", *ACTIVATIONS]))
def test_nan_goes_in_and_comes_out(name):
    values = ACTIVATIONS[name](jnp.array([[jnp.nan, 1.0]]))
    assert jnp.isnan(values).sum() == ACTIVATIONS[name].arity
    assert not jnp.isnan(ACTIVATIONS[name](jnp.array([[0.0, 30.0]]))).any()


def test_the_derivative_of_gelu_at_nan_is_nan():
    assert jnp.isnan(jax.jacobian(ACTIVATIONS["gelu"])(jnp.nan))


def test_the_slope_of_an_infinite_z_gets_no_nan():
    for z, wanted in ((jnp.inf, 0.0), (-jnp.inf, -jnp.inf), (0.0, 0.0), (-2.0, -2.0)):
        assert jax.grad(prelu, argnums=1)(jnp.array(z), 0.25) == wanted
