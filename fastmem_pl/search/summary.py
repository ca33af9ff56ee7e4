"""The result of a search as terminal tables, Markdown and pictures; from a :class:`Ranking` only."""

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, style
from matplotlib import pyplot as plt
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.markdown import Markdown

from fastmem_pl.base.files import write_atomic
from fastmem_pl.metrics import count_of, find_score, format_score
from fastmem_pl.search.ranking import RankedPoint, Ranking

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

_MAPPED = ("steps", "learning_rate", "kl_coeff")
_FURTHER = ("accuracy", "contained", "format_failure", "rouge1", "rougeL", "bert_precision", "factkb")
# Neither the user's matplotlibrc nor a random salt may change a picture.
_STYLE = ["default", {"svg.hashsalt": "fastmem", "svg.fonttype": "none"}]
_PLOTS = {
    "history": "optimization_history",
    "slice": "slice",
    "parallel": "parallel_coordinate",
    "importances": "param_importances",
}


def print_search(ranking: Ranking, console: Console, top: int = 10) -> None:
    """Print the best points beside zero-shot, a heat map per number of steps, and the warnings."""
    text = markdown(ranking, top=top).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    # Names that may break keep a table narrow.
    console.print(Markdown(re.sub(r"(?m)^\| rank .*", lambda line: line[0].replace("_", " "), text)))


def markdown(ranking: Ranking, plots: Sequence[str] = (), top: int | None = None) -> str:
    """Return points, heat maps (after trials, the names of ``plots``) and warnings as Markdown.

    ``top`` limits the points to the first ones and leaves out pictures, where a file beside has them all.
    """
    blocks = [
        *(["# Search"] if top is None else []),
        f"{_summary(ranking)}.",
        "## Points",
        "Mean ± standard error, best first; the gain is the paired difference to zero-shot.",
        _markdown_table(_rows(ranking, top)),
    ]
    if top is not None and len(ranking.points) > top:
        blocks.append(f"{count_of(len(ranking.points) - top, 'further point')}: see search.md")
    if ranking.ranges is None:
        blocks += ["## Heat maps", f"{_label_with_unit(ranking)}, best in bold{_over(ranking)}."]
        if top is None:
            blocks.append(f"![{find_score(ranking.objective).label} by {', '.join(_MAPPED)}](heatmap.svg)")
        for steps, cells in _panels(ranking):
            body = [
                {"learning_rate ↓ kl_coeff →": f"{rate:g}"}
                | {f"{w:g}": _cell_text(ranking, p, "**{}**") for w, p in points.items()}
                for rate, points in cells.items()
            ]
            blocks += [f"### steps {steps:g}", _markdown_table(body)]
    elif plots:
        blocks += ["## Plots", *(f"![{name.removesuffix('.svg')}]({name})" for name in plots)]
    if ranking.warnings:
        blocks += ["## Warnings", "\n".join(f"- {line}" for line in ranking.warnings)]
    return "\n\n".join(blocks) + "\n"


def heat_map(ranking: Ranking, path: Path) -> None:
    """Write an SVG with a panel per number of steps, all of one colour scale; the best is outlined.

    The same ranking gives the same bytes. Colours are viridis, the good end bright.
    """
    steps, rates, weights = (ranking.axes[name] for name in _MAPPED)
    unit = 100 if find_score(ranking.objective).percent else 1
    first = (p for _, cells in _panels(ranking) for row in cells.values() for p in row.values() if p)
    shown = [point.value * unit for point in first]
    scale = Normalize(min(shown), max(shown))
    colours = colormaps["viridis_r" if find_score(ranking.objective).lower_is_better else "viridis"]
    with style.context(_STYLE):
        size = len(steps) * (1.2 + 0.75 * len(weights)) + 2.4, 1.7 + 0.5 * len(rates)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(1, len(steps), squeeze=False)
        for (number, cells), axes in zip(_panels(ranking), grid.flat, strict=True):
            panel = [[*points.values()] for points in cells.values()]
            values = [[p.value * unit if p else math.nan for p in points] for points in panel]
            image = axes.imshow(values, cmap=colours, norm=scale, aspect="auto")
            axes.set_facecolor("#dddddd")
            axes.set_xticks(range(len(weights)), map("{:g}".format, weights))
            axes.set_yticks(range(len(rates)), map("{:g}".format, rates))
            axes.set(title=f"steps {number:g}", xlabel="kl_coeff", ylabel="learning_rate")
            for (y, x), point in np.ndenumerate(np.array(panel, dtype=object)):
                if point is not None:
                    ink = _ink(colours(scale(point.value * unit)))
                    axes.text(x, y, _cell_text(ranking, point), ha="center", va="center", color=ink)
                if point is ranking.best:
                    frame = {"fill": False, "ec": "black", "lw": 3, "clip_on": False, "gid": "best"}
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **frame))
        figure.colorbar(image, ax=grid, label=_label_with_unit(ranking))
        figure.suptitle(f"best outlined{_over(ranking)}", fontsize="medium")
        _save(figure, path)


def plot_study(study: "optuna.Study", folder: Path, objective: str) -> list[str]:
    """Write Optuna's own plots; returns their names. One that fails is left out with a line in the log."""
    from optuna.visualization import matplotlib as optuna_plots

    names: list[str] = []
    for plot, function in _PLOTS.items() if study.best_trials else ():
        name = f"optuna-{plot}.svg"
        # Optuna sets a style of its own for the whole process, and keeps its figures open.
        opened = set(plt.get_fignums())
        try:
            with style.context(_STYLE), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                getattr(optuna_plots, f"plot_{function}")(study, target_name=objective)
                _save(plt.gcf(), folder / name, bbox_inches="tight")
            names.append(name)
        except Exception as error:  # a picture less is no reason to lose the result
            log.warning("%s could not be drawn: %s", name, " ".join(str(error).split()))
        finally:
            for number in set(plt.get_fignums()) - opened:
                plt.close(number)
    return names


def _save(figure: Figure, path: Path, **options: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, **options)
    write_atomic(path, buffer.getvalue())


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever can be read on a colour of viridis: its green rises with its luminance."""
    return "#000000" if colour[1] > 0.5 else "#ffffff"


def _summary(ranking: Ranking) -> str:
    shown = {name: ", ".join(map("{:g}".format, values)) for name, values in ranking.axes.items()}
    for name, (low, high, _) in (ranking.ranges or {}).items():
        shown[name] = f"{low:g} to {high:g}"
    objective = find_score(ranking.objective)
    better = "lower" if objective.lower_is_better else "higher"
    searched = f"{count_of(len(ranking.points), 'point')} for {objective.label} ({better} is better)"
    settings = "; ".join(f"{name} {values}" for name, values in shown.items())
    return f"Searched {searched} on {count_of(ranking.best.n, 'sample')}: {settings}"


def _rows(ranking: Ranking, top: int | None) -> list[dict[str, str]]:
    """Cells by column of the first points, and of zero-shot at the end; columns only where they differ."""
    objective, points, baseline = ranking.objective, ranking.points, ranking.baseline
    varying = [name for name, values in ranking.axes.items() if len(values) > 1]
    further = [n for n in _FURTHER if n != objective and any(n in p.scores for p in points)][:2]
    rows = []
    for place, entry in [*enumerate(points[:top], 1), ("zero-shot", baseline)]:
        point = entry if isinstance(entry, RankedPoint) else None
        row = {"rank": str(place)}
        for name in varying:
            row[name] = f"{point.point[name]:g}" if point else "-"
        if any(p.n != baseline.n for p in points):
            row["n"] = str(entry.n)
        row[find_score(objective).label] = format_score(objective, entry.value, entry.standard_error)
        row["gain"] = format_score(objective, point.gain, point.gain_error, sign="+") if point else "-"
        for name in (*further, "output_words"):
            known = name in entry.scores
            row[find_score(name).label] = format_score(name, entry.scores[name]) if known else "-"
        if any(p.failed for p in points):
            row["failed"] = str(point.failed) if point else "-"
        rows.append({**row, "s/sample": f"{entry.seconds:.2f}"})
    return rows


def _panels(ranking: Ranking) -> Iterator[tuple[float, dict[float, dict[float, RankedPoint | None]]]]:
    """By number of steps and learning rate: the first-ranked point of every KL weight."""
    first: dict[tuple[float, ...], RankedPoint] = {}
    for point in ranking.points:
        first.setdefault(tuple(point.point[name] for name in _MAPPED), point)
    steps, rates, weights = (ranking.axes[name] for name in _MAPPED)
    for number in steps:
        yield number, {rate: {w: first.get((number, rate, w)) for w in weights} for rate in rates}


def _over(ranking: Ranking) -> str:
    others = [name for name, values in ranking.axes.items() if name not in _MAPPED and len(values) > 1]
    return f"; a cell is the best over {', '.join(others)}" if others else ""


def _cell_text(ranking: Ranking, point: RankedPoint | None, best: str = "{}") -> str:
    text = "-" if point is None else format_score(ranking.objective, point.value).removesuffix("%")
    return best.format(text) if point is ranking.best else text


def _label_with_unit(ranking: Ranking) -> str:
    objective = find_score(ranking.objective)
    return f"{objective.label} (%)" if objective.percent else objective.label


def _markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [rows[0], ["---:"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
