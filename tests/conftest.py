"""Two virtual CPU devices, checked shapes and types, and deterministic hypothesis for every test."""

import os

# Before JAX starts its backend: shard_map and pmap need more than one device to mean anything.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import hypothesis
import jaxtyping
import pytest

jaxtyping.install_import_hook("linked_jax", "beartype.beartype")  # before anything imports linked_jax


def pytest_configure(config):
    """Hypothesis tries 10 examples, and 25 where the slow tests are asked for."""
    examples = 10 if config.option.markexpr == "not slow" else 25
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
