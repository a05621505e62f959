"""Two virtual CPU devices, checked shapes and types, and deterministic hypothesis for every test."""

import os

# Before JAX starts its backend: shard_map and pmap need more than one device to mean anything.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import hypothesis
import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("linked_jax", "beartype.beartype")  # before anything imports linked_jax


def pytest_configure(config):
    """The fast suite tries 10 examples of hypothesis and compiles quickly; the slow one tries 25 and optimises."""
    fast = config.option.markexpr == "not slow"
    jax.config.update("jax_disable_most_optimizations", fast or bool(os.environ.get("O0")))
    examples = 10 if fast else 25
    hypothesis.settings.register_profile(
        "linked_jax", deadline=None, max_examples=examples, derandomize=True, database=None
    )
    hypothesis.settings.load_profile("linked_jax")


@pytest.fixture
def unchecked():
    """Turn the type checker off: it raises its own TypeError before the library's own validation can speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
