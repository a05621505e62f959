"""Which records may be averaged together. Pure functions of records."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from experiments import allcnn, covariate_shift, depth, parameters, resnet50, width
from experiments.engine import tables
from experiments.engine.tables import Nets
from experiments.report.stored import Line, Run, StoredRecord

TABLES = {module.TABLE.name: module.TABLE for module in (width, depth, parameters, allcnn, resnet50, covariate_shift)}
"""Name -> the experiment that trains the nets of a table, in the paper's order."""
_CODE = ("jax", "jaxlib", "flax", "optax", "linked_jax")  # what computes; numpy and Python only carry it


@dataclasses.dataclass(frozen=True)
class Group:
    """Records of one experiment, data set, code and protocol."""

    name: str  # of its files, such as depth-digits
    differs: dict[str, str]  # what tells it from others with its experiment and data, such as {"epochs": "30"}
    records: list[StoredRecord]  # in the order of their places
    lines: list[Line]  # of the finished runs, each net and seed once; nets in the table's order, seeds rising
    notes: list[str]  # what a reader must know, such as runs that were left out

    @property
    def config(self) -> dict[str, Any]:
        """Of the first record: experiment, axes, data, commit and protocol are the same in all."""
        return self.records[0].config

    @property
    def axes(self) -> list[str]:
        """What tells nets apart."""
        return self.config["axes"]

    @functools.cached_property
    def by_net(self) -> Nets:
        """The lines of `lines`, sorted by net and seed."""
        return tables.by_net(self.lines, self.axes)

    @functools.cached_property
    def numbers(self) -> list[dict[str, Any]]:
        """The table, as numbers."""
        nets = [net for record in self.records for net in record.config["nets"]]
        return tables.numbers(
            self.config["experiment"], self.config["data"], self.config["protocol"], self.by_net, nets
        )

    @property
    def heading(self) -> str:
        """Title, data set, how little of it was learnt if not all, and what differs from other tables."""
        experiment, protocol = self.config["experiment"], self.config["protocol"]
        sizes = {name.replace("_", " "): protocol.get(name) for name in ("train_size", "held_out")}
        told = {name: size for name, size in sizes.items() if size is not None} | self.differs
        differs = ", ".join(f"{what} {value}" for what, value in told.items())
        title = TABLES[experiment].title if experiment in TABLES else experiment
        return f"{title}. {self.config['data']['name']}" + (f" ({differs})" if differs else "")


def groups(records: Iterable[StoredRecord]) -> list[Group]:
    """Sort records into groups, in the order of the paper's tables.

    Two records come together only if experiment, axes, data fingerprint, commit, versions of jax, jaxlib, flax, optax
    and linked_jax, and protocol are the same. A group is named after its experiment and data set. Where several would
    have that name, it is named after its record's folder or, if it has several records, after the folder they share.
    """
    together: dict[frozenset[tuple[str, str]], list[StoredRecord]] = {}
    for record in records:
        together.setdefault(frozenset(_identity(record).items()), []).append(record)
    alike: dict[str, list[list[StoredRecord]]] = {}
    for members in together.values():
        config = members[0].config
        alike.setdefault(f"{config['experiment']}-{config['data']['name']}", []).append(members)
    found: dict[str, Group] = {}
    for name, namesakes in alike.items():
        for members in namesakes:
            own = _free(name if len(namesakes) == 1 else _folder_name(members), found)
            found[own] = _group(own, members, _differences(members, namesakes))
    return sorted(found.values(), key=lambda group: (_rank(group.config["experiment"], list(TABLES)), group.name))


def _identity(record: StoredRecord) -> dict[str, str]:
    """What must be the same in two records that are averaged; all of it, as texts."""
    config = record.config
    return {
        "experiment": config["experiment"],
        "axes": " ".join(config["axes"]),
        "data fingerprint": config["data"]["fingerprint"],
        "commit": config["commit"],
        **{package: str(config["versions"].get(package)) for package in _CODE},
        **{name.replace("_", " "): str(value) for name, value in config["protocol"].items()},
    }


def _differences(members: list[StoredRecord], namesakes: list[list[StoredRecord]]) -> dict[str, str]:
    """What tells a group from its namesakes: settings that both have; else the code too; else settings one lacks."""
    own, *others = (_identity(each[0]) for each in [members, *(each for each in namesakes if each is not members)])

    def differing(names: Iterable[str]) -> list[set[str]]:
        return [{name for name in names if name in other and other[name] != own[name]} for other in others]

    settings, computed = differing(own.keys() - {"commit", *_CODE}), differing(own)
    lacking = [{name for name in own if other.get(name) != own[name]} for other in others]
    told = set().union(*next((sets for sets in (settings, computed) if all(sets)), lacking))
    return {name: text[:7] + text[40:] if name == "commit" else text for name, text in own.items() if name in told}


def _folder_name(members: list[StoredRecord]) -> str:
    """The record's folder; of several, the folder that they share, or the first one's if that is the searched one."""
    places = [PurePosixPath(member.place) for member in members]
    shared = PurePosixPath(os.path.commonpath([place.parent for place in places])).name
    return shared if shared and len(members) > 1 else places[0].name


def _free(name: str, taken: Mapping[str, Any]) -> str:
    name = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "table"
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _group(name: str, members: list[StoredRecord], differs: dict[str, str]) -> Group:
    config = members[0].config
    runs: dict[Run, tuple[StoredRecord, list[Line]]] = {}
    notes = []
    for record in members:
        again: dict[str, list[str]] = {}
        if record.unfinished:
            which = "; ".join(f"{_named(run)} ({record.progress(run)})" for run in record.unfinished)
            notes.append(f"{record.place}: runs that are not finished, and are left out: {which}.")
        for run, lines in record.runs.items():
            if record.is_finished(run) and run in runs:
                again.setdefault(_twice(*runs[run], lines), []).append(_named(run))
            elif record.is_finished(run):
                runs[run] = (record, lines)
        notes += [f"{record.place}: runs that {why}: {'; '.join(which)}." for why, which in again.items()]
    if not re.fullmatch("[0-9a-f]+", config["commit"]):
        unsure = "The code had changes that no commit has, so it cannot be checked"
        notes.append(unsure + (", nor whether it was the same for all records." if len(members) > 1 else "."))
    acts = TABLES[config["experiment"]].rows if config["experiment"] in TABLES else ()
    in_order = _in_order(list(runs), config["axes"].index("act"), acts)
    return Group(name, differs, members, [line for run in in_order for line in runs[run][1]], notes)


def _named(run: Run) -> str:
    net, seed = run
    return f"{tables.named(net)} seed {seed}"


def _twice(first: StoredRecord, one: list[Line], other: list[Line]) -> str:
    """Why a run that is there twice is left out, and whether that changes anything."""
    results = [[{**line, "seconds": None} for line in lines] for lines in (one, other)]
    same = "the same numbers" if results[0] == results[1] else "OTHER numbers"
    return f"{first.place} has too, with {same}, and that comes first"


def _in_order(runs: list[Run], act: int, acts: Sequence[str]) -> list[Run]:
    """Activations in the paper's order, numbers rising, other values as they come."""
    seen = [list(dict.fromkeys(values)) for values in zip(*(net for net, _ in runs), strict=True)]

    def place(run: Run) -> list[Any]:
        ranks = []
        for axis, (value, values) in enumerate(zip(run[0], seen, strict=True)):
            numeric = all(isinstance(other, int | float) for other in values)
            ranks += [_rank(value, acts if axis == act else ()), value if numeric else values.index(value)]
        return [*ranks, run[1]]

    return sorted(runs, key=place)


def _rank(value: Any, order: Sequence[str]) -> int:
    return order.index(value) if value in order else len(order)
