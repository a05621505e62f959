"""No number in a table of results/ without the record behind it."""

import json
import re
from pathlib import Path

import pytest

from experiments.engine import tables

ROOT = Path(__file__).parent.parent
RECORDS = sorted(path.parent for path in (ROOT / "results" / "records").glob("*/config.json"))
BENCHMARKS = sorted((ROOT / "results" / "benchmarks").glob("*.json"))


def table_of(record: Path) -> str:
    lines = [json.loads(line) for line in (record / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    width = json.loads((record / "config.json").read_text(encoding="utf-8"))["settings"]["width"]
    return tables.markdown(tables.depth_table(lines, width=width))


def test_there_are_records():
    assert RECORDS
    assert BENCHMARKS


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_the_page_shows_the_table_of_each_record(record):
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    config = json.loads((record / "config.json").read_text(encoding="utf-8"))
    assert table_of(record) in page, f"results/README.md lacks this table:\n{table_of(record)}"
    assert config["data"]["fingerprint"] in page
    assert re.fullmatch(r"[0-9a-f]{40}", config["commit"]), "a published record is made from a clean commit"
    assert config["commit"][:7] in page


def test_the_front_page_shows_rows_of_a_record():
    rows = {line for record in RECORDS for line in table_of(record).splitlines()}
    shown = re.findall(r"^\| (?:relu|lk_\w+) .*\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert shown
    assert set(shown) <= rows


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_the_front_page_shows_the_ratios_of_the_benchmark(path):
    nets = json.loads(path.read_text(encoding="utf-8"))["results"]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for mode, measured in nets.items():
        plain = measured["plain"]
        for name in ("naive", "linked"):
            time = measured[name]["step_seconds"] / plain["step_seconds"]
            memory = measured[name]["temporary_bytes"] / plain["temporary_bytes"]
            assert f"| {mode} | {name} | {time:.2f} | {memory:.2f} |" in page


def test_a_linked_layer_meets_its_memory_goal():
    nets = json.loads((ROOT / "results" / "benchmarks" / "linked_layer.json").read_text(encoding="utf-8"))["results"]
    linked, plain, naive = (nets["scanned"][name]["temporary_bytes"] for name in ("linked", "plain", "naive"))
    assert linked <= 0.9 * plain
    assert linked <= 0.45 * naive
