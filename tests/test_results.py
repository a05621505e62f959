"""No number in a table of results/ without the record behind it."""

import json
import re
from pathlib import Path

import pytest

from experiments.charlm import table as charlm_table
from experiments.engine import records, tables
from experiments.headlines import claim as headlines_claim
from experiments.headlines.__main__ import CLAIMS
from experiments.load_forecast import table as forecast_table
from experiments.plasticity import plots as plasticity_plots
from experiments.plasticity import regression
from experiments.plasticity.kumar import table as kumar_table
from experiments.remedies import table as remedies_table
from experiments.report import __main__ as report
from experiments.report import front
from experiments.revive import plots as revive_plots

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
RECORDS, PROBLEMS = report.read_records([RESULTS / "records"])
GROUPS = report.groups(RECORDS)
BENCHMARKS = sorted((RESULTS / "benchmarks").glob("*.json"))
MEAN = re.compile(r"\b\d+\.\d{2,4} ± \d+\.\d{2,4}\b")


def test_there_are_records_and_none_is_damaged():
    assert len(GROUPS) >= 5
    assert BENCHMARKS
    assert [problem for problem in PROBLEMS if not problem.startswith("dynamics: no table is made of it")] == []


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_a_committed_table_is_what_its_records_give(group):
    assert (RESULTS / "tables" / f"{group.name}.md").read_text(encoding="utf-8") == report.markdown_of(group)
    assert (RESULTS / "tables" / f"{group.name}.csv").read_text(encoding="utf-8") == report.csv_of(group)
    assert re.fullmatch(r"[0-9a-f]{40}", group.config["commit"]), "a published record is made from a clean commit"


def test_there_is_no_table_without_records():
    found = {path.stem for path in (RESULTS / "tables").glob("*.md")}
    assert found == {group.name for group in GROUPS}


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_every_mean_of_a_page_is_in_a_table(page):
    others = [path.read_text(encoding="utf-8") for path in RESULTS.rglob("table.md")]
    tables = "".join([*(report.markdown_of(group) for group in GROUPS), *others])
    means = MEAN.findall((ROOT / page).read_text(encoding="utf-8"))
    assert means
    assert not [mean for mean in means if mean not in tables]


def test_the_curves_of_the_front_page_end_at_means_of_the_tables():
    table = (RESULTS / "tables" / "depth-cifar10-original.md").read_text(encoding="utf-8")
    for curve in front.DEEP:
        last = tables.spread(front.deep(curve.row)[:, -1].tolist())
        assert re.search(rf"^\| {curve.row} \| auto \| \S+ \| {re.escape(last)} \|", table, re.MULTILINE)
    table = (RESULTS / "plasticity" / "kumar" / "table.md").read_text(encoding="utf-8")
    for curve in front.CONTINUAL:
        scores = 100 * front.continual(curve.row).mean(axis=1)
        assert f"| {curve.row} | {scores.mean():.2f} ± {scores.std(ddof=1):.2f} |" in table


def test_the_front_pages_other_numbers_are_in_records():
    page, table = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "results/tables/depth-digits.md")
    )
    assert re.search(r"^\| relu \| glorot .* \| 66/200 \| layer 13 ", table, re.MULTILINE)
    assert "relu has 66 of 200 units dead, from layer 13 on" in " ".join(page.split())
    ratios = []
    for batch in (128, 32):
        times = json.loads((RESULTS / "benchmarks" / f"pytorch_depth_{batch}.json").read_text(encoding="utf-8"))
        ratios.append(times["results"]["PyTorch"] / times["results"]["ours"])
    assert f"{ratios[0]:.2f} to {ratios[1]:.2f} times as fast" in page


def test_every_claim_has_a_verdict():
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    claims = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert [int(number) for number, *_ in claims] == list(range(1, 13))
    assert all(len(cell) > 3 for _, *cells in claims for cell in cells)


def test_the_page_of_costs_shows_the_ratios_of_the_benchmark():
    nets = json.loads((RESULTS / "benchmarks" / "linked_layer.json").read_text(encoding="utf-8"))["results"]
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    for mode, measured in nets.items():
        plain = measured["plain"]
        for name in ("naive", "linked"):
            time = measured[name]["step_seconds"] / plain["step_seconds"]
            memory = measured[name]["temporary_bytes"] / plain["temporary_bytes"]
            assert f"| {mode} | {name} | {time:.2f} | {memory:.2f} |" in page
    front_page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    plain, linked, lax = (nets["scanned"][name] for name in ("plain", "linked", "lax"))
    time, memory = (linked[what] / plain[what] for what in ("step_seconds", "temporary_bytes"))
    assert f"{time:.2f} of the time of `nnx.Conv` after `jax.nn.relu`, and {memory:.2f} of its temporary" in front_page
    time, memory = (lax[what] / plain[what] for what in ("step_seconds", "temporary_bytes"))
    assert f"costs {time:.2f} times the plain step and keeps {memory:.2f} of its memory" in front_page


def test_the_page_of_costs_shows_the_ratios_beside_pytorch():
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    records = sorted((RESULTS / "benchmarks").glob("pytorch_*.json"))
    assert records
    for record in records:
        seconds = json.loads(record.read_text(encoding="utf-8"))["results"]
        ratio = f"{seconds['PyTorch'] / seconds['ours']:.2f}"
        assert f"[{ratio}](../results/benchmarks/{record.name})" in page


def test_the_page_of_costs_shows_the_times_of_certificates():
    page = " ".join((ROOT / "docs" / "costs.md").read_text(encoding="utf-8").split())
    links = json.loads((RESULTS / "benchmarks" / "certify.json").read_text(encoding="utf-8"))["results"]
    for name in ("lk_relu", "lk_swish", "fourier"):
        assert f"{links[name]['certify']:.1f} s for `{name}`" in page
    ratios = [seconds["by hand"] / seconds["certify"] for seconds in links.values()]
    assert f"takes {min(ratios):.1f} to {max(ratios):.1f} times as long" in page
    times = [seconds["certify"] for seconds in links.values()]
    front_page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"float32 takes {min(times):.0f} to {max(times):.0f} s" in front_page


def test_the_front_page_quotes_the_record_of_faults():
    rows = json.loads((RESULTS / "faults" / "faults.json").read_text(encoding="utf-8"))["rows"]
    total, kills = rows[-1], [row for row in rows if row["fault"].startswith("SIGKILL: ")]  # of runs that are resumed
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{total['tried']} faults tried, {total['lost']} lost" in page
    assert f"{sum(int(row['tried']) for row in kills)} SIGKILLs" in page
    assert tables.markdown(rows) + "\n" == (RESULTS / "faults" / "table.md").read_text(encoding="utf-8")


def test_a_linked_layer_meets_its_memory_goal():
    nets = json.loads((ROOT / "results" / "benchmarks" / "linked_layer.json").read_text(encoding="utf-8"))["results"]
    linked, plain, naive = (nets["scanned"][name]["temporary_bytes"] for name in ("lax", "plain", "naive"))
    assert linked <= 0.9 * plain
    assert linked <= 0.45 * naive


@pytest.mark.parametrize("name", sorted(path.name for path in (RESULTS / "remedies" / "headlines").glob("*")))
def test_a_committed_claim_is_what_its_record_gives(name):
    folder = RESULTS / "remedies" / "headlines" / name
    page = headlines_claim.page(CLAIMS[name], records.read_config(folder), records.read_lines(folder))
    assert (folder / "table.md").read_text(encoding="utf-8") == page


def test_the_committed_comparison_of_remedies_is_what_its_record_gives():
    folder = RESULTS / "remedies"
    page = remedies_table.markdown(records.read_config(folder), records.read_lines(folder), records.read_times(folder))
    assert (folder / "table.md").read_text(encoding="utf-8") == page


STUDIES = {
    "plasticity": plasticity_plots.markdown,
    "plasticity/cifar10": plasticity_plots.markdown,
    "plasticity/kumar": kumar_table.markdown,
    "plasticity/kumar/normal": kumar_table.markdown,
    "plasticity/kumar/scale": kumar_table.markdown,
    "plasticity/regression": regression.page,
    "revive": revive_plots.markdown,
    "charlm": charlm_table.markdown,
    "charlm/controls": charlm_table.markdown,
    "charlm/depth24": charlm_table.markdown,
    "charlm/layer_norm": charlm_table.markdown,
    "charlm/width": charlm_table.markdown,
}


@pytest.mark.parametrize("name", STUDIES)
def test_the_committed_tables_of_studies_are_what_their_records_give(name):
    folder = RESULTS / name
    page = STUDIES[name](records.read_config(folder), records.read_lines(folder))
    assert (folder / "table.md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", ["remedies", "plasticity", "revive", "charlm"])
def test_numbers_of_a_page_are_in_its_tables(name):
    folder = RESULTS / name
    tabled = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("table.md"))
    numbers = MEAN.findall((folder / "README.md").read_text(encoding="utf-8"))
    assert numbers
    assert all(number in tabled for number in numbers)


def test_the_committed_forecast_is_what_its_record_gives():
    folder = RESULTS / "load_forecast"
    table = forecast_table.table(records.read_lines(folder), records.read_config(folder)["nets"])
    assert tables.markdown(table) in (folder / "README.md").read_text(encoding="utf-8")
