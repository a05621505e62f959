import dataclasses
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax import certificates
from linked_jax.activations import ACTIVATIONS
from linked_jax.certificates import certify
from linked_jax.linking import Link, linked

LINKS = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link) and link.arity > 1}
LINKED = {name: link for name, link in LINKS.items() if name not in ("lk_tanh", "lk_sigmoid")}

over_linked = pytest.mark.parametrize("link", LINKED.values(), ids=LINKED)
half_precision = pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])


def pair_on_last_axis(z):
    return jnp.concatenate([jnp.sin(z), jnp.tanh(z)], axis=-1)


def staircase(z):
    return jnp.where(jnp.floor(z) % 2 == 0, z, 0 * z)


CASES = {
    "lk_relu": LINKS["lk_relu"],
    "lk_selu": LINKS["lk_selu"],
    "lk_swish": LINKS["lk_swish"],
    "lk_tanh": LINKS["lk_tanh"],
    "lk_sigmoid": LINKS["lk_sigmoid"],
    "fourier": LINKS["fourier"],
    "relu": ACTIVATIONS["relu"],
    "relu6": linked(jax.nn.relu6),
    "jax_gelu": linked(jax.nn.gelu),
    "square": linked(jnp.square),
    "reciprocal": linked(jnp.reciprocal),
    "three": linked(jnp.tanh, jax.nn.sigmoid, jnp.sin),
    "interleaved": linked(jnp.tanh, layout="interleaved"),
    "channels_first": linked(jnp.tanh, axis=1),
    "function": jax.nn.relu,
    "pair": pair_on_last_axis,
    "staircase": staircase,
}


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


@half_precision
@pytest.mark.parametrize("link", CASES.values(), ids=CASES)
def test_certificate_agrees_with_brute_force(link, dtype):
    certificate = certify(link, dtype)
    z, largest = brute_force(link, dtype)
    dead, bad = runs(z, largest == 0), np.isnan(largest)
    assert certificate.num_inputs == z.size
    assert certificate.min_gradient == np.nanmin(largest)
    assert certificate.min_gradient in largest[z == certificate.argmin]
    # repr tells -0.0 from 0.0
    assert repr(certificate.dead_intervals) == repr(tuple((float(low), float(high)) for low, high in dead[:64]))
    assert certificate.dead_interval_count == len(dead)
    assert certificate.nonfinite_count == bad.sum()
    if bad.any():
        assert abs(certificate.first_nonfinite) == np.abs(z[bad]).min()
        assert certificate.first_nonfinite in z[bad]
    else:
        assert certificate.first_nonfinite is None
    assert certificate.linked == (not dead and not bad.any())
    assert certificate.dtype == jnp.dtype(dtype).name
    assert certificate.platform == jax.default_backend()


@half_precision
@over_linked
def test_linked_link_holds_its_certificate(link, dtype):
    certificate = certify(link, dtype)
    assert certificate.linked
    assert certificate.min_gradient > 0


@half_precision
def test_mirror_of_relu6_is_dead_exactly_beyond_its_clip(dtype):
    below, largest = -6.0, float(jnp.finfo(dtype).max)
    assert certify(linked(jax.nn.relu6), dtype).dead_intervals == ((-largest, below), (-below, largest))


@half_precision
@pytest.mark.parametrize("name", ["lk_tanh", "lk_sigmoid"])
def test_saturating_mirrors_are_not_linked(name, dtype):
    certificate = certify(LINKS[name], dtype)
    assert not certificate.linked
    assert certificate.dead_interval_count == 2


def test_jax_gelu_breaks_in_float16_and_lk_gelu_does_not():
    broken = certify(linked(jax.nn.gelu), jnp.float16)
    assert not broken.linked
    assert abs(broken.first_nonfinite) == 256
    assert certify(LINKS["lk_gelu"], jnp.float16).nonfinite_count == 0


@pytest.mark.parametrize(("g", "dtype"), [(jnp.square, jnp.bfloat16), (jnp.cos, jnp.bfloat16), (jnp.cos, jnp.float16)])
def test_smooth_flat_mirrors_are_dead_around_zero(g, dtype):
    certificate = certify(linked(g), dtype)
    assert not certificate.linked
    assert certificate.dead_interval_count == 1
    low, high = certificate.dead_intervals[0]
    assert low <= 0 <= high
    assert high == -low < float(jnp.finfo(dtype).tiny)


def test_many_dead_intervals_are_all_counted_and_the_first_64_kept():
    certificate = certify(staircase, jnp.float16)
    assert certificate.dead_interval_count > 1000
    assert len(certificate.dead_intervals) == 64
    assert certificate.dead_intervals == tuple(sorted(certificate.dead_intervals))


@pytest.mark.parametrize("name", ["relu6", "lk_tanh", "jax_gelu", "staircase", "lk_swish"])
def test_the_chunk_size_changes_nothing(name, monkeypatch):
    whole = certify(CASES[name], jnp.float16)
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
    ("dtype", "word"), [(np.float64, "float64"), ("float64", "centuries"), (jnp.int32, "int32"), (bool, "bool")]
)
def test_other_dtypes_are_refused(dtype, word):
    with pytest.raises(ValueError, match=word):
        certify(LINKS["lk_relu"], dtype)


@pytest.mark.usefixtures("unchecked")
def test_a_link_that_is_not_callable_is_refused():
    with pytest.raises(TypeError, match="needs a link or a function"):
        certify("lk_relu", jnp.bfloat16)


def test_text_tells_the_findings():
    text = str(certify(linked(jax.nn.relu6), jnp.bfloat16))
    for words in ("NO", "65,280", "dead intervals   2", "[6, 3.38953e+38]", "non-finite       0"):
        assert words in text


# --- the command line ---------------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "linked_jax.certificates", *arguments], capture_output=True, text=True, check=False
    )


def test_command_for_a_linked_activation():
    done = command("lk_swish", "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    assert "lk_swish" in done.stdout
    assert "yes" in done.stdout


def test_command_for_one_that_is_not_linked():
    done = command("lk_tanh", "--dtype", "float16")
    assert done.returncode == 1
    assert "NO" in done.stdout


def test_command_for_an_unknown_name():
    done = command("lk_swosh")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "lk_swish" in done.stderr


# --- every float32 ------------------------------------------------------------------------------------------------

EVERY_FLOAT32 = 4_278_190_080
FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)


@pytest.mark.slow
@over_linked
def test_linked_link_holds_its_certificate_in_float32(link):
    certificate = certify(link)
    assert certificate.linked
    assert certificate.min_gradient > 0
    assert certificate.num_inputs == EVERY_FLOAT32


@pytest.mark.slow
def test_mirror_of_relu6_is_dead_exactly_beyond_its_clip_in_float32():
    assert certify(linked(jax.nn.relu6)).dead_intervals == ((-FLOAT32_MAX, -6.0), (6.0, FLOAT32_MAX))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flat_from"), [("lk_tanh", 10), ("lk_sigmoid", 90)])
def test_saturating_mirrors_are_not_linked_in_float32(name, flat_from):
    certificate = certify(LINKS[name])
    (left, right) = certificate.dead_intervals
    assert not certificate.linked
    assert left == (-FLOAT32_MAX, -right[0])
    assert right == (pytest.approx(flat_from, rel=0.1), FLOAT32_MAX)


@pytest.mark.slow
def test_jax_gelu_breaks_in_float32():
    certificate = certify(linked(jax.nn.gelu))
    assert not certificate.linked
    assert abs(certificate.first_nonfinite) == pytest.approx(1.8e19, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("g", [jnp.square, jnp.cos])
def test_smooth_flat_mirrors_are_dead_at_zero_in_float32(g):
    certificate = certify(linked(g))
    assert certificate.dead_interval_count == 1
    low, high = certificate.dead_intervals[0]
    assert low <= 0 <= high
    assert high == -low < float(jnp.finfo(jnp.float32).tiny)


@pytest.mark.slow
def test_memory_stays_below_one_gibibyte():
    script = (
        "import resource, jax; from linked_jax import linking, certificates;"
        "certificates.certify(linking.linked(jax.nn.relu6));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kibibytes = int(done.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kibibytes < 2**20
