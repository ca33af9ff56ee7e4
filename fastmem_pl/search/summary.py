"""The result of a search as terminal tables, Markdown and pictures; from a :class:`Ranking` only."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps, style
from matplotlib import pyplot as plt
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.markdown import Markdown

from fastmem_pl.base.files import write_atomic
from fastmem_pl.metrics import SCORES, format_score, lower_is_better
from fastmem_pl.search.ranking import Baseline, RankedPoint, Ranking, format_setting

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

_MAPPED = ("steps", "learning_rate", "kl_coeff")
_FURTHER = ("accuracy", "contained", "format_failure", "rouge1", "rougeL", "bert_precision", "factkb")
_PANELS_PER_ROW = 3
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
    """Return points, heat maps and warnings as Markdown.

    Args:
        ranking: all points.
        plots: pictures beside the file that take the place of heat maps after a search by trials.
        top: number of points to show, without pictures, where a file beside has them all.
    """
    zero_shot, rest = ranking.baseline, 0 if top is None else max(0, len(ranking.points) - top)
    value = format_score(ranking.objective, zero_shot.value, zero_shot.standard_error)
    blocks = [
        f"{_summary(ranking)}.",
        f"Zero-shot: {_label(ranking.objective)} {value} on {_count(zero_shot.n, 'sample')}.",
        "## Points",
        "Mean ± standard error, best first; the gain is the paired difference to zero-shot.",
        _markdown_table(*_rows(ranking, top)),
    ]
    blocks += [f"{_count(rest, 'further point')}: see search.md"] * bool(rest)
    if ranking.ranges is None:
        blocks += ["## Heat maps", f"{_unit_label(ranking)}, best in bold{_over(ranking)}."]
        if top is None:
            blocks.append(f"![{_label(ranking.objective)} by {', '.join(_MAPPED)}](heatmap.svg)")
        header = ["learning_rate ↓ kl_coeff →", *map(format_setting, ranking.axes["kl_coeff"])]
        for steps, cells in _panels(ranking):
            body = [
                [format_setting(rate), *(_cell_text(ranking, point, "**{}**") for point in points)]
                for rate, points in cells.items()
            ]
            blocks += [f"### steps {format_setting(steps)}", _markdown_table(header, body)]
    elif plots:
        blocks += ["## Plots", *(f"![{name.removesuffix('.svg')}]({name})" for name in plots)]
    if ranking.warnings:
        blocks += ["## Warnings", "\n".join(f"- {line}" for line in ranking.warnings)]
    return "\n\n".join(blocks if top else ["# Search", *blocks]) + "\n"


def heat_map(ranking: Ranking, path: Path) -> None:
    """Write an SVG with a panel per number of steps, all of one colour scale; the best is outlined.

    The same ranking gives the same bytes. Colours are viridis, the good end bright.

    Raises:
        OSError: when the file cannot be written.
    """
    steps, rates, weights = (ranking.axes[name] for name in _MAPPED)
    columns = min(len(steps), _PANELS_PER_ROW)
    rows = -(-len(steps) // columns)
    shown = [_shown(ranking, p) for _, cells in _panels(ranking) for row in cells.values() for p in row if p]
    low, high = min(shown), max(shown)
    # Apart even where all values are the same.
    scale = Normalize(low, high) if high > low else Normalize(low - 0.5, high + 0.5)
    colours = colormaps["viridis_r" if lower_is_better(ranking.objective) else "viridis"]
    with style.context(_STYLE):
        size = columns * (1.2 + 0.75 * len(weights)) + 2.4, rows * (1.1 + 0.5 * len(rates)) + 0.6
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(steps) :]:
            axes.set_visible(False)
        for (number, cells), axes in zip(_panels(ranking), grid.flat, strict=False):
            values = [[_shown(ranking, point) for point in points] for points in cells.values()]
            image = axes.imshow(values, cmap=colours, norm=scale, aspect="auto")
            axes.set_facecolor("#dddddd")
            axes.set_xticks(range(len(weights)), map(format_setting, weights))
            axes.set_yticks(range(len(rates)), map(format_setting, rates))
            axes.set(title=f"steps {format_setting(number)}", xlabel="kl_coeff", ylabel="learning_rate")
            for y, points in enumerate(cells.values()):
                for x, point in enumerate(points):
                    if point is not None:
                        ink = _contrast(*colours(scale(_shown(ranking, point)))[:3])
                        axes.text(x, y, _cell_text(ranking, point), ha="center", va="center", color=ink)
                    if point is ranking.best:
                        frame = {"fill": False, "ec": "black", "lw": 3, "clip_on": False, "gid": "best"}
                        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **frame))
        figure.colorbar(image, ax=grid, label=_unit_label(ranking))
        figure.suptitle(f"best outlined{_over(ranking)}", fontsize="medium")
        _save(figure, path)


def plot_study(study: optuna.Study, folder: Path, objective: str) -> list[str]:
    """Write Optuna's own plots; returns their names. One that fails is left out with a line in the log."""
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as optuna_plots

    names: list[str] = []
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return names
    for plot, function in _PLOTS.items():
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


def _summary(ranking: Ranking) -> str:
    ranges, values = ranking.ranges or {}, []
    for name, found in ranking.axes.items():
        ends = ranges.get(name)
        shown = " to ".join(map(format_setting, ends[:2])) if ends else ", ".join(map(format_setting, found))
        values.append(f"{name} {shown}")
    better = "lower" if lower_is_better(ranking.objective) else "higher"
    searched = f"{_count(len(ranking.points), 'point')} for {_label(ranking.objective)} ({better} is better)"
    return f"Searched {searched} on {_count(ranking.best.n, 'sample')}: {'; '.join(values)}"


def _rows(ranking: Ranking, top: int | None) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the first points, and of zero-shot in the last row."""
    objective, points = ranking.objective, ranking.points
    varying = [name for name, values in ranking.axes.items() if len(values) > 1]
    further = [n for n in _FURTHER if n != objective and any(n in p.scores for p in points)][:2]
    further.append("output_words")
    counted = len({p.n for p in (*points, ranking.baseline)}) > 1
    failing = any(point.failed for point in points)
    # Values that were drawn have digits that say nothing.
    digits = 10 if ranking.ranges is None else 4

    def results(entry: Baseline, gain: str, failed: str) -> list[str]:
        scores = [format_score(n, entry.scores[n]) if n in entry.scores else "-" for n in further]
        value = format_score(objective, entry.value, entry.standard_error)
        ends = [*[failed] * failing, f"{entry.seconds:.2f}"]
        return [*[str(entry.n)] * counted, value, gain, *scores, *ends]

    rows = []
    for place, point in enumerate(points[:top], 1):
        settings = (format_setting(point.point[name], digits) for name in varying)
        gain = format_score(objective, point.gain, point.gain_error, sign="+")
        rows.append([str(place), *settings, *results(point, gain, str(point.failed))])
    rows.append(["zero-shot", *["-"] * len(varying), *results(ranking.baseline, "-", "-")])
    header = ["rank", *varying, *["n"] * counted, _label(objective), "gain", *map(_label, further)]
    return [*header, *["failed"] * failing, "s/sample"], rows


def _panels(ranking: Ranking) -> Iterator[tuple[float, dict[float, list[RankedPoint | None]]]]:
    """By number of steps and learning rate: the first-ranked point of every KL weight."""
    first: dict[tuple[float, ...], RankedPoint] = {}
    for point in ranking.points:
        first.setdefault(tuple(point.point[name] for name in _MAPPED), point)
    steps, rates, weights = (ranking.axes[name] for name in _MAPPED)
    for number in steps:
        yield number, {rate: [first.get((number, rate, weight)) for weight in weights] for rate in rates}


def _contrast(red: float, green: float, blue: float) -> str:
    """Return black or white, whichever contrasts more with the colour (WCAG 2.1, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _over(ranking: Ranking) -> str:
    others = [name for name, values in ranking.axes.items() if name not in _MAPPED and len(values) > 1]
    return f"; a cell is the best over {', '.join(others)}" if others else ""


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


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
