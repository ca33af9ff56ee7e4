"""One HTML page from tables, charts and samples: it loads nothing, and what models wrote stays text."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastmem_pl.report.table import PageTable, escaped

FOLDER = Path(__file__).parent / "page"
# Print comes last, in page.css.
_STYLES = ("samples.css", "page.css")
_SCRIPTS = ("filters.js", "list.js", "detail.js", "page.js")
# In HTML a style element, unlike a style attribute, reaches out of its SVG; the metadata is long and unread.
_REMOVED = re.compile(r"<(style|metadata)\b.*?</\1\s*>", re.DOTALL)
_ID = re.compile(r"(\sid=[\"']|\bhref=[\"']#|url\(#)")
# Nothing is loaded, and only this style and script are used. Matplotlib's SVGs say nearly everything in style
# attributes, which no hash can allow: so attributes are free (without fetching they can do no harm), and the
# hash holds for style elements. style-src is for browsers that do not know these two apart. Images are data:
# URLs inside of SVGs (heat maps).
_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src-elem '{style}'; style-src-attr 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
# What could end the script element, or is not allowed in scripts (U+2028/9) or in UTF-8 (lone surrogates).
_UNSAFE_JSON = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Chart:
    """A chart of this package's own making: its markup is trusted.

    ``svg`` uses the page's CSS variables ``--c0`` ... ``--c7``, ``--ink``, ``--muted`` and ``--grid``; XML
    prolog and ``style`` elements are left out, and ``id`` is the prefix of all ids in it.
    """

    id: str
    title: str
    caption: str
    svg: str
    table: PageTable | None = None


def render(template: str, **values: Any) -> str:
    """Fill a template of the page's folder, with texts escaped for HTML or Markdown."""
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    escape = {"finalize": escaped} if template.endswith(".md") else {"autoescape": True}
    environment = Environment(loader=FileSystemLoader(FOLDER), **options, **escape)
    return environment.get_template(template).render(**values)


def render_page(**page: Any) -> str:
    """Return one self-contained HTML document, to be written as UTF-8.

    From top to bottom: texts ``title`` and ``subtitle``, ``facts`` (pairs of texts), ``notices`` (texts),
    ``tables``, ``charts``, ``browser`` (see ``page/filters.js``), ``footer``.
    """
    style, script = (
        "\n".join((FOLDER / n).read_text("utf-8") for n in names) for names in (_STYLES, _SCRIPTS)
    )
    charts = []
    for chart in page["charts"]:
        prefix = re.sub(r"[^\w-]", "-", chart.id)
        svg = _REMOVED.sub("", chart.svg[max(chart.svg.find("<svg"), 0) :])
        charts.append((chart, _ID.sub(rf"\g<1>{prefix}-", svg)))
    browser = page["browser"]
    data = json.dumps(browser, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    html = render(
        "page.html",
        page=page,
        style=style,
        script=script,
        policy=_POLICY.format(script=_digest(script), style=_digest(style)),
        charts=charts,
        data=_UNSAFE_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", data)
        if browser.get("samples")
        else "",
    )
    # A lone surrogate, half a character that a model or a file broke, cannot be written as UTF-8.
    return html.encode("utf-8", "replace").decode("utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
