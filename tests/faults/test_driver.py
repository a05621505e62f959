"""`python -m tests.faults` counts what its tests tried, in processes of their own."""

import json
import re

import pytest

from tests.children import finish, start


@pytest.mark.slow
def test_the_driver_counts_and_leaves_a_record(tmp_path):
    code, said, error = finish(start("-m", "tests.faults", "--only", "pickle", "--out", tmp_path))
    assert code == 0, said + error
    rows = json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))["rows"]
    assert [row["area"] for row in rows] == ["security", "all"]
    assert (rows[-1]["tried"], rows[-1]["lost"]) == ("1", "0")
    assert re.search(r"all +1 +1 +0", said)
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("\n") == 4
