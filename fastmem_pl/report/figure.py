"""How a chart of a report looks: matplotlib draws it, the page's style sheet colours it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from fastmem_pl.report.page import Chart
from fastmem_pl.report.table import PageTable

# Colours that matplotlib writes and the page's variables take the place of.
_COLOURS = {f"#0000c{n}": f"var(--c{n})" for n in range(8)}
_INK, _MUTED, _GRID = "#010001", "#010002", "#010003"
_VARIABLES = {**_COLOURS, _INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"}
_SERIES = list(_COLOURS)
_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX*"
_WIDTH, _HEIGHT = 6.0, 3.5
_RC = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
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
    rows: list[list[Any]],
    legend: bool = True,
    rows_shown: int = 0,
) -> Chart:
    """Draw into an SVG of the page's colours, and keep the numbers as a table.

    Args:
        name: id on the page; the same numbers give the same bytes.
        title: heading.
        caption: below it.
        draw: draws into the axes.
        header: that of the table.
        rows: values of the table.
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
    return Chart(name, title, caption, svg, PageTable.of(title, header, rows))


def line_look(number: int) -> dict[str, Any]:
    """Colour and line of a series; lines tell apart what colours do not."""
    return {"color": _SERIES[number % len(_SERIES)], "linestyle": _STYLES[number % len(_STYLES)], "lw": 1.6}


def marker(number: int) -> str:
    """Sign of a series' points."""
    return _MARKERS[number % len(_MARKERS)]


def series_name(label: str) -> str:
    """A label as legends show it: matplotlib leaves out those that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


def grouped_bars(
    axes: Any, values: pd.DataFrame, errors: pd.DataFrame | None = None, upright: bool = False
) -> None:
    """Draw bars side by side: a group per row, the first on top, and a series per column."""
    width = 0.8 / len(values.columns)
    for number, name in enumerate(values):
        own = values[name].dropna()
        places = values.index.get_indexer(own.index) + (number - (len(values.columns) - 1) / 2) * width
        look = {"color": _SERIES[number % len(_SERIES)], "label": series_name(name)}
        if errors is not None:
            error_look = {"ecolor": _INK, "capsize": 2, "lw": 1}
            look |= {"xerr": errors.loc[own.index, name], "error_kw": error_look}
        (axes.bar if upright else axes.barh)(places, own, 0.9 * width, **look)
    if upright:
        axes.set_xticks(range(len(values)), values.index)
    else:
        _name_rows(axes, values.index)


def stacked_bars(axes: Any, values: pd.DataFrame) -> None:
    """Draw a bar per row, the first on top, of a part per column."""
    ends = values.cumsum(axis=1)
    for number, name in enumerate(values):
        left = ends[name] - values[name]
        axes.barh(range(len(values)), values[name], 0.72, left=left, label=name, color=_SERIES[number])
    _name_rows(axes, values.index)


def _name_rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
