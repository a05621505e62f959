"""Every public function's example runs under each of JAX' strict switches, with the same output."""

import doctest
import importlib
import pkgutil

import pytest

import linked_jax
from tests.cases import SWITCHES

NAMES = [info.name for info in pkgutil.walk_packages(linked_jax.__path__, "linked_jax.")]
MODULES = sorted(name for name in NAMES if not name.endswith("__main__"))
NOT_FINITE = "jnp.inf", "jnp.nan"  # examples of what happens to such numbers cannot run where they are refused


class Values(doctest.OutputChecker):
    """Any output will do: in float64 the numbers print otherwise. An error still fails."""

    def check_output(self, want, got, optionflags):
        return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # x64: float64 into a float32 variable
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("switch", SWITCHES)
def test_examples_run_under(switch, module):
    report: list[str] = []
    runner = doctest.DocTestRunner(checker=Values() if switch == "x64" else None)
    for example in doctest.DocTestFinder().find(importlib.import_module(module)):
        if switch in ("debug_nans", "debug_infs") and any(x in example.docstring for x in NOT_FINITE):
            continue
        if switch == "disable_jit" and "lax.scan(" in example.docstring:  # it is then a loop of Python
            continue
        with SWITCHES[switch]():
            runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)
