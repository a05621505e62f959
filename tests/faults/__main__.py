"""All faults that are tried, and what was survived, as a table: `python -m tests.faults`.

    python -m tests.faults
    python -m tests.faults --out results/faults       # also a record: faults.json and table.md

A fault is a test with the mark `fault(area, what)`, wherever it stands; a test may try one several times, and says how
often by the property `tried`. Lost is what a failed test had tried.
"""

import argparse
import collections
import json
import sys
import time
from pathlib import Path

import pytest

from experiments.engine.console import Console
from experiments.engine.environment import environment
from experiments.engine.files import write_whole
from experiments.engine.tables import markdown


class Faults:
    """A plugin that counts, of each area and kind of fault, what was tried and what was lost; see tests/conftest.py."""

    def __init__(self):
        self.tried, self.lost = collections.Counter(), collections.Counter()

    def pytest_runtest_logreport(self, report):
        """Count a test when it ends."""
        said = dict(report.user_properties)
        if "fault" not in said or not (report.when == "call" or report.failed or report.skipped):
            return
        fault, count = tuple(said["fault"]), said.get("tried", 1)
        self.tried[fault] += 0 if report.skipped else count
        self.lost[fault] += count if report.failed else 0

    def rows(self):
        """A row for each kind, in order, and one for all."""
        order = sorted(self.tried)
        rows = [(*fault, self.tried[fault], self.lost[fault]) for fault in order]
        total = ("all", "", sum(self.tried.values()), sum(self.lost.values()))
        return [
            {"area": area, "fault": what, "tried": f"{n:,}", "survived": f"{n - lost:,}", "lost": f"{lost:,}"}
            for area, what, n, lost in [*rows, total]
        ]


def main():
    """Run the tests of faults, print the table, and end with 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for faults.json and table.md")
    parser.add_argument("--only", default="", help="an expression of pytest's -k")
    settings = parser.parse_args()
    faults, began = Faults(), time.monotonic()
    code = pytest.main(["-m", "fault", "-q", "-p", "no:cacheprovider", "-k", settings.only, "tests"], plugins=[faults])
    rows = faults.rows()
    Console().table(f"Faults, in {time.monotonic() - began:,.0f} s; what was skipped here is tried 0 times", rows)
    if settings.out:
        settings.out.mkdir(parents=True, exist_ok=True)
        record = {"command": "python -m tests.faults", **environment(), "rows": rows}
        write_whole(settings.out / "faults.json", json.dumps(record, indent=2) + "\n")
        write_whole(settings.out / "table.md", markdown(rows) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
