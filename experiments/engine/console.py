"""What a run says on a terminal: lines, one progress bar, a closing table."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import rich.box
import rich.console
import rich.table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

_WIDE = 180  # columns, where the output goes to a file


class _Console(rich.console.Console):
    """Rich's, that lets `run_command` end a program whose reader has gone."""

    def on_broken_pipe(self) -> None:
        """Not rich's exit code 1."""
        raise BrokenPipeError


class Console:
    """Lines and tables on standard output, unless quiet; the bar only where that is a terminal."""

    def __init__(self, *, quiet: bool = False):
        width = None if sys.stdout.isatty() else _WIDE
        self._console = _Console(file=sys.stdout, highlight=False, width=width, quiet=quiet)  # also if redirected

    def say(self, text: str) -> None:
        """Print plain text, never wrapped or styled."""
        self._console.print(text, soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def progress(self, description: str, total: int, *columns: ProgressColumn) -> Iterator[Callable[[int], None]]:
        """A bar that is gone at the end; call what it gives with what was done since the last call.

        The columns show the count; by default in steps.
        """
        shown = columns or (MofNCompleteColumn(), TextColumn("steps"))
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), *shown, TimeRemainingColumn(), console=self._console,
            transient=True, disable=self._console.quiet or not self._console.is_terminal,
        )  # fmt: skip
        with bar:
            task = bar.add_task(description, total=total)
            yield lambda done: bar.advance(task, done)

    def table(self, title: str, rows: list[dict[str, str]]) -> None:
        """Rows with the same keys, as a table below a title; columns that do not fit beside others stand below them."""
        self._console.print(f"\n{title}", soft_wrap=not self._console.is_terminal, markup=False)
        for names in _fitting(rows, self._console.width):
            table = rich.table.Table(*names, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for row in rows:
                table.add_row(*(row[name] for name in names))
            self._console.print(table)


def _fitting(rows: list[dict[str, str]], width: int) -> list[list[str]]:
    """The columns in groups that fit; each group begins with the first column, which tells what a row is of.

    >>> from experiments.engine.console import _fitting
    >>> _fitting([{"act": "relu", "last epoch": "0.1028 ± 0.0000", "time": "13 s"}], 28)
    [['act', 'last epoch'], ['act', 'time']]
    """
    first, *others = rows[0]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) + 2 for name in rows[0]}
    groups = [[first]]
    for name in others:
        if len(groups[-1]) > 1 and sum(widths[each] for each in [*groups[-1], name]) + 1 > width:
            groups.append([first])
        groups[-1].append(name)
    return groups
