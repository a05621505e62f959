"""Command lines: what they mean, what a record keeps of them, and the nets that they ask for."""

import ast
import dataclasses
import inspect
import itertools
import json
import shlex
from pathlib import Path

import pytest

from experiments import allcnn, covariate_shift, depth, parameters, resnet50, width
from experiments.engine.errors import UsageError
from experiments.engine.rows import Row
from experiments.engine.settings import OF_THIS_COMMAND, Settings, check, named_rows, recorded, resumes
from experiments.engine.study import command

MODULES = {module.TABLE.name: module for module in (width, depth, parameters, allcnn, resnet50, covariate_shift)}
OTHER = {
    "preset": "paper", "act": ("selu",), "norm": "batch", "match_params": True, "init": ("he",), "lr": (0.5,),
    "dataset": "digits", "data_dir": "x", "train_size": 7, "held_out": 7, "epochs": 7, "batch_size": 7, "decay": 0.5,
    "on_nonfinite": "skip",
    "optimizer": "rmsprop", "augment": True, "shuffle": False, "seed": 7, "seeds": 7, "seeds_mode": "vmap",
    "devices": 7, "time_steps": 7, "out": "x", "resume": "x", "checkpoint_every": 7.0,
    "distributed": True, "coordinator": "x:7", "process_id": 7, "process_count": 7, "start_timeout": 7,
}  # fmt: skip
"""A value of each shared option that is not its default."""


# --- which rows


@pytest.mark.slow
def test_all_is_every_row_of_the_table():
    for module in MODULES.values():
        table = module.TABLE
        assert table.check(table.parse(["--act", "all"])).act == table.rows
        assert len(set(table.rows)) == len(table.rows)
        assert [Row.parse(name).name for name in table.rows] == list(table.rows)


def test_all_of_them_with_batch_norm_or_wider_has_each_net_once():
    rows = ("relu", "relu_sqrt2", "relu_bn", "lk_relu")
    assert named_rows(Settings(act=("all",), norm="batch"), rows) == ("relu_bn", "relu_sqrt2_bn", "lk_relu_bn")
    assert named_rows(Settings(act=("all",), match_params=True), rows) == (
        "relu_sqrt2", "relu_sqrt2_bn", "lk_relu_sqrt2"
    )  # fmt: skip
    assert named_rows(Settings(act=("lk_relu", "bn", "all", "relu")), rows) == (
        "lk_relu", "relu_bn", "relu", "relu_sqrt2"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "act"),
    [({"norm": "batch"}, "bn"), ({"norm": "batch"}, "lk_relu_bn"), ({"match_params": True}, "relu_sqrt2")],
)
def test_what_a_row_says_is_not_said_again(option, act):
    with pytest.raises(UsageError, match=f"--act {act} says what .* again; leave one out"):
        named_rows(Settings(act=("all", act), **option), ("relu", "relu_bn", "relu_sqrt2"))


# --- which nets


def test_the_nets_are_every_combination_of_the_axes_once():
    options = ["--act", "relu", "lk_relu", "--depth", "3", "5", "3", "--init", "glorot", "he", "--lr", "0.1", "1e-1"]
    cells = depth.TABLE.cells(depth.TABLE.check(depth.TABLE.parse(options)))
    expected = itertools.product(("relu", "lk_relu"), (3, 5), ("glorot", "he"), (0.1,))
    assert cells == [dict(zip(("act", "depth", "init", "lr"), values, strict=True)) for values in expected]
    assert depth.TABLE.all_axes == ("act", "depth", "init", "lr")


# --- what is refused


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("--act relu --act lk_relu", "--act"),
        ("--act=relu --seeds 2 --act lk_relu", "--act"),
        ("--lr 0.1 --lr=0.2", "--lr"),
        ("--act relu --depth 3 --init auto --depth 4", "--depth"),
    ],
)
def test_a_list_that_is_given_twice_is_refused(line, option):
    with pytest.raises(UsageError, match=f"{option} is given twice, .*; give it once: {option} A B"):
        depth.TABLE.parse(line.split())


def test_a_list_may_override_the_one_before_the_command_line():
    settings = depth.TABLE.parse(["--act", "relu", "elu", "--seed", "1", "--seed=2"], ["--act", "all", "--lr", "1"])
    assert (settings.act, settings.lr, settings.seed) == (("relu", "elu"), (1.0,), 2)


def test_every_command_with_lists_reads_them_so():
    root = Path(depth.__file__).parent
    for path in [*root.glob("*.py"), *root.glob("*/__main__.py")]:
        text = path.read_text(encoding="utf-8")
        assert "tyro.cli" not in text or ": tuple[" not in text.split("def main")[0], path


@pytest.mark.parametrize(("first", "count", "fine"), [(0, 1, True), (2**31 - 2, 2, True), (2**31 - 2, 3, False)])
def test_seeds_fit_into_31_bits(first, count, fine):
    if fine:
        assert check(Settings(seed=first, seeds=count), ()).seed == first
    else:
        with pytest.raises(UsageError, match=r"all seeds are between 0 and 2\^31"):
            check(Settings(seed=first, seeds=count), ())


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_checked_setting_passes_again(module):
    for preset in module.TABLE.presets.values():
        once = module.TABLE.check(preset)
        assert module.TABLE.check(once) == once


# --- what a record keeps


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_record_keeps_all_that_was_computed_and_no_path(module):
    """The JSON of a record, read again, is the settings that were checked, but for folders."""
    default = module.TABLE.presets["auto"]
    common = {name: value for name, value in OTHER.items() if name not in ("norm", "match_params", "preset", "devices")}
    settings = module.TABLE.check(dataclasses.replace(default, **common))
    stored = json.loads(json.dumps(recorded(settings)))
    again = type(default)(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})
    of_this_command = {name: getattr(default, name) for name in ("out", "resume", *OF_THIS_COMMAND)}
    assert again == dataclasses.replace(settings, **of_this_command)


def test_norm_and_match_params_are_in_the_names_of_the_rows():
    settings = depth.TABLE.check(depth.TABLE.parse(["--norm", "batch", "--match-params", "--act", "relu", "lk_relu"]))
    assert settings.act == ("relu_sqrt2_bn", "lk_relu_sqrt2_bn")
    assert (settings.norm, settings.match_params) == ("none", False)
    assert not {"norm", "match_params"} & set(recorded(settings))


PRIVATE = [
    ["--out", "/home/me/run"], ["--out=/home/me/run"], ["--data-dir", "/home/me/sets"], ["--data-dir=/home/me/sets"],
    ["--data_dir", "/home/me/sets"], ["--data_dir=/home/me/sets"],
    ["--data-dir", "/home/me/a b", "--out", "/home/me/c"],
]  # fmt: skip


@pytest.mark.parametrize("private", PRIVATE, ids=" ".join)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_the_recorded_command_is_the_same_one_without_folders(private, place):
    rest = ["--act", "relu", "selu", "--epochs=3", "--no-shuffle", "--augment"]
    given = [*rest[:place], *private, *rest[place:]]
    assert command("depth", given) == shlex.join(["python", "-m", "experiments.depth", *rest])
    asked = depth.TABLE.parse(given)
    assert "/home/me" in f"{asked.out}{asked.data_dir}"
    assert depth.TABLE.parse(shlex.split(command("depth", given))[3:]) == dataclasses.replace(
        asked, out=None, data_dir=None
    )


# --- resuming


def test_each_option_has_another_value_here():
    assert set(OTHER) == {field.name for field in dataclasses.fields(Settings)}
    assert all(value != getattr(Settings(), name) for name, value in OTHER.items())


@pytest.mark.parametrize("name", OTHER)
def test_a_record_is_gone_on_with_as_it_is(name):
    settings = dataclasses.replace(Settings(resume="run"), **{name: OTHER[name]})
    if name in ("resume", *OF_THIS_COMMAND):
        assert resumes(settings, Settings())
    else:
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(UsageError, match=f"got {option} too; leave {option} out"):
            resumes(settings, Settings())
    if name != "resume":
        assert not resumes(dataclasses.replace(settings, resume=None), Settings())


def test_an_option_of_the_table_itself_cannot_change_either():
    for module, changed in (
        (depth, {"depth": (3,)}),
        (allcnn, {"dropout": 0.1}),
        (resnet50, {"link": ("everywhere",)}),
    ):
        default = module.TABLE.presets["auto"]
        with pytest.raises(UsageError, match=f"got --{next(iter(changed))} too"):
            resumes(dataclasses.replace(default, resume="run", **changed), default)


# --- help


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_every_option_is_explained(module):
    """Each field is followed by its docstring, which --help shows; a changed default is explained anew."""
    explained = set()
    for kind in module.Settings.__mro__[:-1]:
        (settings,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(settings, ast.ClassDef)
        fields, docs = settings.body[1::2], settings.body[2::2]
        assert [type(node) for node in fields] == [ast.AnnAssign] * len(docs)
        assert all(doc.value.value.endswith(".") for doc in docs)
        assert not [doc.value.value for doc in docs if "\n" in doc.value.value]  # tyro breaks the line there
        explained |= {field.target.id for field in fields}
    assert explained == {field.name for field in dataclasses.fields(module.Settings)}
