"""A report as one HTML page that opens anywhere: nothing is fetched, pictures are inside, light and dark."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from experiments.engine.tables import legend
from experiments.report.groups import Group
from experiments.report.table import commands, origin, table_of, times_of


def page(groups: Sequence[Group], pictures: Mapping[str, Mapping[str, bytes]], problems: Sequence[str]) -> str:
    """The page: page.html beside this file, filled in; all text is escaped.

    Args:
      groups: of `groups.groups`.
      pictures: name of a group -> caption -> PNG; the first one is the table's.
      problems: records that were left out, and why.

    Returns:
      HTML that refers to nothing outside itself.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    functions = (commands, counted, legend, origin, table_of, times_of)
    return templates.get_template("page.html").render(
        groups=groups, pictures=pictures, problems=problems, **{function.__name__: function for function in functions}
    )


def counted(count: int, what: str) -> str:
    """1 table, 2 tables."""
    return f"{count} {what}{'' if count == 1 else 's'}"
