"""The map of the house, as README.md draws it, guarded."""

import ast
import doctest
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import linked_jax
from linked_jax import plasticity, probe, remedies, revive

ROOT = Path(__file__).parent.parent
ROOMS = [
    "arrays", "members", "arguments", "measurements", "linking", "activations", "moments", "initializers", "schedules",
    "diagnostics", "slopes", "signal_statistics", "histograms", "updates", "convolution", "learned", "registry",
    "layers", "linen", "certificates", "remedies", "probe", "revive", "plasticity",
]  # fmt: skip
"""From the ground up: a room imports from rooms before it only."""
ALLOWED = {"jax", "numpy", "flax", "optax", "jaxtyping", "linked_jax"}
FLAX_ROOMS = {"learned", "layers", "linen", "remedies", "probe", "revive"}
LAZY = {"probe": {"rich", "matplotlib", "tensorboardX"}}
"""What a room imports when it is asked to show something."""
PACKAGES = {
    "linked_jax": linked_jax, "probe": probe, "remedies": remedies, "revive": revive, "plasticity": plasticity,
}  # fmt: skip
SOURCES = sorted(path for root in ("linked_jax", "experiments", "benchmarks") for path in (ROOT / root).rglob("*.py"))
SHARED = ("engine", "models")
"""The folders of experiments/ that studies share; every other file or folder there is a study."""


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
    found = {
        path.stem for path in (ROOT / "linked_jax").iterdir() if path.suffix in ("", ".py") and path.stem[0] != "_"
    }
    assert found == set(ROOMS)
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


def run_python(code):
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_core_imports_without_the_extras():
    extras = ["chex", "tensorflow_datasets", "sklearn", "matplotlib", "tyro", "hypothesis", "beartype", "PIL"]
    extras += ["tensorboardX"]
    rooms = "linked_jax.linen, linked_jax.probe, linked_jax.remedies, linked_jax.revive, linked_jax.plasticity"
    run_python(f"import sys; [sys.modules.__setitem__(m, None) for m in {extras}]; import {rooms}")


def test_the_library_imports_only_its_core_and_the_rest_when_it_is_used():
    run_python("""
import sys
import flax.nnx, jax, jaxtyping, optax
before = set(sys.modules)
import linked_jax
core = "arrays members arguments measurements linking activations moments initializers schedules diagnostics".split()
core += "convolution learned registry layers".split()
core += [f"convolution.{file}" for file in "geometry banded winograd patched".split()]
new = {module for module in set(sys.modules) - before if not module.startswith("jax.")}
assert new == {"linked_jax", *(f"linked_jax.{room}" for room in core)}, new
assert {*linked_jax.__all__} <= {*dir(linked_jax)}
assert linked_jax.certify is linked_jax.certificates.certify
assert linked_jax.linen.LinkedDense and linked_jax.remedies and linked_jax.revive and linked_jax.plasticity
assert linked_jax.probe.probe
from linked_jax import *
try:
    linked_jax.nothing
except AttributeError as error:
    assert str(error) == "module 'linked_jax' has no attribute 'nothing'"
else:
    raise AssertionError
""")


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_all_agrees_with_what_is_imported(package):
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {alias.name for node in froms if str(node.module).startswith("linked_jax") for alias in node.names}
    assert imported == set(package.__all__)
    assert package.__all__ == sorted(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize(
    "thing", [f"{package}.{name}" for package, module in PACKAGES.items() for name in module.__all__]
)
def test_public_callables_have_an_example_that_runs(thing):
    package, name = thing.split(".")
    found = getattr(PACKAGES[package], name)
    made_by_others = {"linked_jax.Certificate", "remedies.Moments", "probe.LayerReport", "probe.Report", "probe.Tap"}
    made_by_others |= {"probe.Origin"}
    if thing in made_by_others or not callable(found) or inspect.ismodule(found) or isinstance(found, linked_jax.Link):
        return  # made by certify, the calculus, probe; the links are one line each, explained at the top of their file
    assert doctest.DocTestFinder(recurse=False).find(found)[0].examples, f"{thing} has no example"


# --- the size of things ---------------------------------------------------------------------------------------------


def length(node) -> int:
    return node.end_lineno - min(part.lineno for part in (node, *node.decorator_list)) + 1


def test_no_function_has_over_80_lines_and_no_class_over_200():
    too_long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            limit = 200 if isinstance(node, ast.ClassDef) else 80
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > limit:
                too_long.append(f"{path.relative_to(ROOT)} {node.name}: {length(node)} lines, at most {limit}")
    assert not too_long, "\n".join(too_long)


def test_files_of_over_300_lines_are_named(capsys):
    """Advice: near 300 lines ask whether a file holds two concepts."""
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    with capsys.disabled():
        for path, size in sizes.items():
            if size > 300:
                print(f"\n{path.relative_to(ROOT)} has {size} lines; is it two concepts?", end="")


def test_annotations_are_evaluated():
    for path in SOURCES:
        assert "from __future__ import annotations" not in path.read_text(encoding="utf-8"), path


# --- the import graph of the experiments ------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


EXPERIMENTS = {module_of(path): path for path in SOURCES if path.is_relative_to(ROOT / "experiments")}


def by_string(path: Path) -> set[str]:
    """What a file imports by its name, import_module(f"experiments.{name}"), and the studies that it names in full."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    by_name = [node for node in calls if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")]
    arguments = {node.value for call in by_name for node in ast.walk(call) if isinstance(node, ast.Constant)}
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & EXPERIMENTS.keys()
    return {str(text) for text in arguments if str(text).startswith("experiments.")} | {m for m in named if study_of(m)}


GRAPH = {module: imports(path) & EXPERIMENTS.keys() for module, path in EXPERIMENTS.items()}


def reached_from(modules: set[str]) -> set[str]:
    reached: set[str] = set()
    while modules:
        reached |= modules
        modules = set().union(*(GRAPH[module] for module in modules)) - reached
    return reached


def study_of(module: str) -> str | None:
    """ "depth" for experiments.depth, "report" for experiments.report.table, None for shared rooms."""
    name = (*module.split("."), "")[1]
    return None if name in ("", *SHARED) else name


STUDIES = {name: {m for m in EXPERIMENTS if study_of(m) == name} for name in {study_of(m) for m in EXPERIMENTS} if name}


def in_room(room: str) -> list[str]:
    return [module for module in EXPERIMENTS if module.startswith(f"experiments.{room}.")]


def test_no_shared_room_of_the_experiments_knows_a_study():
    found = []
    for module in itertools.chain(*map(in_room, SHARED)):
        found += [f"{module} imports {other}" for other in GRAPH[module] if study_of(other)]
        found += [f"{module} names {other}" for other in by_string(EXPERIMENTS[module])]
    assert not found, "\n".join(found)


def test_a_room_with_one_owner_stands_in_its_owners_folder():
    reached = {name: reached_from(modules) for name, modules in STUDIES.items()}
    owners = {module: sorted(name for name in reached if module in reached[name]) for module in EXPERIMENTS}
    found = [f"{module} is of {owners[module]} alone" for module in in_room("engine") if len(owners[module]) < 2]
    found += [f"{module} is used by no table" for module in in_room("models") if not owners[module]]
    assert not found, "\n".join(found)


# --- the pages --------------------------------------------------------------------------------------------------------


def test_local_links_of_the_pages_exist():
    """On the site they lead to files only: it has no page for a folder. The README is not on it."""
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")]:
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            path = page.parent / target
            found = path.exists() if page.name == "README.md" and page.parent == ROOT else path.is_file()
            assert "://" in target or found, f"{page.relative_to(ROOT)} links to {target}"


def test_files_and_commands_that_texts_name_exist():
    for page in [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")]:
        text = page.read_text(encoding="utf-8")
        for named in re.findall(r"`((?:linked_jax|experiments|benchmarks|tests|results|docs|scripts)/[\w./-]+)`", text):
            assert (ROOT / named).exists(), f"{page.relative_to(ROOT)} names {named}"
        for module in re.findall(r"python -m ((?:linked_jax|experiments|benchmarks|tests)(?:\.[a-z_0-9]+)*)", text):
            path = ROOT.joinpath(*module.split("."))
            found = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
            assert found, f"{page.relative_to(ROOT)} has the command python -m {module}"


@pytest.mark.slow
def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
