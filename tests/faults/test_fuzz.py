"""Generated arrays for the public API, and generated command lines: a right result, or an error in one line."""

import contextlib
import io
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import linked_jax
from experiments import allcnn, depth, resnet50, width
from experiments.charlm import __main__ as charlm
from experiments.engine.checks import command_line
from experiments.engine.errors import UsageError
from experiments.load_forecast import __main__ as load_forecast
from experiments.plasticity import __main__ as plasticity
from experiments.plasticity import regression
from experiments.plasticity.kumar import command as kumar
from experiments.remedies import __main__ as remedies
from experiments.revive import __main__ as revive
from linked_jax import linked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]
fault = pytest.mark.fault
LINKS, LAYERS, TABLES, STUDIES = 4500, 1500, 1000, 3000


def one_line(error):
    return len(str(error).strip().splitlines()) == 1


def outcome(call, *refusals):
    """What it gives, and None; or None, and the refusal that it raises."""
    try:
        return call(), None
    except refusals as error:
        return None, error


# --- links against NumPy in float64


def sigmoid(z):
    return 0.5 * (1 + np.tanh(z / 2))


MEMBERS = {  # name: JAX' function, and NumPy's
    "relu": (jax.nn.relu, lambda z: np.maximum(z, 0.0)),
    "tanh": (jnp.tanh, np.tanh),
    "silu": (jax.nn.silu, lambda z: z * sigmoid(z)),
    "abs": (jnp.abs, np.abs),
    "leaky": (jax.nn.leaky_relu, lambda z: np.where(z >= 0, z, 0.01 * z)),
}
SHAPES = [(), (0,), (1,), (3,), (2, 3), (0, 3), (3, 0), (2, 1, 3), (2, 0, 3), (1, 2, 2, 3)]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_, np.float64, np.complex64]
VALUES = [0.0, -0.0, 1.0, -1.0, 1e-40, 3e38, -3e38, 1e-8, 88.0, -88.0, 7.5, -0.3, math.inf, -math.inf, math.nan]


def expected(members, z, axis, interleaved):
    parts = [g(z) for g in members]
    if z.ndim == 0:
        return np.stack(parts)
    if interleaved:
        axis %= z.ndim
        shape = (*z.shape[:axis], len(parts) * z.shape[axis], *z.shape[axis + 1 :])
        return np.stack(parts, axis=axis + 1).reshape(shape)
    return np.concatenate(parts, axis=axis)


@fault("input", "links: shapes, dtypes, empty arrays, extremes, wrong axes")
def test_a_link_of_anything_is_numpys_or_an_error(record_property):
    @settings(max_examples=LINKS)
    @given(
        st.sampled_from(sorted(MEMBERS)), st.sampled_from([None, *sorted(MEMBERS)]), st.sampled_from(SHAPES),
        st.sampled_from(DTYPES), st.sampled_from([-1, -1, -1, 0, 1, 3, -5]), st.booleans(),
        st.lists(st.sampled_from(VALUES), min_size=12, max_size=12),
    )  # fmt: skip
    def check(g, h, shape, dtype, axis, interleaved, values):
        chosen = [MEMBERS[name] for name in (g, h) if name]
        with np.errstate(all="ignore"):
            z = np.resize(np.array(values), math.prod(shape)).reshape(shape).astype(dtype)
        is_floating = jnp.issubdtype(dtype, jnp.floating)
        link = linked(*(f for f, _ in chosen), axis=axis, layout="interleaved" if interleaved else "blocked")
        found, error = outcome(lambda: link(jnp.asarray(z)), TypeError, ValueError)
        if error:
            assert one_line(error)
            assert not is_floating or not -len(shape) <= axis < len(shape)
            return
        assert is_floating
        numpys = [f for _, f in chosen] if h else [chosen[0][1], lambda z: chosen[0][1](-z)]
        seen = np.asarray(jnp.asarray(z), np.float64)
        with np.errstate(all="ignore"):
            want = expected(numpys, seen, axis, interleaved)
        assert found.shape == want.shape
        assert found.dtype == (z.dtype if z.dtype in (np.float16, ml_dtypes.bfloat16) else np.float32)
        limits = jnp.finfo(found.dtype)
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(
                np.asarray(found, np.float64), want.astype(found.dtype).astype(np.float64),
                rtol=8 * float(limits.eps), atol=4 * float(limits.tiny),
            )  # fmt: skip

    check()
    record_property("tried", LINKS)


# --- layers and functions


ODD = st.one_of(
    st.sampled_from(
        [0, -1, 1, 2, 3, 2.5, math.nan, math.inf, None, "", "relu", "lk_relu", True, (), (3,), (3, 3), [1]]
    ),
    st.sampled_from([np.zeros(3), np.zeros((2, 3)), np.zeros((0, 4)), jnp.ones((2, 4, 3)), np.array(1), object()]),
)
CALLS = [
    lambda a, b, c: linked_jax.LinkedLinear(a, b, rngs=nnx.Rngs(0))(c),
    lambda a, b, c: linked_jax.LinkedConv(a, b, (3,), rngs=nnx.Rngs(0))(c),
    lambda a, b, c: linked_jax.LinkedPReLU(a, negative_slope=b)(c),
    lambda a, b, c: linked_jax.ChannelPReLU(a, negative_slope=b)(c),
    lambda a, b, c: linked_jax.get_activation(a, b)(c),
    lambda a, b, c: linked_jax.linked(jax.nn.relu, axis=a, layout=b)(c),
    lambda a, b, c: linked_jax.looks_linear(a)(jax.random.key(0), b, c),
    lambda a, b, c: linked_jax.default_kernel_init(a)(jax.random.key(0), b),
    lambda a, b, c: linked_jax.live_units(c, arity=a, layout=b),
    lambda a, b, c: linked_jax.embed_plain_kernel(c, a, member=b),
    lambda a, b, c: linked_jax.gain(a),
    lambda a, b, c: linked_jax.prelu(c, a),
    lambda a, b, c: linked_jax.inverse_time_decay(a, b)(jnp.asarray(c)),
]


@fault("input", "layers, initialisers, diagnostics: arguments of any kind")
def test_arguments_of_any_kind_are_taken_or_refused_in_one_line(record_property):
    @settings(max_examples=LAYERS)
    @given(st.sampled_from(range(len(CALLS))), ODD, ODD, ODD)
    def check(call, a, b, c):
        found, error = outcome(lambda: CALLS[call](a, b, c), TypeError, ValueError)
        assert error is None or one_line(error), error
        jax.block_until_ready(found)

    check()
    record_property("tried", LAYERS)


@fault("input", "links of tracers: jit, grad, vmap and shapes alone")
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_tracers(shape):
    link, z = linked(jax.nn.silu), jnp.full(shape, 0.7)
    doubled = (*shape[:-1], 2 * shape[-1])
    assert jax.eval_shape(link, z).shape == doubled
    np.testing.assert_allclose(jax.jit(link)(z), link(z), rtol=1e-6)
    assert jax.grad(lambda z: link(z).sum())(z).shape == shape
    if shape[0] and len(shape) > 1:
        np.testing.assert_allclose(jax.vmap(link)(z), link(z), rtol=1e-6)


# --- command lines


COMMANDS = {
    "depth": depth.TABLE, "width": width.TABLE, "allcnn": allcnn.TABLE, "resnet50": resnet50.TABLE,
    "charlm": charlm, "remedies": remedies, "revive": revive, "plasticity": plasticity, "load_forecast": load_forecast,
    "regression": regression, "kumar": kumar,
}  # fmt: skip
WORDS = [
    "relu", "lk_relu", "all", "rleu", "", "0", "1", "-1", "3", "1e-3", "nan", "inf", "1e400", "digits", "../x", "\x00",
    "--", "-h", "yes", "True", "None", "9" * 40, "a" * 300, "auto", "glorot", "skip", "quick", "{}", "$(x)", "%s",
]  # fmt: skip


def names(command):
    kind = type(command.presets["auto"]) if hasattr(command, "presets") else command.Settings
    return [f"--{name.replace('_', '-')}" for name in kind.__dataclass_fields__]


def parsed(name, words):
    command = COMMANDS[name]
    if hasattr(command, "parse"):
        return command.check(command.parse(words))
    return command.check(command_line(command.Settings, name, words))


def check_commands(which, count):
    @settings(max_examples=count)
    @given(st.sampled_from(which), st.data())
    def check(name, data):
        option = st.sampled_from([*names(COMMANDS[name]), "--nosuch", "--no-stress"])
        pairs = st.tuples(option, st.lists(st.sampled_from(WORDS), max_size=2))
        words = [word for option, values in data.draw(st.lists(pairs, max_size=4)) for word in (option, *values)]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            _, error = outcome(lambda: parsed(name, words), UsageError, SystemExit)
        if isinstance(error, UsageError):
            assert one_line(error), words
        if isinstance(error, SystemExit):
            assert error.code in (0, 2), words
            assert said.getvalue().strip(), words
            assert "Traceback" not in said.getvalue()

    check()


@fault("input", "command lines of tables")
def test_command_lines_of_tables(record_property):
    check_commands([name for name in COMMANDS if hasattr(COMMANDS[name], "presets")], TABLES)
    record_property("tried", TABLES)


@fault("input", "command lines of studies")
def test_command_lines_of_studies(record_property):
    check_commands([name for name in COMMANDS if not hasattr(COMMANDS[name], "presets")], STUDIES)
    record_property("tried", STUDIES)
