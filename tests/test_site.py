"""The documentation: built strictly with its notebooks run, and every page looked at in a browser, wide and narrow."""

import functools
import html.parser
import http.server
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

import linked_jax

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
OFFLINE = "--disable-background-networking --disable-component-update --disable-sync --no-first-run --disable-quic"
WIDE, PHONE = 1280, 390
ABORTED = "net::ERR_ABORTED"  # the next page was opened before this one had all
PAGES = sorted(ROOT.glob("docs/**/*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
slow = pytest.mark.slow


@pytest.mark.parametrize("package", ["", ".probe", ".remedies", ".revive", ".plasticity"])
def test_every_public_name_is_on_a_page_of_the_api(package):
    pages = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/api/*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    module = importlib.import_module(f"linked_jax{package}")
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, linked_jax.Link | types.ModuleType | tuple):
            continue  # the gallery has the links, and a page its module
        ways = {f"linked_jax{package}.{name}", f"{thing.__module__}.{thing.__name__}", thing.__module__}
        assert ways & shown, f"no page of docs/api has {name}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("no MkDocs: install linked_jax[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@slow
def test_every_page_is_built_and_every_formula_is_mathml(site):
    for page in PAGES:
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        built = site / ("index.html" if name == "index" else f"{name}/index.html")
        text = built.read_text(encoding="utf-8")
        formulas = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).count("$`")
        assert text.count("<math") >= formulas
        assert "formula:" not in text


class Links(html.parser.HTMLParser):
    """Where a page's links lead, as they are written."""

    def __init__(self):
        super().__init__()
        self.targets = []

    def handle_starttag(self, tag, attributes):
        target = dict(attributes).get("href") if tag == "a" else None
        if target and "://" not in target and not target.startswith(("#", "mailto:")):
            self.targets.append(target.partition("#")[0])


@slow
def test_every_link_leads_to_a_page_or_a_file(site):
    for page in site.rglob("index.html"):
        reader = Links()
        reader.feed(page.read_text(encoding="utf-8"))
        for target in reader.targets:
            found = page.parent / target
            assert found.is_file() or (found / "index.html").is_file(), f"{page.relative_to(site)} links to {target}"


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@slow
@pytest.mark.skipif(BROWSER is None, reason="no browser: install Debian's chromium")
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_a_browser_shows_every_page_without_an_error(width, site, address):
    """No message in the console, no request to elsewhere or in vain, no picture without text, no page too wide."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", *OFFLINE.split()])
        view = browser.new_page(viewport={"width": width, "height": 900})
        view.on("console", lambda message: found.append(f"{view.url}: {message.type} {message.text}"))
        view.on("pageerror", lambda error: found.append(f"{view.url}: {error}"))
        view.on("requestfailed", lambda r: None if r.failure == ABORTED else found.append(f"{view.url}: no {r.url}"))
        view.on("request", lambda r: None if r.url.startswith((address, "data:")) else found.append(r.url))
        for path in sorted(site.rglob("index.html")):
            view.goto(address + path.parent.relative_to(site).as_posix())
            found += [f"{view.url}: no text for {src}" for src in view.evaluate(
                "[...document.images].filter(image => !image.alt.trim()).map(image => image.src.slice(0, 80))"
            )]  # fmt: skip
            if view.evaluate("document.documentElement.scrollWidth") > width:
                found.append(f"{view.url}: wider than {width}")
        browser.close()
    assert not found, "\n".join(found)


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def alike(printed, shown):
    """Numbers differ between machines: up to a factor of 2, or by 0.002, which is rounding here."""
    return printed * shown >= 0 and abs(shown) / 2 - 0.002 <= abs(printed) <= 2 * abs(shown) + 0.002


@slow
@pytest.mark.whole
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    page = page.read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        Path("net.py").write_text(code, encoding="utf-8")
        exec(compile(code, tmp_path / "net.py", "exec"), names)
    printed = capsys.readouterr().out
    for shown in re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
        numbers, expected = ([float(number) for number in NUMBER.findall(text)] for text in (printed, shown))
        assert [pair for pair in zip(numbers, expected, strict=True) if not alike(*pair)] == []
