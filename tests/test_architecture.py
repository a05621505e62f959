"""The map of the house, as README.md draws it, guarded."""

import ast
import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

import linked_jax
from linked_jax import probe, remedies, revive

ROOT = Path(__file__).parent.parent
ROOMS = [
    "members", "linking", "activations", "moments", "initializers", "schedules", "diagnostics",
    "signal_statistics", "layers", "certificates", "remedies", "probe", "revive",
]  # fmt: skip
"""From the ground up: a room imports from rooms before it only."""
ALLOWED = {"jax", "numpy", "flax", "optax", "jaxtyping", "linked_jax"}
FLAX_ROOMS = {"layers", "remedies", "probe", "revive"}
LAZY = {"probe": {"rich", "matplotlib"}}
"""What a room imports when it is asked to show something."""
PACKAGES = {"linked_jax": linked_jax, "probe": probe, "remedies": remedies, "revive": revive}


def imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return modules


def test_every_file_of_the_library_is_a_room_of_the_map():
    assert sorted(ROOMS) == sorted(path.stem for path in (ROOT / "linked_jax").iterdir() if path.stem[0] != "_")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    places = [readme.index(f"\n  {room}") for room in ROOMS]
    assert places == sorted(places)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_upwards_only(room):
    files = [ROOT / "linked_jax" / f"{room}.py", *(ROOT / "linked_jax" / room).glob("*.py")]
    found = set().union(*(imports(file) for file in files if file.exists()))
    outside = {name.split(".")[0] for name in found} - ALLOWED - LAZY.get(room, set()) - sys.stdlib_module_names
    assert not outside, f"{room} imports {outside}"
    inside = {name.split(".")[1] for name in found if name.startswith("linked_jax.")} - {room}
    assert inside <= set(ROOMS[: ROOMS.index(room)]), f"{room} imports from rooms below it: {inside}"
    if room not in FLAX_ROOMS:
        assert not any(name.split(".")[0] == "flax" for name in found), f"{room} is maths and imports Flax"


def test_the_library_does_not_need_the_experiments():
    for path in (ROOT / "linked_jax").rglob("*.py"):
        assert not {"experiments", "benchmarks", "tests"} & {name.split(".")[0] for name in imports(path)}


def test_the_core_imports_without_the_extras():
    extras = ["chex", "tensorflow_datasets", "sklearn", "matplotlib", "tyro", "hypothesis", "beartype", "PIL"]
    rooms = "linked_jax.probe, linked_jax.revive"
    code = f"import sys; [sys.modules.__setitem__(m, None) for m in {extras}]; import {rooms}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_all_agrees_with_what_is_imported(package):
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(package.__all__)
    assert package.__all__ == sorted(package.__all__)


@pytest.mark.parametrize(
    "thing", [f"{package}.{name}" for package, module in PACKAGES.items() for name in module.__all__]
)
def test_public_callables_have_an_example_that_runs(thing):
    package, name = thing.split(".")
    found = getattr(PACKAGES[package], name)
    made_by_others = {"linked_jax.Certificate", "remedies.Moments", "probe.LayerReport", "probe.Report"}
    if thing in made_by_others or not callable(found) or isinstance(found, linked_jax.Link):
        return  # made by certify, the calculus, probe; the links are one line each, explained at the top of their file
    assert doctest.DocTestFinder(recurse=False).find(found)[0].examples, f"{thing} has no example"


@pytest.mark.parametrize(
    "path",
    sorted({*ROOT.glob("linked_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")}),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_no_file_holds_two_concepts(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    assert "from __future__ import annotations" not in path.read_text(encoding="utf-8")


def test_local_links_of_the_pages_exist():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_snippets_of_the_readme_run():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
