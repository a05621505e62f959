"""Two virtual CPU devices, checked shapes and types, and deterministic hypothesis for every test."""

import collections
import hashlib
import os
import tempfile
from pathlib import Path

# Before JAX starts its backend: shard_map and pmap need more than one device to mean anything.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import hypothesis
import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("linked_jax", "beartype.beartype")  # before anything imports linked_jax
SLOW_CASES = 1  # of each law, in CI
MOST_MAPS = 30_000  # Linux gives a process 65,530, and each compiled program takes some
_SCRATCH = pytest.StashKey[tempfile.TemporaryDirectory]()


def pytest_configure(config):
    """The fast suite tries 10 examples of hypothesis, the slow one 25. Both compile quickly, but see `optimised`."""
    examples = 10 if config.option.markexpr == "not slow" else 25
    hypothesis.settings.register_profile(
        "linked_jax", deadline=None, max_examples=examples, derandomize=True, database=None
    )
    hypothesis.settings.load_profile("linked_jax")
    jax.config.update("jax_disable_most_optimizations", True)
    if not hasattr(config, "workerinput"):  # the process that starts the others: they inherit the folder
        config.stash[_SCRATCH] = tempfile.TemporaryDirectory(prefix="linked_jax-")
        os.environ["LINKED_JAX_TESTS"] = config.stash[_SCRATCH].name


def pytest_unconfigure(config):
    if _SCRATCH in config.stash:
        config.stash[_SCRATCH].cleanup()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Docstrings are slow. Of each law's slow cases all but a few are `exhaustive`, chosen by a hash of their names."""
    laws = collections.defaultdict(list)
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.slow)
        marks = {mark.name for mark in item.iter_markers()}
        if "slow" in marks and not marks & {"fault", "whole"}:
            laws[item.nodeid.partition("[")[0]].append(item)
    for cases in laws.values():
        cases.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
        for item in cases[SLOW_CASES:]:
            item.add_marker(pytest.mark.exhaustive)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add what the mark `fault` says to the report, for `python -m tests.faults`: no items come back from workers."""
    report = yield
    mark = item.get_closest_marker("fault")
    if mark:
        report.user_properties.append(("fault", list(mark.args)))
    return report


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """XLA ends with a segmentation fault where a process has no memory maps left for one more program."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def compile_quickly(request):
    """Without most optimisations; in the slow suite, modules with the mark `optimised` have what users have."""
    optimised = request.node.get_closest_marker("optimised") and request.config.option.markexpr != "not slow"
    jax.config.update("jax_disable_most_optimizations", not optimised)


@pytest.fixture
def unchecked():
    """Turn the type checker off: it raises its own TypeError before the library's own validation can speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
