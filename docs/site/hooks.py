"""What MkDocs is told beside mkdocs.yml: results and changes are pages too, formulas are MathML, the gallery is drawn.

Pages are written for two readers, a browser on the site and one on the repository. So their links are those of the
repository, and formulas are GitHub's: `$$ ... $$` on lines of their own, and $`...`$ within a line.
"""

import os
import re
import sys
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import gallery  # noqa: E402, it stands beside this file

BESIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "scripts/table.slurm"]


def on_files(files, config):
    """Add the results, what stands beside docs/, and the gallery."""
    paths = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("results/**/*")) if path.is_file()]
    for path in [*BESIDE, *paths]:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    files.remove(files.get_file_from_path("gallery.md"))  # it stands for the page in the repository
    for path, content in gallery.files().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the repository become links of the site, formulas become MathML; code stays as it is."""
    here = page.file.src_uri
    source = here if (ROOT / here).exists() and not here.startswith("docs/") else f"docs/{here}"
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _formulas(_links(part, source, here), page) for part in parts)


def _on_site(source, target):
    """Where a file of the repository is on the site, given as a link from another one: docs/ is left out."""
    path = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / target))
    return path.relative_to("docs") if path.parts[0] == "docs" else path


def _links(text, source, here):
    """docs/a.md -> ../results/b.md is, on the site, a.md -> results/b.md."""

    def moved(match):
        target, _, anchor = match[1].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        relative = os.path.relpath(_on_site(source, target), PurePosixPath(here).parent)
        return f"]({relative}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, text)


def _formulas(text, page):
    """Formulas wait behind marks until Markdown is done with the text: it would take some of MathML for blocks."""
    waiting = page.meta.setdefault("formulas", [])

    def mark(match, display):
        waiting.append(convert(match[1].strip(), display=display))
        return f"formula:{len(waiting) - 1}:"

    text = re.sub(r"^\$\$\n(.*?)\n\$\$$", lambda m: mark(m, "block"), text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\$`(.*?)`\$", lambda m: mark(m, "inline"), text, flags=re.DOTALL)


def on_page_content(html, page, config, files):
    """Put the formulas where their marks are; and MkDocs does not see the links of notebooks."""
    formulas = page.meta.get("formulas", [])
    html = re.sub(r"formula:(\d+):", lambda match: formulas[int(match[1])], html)
    return _notebook_links(html, page, files) if page.file.src_uri.endswith(".ipynb") else html


def _notebook_links(html, page, files):
    """A link to a page's file becomes one to the page."""

    def moved(match):
        file = files.get_file_from_path(str(_on_site(f"docs/{page.file.src_uri}", match[1])))
        if file is None:
            raise PluginError(f"{page.file.src_uri} links to {match[1]}, which is no page")
        return f'href="{file.url_relative_to(page.file)}"'

    return re.sub(r'href="([^":#]+\.(?:md|ipynb))"', moved, html)
