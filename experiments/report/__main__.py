"""Tables, pictures and one page, made from the records of runs alone.

    python -m experiments.report
    python -m experiments.report results/records --out results/tables

Makes for each table NAME.md, NAME.csv, NAME.png (the table as a picture) and NAME-curves.png, and report.html, which
has all of them and opens offline. Records of different data, code or protocol are never averaged.
"""

import base64
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import jinja2
import tyro

from experiments.engine import plots
from experiments.engine.checks import command_line
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command
from experiments.engine.tables import legend
from experiments.report.groups import Group, groups
from experiments.report.stored import read_records
from experiments.report.table import commands, csv_of, markdown_of, origin, table_of, times_of

PAGE = "report.html"
_US = "experiments.report"
_CONTENTS = "contents.json"  # says that the folder is a report, and what is in it


@dataclasses.dataclass(frozen=True)
class Settings:
    """Make each table in Markdown, CSV and pictures, and one HTML page of all, from the records of runs alone."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ("runs",)
    """Folders that are searched for records."""
    out: str = "report"
    """The folder to make; a report that is there is replaced."""


def main() -> None:
    """Read the command line and make the report."""
    settings = command_line(Settings, "python -m experiments.report")
    out = Path(settings.out)
    _check_out(out)
    found, problems = read_records(settings.runs)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not found:
        raise UsageError(f"there is no record to report in {' or '.join(settings.runs)}; make one, or pass its folder")
    console, sorted_ = Console(), groups(found)
    with console.progress("tables", len(sorted_)) as advance:
        write(out, sorted_, problems, advance)
    for group in sorted_:
        console.say(f"{group.name:<24} {group.heading}: {counted(len(group.records), 'record')}, "
                    f"{counted(len(table_of(group)), 'net')}")  # fmt: skip
        for note in group.notes:
            console.say(f"{'':<24} {note}")
    console.say(f"page     {out / PAGE}")


def write(
    out: Path, found: Sequence[Group], problems: Sequence[str] = (), advance: Callable[[int], None] = lambda _: None
) -> None:
    """Make the report's folder, whole or not at all; a report that is there is replaced, anything else refused.

    The problems of `read_records` are listed on the page; `advance` is called with 1 after each table.
    """
    _check_out(out)
    target = out.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            pictures = {}
            for group in found:
                pictures[group.name] = _write_table(new, group)
                advance(1)
            (new / PAGE).write_text(page(found, pictures, problems), encoding="utf-8")
            files = sorted([_CONTENTS, *(path.name for path in new.iterdir())])
            (new / _CONTENTS).write_text(json.dumps({"made_by": _US, "files": files}, indent=2) + "\n")
            _check_out(out)  # it took a while
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
    except OSError as error:
        raise UsageError(f"cannot write {out} ({error.strerror}); pass another --out") from error


def _write_table(folder: Path, group: Group) -> dict[str, bytes]:
    """The files of one table; gives the pictures for the page."""
    (folder / f"{group.name}.md").write_text(markdown_of(group), encoding="utf-8")
    (folder / f"{group.name}.csv").write_text(csv_of(group), encoding="utf-8")
    if not group.lines:
        return {}
    data = group.config["data"]
    table = plots.table_picture(group.numbers, group.axes, title=group.heading, data=group.config["data"])
    (folder / f"{group.name}.png").write_bytes(table)
    plots.accuracy_picture(group.by_net, folder / f"{group.name}-curves.png", title=group.heading, data=data)
    about = plots.caption(group.by_net)
    panels = plots.panel_pictures(group.by_net, data=data)
    captions = {f"{name}{'; ' if about else ''}{about}": png for name, png in panels.items()}
    return {"The table as a picture": table, **captions}


def page(found: Sequence[Group], pictures: Mapping[str, Mapping[str, bytes]], problems: Sequence[str]) -> str:
    """One HTML page, page.html beside this file filled in: nothing is fetched, and all text is escaped.

    Pictures are name of a group -> caption -> PNG, the table's first; problems say which records are left out, and why.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    functions = {each.__name__: each for each in (commands, counted, legend, origin, table_of, times_of)}
    return templates.get_template("page.html").render(groups=found, pictures=pictures, problems=problems, **functions)


def counted(count: int, what: str) -> str:
    """1 table, 2 tables."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _check_out(out: Path) -> None:
    """Refuse what is there and is no report."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        contents = json.loads((out / _CONTENTS).read_text(encoding="utf-8"))
        extra = {path.name for path in out.iterdir()} - set(contents["files"])
        if contents["made_by"] != _US:
            raise ValueError(contents["made_by"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UsageError(f"{out} exists and is no report; pass another --out") from None
    if extra:
        raise UsageError(f"{out} has {sorted(extra)[0]}, which no report made; move it away, or pass another --out")


if __name__ == "__main__":
    run_command(main)
