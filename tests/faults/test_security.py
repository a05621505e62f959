"""Nothing that is read is run: no pickle, no eval; names stay in their folders; pages escape what they show."""

import ast
import hashlib
import html.parser
import io
import json
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from experiments.engine.checkpoints import Checkpoints, _unpacked
from experiments.engine.errors import UsageError
from tests.children import ROOT, finish, start
from tests.experiments.test_report import write_record

fault = pytest.mark.fault
SCRIPT = "<script>document.title='run'</script>"


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@fault("security", "a checkpoint that is a pickle, or holds one")
def test_a_pickle_is_never_loaded(tmp_path):
    mark, buffer = tmp_path / "ran", io.BytesIO()
    np.savez(buffer, allow_pickle=True, **{"0": np.array([Bomb(mark)], object), "facts": np.zeros(2, np.uint8)})
    for content in (pickle.dumps(Bomb(mark)), buffer.getvalue()):
        signed = content + hashlib.sha256(content).digest()  # whole, by its checksum
        with pytest.raises(ValueError, match="pickle"):
            _unpacked(signed)
        (tmp_path / "checkpoint").mkdir(exist_ok=True)
        (tmp_path / "checkpoint" / "000001.ckpt").write_bytes(signed)
        with pytest.raises(UsageError, match="none before it is whole"):
            Checkpoints(tmp_path / "checkpoint", 0).load()
    assert not mark.exists()


@pytest.mark.slow
@fault("security", "code that runs what it reads: pickle, eval, exec, shell=True, a tar file without a filter")
def test_no_code_runs_what_it_reads():
    """Of the library, the experiments and the benchmarks, by their syntax trees."""
    found = []
    for path in (path for part in ("linked_jax", "experiments", "benchmarks") for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            bad = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"} & set(names)
            if isinstance(node, ast.Call):
                called = node.func
                name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                is_builtin = isinstance(called, ast.Name) and name in ("eval", "exec", "compile", "__import__")
                bad |= {name} if is_builtin or name == "extractall" else set()
                bad |= {"shell"} if options.get("shell") == "True" else set()
                bad |= {"allow_pickle"} if options.get("allow_pickle") == "True" else set()
            found += [f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in bad]
    assert found == []


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


@pytest.fixture
def page(tmp_path):
    """A report on runs whose folder and data set are named with a script."""
    folder = tmp_path / "runs" / SCRIPT.replace("/", "\N{DIVISION SLASH}")
    write_record(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["data"]["description"] = config["command"] = SCRIPT
    config["protocol"]["optimizer"] = f'"><img src=x onerror="{SCRIPT}">'
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, _, error = finish(start("-m", "experiments.report", tmp_path / "runs", "--out", tmp_path / "report"))
    assert code == 0, error
    return tmp_path / "report" / "report.html"


@pytest.mark.slow
@fault("security", "a report on runs that are named with a script")
def test_a_report_escapes_what_it_shows(page):
    reader = Tags()
    reader.feed(page.read_text(encoding="utf-8"))
    assert "&lt;script&gt;" in page.read_text(encoding="utf-8")
    assert not [tag for tag, _ in reader.tags if tag in ("script", "iframe", "object", "embed")]
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]


@pytest.mark.slow
@fault("security", "the same report in a browser: nothing runs")
def test_a_browser_runs_nothing(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser: install Debian's chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>run</title>" not in dom
    assert "<title>" in dom
