"""What experiments there are, where the data stand, and what has been run here: `python -m experiments`."""

import ast
import difflib
import shlex
import sys
import textwrap
from pathlib import Path

from experiments.engine.archives import READERS
from experiments.engine.errors import UsageError, run_command
from experiments.engine.folders import CONFIG
from experiments.engine.records import read_config, read_lines
from experiments.engine.tfds import tfds_folder

_HERE = Path(__file__).parent
_ORDER = (
    "width", "depth", "parameters", "allcnn", "resnet50", "covariate_shift", "dynamics", "remedies", "headlines",
    "plasticity", "revive", "load_forecast", "charlm", "sweep", "report", "prepare",
)  # fmt: skip
_WIDTH = 80


def first_line(name: str) -> str:
    """What an experiment is, from its file, which is not imported."""
    path = _HERE / f"{name}.py"
    text = (path if path.exists() else _HERE / name / "__main__.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def prepared(folder: Path) -> list[str]:
    """The sets that experiments use and that are in a folder of TensorFlow Datasets."""
    return [name for name in READERS if any(folder.glob(f"{name}/**/dataset_info.json"))]


def runs(folder: Path) -> list[str]:
    """A line for each record in a folder, the oldest first."""
    found = []
    for config in sorted(folder.rglob(CONFIG), key=lambda path: path.stat().st_mtime):
        try:
            told, lines = read_config(config.parent), read_lines(config.parent, damaged_end=True)
            found.append(f"{config.parent}: {told.get('command', 'unknown')}, {len(lines):,} lines")
        except UsageError as error:
            found.append(str(error))
    return found


def overview(data_dir: Path, runs_dir: Path) -> str:
    """All of it, for 80 columns."""
    wide = max(map(len, _ORDER)) + 2

    def row(name: str, text: str) -> str:
        return textwrap.fill(
            text, _WIDTH, initial_indent=name.ljust(wide), subsequent_indent=" " * wide, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip

    there = prepared(data_dir)
    missing = [name for name in READERS if name not in there]
    data = [row("digits", "embedded, nothing to prepare")]
    data += [row(name, f"prepared in {data_dir}") for name in there]
    if missing:
        data.append(row("not there", f"{', '.join(missing)}; `python -m experiments.prepare cifar10` prepares one"))
    said = [row("", text).lstrip() for text in runs(runs_dir)] or [f"nothing in {runs_dir}/ yet"]
    return "\n".join(
        [
            "Experiments: python -m experiments.NAME, and --help for its options",
            *(row(name, first_line(name)) for name in _ORDER),
            "\nData",
            *data,
            "\nWhat has been run here",
            *said,
            "\nBegin with: python -m experiments.depth --act relu lk_relu --dataset digits",
        ]
    )


def main() -> None:
    """Print it."""
    if sys.argv[1:] and sys.argv[1:] != ["--help"]:
        name, *options = sys.argv[1:]
        nearest = difflib.get_close_matches(name, _ORDER, n=1) or ["NAME"]
        command = f"python -m experiments.{shlex.join([*nearest, *options])}"
        raise UsageError(f"there is no option {name}; an experiment is {command}")
    print(overview(tfds_folder(None), Path("runs")))


if __name__ == "__main__":
    run_command(main)
