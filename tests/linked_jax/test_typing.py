"""A project that uses the library passes pyright in strict mode, and a misspelled option of Flax does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYRIGHT = Path(sys.executable).with_name("pyright")

CONSUMER = """
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import linked_jax
from linked_jax import (
    Certificate, LinkedConv, LinkedConvTranspose, LinkedLinear, LinkedPReLU, activation_arity, certify,
    default_kernel_init, gain, get_activation, inverse_time_decay, linked, live_units, lk_swish, looks_linear, read_out,
)
from linked_jax import linen as linked_linen
from linked_jax.probe import probe


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        link = linked(jax.nn.relu, layout="interleaved")
        init = looks_linear(lk_swish)
        self.stem = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.conv = LinkedConv(4, 8, (3, 3), link=link, strides=2, feature_group_count=2, use_bias=False, rngs=rngs)
        self.up = LinkedConvTranspose(8, 4, (4, 4), strides=2, padding="SAME", rngs=rngs)
        self.head = LinkedLinear(4, 2, link=LinkedPReLU(4), kernel_init=init, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        z = self.up(self.conv(self.stem(x)))
        return self.head(z.mean((1, 2)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        z = linked_linen.LinkedConv(4, (3, 3), strides=2, link=linked_linen.LinkedPReLU())(nn.Conv(4, (3, 3))(x))
        return linked_linen.LinkedDense(2, link=lk_swish)(z.mean((1, 2)))


def main() -> float:
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, 8, 8, 1))
    net = Net(nnx.Rngs(0))
    report = probe(net, [x])
    print(report, linked_jax.__version__)
    certificate: Certificate = certify(lk_swish, jnp.bfloat16)
    activation = get_activation("lk_prelu", features=4)
    kernel: jax.Array = default_kernel_init(activation.link)(key, (8, 4), jnp.float32)
    h: jax.Array = activation(jax.random.normal(key, (2, 4)))
    alive: jax.Array = live_units(h, arity=activation_arity("lk_prelu"))
    leaky = linked(functools.partial(jax.nn.leaky_relu, negative_slope=0.1))
    print(certificate.linked, kernel.shape, alive, inverse_time_decay(0.1, 1e-6)(3), read_out(leaky), gain(leaky))
    print(net(x), LinenNet())
    return certificate.min_gradient


if __name__ == "__main__":
    main()
"""
MISSPELLED = """
from flax import nnx
from linked_jax import LinkedConv, get_activation

LinkedConv(1, 2, (3, 3), kernel_dilatation=2, rngs=nnx.Rngs(0))
get_activation(3)
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYRIGHT.exists(), reason="needs the dev extra")
def test_a_project_that_uses_the_library_passes_pyright_in_strict_mode(tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "misspelled.py").write_text(MISSPELLED)
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [PYRIGHT, "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = [(Path(each["file"]).name, each["message"]) for each in json.loads(done.stdout)["generalDiagnostics"]]
    assert [message for file, message in found if file == "consumer.py"] == []
    refused = " ".join(message for file, message in found if file == "misspelled.py")
    assert "kernel_dilatation" in refused
    assert '"Literal[3]"' in refused


@pytest.mark.slow
def test_that_project_runs(tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    code = "import runpy, sys; sys.path.insert(0, '.'); runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "consumer.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "0.2.0" in done.stdout


def test_the_library_says_that_it_is_typed():
    assert (ROOT / "linked_jax" / "py.typed").exists()
