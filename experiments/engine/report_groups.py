"""Records that may be averaged together, and the table of each such group. Pure functions of records."""

import csv
import dataclasses
import importlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.engine import tables
from experiments.engine.report_records import Line, NetKey, StoredRecord

TABLES = ("width", "depth", "parameters", "allcnn", "resnet50", "covariate_shift")
"""The experiments that leave nets with axes, in the paper's order."""
_CODE = ("jax", "jaxlib", "flax", "optax", "linked_jax")  # what computes; numpy and Python only carry it
_OUR_AXES = ("paper", "later")


@dataclasses.dataclass(frozen=True)
class Group:
    """Records of one experiment, data set, code and protocol; and what a table shows of them.

    Attributes:
      name: of its files, such as depth-digits.
      experiment: such as depth.
      title: of the paper's table.
      differs: what tells it from other groups of its experiment and data, such as {"epochs": "30"}; often empty.
      records: in the order of their places.
      axes: what tells nets apart.
      lines: of the finished runs, each net and seed once; nets in the table's order.
      nets: of all config.json, each once.
      notes: what a reader must know, such as runs that were left out.
    """

    name: str
    experiment: str
    title: str
    differs: dict[str, str]
    records: list[StoredRecord]
    axes: tuple[str, ...]
    lines: list[Line]
    nets: list[dict[str, Any]]
    notes: list[str]

    @property
    def config(self) -> dict[str, Any]:
        """Of the first record: experiment, data, commit and protocol are the same in all."""
        return self.records[0].config

    @property
    def heading(self) -> str:
        """Title, data set and what differs from other tables."""
        return ": ".join([f"{self.title}, {self.config['data']['name']}", *filter(None, [_said(self.differs)])])


def groups(records: Iterable[StoredRecord]) -> list[Group]:
    """Sort records into groups, in the order of the paper's tables.

    Two records come together only if experiment, axes, data fingerprint, commit, versions of jax, jaxlib, flax, optax
    and linked_jax, and protocol are the same. A group is called after its experiment and data set. Where several would
    have that name, it is called after its record's folder; if it has several, after the folder that they share.
    """
    together: dict[str, list[StoredRecord]] = {}
    for record in records:
        together.setdefault(json.dumps(_identity(record), sort_keys=True), []).append(record)
    named: dict[str, list[list[StoredRecord]]] = {}
    for members in together.values():
        config = members[0].config
        named.setdefault(_file_name(f"{config['experiment']}-{config['data']['name']}"), []).append(members)
    found: dict[str, Group] = {}
    for name, namesakes in named.items():
        for members in namesakes:
            own = name if len(namesakes) == 1 else _file_name(_shared_folder(members))
            while own in found:
                own += "-2"
            found[own] = _group(own, members, _differences(members, namesakes))
    return sorted(found.values(), key=lambda group: (_rank(TABLES, group.experiment), group.experiment, group.name))


def table_of(group: Group) -> list[dict[str, str]]:
    """The rows of a group's table, as texts; none if no run is finished."""
    return tables.summary(group.experiment, group.lines, group.axes, group.nets) if group.lines else []


def times_of(group: Group) -> list[tuple[StoredRecord, list[dict[str, str]]]]:
    """Each record that timed several nets, with its table of times: only times of one process are compared."""
    timed = [record for record in group.records if record.times and len(record.times["medians"]) > 1]
    return [(record, tables.time_table(record.times["medians"])) for record in timed if record.times]


def csv_of(group: Group) -> str:
    """The table as CSV, with all digits; lists have a value for each seed, between spaces."""
    same = {
        "experiment": group.experiment,
        "dataset": group.config["data"]["name"],
        "fingerprint": group.config["data"]["fingerprint"],
    }
    rows = []
    for row in tables.numbers(group.experiment, group.lines, group.axes, group.nets) if group.lines else []:
        flat = {**same, **{key: value for key, value in row.items() if not isinstance(value, list)}}
        flat |= tables.moments("last", row["last"]) | tables.moments("best", row["best"])
        rows.append(flat | {f"{key}_by_seed": " ".join(map(str, row[key])) for key in ("seeds", "last", "best")})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else list(same), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def markdown_of(group: Group) -> str:
    """The whole Markdown file of a group: heading, table, legend, notes, and what makes it again."""
    rows = table_of(group)
    parts = [f"# {group.heading}", *([tables.markdown(rows), tables.legend(rows)] if rows else ["No run is finished."])]
    for record, times in times_of(group):
        parts += [f"## {times_title(record)}", tables.markdown(times)]
    if group.notes:
        parts.append("\n".join(f"- {note}" for note in group.notes))
    parts += ["\n".join(f"- {label}: {text}" for label, text in origin(group).items()), "Made by:"]
    return "\n\n".join([*parts, "\n".join(["```bash", *commands(group), "```"])]) + "\n"


def times_title(record: StoredRecord) -> str:
    """What stands above a table of times."""
    assert record.times is not None
    return f"Median time of a training step, {record.times['steps']} steps of each net in turns, {_hardware(record)}"


def commands(group: Group) -> list[str]:
    """The commands that left the records, each once."""
    return list(dict.fromkeys(record.config["command"] for record in group.records))


def origin(group: Group) -> dict[str, str]:
    """Label -> text: all that a sceptic needs to check a table, but for `commands`."""
    config, records = group.config, group.records
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in record.config["versions"].items():
            versions.setdefault(package, {})[str(version)] = None
    return {
        "data": f"{config['data']['description']} (fingerprint {config['data']['fingerprint']})",
        "protocol": _said(config["protocol"]),
        "commit": config["commit"],
        "versions": ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items()),
        "hardware": "; ".join(dict.fromkeys(map(_hardware, records))),
        "records": ", ".join(f"{record.place} ({record.config['time']})" for record in records),
    }


def _group(name: str, members: list[StoredRecord], differs: dict[str, str]) -> Group:
    config, notes = members[0].config, []
    runs: dict[tuple[NetKey, int], tuple[StoredRecord, list[Line]]] = {}
    for record in members:
        if record.unfinished:
            left_out = "; ".join(_progress(record, run) for run in record.unfinished)
            notes.append(f"{record.place}: {len(record.unfinished)} of {len(record.runs)} runs are not finished and "
                         f"are left out: {left_out}.")  # fmt: skip
        again: dict[str, list[str]] = {}
        for run, lines in record.runs.items():
            if not record.is_finished(run):
                continue
            first = runs.setdefault(run, (record, lines))
            if first[0] is not record:
                same = _results(first[1]) == _results(lines)
                text = f"of {first[0].place} counts; the second one has {'the same' if same else 'OTHER'} numbers"
                again.setdefault(text, []).append(_run_name(run))
        notes += [f"{record.place}: runs that another record has too: that {text}: {', '.join(which)}."
                  for text, which in again.items()]  # fmt: skip
    if "+" in config["commit"] or config["commit"] == "unknown":
        notes.append("The code had changes that are in no commit, so that nobody can check it"
                     + (", nor that it was the same for all records." if len(members) > 1 else "."))  # fmt: skip
    title, acts = _paper(config["experiment"])
    order = _order([run for run, _ in runs], acts, config["axes"].index("act"))
    lines = [line for net in order for (other, _), (_, lines) in runs.items() if other == net for line in lines]
    nets = {tuple(net[a] for a in config["axes"]): net for record in reversed(members) for net in record.config["nets"]}
    return Group(
        name, config["experiment"], title, differs, members, tuple(config["axes"]), lines, list(nets.values()), notes
    )
