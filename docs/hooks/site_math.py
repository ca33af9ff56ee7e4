"""Equations as MathML, which browsers show by themselves: no script, nothing to fetch."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of $...$ and $$...$$.
_EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
# Letters of a name one by one would be set like a product.
_NAME = re.compile(r"\\mathrm\{(\w+)\}")


def with_mathml(page: str) -> str:
    """The page with its equations as ``<math>``; the LaTeX stays as alternative text."""
    return _EQUATION.sub(_mathml, page)


def _mathml(found: re.Match[str]) -> str:
    latex = " ".join(html.unescape(found["latex"]).split())
    block = found["tag"] == "div"
    math = convert(_NAME.sub(r"\\operatorname{\1}", latex), display="block" if block else "inline")
    math = math.replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)
    return f'<div class="equation" tabindex="0">{math}</div>' if block else math
