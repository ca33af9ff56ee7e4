"""How a chart of a report looks: matplotlib draws it, the page's style sheet colours it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from fastmem_pl.report.page import Cell, Chart, PageTable

# Colours that matplotlib writes and the page's variables take the place of.
_COLOURS = {f"#0000c{n}": f"var(--c{n})" for n in range(8)}
INK, _MUTED, _GRID = "#010001", "#010002", "#010003"
_VARIABLES = {**_COLOURS, INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"}
SERIES = list(_COLOURS)
_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX*"
_WIDTH, _HEIGHT = 6.0, 3.5
_RC = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": _MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Names are the user's: a dollar sign in one begins no formula.
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def draw_chart(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Any], None],
    header: list[str],
    rows: list[list[Cell]],
    legend: bool = True,
    rows_shown: int = 0,
) -> Chart:
    """Draw into an SVG of the page's colours, and keep the numbers as a table.

    Args:
        name: id on the page; the same numbers give the same bytes.
        title: heading.
        caption: below it.
        draw: draws into the axes.
        header: of the table.
        rows: of the table.
        legend: name the series.
        rows_shown: bars one below the other, which need height.
    """
    # Slow to import, and only the page has pictures.
    from matplotlib import style
    from matplotlib.figure import Figure

    # Neither the user's matplotlibrc nor a random salt may change the picture.
    with style.context(["default", {**_RC, "svg.hashsalt": f"fastmem-{name}"}]):
        height = max(_HEIGHT, 0.9 + 0.3 * rows_shown)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            # Below the axes: eight methods would cover the curves.
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match.group()], svg[svg.index("<svg") :])
    return Chart(name, title, caption, svg, PageTable(title, header, rows))


def line_look(number: int) -> dict[str, Any]:
    """Colour and line of a series; lines tell apart what colours do not."""
    return {"color": SERIES[number % len(SERIES)], "linestyle": _STYLES[number % len(_STYLES)], "lw": 1.6}


def marker(number: int) -> str:
    """Sign of a series' points."""
    return _MARKERS[number % len(_MARKERS)]


def series_name(label: str) -> str:
    """A label as legends show it: matplotlib leaves out those that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


def name_rows(axes: Any, labels: Sequence[str]) -> None:
    """Name horizontal bars, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
