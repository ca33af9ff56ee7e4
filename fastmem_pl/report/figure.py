"""How a chart of a report looks: matplotlib draws it, the page's style sheet colours it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fastmem_pl.report.page import Chart
from fastmem_pl.report.table import PageTable

_STYLE = Path(__file__).parent / "page" / "charts.mplstyle"
# Colours of that style, and the page's variables that take their place.
_VARIABLES = {f"#0000c{n}": f"var(--c{n})" for n in range(8)}
_VARIABLES |= {"#010001": "var(--ink)", "#010002": "var(--muted)", "#010003": "var(--grid)"}


def draw_chart(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Any], None],
    header: list[str],
    rows: Iterable[Iterable[Any]],
) -> Chart:
    """Let ``draw`` fill axes of an SVG in the page's colours; ``header`` and ``rows`` are its numbers."""
    # Slow to import, and only the page has pictures.
    from matplotlib import style
    from matplotlib.figure import Figure

    # Neither the user's matplotlibrc nor a random salt may change the picture.
    with style.context(["default", _STYLE, {"svg.hashsalt": f"fastmem-{name}"}]):
        figure = Figure()
        axes = figure.subplots()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        # Below the axes: eight methods would cover the curves.
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(4, len(labels))))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match.group()], file.getvalue())
    return Chart(name, title, caption, svg, PageTable(title, header, rows))


def series_name(label: str) -> str:
    """A label as legends show it: matplotlib leaves out those that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


def draw_bars(
    axes: Any, values: pd.DataFrame, errors: pd.DataFrame | None = None, stacked: bool = False
) -> None:
    """Draw a group of bars per row, the first on top, of a series per column: side by side, or stacked."""
    side_by_side = 1 if stacked else len(values.columns)
    width, ends = 0.8 / side_by_side, values.cumsum(axis=1)
    for number, name in enumerate(values):
        own = values[name].dropna()
        shift = 0.0 if stacked else (number - (side_by_side - 1) / 2) * width
        look = {"color": f"C{number}", "label": series_name(name)}
        if stacked:
            look["left"] = ends[name] - own
        if errors is not None:
            look |= {"xerr": errors.loc[own.index, name], "ecolor": "#010001", "error_kw": {"lw": 1}}
        axes.barh(values.index.get_indexer(own.index) + shift, own, 0.9 * width, **look)
    axes.set_yticks(range(len(values)), values.index)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    # Names and bars need height.
    axes.figure.set_figheight(max(3.5, 0.9 + 0.3 * max(len(values), values.size // 2)))
