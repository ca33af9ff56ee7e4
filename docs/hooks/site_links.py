"""Links of pages to files outside docs/: right for readers of the repository, and turned for the site.

A config becomes its place in the reference, README.md the start page, any other file a copy in the site;
a link to a folder, which a site cannot show, becomes plain text.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIES = "files"
_DOCS = "docs"
_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
# Code first, so that what looks like a link in it is none; link texts may hold code.
_LINK = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$"
    r"|(?P<text>!?\[(?:`[^`]*`|[^\]`])*\])\((?P<target>[^)\s]+)\)"
    r"|`[^`\n]+`",
    re.DOTALL | re.MULTILINE,
)
_log = logging.getLogger("mkdocs.hooks.site_links")


def linked_files(markdown: str) -> set[str]:
    """Files outside docs/ that links name, as paths from the top of the repository, to be copied."""
    found = set()
    for link in _LINK.finditer(markdown):
        target = link["target"] or "#"
        path = _in_repository(target, _DOCS) or _in_repository(target, "")
        if path and path not in _PAGES and not path.startswith("configs/") and (ROOT / path).is_file():
            found.add(path)
    return found


def rewritten(markdown: str, page: str) -> str:
    """The page with links that hold in the site.

    Args:
        markdown: of the page.
        page: its path in the site's sources, such as ``search.md``.
    """
    # CONTRIBUTING.md lies at the top of the repository and becomes a page beside those of docs/.
    source = "" if page == "contributing.md" else posixpath.dirname(posixpath.join(_DOCS, page))
    return _LINK.sub(
        lambda link: _rewritten(link, source, page) if link["target"] else link.group(), markdown
    )


def _rewritten(link: re.Match[str], source: str, page: str) -> str:
    target, _, anchor = link["target"].partition("#")
    inside = source == "" and target.startswith(f"{_DOCS}/")
    path = target if inside else _in_repository(target, source)
    if path is None:
        return link.group()
    here = posixpath.dirname(page)
    if inside:
        goal = path.removeprefix(f"{_DOCS}/")
    elif path in _PAGES:
        goal = _PAGES[path]
    elif path.startswith("configs/") and path.endswith(".yaml"):
        goal, anchor = "reference/configs.md", config_anchor(Path(path).stem)
    elif (ROOT / path).is_dir():
        return link["text"][1:-1]
    elif (ROOT / path).is_file():
        goal = f"{COPIES}/{path}"
    else:
        _log.warning("%s: there is no %s to link to", page, target)
        return link.group()
    return f"{link['text']}({os.path.relpath(goal, here or '.')}{'#' * bool(anchor)}{anchor})"


def _in_repository(target: str, source: str) -> str | None:
    """Path of what a link names if it is outside docs/, else ``None``."""
    if re.match(r"[a-z]+:|#|/", target):
        return None
    path = posixpath.normpath(posixpath.join(source, target.partition("#")[0]))
    outside = not path.startswith(("..", f"{_DOCS}/"))
    return path if outside and path != "." else None


def config_anchor(name: str) -> str:
    """Where a packaged config stands in the reference."""
    return f"config-{name.replace('+', '-')}"
