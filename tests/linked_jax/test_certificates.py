import dataclasses
import functools
import itertools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax import certificates
from linked_jax.activations import ACTIVATIONS
from linked_jax.certificates import certify, main
from linked_jax.learned import LinkedPReLU
from linked_jax.linking import Link, linked
from tests.cases import first_fast

LINKS = {n: f for n, f in ACTIVATIONS.items() if isinstance(f, Link) and f.arity > 1 and n != "crelu"}  # lk_relu again
LINKED = {name: link for name, link in LINKS.items() if name not in ("lk_tanh", "lk_sigmoid")}

over_linked = pytest.mark.parametrize("name", first_fast(LINKED))
half_precision = pytest.mark.parametrize("dtype", first_fast([jnp.float16, jnp.bfloat16]))


def pair_on_last_axis(z):
    return jnp.concatenate([jnp.sin(z), jnp.tanh(z)], axis=-1)


def staircase(z):
    return jnp.where(jnp.floor(z) % 2 == 0, z, 0 * z)


CASES = {
    "lk_swish": LINKS["lk_swish"],
    "lk_tanh": LINKS["lk_tanh"],
    "fourier": LINKS["fourier"],
    "relu": ACTIVATIONS["relu"],
    "relu6": linked(jax.nn.relu6),
    "jax_gelu": linked(jax.nn.gelu),
    "square": linked(jnp.square),
    "reciprocal": linked(jnp.reciprocal),
    "channels_first": linked(jnp.tanh, jax.nn.sigmoid, jnp.sin, axis=1, layout="interleaved"),
    "function": jax.nn.relu6,
    "pair": pair_on_last_axis,
    "staircase": staircase,
}


@functools.cache
def certificate_of(name, dtype):
    return certify({**LINKS, **CASES}[name], dtype)


def brute_force(link, dtype):
    """Every finite value in rising order, and max_i |g_i'(z)| there (NaN where one is not finite), by NumPy."""
    z = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    with np.errstate(invalid="ignore"):  # bfloat16 warns of signalling NaNs
        z = z[np.isfinite(z)]
    z = z[np.lexsort((~np.signbit(z), z.astype(np.float64)))]  # -0.0 before 0.0
    column = jnp.asarray(z)[:, None]
    if isinstance(link, Link):
        link = dataclasses.replace(link, axis=-1)
    gradients = jax.jit(lambda z: jax.jvp(link, (z,), (jnp.ones_like(z),))[1])(column)
    gradients = np.abs(np.asarray(gradients, np.float64))
    finite = np.isfinite(gradients).all(-1)
    return z.astype(np.float64), np.where(finite, np.where(finite[:, None], gradients, 0).max(-1), np.nan)


def runs(z, mask):
    groups = itertools.groupby(zip(z, mask, strict=True), key=lambda pair: pair[1])
    members = ([value for value, _ in group] for is_in, group in groups if is_in)
    return tuple((run[0], run[-1]) for run in members)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    first_fast(
        [(name, jnp.float16) for name in CASES]
        + [(name, jnp.bfloat16) for name in ("lk_swish", "relu6", "reciprocal", "square")]
    ),
)
def test_certificate_agrees_with_brute_force(name, dtype):
    certificate = certificate_of(name, dtype)
    z, largest = brute_force(CASES[name], dtype)
    dead, bad = runs(z, largest == 0), np.isnan(largest)
    assert certificate.num_inputs == z.size
    assert certificate.min_gradient == np.nanmin(largest)
    assert certificate.min_gradient in largest[z == certificate.argmin]
    # repr tells -0.0 from 0.0
    assert repr(certificate.dead_intervals) == repr(tuple((float(low), float(high)) for low, high in dead[:64]))
    assert certificate.dead_interval_count == len(dead)
    assert certificate.nonfinite_count == bad.sum()
    if bad.any():
        # The CPU takes denormals for zeros, so that among them none is nearer to zero.
        assert abs(certificate.first_nonfinite) == pytest.approx(np.abs(z[bad]).min(), abs=float(jnp.finfo(dtype).tiny))
        assert certificate.first_nonfinite in z[bad]
    else:
        assert certificate.first_nonfinite is None
    assert certificate.linked == (not dead and not bad.any())
    flat = runs(z, (largest < 1e-3) & (np.abs(z) <= 10))
    assert certificate.dead_band == pytest.approx(sum(high - low for low, high in flat) / 20, rel=1e-12)
    assert certificate.dtype == jnp.dtype(dtype).name
    assert certificate.platform == jax.default_backend()


@half_precision
@over_linked
def test_linked_link_holds_its_certificate(name, dtype):
    certificate = certificate_of(name, dtype)
    assert certificate.linked
    assert certificate.min_gradient > 0


@pytest.mark.slow
@half_precision
def test_mirror_of_relu6_is_dead_exactly_beyond_its_clip(dtype):
    below, largest = -6.0, float(jnp.finfo(dtype).max)
    assert certificate_of("relu6", dtype).dead_intervals == ((-largest, below), (-below, largest))


@half_precision
@pytest.mark.parametrize("name", first_fast(["lk_tanh", "lk_sigmoid"]))
def test_saturating_mirrors_are_not_linked(name, dtype):
    certificate = certificate_of(name, dtype)
    assert not certificate.linked
    assert certificate.dead_interval_count == 2


@pytest.mark.slow
def test_jax_gelu_breaks_in_float16_and_lk_gelu_does_not():
    broken = certificate_of("jax_gelu", jnp.float16)
    assert not broken.linked
    assert 100 < broken.first_nonfinite <= 256  # 256 with jax 0.10, 147.875 with jax 0.12
    assert certificate_of("lk_gelu", jnp.float16).nonfinite_count == 0


@pytest.mark.slow
@pytest.mark.parametrize("g", first_fast([jnp.square, jnp.cos]))
def test_smooth_flat_mirrors_are_dead_at_exactly_zero(g):
    assert repr(certify(linked(g), jnp.float16).dead_intervals) == "((-0.0, 0.0),)"


@pytest.mark.parametrize("g", first_fast([jnp.square, jnp.cos]))
def test_smooth_flat_mirrors_are_dead_at_zero_and_flushed_denormals(g):
    certificate = certify(linked(g), jnp.bfloat16)
    assert certificate.dead_interval_count == 1
    low, high = certificate.dead_intervals[0]
    assert low <= 0 <= high
    assert high == -low < float(jnp.finfo(jnp.bfloat16).tiny)


def test_many_dead_intervals_are_all_counted_and_the_first_64_kept():
    certificate = certificate_of("staircase", jnp.float16)
    assert certificate.dead_interval_count > 1000
    assert len(certificate.dead_intervals) == 64
    assert certificate.dead_intervals == tuple(sorted(certificate.dead_intervals))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    first_fast(
        [
            "relu6",
            "staircase",
            "lk_swish",
            "jax_gelu",
        ]
    ),
)
def test_the_chunk_size_changes_nothing(name, monkeypatch):
    whole = certificate_of(name, jnp.float16)
    monkeypatch.setattr(certificates, "_CHUNK", 2**10)
    chunked = certify(CASES[name], jnp.float16)
    assert dataclasses.replace(chunked, seconds=0.0) == dataclasses.replace(whole, seconds=0.0)


def test_progress_rises_to_one(monkeypatch):
    monkeypatch.setattr(certificates, "_CHUNK", 2**12)
    shares = []
    certify(LINKS["lk_relu"], jnp.bfloat16, progress=shares.append)
    assert len(shares) == 16
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("dtype", "word"),
    first_fast(
        [
            (np.float64, "float64"),
            ("float64", "centuries"),
            (jnp.int32, "int32"),
            (bool, "bool"),
            (None, "got None"),
            ("bf16", "float32, bfloat16, float16; got 'bf16'"),
            (3, "got 3"),
        ]
    ),
)
def test_other_dtypes_are_refused(dtype, word):
    with pytest.raises(ValueError, match=word):
        certify(LINKS["lk_relu"], dtype)


@pytest.mark.usefixtures("unchecked")
def test_a_link_that_is_not_callable_is_refused():
    with pytest.raises(TypeError, match="needs a link or a function"):
        certify("lk_relu", jnp.bfloat16)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("f", "error", "words"),
    [
        (lambda z: z.sum(), ValueError, r"each row on its own, got <lambda>, which makes \(\) of \(8, 1\)"),
        (lambda z: (z, z), ValueError, "no array"),
        (lambda z: z.T, ValueError, "elementwise"),
        (jax.nn.softmax, ValueError, "elementwise function, .* got softmax"),
        (lambda z: z / z.sum(), ValueError, "elementwise"),
        (lambda z: jnp.concatenate([jax.nn.relu(z - z.mean(0)), -z], -1), ValueError, "each row on its own, got <lam"),
        (lambda z: jnp.concatenate([-z, jnp.cumsum(z, 0)], -1), ValueError, "each row on its own"),
        (lambda z: z if z.sum() > 0 else 0 * z, TypeError, "that jax.jit can trace, got <lambda>"),
        (lambda z: z if z > 0 else -z, TypeError, r"that jax.jit can trace, got <lambda>; write jnp.where"),
        (lambda z: (z > 0).astype(jnp.int32), TypeError, "floating-point outputs, got <lambda> with int32"),
        (np.tanh, TypeError, "from jax.numpy, got NumPy's tanh"),
        (LinkedPReLU, TypeError, "LinkedPReLU"),
        (None, TypeError, "got None"),
    ],
)
def test_what_is_not_elementwise_is_refused(f, error, words):
    with pytest.raises(error, match=words) as raised:
        certify(f, jnp.bfloat16)
    assert len(str(raised.value).splitlines()) == 1


@jax.custom_vjp
def steep_relu(z):
    return jnp.maximum(z, 0)


steep_relu.defvjp(lambda z: (steep_relu(z), z), lambda z, g: (2 * g * (z > 0),))


@pytest.mark.slow
def test_a_custom_vjp_is_pulled_back():
    certificate = certify(linked(steep_relu), jnp.bfloat16)
    assert certificate.linked
    assert certificate.min_gradient == 2
    one = certify(steep_relu, jnp.bfloat16)
    ((low, high),) = one.dead_intervals
    assert low == -float(jnp.finfo(jnp.bfloat16).max)
    assert 0 <= high < float(jnp.finfo(jnp.bfloat16).tiny)  # and denormals, which the CPU takes for zeros
    assert certify(LinkedPReLU(1), jnp.bfloat16).linked


@pytest.mark.slow
@pytest.mark.parametrize("switch", [jax.debug_nans, jax.debug_infs])
def test_the_verdict_is_the_same_while_someone_hunts_nan(switch):
    with switch(True):
        found = certify(linked(jax.nn.gelu), jnp.float16)
        assert getattr(jax.config, f"jax_{switch.__name__}", True)
    wanted = certificate_of("jax_gelu", jnp.float16)
    assert dataclasses.replace(found, seconds=0.0) == dataclasses.replace(wanted, seconds=0.0)
    assert not jax.config.jax_debug_nans


@pytest.mark.slow
def test_the_dead_band_of_relu_is_the_half_line_and_its_mirror_has_none():
    assert certificate_of("relu", jnp.bfloat16).dead_band == pytest.approx(0.5)
    assert certificate_of("relu6", jnp.bfloat16).dead_band == 0.4  # mirrored: beyond 6 on both sides
    assert certificate_of("lk_swish", jnp.bfloat16).dead_band == 0


def test_text_tells_the_findings():
    text = str(certificate_of("relu6", jnp.bfloat16))
    band = "dead band        40.00% of [-10, 10]"
    for words in ("NO", "65,280", "dead intervals   2", "[6, 3.38953e+38]", "non-finite       0", band):
        assert words in text


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command_lines():
    """Real processes, side by side: most of their time is importing JAX."""
    arguments = {
        "linked": ("linked_jax.certificates", "lk_swish", "--dtype", "bfloat16"),
        "certify": ("linked_jax", "certify", "lk_prelu", "--dtype", "bfloat16"),
        "unknown": ("linked_jax", "certify", "lk_swosh"),
        "other": ("linked_jax", "prove", "lk_swish"),
    }
    command = [sys.executable, "-W", "error", "-m"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {name: subprocess.Popen([*command, *words], **pipe) for name, words in arguments.items()}
    return {name: (*process.communicate(timeout=120), process.returncode) for name, process in started.items()}


@pytest.mark.slow
def test_command_for_a_linked_activation(command_lines):
    out, _, code = command_lines["linked"]
    assert code == 0
    assert "activation       lk_swish\nlinked           yes\n" in out
    out, _, code = command_lines["certify"]
    assert code == 0
    assert "activation       lk_prelu\nlinked           yes\n" in out


def test_command_for_one_that_is_not_linked(capsys):
    assert main(["lk_tanh", "--dtype", "float16"]) == 1
    assert "activation       lk_tanh\nlinked           NO\n" in capsys.readouterr().out


@pytest.mark.slow
def test_command_for_an_unknown_name(command_lines):
    out, err, code = command_lines["unknown"]
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "did you mean 'lk_swish'" in err.splitlines()[-1]


@pytest.mark.slow
def test_another_command_is_refused(command_lines):
    assert command_lines["other"] == (
        "", "error: the command is certify, got prove; try python -m linked_jax certify lk_swish\n", 2
    )  # fmt: skip


@pytest.mark.slow
def test_commands_print_one_line_of_error_and_no_warning(command_lines):
    assert command_lines["linked"][1] == command_lines["certify"][1] == ""
    assert len(command_lines["unknown"][1].splitlines()) == 1


# --- every float32 ------------------------------------------------------------------------------------------------

EVERY_FLOAT32 = 4_278_190_080
FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)


def tries_every_float32(test):
    """Compiled as users compile: some minutes become one."""
    return pytest.mark.slow(pytest.mark.optimised(test))


@tries_every_float32
@over_linked
def test_linked_link_holds_its_certificate_in_float32(name):
    certificate = certify(LINKED[name])
    assert certificate.linked
    assert certificate.min_gradient > 0
    assert certificate.num_inputs == EVERY_FLOAT32


@tries_every_float32
def test_mirror_of_relu6_is_dead_exactly_beyond_its_clip_in_float32():
    assert certify(linked(jax.nn.relu6)).dead_intervals == ((-FLOAT32_MAX, -6.0), (6.0, FLOAT32_MAX))


@tries_every_float32
@pytest.mark.parametrize(("name", "first", "last"), first_fast([("lk_tanh", 7.9, 20), ("lk_sigmoid", 86, 89)]))
def test_saturating_mirrors_are_not_linked_in_float32(name, first, last):
    """Beyond a point all is flat; XLA's tanh for CPUs without AVX2 goes on to 20, with single flat values from 8 on."""
    certificate = certify(LINKS[name])
    (low, edge), *others = found = [interval for interval in certificate.dead_intervals if interval[1] < 0]
    assert not certificate.linked
    assert low == -FLOAT32_MAX
    assert -last <= edge <= -first
    assert all(edge < low <= high <= -first for low, high in others)
    if len(certificate.dead_intervals) == certificate.dead_interval_count:  # all are kept
        assert certificate.dead_intervals == (*found, *((-high, -low) for low, high in reversed(found)))
    edge = {"lk_tanh": np.arctanh(0.999**0.5), "lk_sigmoid": 2 * np.arctanh(0.996**0.5)}[name]  # of g' = 0.001
    assert certificate.dead_band == pytest.approx(1 - edge / 10, rel=1e-4)  # float32 rounds 1 - tanh² so much


@tries_every_float32
def test_jax_gelu_breaks_in_float32():
    certificate = certify(linked(jax.nn.gelu))
    assert not certificate.linked
    assert abs(certificate.first_nonfinite) == pytest.approx(1.8e19, rel=0.05)


@tries_every_float32
@pytest.mark.parametrize("g", first_fast([jnp.square, jnp.cos]))
def test_smooth_flat_mirrors_are_dead_at_zero_in_float32(g):
    certificate = certify(linked(g))
    assert certificate.dead_interval_count == 1
    low, high = certificate.dead_intervals[0]
    assert low <= 0 <= high
    assert high == -low < float(jnp.finfo(jnp.float32).tiny)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_one_gibibyte():
    script = (
        "import jax; from linked_jax import linking, certificates;"
        "certificates.certify(linking.linked(jax.nn.relu6));"
        "print(open('/proc/self/status').read())"  # not getrusage: its peak is that of the parent at the fork
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout).group(1))
    assert kibibytes < 2**20


@pytest.mark.slow
@half_precision
def test_the_least_gradient_of_a_mirror_with_slopes_is_1(dtype):
    """One member is on its steep side everywhere, also at the smallest normal numbers beside the denormals."""
    assert certify(ACTIVATIONS["lk_leaky_relu"], dtype).min_gradient == 1.0
