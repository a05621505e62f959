"""The table of a group of records, as rows, Markdown and CSV, with all that a sceptic needs to check it."""

import statistics
from typing import Any

import pandas

from experiments.engine import tables
from experiments.report.groups import Group
from experiments.report.stored import StoredRecord


def table_of(group: Group) -> list[dict[str, str]]:
    """The rows of a group's table, as texts; none if no run is finished."""
    return tables.summary(group.numbers, group.axes) if group.lines else []


def times_of(group: Group) -> list[tuple[str, list[dict[str, str]]]]:
    """A title and the rows of a table for each record that timed several nets; times of two records never mix."""
    found = []
    for record in group.records:
        times = record.times
        if times and len(times["medians"]) > 1:
            title = f"Median time of a training step, {times['steps']} steps of each net in turns; {_hardware(record)}"
            found.append((title, tables.time_table(group.config["experiment"], times["medians"])))
    return found


def markdown_of(group: Group) -> str:
    """The Markdown file of a group: heading, table, legend, notes, origin and commands."""
    rows = table_of(group)
    parts = [f"# {group.heading}"]
    parts += [tables.markdown(rows), tables.legend(rows, group.config["data"])] if rows else ["No run is finished."]
    for title, times in times_of(group):
        parts += [title + ":", tables.markdown(times)]
    if group.notes:
        parts.append("\n".join(f"- {note}" for note in group.notes))
    parts.append("\n".join(f"- {label}: {text}" for label, text in origin(group).items()))
    return "\n\n".join([*parts, "\n".join(["```bash", *commands(group), "```"])]) + "\n"


def csv_of(group: Group) -> str:
    """The table as CSV with ten digits, on which all Pythons agree; the last columns have a value for each seed."""
    data = group.config["data"]
    same = {"experiment": group.config["experiment"], "dataset": data["name"], "fingerprint": data["fingerprint"]}
    rows: list[dict[str, Any]] = []
    for row in group.numbers:
        found: dict[str, Any] = {**same, **{axis: row[axis] for axis in group.axes}, "seeds": len(row["seeds"])}
        for key in ("last", "best"):
            found[f"{key}_mean"] = statistics.fmean(row[key])
            found[f"{key}_deviation"] = statistics.stdev(row[key]) if len(row[key]) > 1 else None
        found |= {key: value for key, value in row.items() if not isinstance(value, list)}
        of_seeds = {"seed_numbers": row["seeds"], "last_by_seed": row["last"], "best_by_seed": row["best"]}
        rows.append(found | {key: " ".join(f"{value:.10g}" for value in values) for key, values in of_seeds.items()})
    return pandas.DataFrame(rows, columns=None if rows else list(same)).to_csv(
        index=False, float_format="%.10g", lineterminator="\n"
    )


def commands(group: Group) -> list[str]:
    """The commands that left the records, each once."""
    return list(dict.fromkeys(record.config["command"] for record in group.records))


def origin(group: Group) -> dict[str, str]:
    """Label -> text: where the numbers come from."""
    config, records = group.config, group.records
    packages = dict.fromkeys(package for record in records for package in record.config["versions"])
    versions = {
        package: dict.fromkeys(str(record.config["versions"].get(package)) for record in records)
        for package in packages
    }
    return {
        "data": f"{config['data']['description']} (fingerprint {config['data']['fingerprint']})",
        "protocol": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in config["protocol"].items()),
        "commit": config["commit"],
        "versions": ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items()),
        "hardware": "; ".join(dict.fromkeys(map(_hardware, records))),
        "records": ", ".join(f"{record.place} ({record.config['time']})" for record in records),
    }


def _hardware(record: StoredRecord) -> str:
    found = record.config["hardware"]
    machine = f"{found.get('machine')} {found.get('system')}, {found.get('cpu_cores')} CPU cores"
    return f"{record.config['settings'].get('devices', 1)} x {found.get('device')} ({machine})"
