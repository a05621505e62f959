"""Proof by exhaustion: the derivative of every member at every finite value of a dtype.

    linked  <=>  for every finite z all g_i'(z) are finite and max_i |g_i'(z)| > 0.

A float32 has 2^32 bit patterns, so all of them can be tried. Sampling cannot prove this, and has missed real faults.

    python -m linked_jax certify lk_swish --dtype bfloat16
    python -m linked_jax.certificates lk_swish --dtype bfloat16        (the same)
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from linked_jax.arguments import brief
from linked_jax.linking import Link
from linked_jax.measurements import equations, is_elementwise, keeps_apart
from linked_jax.registry import get_activation
from linked_jax.slopes import FLAT

_CHUNK = 2**19  # values tried at once: their temporaries fit a CPU's cache
_KEPT_INTERVALS = 64
_RANGE = 10.0  # of pre-activations that are common in a net: where sigmoid and tanh saturate, and elu and silu go flat
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `certify` found over every finite value of a dtype, on one platform.

    Attributes:
      linked: True if at every finite z all member derivatives are finite and one of them is non-zero.
      dtype: the dtype tried.
      min_gradient: min over z of max_i |g_i'(z)|, over the z where all derivatives are finite (inf if there is none).
      argmin: a z where it is reached.
      dead_intervals: (low, high) pairs of z, ends included, where every member's derivative is zero, in rising order;
        the first 64.
      dead_interval_count: how many there are in all.
      nonfinite_count: the number of z with an infinite or NaN derivative.
      first_nonfinite: the one of least magnitude, the positive one of two; None if there is none.
      num_inputs: the number of values tried.
      seconds: wall time.
      dead_band: the width of the dead band, where every |g_i'(z)| < 0.001, as a share of [-10, 10]: the lengths of its
        intervals, each from the first to the last value of the dtype in it.
      platform: where it ran. CPUs flush denormal derivatives to zero and other platforms may not.
    """

    linked: bool
    dtype: str
    min_gradient: float
    argmin: float
    dead_intervals: tuple[tuple[float, float], ...]
    dead_interval_count: int
    nonfinite_count: int
    first_nonfinite: float | None
    num_inputs: int
    seconds: float
    platform: str
    dead_band: float

    def __str__(self) -> str:
        lines = [
            f"linked           {'yes' if self.linked else 'NO'}",
            f"values tried     {self.num_inputs:,}: every finite {self.dtype}; {self.platform}, {self.seconds:.1f} s",
            f"least gradient   {self.min_gradient:.6g} at z = {self.argmin:.6g}",
            f"dead intervals   {self.dead_interval_count:,}",
            *(f"                 [{low:.6g}, {high:.6g}]" for low, high in self.dead_intervals[:8]),
        ]
        if self.dead_interval_count > 8:
            lines.append("                 ...")
        at = "" if self.first_nonfinite is None else f", the nearest to 0 at z = {self.first_nonfinite:.6g}"
        lines.append(f"non-finite       {self.nonfinite_count:,}{at}")
        lines.append(f"dead band        {self.dead_band:.2%} of [-{_RANGE:g}, {_RANGE:g}] has every |g'| below {FLAT}")
        return "\n".join(lines)


def certify(
    link: Callable[[Any], Any], dtype: Any = jnp.float32, *, progress: Callable[[float], None] | None = None
) -> Certificate:
    """Try every finite value of a dtype and tell where a link is dead, and how small its gradient gets.

    The derivatives are those that the link itself gives under `jax.jit`, the rule at z = 0 included; a custom_vjp is
    pulled back. The values tried include NaN, so jax_debug_nans and jax_debug_infs are off meanwhile. A certificate
    holds for the platform that made it: XLA's tanh is flat beyond 7.9988 on CPUs with AVX2, beyond 20 on others.

    Args:
      link: a `Link`, an elementwise function, or any function of z (N, 1) to (N, d).
      dtype: float32 (all 2^32 bit patterns: up to half a minute on two CPU cores), bfloat16 or float16 (65,536).
      progress: called with the share done, from 0 to 1.

    Returns:
      A `Certificate`. Memory stays below 1 GiB.

    Raises:
      ValueError: for another dtype: 2^64 float64 values would take centuries. If link does not map z of shape (N, 1) to
        (N, d), each row on its own.
      TypeError: if link is not a function of JAX arrays.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax import certify, linked
      >>> certify(linked(jax.nn.relu), jnp.bfloat16).linked
      True
      >>> certify(linked(jnp.tanh), jnp.bfloat16).linked
      False
    """
    dtype = _known_dtype(dtype)
    start, chunks, lowest = time.perf_counter(), [], float("inf")
    with jax.debug_nans(False), jax.debug_infs(False):
        derivatives = _derivatives(link, dtype)
        extremes = jax.jit(functools.partial(_extremes, derivatives, dtype))
        details = jax.jit(functools.partial(_details, derivatives, dtype))
        num_keys = 2 ** (dtype.itemsize * 8)
        for first_key in range(0, num_keys, _CHUNK):
            least, largest, nearest = np.asarray(extremes(np.uint32(first_key)))
            if largest == 0 and least == 0 and nearest > _RANGE:  # all dead: nothing else to look for
                chunks.append(_dead_chunk(first_key, dtype))
                lowest = 0.0
            elif least < max(lowest, FLAT):
                chunk = jax.tree.map(np.asarray, details(np.uint32(first_key)))
                chunks.append(chunk | {name: _runs(chunk[name], first_key) for name in ("dead", "flat")})
                lowest = min(lowest, float(chunk["least"]))
            if progress is not None:
                progress(min(1.0, (first_key + _CHUNK) / num_keys))
    return _certificate(chunks, dtype, time.perf_counter() - start)


def _certificate(chunks: list[dict[str, Any]], dtype: np.dtype, seconds: float) -> Certificate:
    """What the chunks with a finding say together."""
    dead, flat = (_joined(np.concatenate([chunk[name] for chunk in chunks])) for name in ("dead", "flat"))
    intervals, band = (
        np.asarray(_ordered_values(jnp.asarray(keys), dtype), np.float64) for keys in (dead[:_KEPT_INTERVALS], flat)
    )
    lowest = min(chunks, key=lambda chunk: chunk["least"])
    min_gradient, nonfinite_count = float(lowest["least"]), sum(int(chunk["bad_count"]) for chunk in chunks)
    nonfinite = [float(chunk["nearest_bad"]) for chunk in reversed(chunks) if chunk["bad_count"]]
    return Certificate(
        linked=nonfinite_count == 0 and min_gradient > 0,
        dtype=dtype.name,
        min_gradient=min_gradient,
        argmin=float(lowest["argmin"]),
        dead_intervals=tuple((float(low), float(high)) for low, high in intervals),
        dead_interval_count=len(dead),
        nonfinite_count=nonfinite_count,
        first_nonfinite=min(nonfinite, key=abs, default=None),  # the positive one of two, which comes first here
        num_inputs=2 * int(np.array(np.inf, dtype).view(f"uint{dtype.itemsize * 8}")),  # finite patterns lie below
        seconds=seconds,
        platform=jax.default_backend(),
        dead_band=float(np.diff(band).sum()) / (2 * _RANGE),
    )


def _known_dtype(dtype: Any) -> np.dtype:
    # NumPy would take None for float64, and an array for its dtype.
    try:
        known = None if dtype is None or isinstance(dtype, jax.Array | np.ndarray) else jnp.dtype(dtype)
    except (TypeError, ValueError):
        known = None
    if known == np.float64:
        raise ValueError("certify cannot try all 2^64 float64 values (centuries); got float64, use float32")
    if known is None or known.name not in DTYPES:
        raise ValueError(f"certify tries every value of {', '.join(DTYPES)}; got {known or brief(dtype)}")
    return known


def _derivatives(link: Callable, dtype: np.dtype) -> Callable[[Array], list[Array]]:
    """z (N,) -> [g_1'(z), ..., g_d'(z)], each (N,), once the link is known to be one."""
    if isinstance(link, Link):
        link = dataclasses.replace(link, axis=-1)
    if not callable(link) or isinstance(link, type):
        raise TypeError(f"certify needs a link or a function of z, got {brief(link)}; pass e.g. linked(jax.nn.relu)")
    z = jax.ShapeDtypeStruct((8, 1), dtype)
    try:
        h = jax.eval_shape(lambda z: link(z), z)
    except jax.errors.TracerArrayConversionError as error:
        raise TypeError(f"certify needs a function built from jax.numpy, got NumPy's {brief(link)}") from error
    except (jax.errors.ConcretizationTypeError, ValueError) as error:
        if isinstance(error, ValueError) and "truth value of an array" not in str(error):
            raise
        raise TypeError(
            f"certify needs a function that jax.jit can trace, got {brief(link)}; write jnp.where(z > 0, ...) for an if"
        ) from error
    shape = getattr(h, "shape", None)
    if shape is None or shape[:-1] != (8,) or not _keeps_rows_apart(link, shape[-1]):
        raise ValueError(
            f"certify needs an elementwise function, or one of z of shape (N, 1) to (N, d), each row on its own, got "
            f"{brief(link)}, which makes {'no array' if shape is None else shape} of (8, 1); pass e.g. "
            "linked(jax.nn.relu)"
        )
    if not jnp.issubdtype(h.dtype, jnp.floating):
        raise TypeError(f"certify needs a function with floating-point outputs, got {brief(link)} with {h.dtype}")
    # Slices of the derivative, each of which XLA makes without the whole, fuse with what follows.
    if not any("custom_vjp" in e.primitive.name for e in equations(jax.make_jaxpr(link)(z))):
        if isinstance(link, Link):  # XLA is faster on rows than on columns
            rows = dataclasses.replace(link, axis=0)
            return lambda z: list(jax.jvp(rows, (z[None],), (jnp.ones_like(z)[None],))[1])
        return lambda z: list(jax.jvp(link, (z[:, None],), (jnp.ones_like(z)[:, None],))[1].T)

    def pulled(z: Array) -> list[Array]:  # a custom_vjp has no forward mode
        h, pull = jax.vjp(link, z[:, None])
        return [pull(jnp.zeros_like(h).at[:, i].set(1))[0][:, 0] for i in range(h.shape[-1])]

    return pulled


def _keeps_rows_apart(link: Callable, d: int) -> bool:
    """Whether each of the d outputs of a row depends on the z of that row alone, as those of a `Link` do."""
    if isinstance(link, Link) or d == 1:
        return isinstance(link, Link) or is_elementwise(link)
    try:
        return keeps_apart(link, (24, 1), [1, 5])  # a positive one and a negative one
    except ValueError:  # it takes no float64
        return True


def _ordered_values(keys: Array, dtype: np.dtype) -> Array:
    """The key-th value of a dtype in rising order: -nan, -inf, ..., -0.0, 0.0, ..., inf, nan."""
    bits = dtype.itemsize * 8
    sign, largest = np.uint32(2 ** (bits - 1)), np.uint32(2**bits - 1)
    patterns = jnp.where(keys < sign, largest - keys, keys - sign)  # of negative floats, larger patterns lie lower
    return jax.lax.bitcast_convert_type(patterns.astype(f"uint{bits}"), dtype)


def _scores(derivatives: Callable, dtype: np.dtype, first_key: Array) -> tuple[Array, Array]:
    """The values z of a chunk, and max_i |g_i'(z)|: -1 where one is not finite, inf where z is not."""
    size = min(_CHUNK, 2 ** (dtype.itemsize * 8))
    z = _ordered_values(first_key + jnp.arange(size, dtype=jnp.uint32), dtype)
    gradients = [jnp.abs(g).astype(jnp.float32) for g in derivatives(z)]
    finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, gradients))
    largest = jnp.where(finite, functools.reduce(jnp.maximum, gradients), -1.0)
    return z, jnp.where(jnp.isfinite(z), largest, jnp.inf)


def _extremes(derivatives: Callable, dtype: np.dtype, first_key: Array) -> Array:
    """The least and the largest score of a chunk, and its least |z|."""
    z, scores = _scores(derivatives, dtype, first_key)
    return jnp.stack([scores.min(), scores.max(), jnp.abs(z[jnp.array([0, -1])]).min().astype(jnp.float32)])


def _details(derivatives: Callable, dtype: np.dtype, first_key: Array) -> dict[str, Array]:
    z, scores = _scores(derivatives, dtype, first_key)
    bad = scores < 0
    largest = jnp.where(bad, jnp.inf, scores)
    return {
        "least": largest.min(),
        "argmin": jnp.where(jnp.isinf(largest.min()), jnp.nan, z[largest.argmin()].astype(jnp.float32)),
        "bad_count": bad.sum(),
        "nearest_bad": _nearest_to_zero(z, bad).astype(jnp.float32),
        "dead": largest == 0,
        "flat": (largest < FLAT) & (jnp.abs(z) <= _RANGE),
    }


def _dead_chunk(first_key: int, dtype: np.dtype) -> dict[str, Any]:
    """The details of a chunk beyond the range where every derivative is zero."""
    ends = np.array([[first_key, first_key + _CHUNK - 1]], np.uint32)
    first = float(_ordered_values(jnp.asarray(ends[0, 0]), dtype))
    return {"least": 0.0, "argmin": first, "bad_count": 0, "nearest_bad": np.nan, "dead": ends, "flat": ends[:0]}


def _nearest_to_zero(z: Array, mask: Array) -> Array:
    """The value of least magnitude under a mask, by its bits: comparisons of floats may flush denormals."""
    unsigned = f"uint{z.dtype.itemsize * 8}"
    sign = jnp.asarray(2 ** (z.dtype.itemsize * 8 - 1), unsigned)
    magnitude = jax.lax.bitcast_convert_type(z, unsigned) & ~sign
    backwards = jnp.where(mask, magnitude, ~jnp.zeros_like(magnitude))[::-1]  # the positive one of a pair comes first
    return z[z.size - 1 - backwards.argmin()]


def _runs(mask: np.ndarray, first_key: int) -> np.ndarray:
    """First and last key of each run of True, (runs, 2).

    >>> _runs(np.array([True, False, True, True]), 0).tolist()
    [[0, 0], [2, 3]]
    """
    ends = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    return (first_key + ends - [0, 1]).astype(np.uint32)


def _joined(runs: np.ndarray) -> np.ndarray:
    """The same runs of keys, one for each two of which one begins where the other ends.

    >>> _joined(np.array([[0, 3], [4, 6], [8, 9]], np.uint32)).tolist()
    [[0, 6], [8, 9]]
    """
    apart = runs[:-1, 1] + 1 != runs[1:, 0]
    first, last = np.append(True, apart)[: len(runs)], np.append(apart, True)[: len(runs)]
    return np.stack([runs[first, 0], runs[last, 1]], axis=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Certify a named activation and print what was found; exit code 1 if it is not linked."""
    parser = argparse.ArgumentParser(
        prog="python -m linked_jax certify",
        description="Try every finite value of a dtype: is some member's derivative non-zero, and all finite, at each?",
    )
    parser.add_argument("activation", help="a name such as lk_swish; a wrong name lists them all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(arguments)
    try:
        link = get_activation(options.activation, 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    certificate = certify(link, options.dtype, progress=_print_progress if sys.stderr.isatty() else None)
    print(f"activation       {options.activation}\n{certificate}")
    return 0 if certificate.linked else 1


def _print_progress(share: float) -> None:
    filled = int(32 * share)
    end = "\r" + " " * 48 + "\r" if share >= 1 else ""
    print(f"\r[{'#' * filled}{'.' * (32 - filled)}] {share:4.0%} ", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
