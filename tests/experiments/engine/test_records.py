import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest

from experiments.engine import environment, records
from experiments.engine.errors import UsageError
from experiments.engine.folders import new_folder
from experiments.engine.records import Record


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with experiments/engine/, which records.py believes to be in."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    root = tmp_path / "checkout"
    (root / "experiments" / "engine").mkdir(parents=True)
    file = root / "experiments" / "engine" / "records.py"
    file.write_text("1\n")
    monkeypatch.setattr(environment, "__file__", str(file))
    return root


def git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_record_says_everything_that_determines_the_run(tmp_path):
    record = Record.create(tmp_path / "deep" / "run", {"settings": {"depth": 3}, "data": {"fingerprint": "ab"}})
    record.close()
    assert sorted(path.name for path in record.folder.iterdir()) == ["config.json", "metrics.jsonl"]
    config = json.loads((record.folder / "config.json").read_text())
    assert config["settings"] == {"depth": 3}
    assert config["data"] == {"fingerprint": "ab"}
    for package in ("jax", "jaxlib", "flax", "optax", "numpy", "linked_jax"):
        assert config["versions"][package] == metadata.version(package)
    assert config["hardware"]["platform"] == jax.devices()[0].platform
    assert config["hardware"]["devices"] == jax.device_count()
    assert config["hardware"]["cpu_cores"] == os.cpu_count()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", config["time"])
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes-[0-9a-f]{8})?|unknown-[0-9a-f]{8}", config["commit"])


def test_no_path_of_this_machine_is_recorded(tmp_path):
    Record.create(tmp_path / "run", {}).close()
    text = (tmp_path / "run" / "config.json").read_text()
    for path in (tmp_path, Path.home(), Path(records.__file__).parents[2]):
        assert str(path) not in text
    assert not re.search(r'"[^"]*(?:^|[" ])/[^"]*"', text)


def test_each_line_is_on_disk_when_add_returns(tmp_path):
    record = Record.create(tmp_path / "run", {})
    lines = [{"epoch": epoch, "name": "é\n"} for epoch in range(3)]
    for number, line in enumerate(lines, 1):
        record.add(line)
        read = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(text) for text in read] == lines[:number]
    record.close()


def test_an_existing_record_is_never_touched(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    for make in (lambda: new_folder(str(folder), "name"), lambda: Record.create(folder, {})):
        with pytest.raises(UsageError, match=r"run exists.*--out"):
            make()
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_file_as_parent_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("kept")
    folder = tmp_path / "file" / "a" / "run"
    for make in (lambda: new_folder(str(folder), "name"), lambda: Record.create(folder, {})):
        with pytest.raises(UsageError, match=r"write the record.*run.*--out"):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_parent_without_permission_is_refused(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((Path(path), mode)))
    with pytest.raises(UsageError, match=r"no permission.*--out"):
        new_folder(str(tmp_path / "new" / "run"), "name")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write into any folder")
def test_a_read_only_parent_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        for make in (lambda: new_folder(str(tmp_path / "run"), "name"), lambda: Record.create(tmp_path / "run", {})):
            with pytest.raises(UsageError, match="--out"):
                make()
    finally:
        tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_refused(tmp_path):
    folder = tmp_path / ("x" * 300)
    for make in (lambda: new_folder(str(folder), "name"), lambda: Record.create(folder, {})):
        with pytest.raises(UsageError, match=r"too long.*--out"):
            make()


def test_a_config_that_is_no_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        Record.create(tmp_path / "run", {"settings": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_is_named_and_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert new_folder("here/run", "name") == Path("here/run")
    assert re.fullmatch(r"runs/\d{8}-\d{6}-\d{6}-depth-relu", new_folder(None, "depth-relu").as_posix())
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_held_while_it_is_open_and_can_be_taken_up_again(tmp_path):
    record = Record.create(tmp_path / "run", {"experiment": "x"})
    record.add({"epoch": 1})
    for take in (lambda: Record.reopen(record.folder), lambda: Record.create(record.folder, {})):
        with pytest.raises(UsageError, match=rf"held|written by process {os.getpid()} on"):
            take()
    record.close()
    assert sorted(path.name for path in record.folder.iterdir()) == ["config.json", "metrics.jsonl"]
    with pytest.raises(UsageError, match="exists; pass another --out, resume it with --resume"):
        Record.create(record.folder, {})
    again = Record.reopen(record.folder)
    assert again.lines == [{"epoch": 1}]
    again.add({"epoch": 2})
    again.keep(1)
    again.add({"epoch": 3})
    again.close()
    assert records.read_lines(record.folder) == [{"epoch": 1}, {"epoch": 3}]


def test_a_last_line_that_was_cut_is_left_out_when_a_run_goes_on(tmp_path):
    Record.create(tmp_path / "run", {}).close()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(UsageError, match=r"metrics.jsonl, line 2 cannot be read"):
        records.read_lines(tmp_path / "run")
    with Record.reopen(tmp_path / "run") as again:
        assert again.lines == [{"epoch": 1}]
        again.add({"epoch": 2})
    assert records.read_lines(tmp_path / "run") == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("before", [[], [{"epoch": 1}]])
def test_what_is_added_after_a_last_line_that_was_cut_is_a_line_of_its_own(before, tmp_path):
    with Record.create(tmp_path / "run", {}) as record:
        for line in before:
            record.add(line)
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"act": "lk_r')
    with Record.reopen(tmp_path / "run") as record:
        record.add({"epoch": 2})
    assert records.read_lines(tmp_path / "run") == [*before, {"epoch": 2}]


def test_a_run_is_made_once(tmp_path):
    with Record.create(tmp_path / "run", {}) as record:
        made = record.once({"row": "relu", "seed": 0}, lambda: {"accuracy": 0.5})
        assert made == {"row": "relu", "seed": 0, "accuracy": 0.5, "seconds": made["seconds"]}
        assert made["seconds"] >= 0
    with Record.reopen(tmp_path / "run") as again:
        assert again.once({"row": "relu", "seed": 0}, lambda: pytest.fail("it is there")) == made
        assert again.once({"row": "relu", "seed": 1}, lambda: {"accuracy": 0.6})["accuracy"] == 0.6
    assert [line["seed"] for line in records.read_lines(tmp_path / "run")] == [0, 1]


def test_runs_that_are_missing_are_made_together(tmp_path):
    keys = [{"seed": seed} for seed in range(4)]
    with Record.create(tmp_path / "run", {}) as record:
        record.add({"seed": 2, "value": 20})
        asked = []

        def make(missing):
            asked.append(missing)
            return [{"value": 10 * i} for i in missing]

        for _ in range(2):
            assert [line["value"] for line in record.once_each(keys, make)] == [0, 10, 20, 30]
        assert asked == [[0, 1, 3]]
        with pytest.raises(ValueError, match="zip"):
            record.once_each([{"seed": 9}], lambda _: [])
    assert [line["seed"] for line in records.read_lines(tmp_path / "run")] == [2, 0, 1, 3]


def test_lines_that_belong_together_are_all_there_or_none(tmp_path, monkeypatch):
    with Record.create(tmp_path / "run", {}) as record:
        record.add({"seed": 0})
        with monkeypatch.context() as crash:
            crash.setattr(Path, "replace", lambda *_: pytest.fail("the disk is full"))
            with pytest.raises(pytest.fail.Exception):
                record.once_all({"seed": 1}, lambda: [{"epoch": 1}, {"epoch": 2}])
        assert records.read_lines(tmp_path / "run") == [{"seed": 0}]
    with Record.reopen(tmp_path / "run") as again:
        wanted = [{"seed": 1, "epoch": 1}, {"seed": 1, "epoch": 2}]
        assert again.once_all({"seed": 1}, lambda: [{"epoch": 1}, {"epoch": 2}]) == wanted
        assert again.once_all({"seed": 1}, lambda: pytest.fail("they are there")) == wanted
    assert records.read_lines(tmp_path / "run") == [{"seed": 0}, *wanted]


def test_each_command_that_adds_to_a_record_is_told_once(tmp_path):
    config = {"experiment": "x", "command": "python -m x --seeds 1"}
    for seeds in (1, 2, 1, 2):
        with Record.open(tmp_path / "run", config, same=("experiment",)) as record:
            record.made_by(f"python -m x --seeds {seeds}")
    again = records.read_config(tmp_path / "run")
    assert environment.commands(again) == ["python -m x --seeds 1", "python -m x --seeds 2"]
    assert again["commit"] == record.config["commit"]


def test_an_error_while_a_record_is_opened_lets_go_of_it(tmp_path, monkeypatch):
    Record.create(tmp_path / "run", {}).close()
    with monkeypatch.context() as crash:
        crash.setattr(records, "read_lines", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Record.reopen(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "metrics.jsonl"]


def test_a_line_is_synchronised_to_the_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink()) or fsync(file)
    )
    with Record.create(tmp_path / "run", {}) as record:
        synced.clear()
        record.add({"epoch": 1})
        assert [path.name for path in synced] == ["metrics.jsonl"]


DAMAGE = {
    "no config": lambda run: (run / "config.json").unlink(),
    "garbled config": lambda run: (run / "config.json").write_text("{"),
    "no object": lambda run: (run / "config.json").write_text("[]"),
    "garbled line": lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1\n{"epoch": 2}\n'),
    "other commit": lambda run: change(run, commit="0" * 40),
    "other versions": lambda run: change(run, versions={"jax": "0.0.1"}),
}


def change(run, **values):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_go_on_is_refused_in_one_line_and_let_go(damage, tmp_path):
    Record.create(tmp_path / "run", {}).close()
    DAMAGE[damage](tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for _ in range(2):  # the lock is released
        with pytest.raises(UsageError) as caught:
            Record.reopen(tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert "run" in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no run"):
        Record.reopen(tmp_path / "nothing")


def test_the_commit_of_a_checkout_and_whether_code_differs_from_it(checkout):
    git(checkout, "init", "-q")
    assert re.fullmatch("unknown-[0-9a-f]{8}", environment._commit())  # no commit yet
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    commit = git(checkout, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert environment._commit() == commit
    (checkout / "README.md").write_text("prose and results do not change a run")
    assert environment._commit() == commit
    (checkout / "experiments" / "new.py").write_text("")
    added = environment._commit()
    assert re.fullmatch(rf"{commit}\+changes-[0-9a-f]{{8}}", added)
    (checkout / "experiments" / "new.py").unlink()
    (checkout / "experiments" / "engine" / "records.py").write_text("2\n")
    changed = environment._commit()
    assert re.fullmatch(rf"{commit}\+changes-[0-9a-f]{{8}}", changed)
    (checkout / "experiments" / "engine" / "records.py").write_text("3\n")
    assert len({added, changed, environment._commit()}) == 3


def test_the_commit_is_unknown_outside_a_checkout_and_without_git(checkout, monkeypatch):
    unknown = environment._commit()
    assert re.fullmatch("unknown-[0-9a-f]{8}", unknown)
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    assert environment._commit() == git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")
    assert environment._commit() == unknown


HOLDER = """
import sys, time
from pathlib import Path
from experiments.engine.records import Record
record = Record.create(Path(sys.argv[1]), {})
record.add({"epoch": 1})
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_lets_go_of_its_folder(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            for take in (lambda: Record.reopen(folder), lambda: new_folder(str(folder), "name")):
                with pytest.raises(UsageError, match=rf"by process {holder.pid} on .* since .*; wait for it, or stop"):
                    take()
        finally:
            holder.kill()
    with pytest.raises(UsageError, match="exists; pass another --out, resume it with --resume"):
        new_folder(str(folder), "name")
    again = Record.reopen(folder)
    assert again.lines == [{"epoch": 1}]
    again.close()


def test_what_is_there_and_is_no_record_is_not_gone_on_with(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="is there and is no record; pass --out"):
            Record.open(folder, {"experiment": "x"}, same=("experiment",))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
