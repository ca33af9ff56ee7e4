"""The result of a search as terminal tables, Markdown and a picture; from a :class:`Ranking` only."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastmem_pl.base.files import write_atomic
from fastmem_pl.metrics import SCORES, format_score, lower_is_better
from fastmem_pl.search.ranking import (
    Baseline,
    RankedPoint,
    Ranking,
    format_setting,
)

_MAPPED = ("learning_rate", "kl_coeff", "steps")
_FURTHER = ("accuracy", "contained", "format_failure", "rouge1", "rougeL", "bert_precision", "factkb")
# Matplotlib's viridis at equal distances; importing matplotlib for ten colours would slow every command.
_VIRIDIS = "4401544828783e498931688e26828e1f9e8935b7796ece58b5de2bfde725"
_PANELS_PER_ROW = 3


def print_search(ranking: Ranking, console: Console, top: int = 10) -> None:
    """Print the best points beside zero-shot, a heat map per number of steps, and the warnings."""
    console.print(Text(_summary(ranking)))
    header, rows = _rows(ranking)
    table = Table(title="mean ± standard error, gain over zero-shot", title_justify="left")
    for name in header:
        table.add_column(escape(name.replace("_", " ").replace(" ", "\n")), justify="right")
    for row in rows[:-1][:top]:
        table.add_row(*map(escape, row))
    table.add_section()
    table.add_row(*map(escape, rows[-1]))
    console.print(table)
    if len(ranking.points) > top:
        console.print(Text(f"{_count(len(ranking.points) - top, 'further point')}: see search.md"))
    if ranking.ranges is None:
        for steps in ranking.axes["steps"]:
            console.print(_terminal_map(ranking, steps))
        console.print(Text(f"* best{_over(ranking)}"))
    for line in ranking.warnings:
        console.print(Text(line, style="yellow"))


def markdown(ranking: Ranking, picture: bool = False, plots: Sequence[str] = ()) -> str:
    """Return all points, heat maps and warnings as Markdown.

    Args:
        ranking: of the points.
        picture: refer to ``heatmap.svg`` beside the file.
        plots: pictures beside the file that take the place of heat maps after a search by trials.
    """
    zero_shot = ranking.baseline
    value = format_score(ranking.objective, zero_shot.value, zero_shot.standard_error)
    blocks = [
        "# Search",
        f"{_summary(ranking)}.",
        f"Zero-shot: {_label(ranking.objective)} {value} on {_count(zero_shot.n, 'sample')}.",
        "## Points",
        "Mean ± standard error, best first; the gain is the paired difference to zero-shot.",
        _markdown_table(*_rows(ranking)),
    ]
    if ranking.ranges is None:
        blocks += _markdown_maps(ranking, picture)
    elif plots:
        blocks += ["## Plots", *(f"![{name.removesuffix('.svg')}]({name})" for name in plots)]
    if ranking.warnings:
        blocks += ["## Warnings", "\n".join(f"- {line}" for line in ranking.warnings)]
    return "\n\n".join(blocks) + "\n"


def _markdown_maps(ranking: Ranking, picture: bool) -> list[str]:
    blocks = ["## Heat maps", f"{_unit_label(ranking)}, best in bold{_over(ranking)}."]
    if picture:
        blocks.append(f"![{_label(ranking.objective)} by {', '.join(_MAPPED)}](heatmap.svg)")
    for steps in ranking.axes["steps"]:
        cells, body = _cells(ranking, steps), []
        for rate in ranking.axes["learning_rate"]:
            points = (cells.get((rate, weight)) for weight in ranking.axes["kl_coeff"])
            body.append([format_setting(rate), *(_cell_text(ranking, p, "**{}**") for p in points)])
        blocks += [f"### steps {format_setting(steps)}", _markdown_table(_map_header(ranking), body)]
    return blocks


def heat_map(ranking: Ranking, path: Path) -> None:
    """Write an SVG with a panel per number of steps, all of one colour scale; the best is outlined.

    The same ranking gives the same bytes. Colours are viridis, the good end bright.

    Raises:
        OSError: when the file cannot be written.
    """
    from matplotlib import colormaps, style
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    steps, rates, weights = (ranking.axes[name] for name in ("steps", "learning_rate", "kl_coeff"))
    columns = min(len(steps), _PANELS_PER_ROW)
    rows = -(-len(steps) // columns)
    scale = Normalize(*_range(ranking))
    colours = colormaps["viridis_r" if lower_is_better(ranking.objective) else "viridis"]
    # Neither the user's matplotlibrc nor a random salt may change the file.
    with style.context(["default", {"svg.hashsalt": "fastmem", "svg.fonttype": "none"}]):
        figure = Figure(
            figsize=(columns * (1.2 + 0.75 * len(weights)) + 2.4, rows * (1.1 + 0.5 * len(rates)) + 0.6),
            layout="constrained",
        )
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(steps) :]:
            axes.set_visible(False)
        for number, axes in zip(steps, grid.flat, strict=False):
            cells = _cells(ranking, number)
            values = [[_shown(ranking, cells.get((rate, weight))) for weight in weights] for rate in rates]
            image = axes.imshow(values, cmap=colours, norm=scale, aspect="auto")
            axes.set_facecolor("#dddddd")
            axes.set_xticks(range(len(weights)), map(format_setting, weights))
            axes.set_yticks(range(len(rates)), map(format_setting, rates))
            axes.set(title=f"steps {format_setting(number)}", xlabel="kl_coeff", ylabel="learning_rate")
            for (rate, weight), point in cells.items():
                x, y = weights.index(weight), rates.index(rate)
                ink = _contrast(*colours(scale(_shown(ranking, point)))[:3])
                axes.text(x, y, _cell_text(ranking, point), ha="center", va="center", color=ink)
                if point is ranking.best:
                    outline = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec="black", lw=3, clip_on=False)
                    outline.set_gid("best")
                    axes.add_patch(outline)
        figure.colorbar(image, ax=grid, label=_unit_label(ranking))
        figure.suptitle(f"best outlined{_over(ranking)}", fontsize="medium")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(path, buffer.getvalue())


def _summary(ranking: Ranking) -> str:
    ranges, values = ranking.ranges or {}, {}
    for name, found in ranking.axes.items():
        if name in ranges:
            values[name] = " to ".join(map(format_setting, ranges[name][:2]))
        else:
            values[name] = ", ".join(map(format_setting, found))
    axes = "; ".join(f"{name} {text}" for name, text in values.items())
    better = "lower" if lower_is_better(ranking.objective) else "higher"
    searched = f"{_count(len(ranking.points), 'point')} for {_label(ranking.objective)} ({better} is better)"
    return f"Searched {searched} on {_count(ranking.best.n, 'sample')}: {axes}"


def _rows(ranking: Ranking) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the ranked points, and of zero-shot in the last row."""
    objective, points = ranking.objective, ranking.points
    varying = [name for name, values in ranking.axes.items() if len(values) > 1]
    further = [n for n in _FURTHER if n != objective and any(n in p.scores for p in points)][:2]
    further.append("output_words")
    counted = len({p.n for p in (*points, ranking.baseline)}) > 1
    failing = any(point.failed for point in points)
    # Values that were drawn have digits that say nothing.
    digits = 10 if ranking.ranges is None else 4

    def results(entry: RankedPoint | Baseline, gain: str, failed: str) -> list[str]:
        scores = [format_score(n, entry.scores[n]) if n in entry.scores else "-" for n in further]
        value = format_score(objective, entry.value, entry.standard_error)
        ends = [*[failed] * failing, f"{entry.seconds:.2f}"]
        return [*[str(entry.n)] * counted, value, gain, *scores, *ends]

    rows = []
    for place, point in enumerate(points, 1):
        settings = (format_setting(point.point[name], digits) for name in varying)
        gain = format_score(objective, point.gain, point.gain_error, sign="+")
        rows.append([str(place), *settings, *results(point, gain, str(point.failed))])
    rows.append(["zero-shot", *["-"] * len(varying), *results(ranking.baseline, "-", "-")])
    header = ["rank", *varying, *["n"] * counted, _label(objective), "gain", *map(_label, further)]
    return [*header, *["failed"] * failing, "s/sample"], rows


def _terminal_map(ranking: Ranking, steps: float) -> Table:
    title = f"steps {format_setting(steps)}: {escape(_unit_label(ranking))}"
    table = Table(title=title, title_justify="left")
    for name in _map_header(ranking):
        table.add_column(name, justify="right")
    cells = _cells(ranking, steps)
    low, high = _range(ranking)
    for rate in ranking.axes["learning_rate"]:
        row = [Text(format_setting(rate))]
        for weight in ranking.axes["kl_coeff"]:
            point = cells.get((rate, weight))
            text = Text(_cell_text(ranking, point, "{}*"))
            if point is not None:
                share = (_shown(ranking, point) - low) / (high - low)
                place = round(9 * (1 - share if lower_is_better(ranking.objective) else share))
                colour = _VIRIDIS[6 * place : 6 * place + 6]
                text.stylize(f"{_contrast(*(c / 255 for c in bytes.fromhex(colour)))} on #{colour}")
            row.append(text)
        table.add_row(*row)
    return table


def _map_header(ranking: Ranking) -> list[str]:
    return ["learning_rate ↓ kl_coeff →", *map(format_setting, ranking.axes["kl_coeff"])]


def _over(ranking: Ranking) -> str:
    others = [name for name, values in ranking.axes.items() if name not in _MAPPED and len(values) > 1]
    return f"; a cell is the best over {', '.join(others)}" if others else ""


def _cells(ranking: Ranking, steps: float) -> dict[tuple[float, float], RankedPoint]:
    """Return the first-ranked point of every learning rate and KL weight."""
    cells: dict[tuple[float, float], RankedPoint] = {}
    for point in ranking.points:
        if point.point["steps"] == steps:
            cells.setdefault((point.point["learning_rate"], point.point["kl_coeff"]), point)
    return cells


def _range(ranking: Ranking) -> tuple[float, float]:
    """Return the bounds of the colours of all panels; apart even where all values are the same."""
    values = [_shown(ranking, p) for steps in ranking.axes["steps"] for p in _cells(ranking, steps).values()]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _shown(ranking: Ranking, point: RankedPoint | None) -> float:
    return math.nan if point is None else point.value * (100 if _percent(ranking.objective) else 1)


def _cell_text(ranking: Ranking, point: RankedPoint | None, best: str = "{}") -> str:
    text = "-" if point is None else format_score(ranking.objective, point.value).removesuffix("%")
    return best.format(text) if point is ranking.best else text


def _unit_label(ranking: Ranking) -> str:
    return _label(ranking.objective) + (" (%)" if _percent(ranking.objective) else "")


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _label(name: str) -> str:
    return "words" if name == "output_words" else SCORES[name].label if name in SCORES else name


def _percent(name: str) -> bool:
    return name in SCORES and SCORES[name].percent


def _contrast(red: float, green: float, blue: float) -> str:
    """Return black or white, whichever contrasts more with the colour (WCAG 2.1, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
