"""MkDocs hooks: pages generated from the code, links out of docs/, and equations as MathML."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

import reference_cli
import reference_files
import reference_python
import site_links
import site_math
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
_GENERATED = {
    "reference/cli.md": reference_cli.page,
    "reference/configs.md": reference_files.configs_page,
    "reference/tasks.md": reference_files.tasks_page,
    "reference/python.md": reference_python.page,
}
_INSERTED = {
    "published results": reference_files.published_tables,
    "demo table": reference_files.demo_table,
}


def on_startup(command: str, **kwargs: Any) -> None:
    """Let the pages be generated from this checkout, wherever mkdocs was started."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, CONTRIBUTING.md, and the files that pages link to."""
    for uri in _GENERATED:
        files.append(File.generated(config, uri, content=_generated(uri)))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "contributing.md", content=contributing))
    written = [file.content_string for file in files.documentation_pages()]
    for path in sorted({path for text in written for path in site_links.linked_files(text)}):
        uri = f"{site_links.COPIES}/{path}"
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


@functools.cache
def _generated(uri: str) -> str:
    """A generated page; made once, also where ``mkdocs serve`` builds again and again."""
    return _GENERATED[uri]()


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Insert generated tables, and turn links out of docs/ into ones that the site has."""
    for name, make in _INSERTED.items():
        markdown = re.sub(rf"^<!-- insert: {name} -->$", lambda _, make=make: make(), markdown, flags=re.M)
    return site_links.rewritten(markdown, page.file.src_uri)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Turn equations into MathML."""
    return site_math.with_mathml(html)
