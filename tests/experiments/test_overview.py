"""`python -m experiments`: every command with a line, the data, the runs."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
from pathlib import Path

import pytest

from experiments import __main__ as overview
from experiments.engine.checks import command_line
from experiments.engine.records import Record

HERE = Path(overview.__file__).parent


def commands():
    """The modules that end in a call of their main."""
    files = [*HERE.glob("*.py"), *HERE.glob("*/__main__.py")]
    ends = {path for path in files if "__name__ ==" in path.read_text(encoding="utf-8")}
    return {path.parent.name if path.stem == "__main__" else path.stem for path in ends} - {"experiments"}


def test_every_command_has_a_line():
    assert set(overview._ORDER) == commands()
    assert all(re.match(r"\S.*[.?]", overview.first_line(name)) for name in overview._ORDER)


PROTOCOLS = ("plasticity.regression", "plasticity.kumar.command")


@pytest.mark.parametrize("name", [*overview._ORDER, *PROTOCOLS])
def test_the_help_of_every_command_begins_with_what_it_is_and_an_example(name, capsys):
    package = (HERE / name / "__main__.py").exists()
    module = importlib.import_module(f"experiments.{name}" + ".__main__" * package)
    name = name.partition(".")[0]
    settings = getattr(module, "Settings", None) or module.Sweep
    with pytest.raises(SystemExit):
        command_line(settings, f"python -m experiments.{name}", ["--help"])
    said = capsys.readouterr().out
    usage, _, what, example, *_ = said.splitlines()
    assert usage.startswith(f"usage: python -m experiments.{name} [-h]")
    assert what.endswith(". For example:")
    assert example.startswith(f"    python -m experiments.{name}")
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", said).split())
    for words in explanations(settings):
        assert words in text


def explanations(settings):
    """`--option` and the text below its field, for all fields of a class of settings and of its bases."""
    found = {}
    for each in reversed(settings.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        for field, doc in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign):
                option = "" if "Positional" in ast.unparse(field.annotation) else f"--{field.target.id}"
                found[field.target.id] = option.replace("_", "-"), " ".join(doc.value.value.split())
    assert set(found) == {field.name for field in dataclasses.fields(settings)}
    return itertools.chain(*found.values())


def test_what_is_there_is_said_in_80_columns(tmp_path):
    (tmp_path / "tfds" / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "tfds" / "mnist" / "3.0.1" / "dataset_info.json").write_text("{}")
    with Record.create(tmp_path / "runs" / "one", {"command": "python -m experiments.depth --act relu"}) as record:
        record.add({"epoch": 1})
    with Record.create(tmp_path / "runs" / "sweep" / "two", {"command": "python -m experiments.depth --act selu"}):
        pass
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "config.json").write_text("{")
    said = overview.overview(tmp_path / "tfds", tmp_path / "runs")
    flat = " ".join(said.split())
    assert f"mnist prepared in {tmp_path / 'tfds'}" in flat
    assert "cifar10, cifar100, tiny_shakespeare" in flat
    assert "one: python -m experiments.depth --act relu, 1 lines" in flat
    assert "two: python -m experiments.depth --act selu, 0 lines" in flat
    assert "config.json cannot be read" in flat
    assert "nothing in none/ yet" in " ".join(overview.overview(tmp_path, Path("none")).split())
    long = [line for line in said.splitlines() if len(line) > 80]
    assert all(str(tmp_path) in line for line in long)  # a path is not broken


@pytest.mark.parametrize(
    ("given", "command"),
    [("depth --epochs 2", "depth --epochs 2"), ("dept", "depth"), ("--frob", "NAME"), ("plasticty", "plasticity")],
)
def test_another_word_is_refused_with_the_command(given, command, monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments", *given.split()])
    with pytest.raises(overview.UsageError, match=rf"an experiment is python -m experiments\.{command}$"):
        overview.main()
