"""What the benchmarks share: bad input is refused before anything is measured, and a record is whole."""

import json
import sys

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import bandwidth, certify, growth, turns, warm_up
from tests.commands import in_this_process


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (bandwidth.main, ["--links", "relu", "foo"], "--links: there is no 'foo'; take of "),
        (certify.main, ["--links", "lk_relu", "foo"], "--links: there is no 'foo'; take of "),
        (certify.main, ["--rounds", "0"], "--rounds is at least 1, got 0"),
        (certify.main, ["--out", "."], "--out is a file for the record, got the folder ."),
        (certify.main, ["--out", "taken/record.json"], "cannot write taken/record.json"),
        (warm_up.main, ["--rate", "-1"], "--rate is a positive number, got -1.0"),
        (warm_up.main, ["--rate", "nan"], "--rate is a positive number, got nan"),
        (growth.main, ["--out", "growth.png"], "--out is the record, got growth.png, which its picture will be"),
        (benchmarks.main, ["--rounds", "0"], "--rounds is at least 1, got 0"),
        (benchmarks.main, ["--rounds", "-3"], "--rounds is at least 1, got -3"),
        (benchmarks.main, ["--out", "taken"], "--out is a folder for the records, got the file taken"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(main, arguments, says, tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "in_turns", None)
    monkeypatch.setattr(benchmarks.subprocess, "run", None)
    (tmp_path / "taken").write_text("")
    code, out, error = in_this_process(main, *arguments, folder=tmp_path)
    assert (code, out) == (2, "")
    assert says in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_record_is_written_with_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["turns", "--rounds", "2", "--out", str(tmp_path / "new" / "record.json")])
    settings = turns.parse(turns.Settings, "turns")
    turns.save(settings, "toy", {"seconds": 1.0})
    (file,) = (tmp_path / "new").iterdir()
    record = json.loads(file.read_text())
    assert (record["benchmark"], record["settings"], record["results"]) == ("toy", {"rounds": 2}, {"seconds": 1.0})
    assert "versions" in record
