"""A report as one HTML page that opens anywhere: nothing is fetched, pictures are inside, light and dark."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from experiments.engine import tables
from experiments.report.groups import Group
from experiments.report.table import commands, origin, table_of, times_of

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --paper: #fff; --shade: #f6f8fa;
  --link: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117; --shade: #151b23; --link: #56b4e9 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem }
a { color: var(--link) }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; width: 100% }
th, td { padding: .3rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line) }
tr:last-child td { border-bottom: 0 }
th { background: var(--shade) }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--shade); font-weight: 600 }
.legend, figcaption, dt { color: var(--soft); font-size: .85rem }
.notes { border-left: 4px solid #e69f00; padding: .3rem .8rem; margin: 1rem 0; background: var(--shade) }
.notes ul { margin: 0; padding-left: 1.1rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem;
  align-items: start; margin: 1rem 0 }
figure { margin: 0 }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px }
.table-picture { max-width: 40rem; margin: 1rem 0 }
summary { cursor: pointer; margin: .5rem 0 }
dl { margin: 0 }
dt { margin-top: .5rem }
dd { margin: 0 }
pre { overflow-x: auto; overflow-wrap: normal; background: var(--shade); border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem; font-size: .85rem }
"""


def page(groups: Sequence[Group], pictures: Mapping[str, Mapping[str, bytes]], problems: Sequence[str]) -> str:
    """The page.

    Args:
      groups: of `report_groups.groups`.
      pictures: name of a group -> caption -> PNG; the first one is the table's.
      problems: records that were left out, and why.

    Returns:
      HTML that refers to nothing outside itself.
    """
    entries = "".join(f'<li><a href="#{escape(group.name)}">{escape(group.heading)}</a></li>' for group in groups)
    count = sum(len(group.records) for group in groups)
    left_out = ""
    if problems:
        left_out = '<h2 id="left-out">Records that are left out</h2>' + _list(problems)
        entries += '<li><a href="#left-out">Records that are left out</a></li>'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Linked neurons: report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Linked neurons: {counted(len(groups), 'table')} from {counted(count, 'record')}</h1>\n"
        "<p>Every number and every picture is computed from the records that are named below it. Records of different "
        "data, code or protocol are never averaged: each has a table of its own.</p>\n"
        f"<nav><ul>{entries}</ul></nav>\n"
        + "\n".join(_section(group, pictures.get(group.name, {})) for group in groups)
        + f"{left_out}\n</body>\n</html>\n"
    )


def _section(group: Group, pictures: Mapping[str, bytes]) -> str:
    rows = table_of(group)
    parts = [f'<section>\n<h2 id="{escape(group.name)}">{escape(group.heading)}</h2>']
    parts.append(f"<p>{escape(group.config['data']['description'])}. Files: {escape(group.name)}.md, .csv, .png.</p>")
    if rows:
        parts += [_table(rows), f'<p class="legend">{escape(tables.legend(rows))}</p>']
    else:
        parts.append("<p>No run is finished.</p>")
    for title, times in times_of(group):
        parts += [f"<h3>{escape(title)}</h3>", _table(times)]
    if group.notes:
        parts.append(f'<div class="notes">{_list(group.notes)}</div>')
    figures = [_figure(caption, png) for caption, png in pictures.items()]
    if figures:
        parts += [
            f'<div class="table-picture">{figures[0]}</div>',
            f'<div class="pictures">{"".join(figures[1:])}</div>',
        ]
    facts = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in origin(group).items())
    made = "\n".join(map(escape, commands(group)))
    parts.append(f"<details open><summary>Where this comes from</summary><dl>{facts}<dt>commands</dt></dl>")
    parts.append(f"<pre>{made}</pre></details>\n</section>")
    return "\n".join(parts)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row.values())}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _figure(caption: str, png: bytes) -> str:
    source = base64.b64encode(png).decode("ascii")
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def counted(count: int, what: str) -> str:
    """1 table, 2 tables."""
    return f"{count} {what}{'' if count == 1 else 's'}"
