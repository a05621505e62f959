"""The package: wheel and sdist are built, installed where nothing else is, and work there."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, cwd):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_has_the_library_and_nothing_else(built):
    names = zipfile.ZipFile(built[0]).namelist()
    ours = [path for path in (ROOT / "linked_jax").rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    assert {name for name in names if ".dist-info/" not in name} == {str(path.relative_to(ROOT)) for path in ours}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_has_what_its_tests_need(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "tests/conftest.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/"))]


def test_it_works_in_an_empty_environment(built, tmp_path):
    """With the extra `probe`, and without the experiments' packages."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", f"{built[0]}[probe]", cwd=tmp_path)
    packages = {line.partition("==")[0] for line in run(python, "-m", "pip", "freeze", cwd=tmp_path).splitlines()}
    assert not {"tyro", "scikit-learn", "tensorflow-datasets", "pandas"} & packages
    said = run(python, "-m", "linked_jax", "certify", "lk_relu", "--dtype", "bfloat16", cwd=tmp_path)
    assert re.search(r"linked +yes", said)
    said = run(python, "-W", "error", "-c", """
import jax
from flax import nnx
from linked_jax import LinkedLinear
from linked_jax.probe import probe
rngs = nnx.Rngs(0)
net = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), LinkedLinear(16, 3, rngs=rngs))
report = probe(net, [jax.random.normal(jax.random.key(0), (64, 8))])
report.print()
report.plot("units.png")
""", cwd=tmp_path)  # fmt: skip
    assert "relu" in said
    assert (tmp_path / "units.png").stat().st_size > 5_000
