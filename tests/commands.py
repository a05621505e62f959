"""The project's commands, as a person runs them: in a process of their own, or in this one, which is quicker."""

import json
import sys
import tempfile

import pytest

from experiments.engine.errors import run_command
from tests.children import finish, start


def command(module, *arguments, timeout=500, **more):
    """The exit code, standard output and standard error of `python -m module`; `more` goes into its environment."""
    return finish(start("-W", "error", "-m", module, *arguments, COLUMNS=100, **more), timeout)


def in_this_process(main, *arguments, folder="."):
    """The exit code, standard output and standard error of a command's main function, run in a folder."""

    def file():
        return tempfile.TemporaryFile("w+", encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch, file() as out, file() as error:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", error)
        with pytest.raises(SystemExit) as end:
            run_command(main)
        texts = []
        for said in (out, error):
            said.seek(0)
            texts.append(said.read())
    return end.value.code, *texts


def metrics(folder):
    """The lines of a record."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
