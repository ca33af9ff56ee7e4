"""The charts of a report, each with its numbers as a table."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from fastmem_pl.metrics import estimate, find_score
from fastmem_pl.report.collect import Comparison
from fastmem_pl.report.page import FOLDER, Chart
from fastmem_pl.report.table import PageTable

# Colours of charts.mplstyle, and the page's variables that take their place.
_VARIABLES = {f"#0000c{n}": f"var(--c{n})" for n in range(8)}
_VARIABLES |= {"#010001": "var(--ink)", "#010002": "var(--muted)", "#010003": "var(--grid)"}
# Before the label of a series: matplotlib leaves out those that begin with an underscore.
_SHOWN = " "
_BINS, _LEAST_OF_BIN, _MOST_BARS = 5, 4, 4


def make_charts(comparison: Comparison) -> list[Chart]:
    """All charts that the records have numbers for."""
    charts = [
        _curve_chart(comparison, "cross_entropy", "Loss over the steps", "cross-entropy, nats a token"),
        _curve_chart(comparison, "kl", "Distance from the model itself", "KL(p₀ ‖ pₙ), nats a token"),
    ]
    for kind, label, about in (
        ("length", "context tokens", "context length"),
        ("perplexity", "perplexity of the context (base model)", "perplexity of the context"),
    ):
        for place in comparison.tasks:
            # Models have tokens and perplexities of their own.
            models = comparison.answers[comparison.answers["dataset"] == place].groupby("model", sort=False)
            for number, (model, answers) in enumerate(models):
                name = f"{kind}-{place}" + (f"-{number}" if number else "")
                data = [comparison.datasets[place].label] if len(comparison.tasks) > 1 else []
                where = ", ".join([about, *data, *([model] if models.ngroups > 1 else [])])
                charts.append(_binned_chart(comparison, place, answers, kind, name, label, where))
    for score, title, caption in (
        ("format_failure", "Format failures", 'Answers without "The answer is:".'),
        (
            "original",
            "Answers of the memorized world",
            "Answers that repeat the fact the context contradicts: what the model learned instead of what it "
            "was given to read.",
        ),
    ):
        caption += " Lower is better; bars show standard errors."
        charts.append(_score_chart(comparison, score, title, caption))
    means = {}
    for place in comparison.tasks:
        data = f"{comparison.datasets[place].label}: " if len(comparison.tasks) > 1 else ""
        for variant, answers in comparison.groups[place].items():
            means[f"{data}{variant}"] = answers[["memorize", "decode"]].mean()
    caption = "A batch's seconds are shared out among its samples; decoding counts the prompt's pass."
    header = ["phase", "method", "seconds a sample"]
    charts.append(_bar_chart("seconds", "Time", caption, pd.DataFrame(means).T, header, 3, stacked=True))
    peaks = comparison.peak_memory.rename(lambda number: comparison.runs[number].label).T
    caption = "The weights included: allocated on a GPU, resident on a CPU."
    charts.append(_bar_chart("memory", "Memory", caption, peaks, ["run", "phase", "peak GiB"], 2))
    for make in (_strength_chart, _layer_chart):
        charts += [make(comparison, place) for place in comparison.tasks]
    return [chart for chart in charts if chart is not None]


def _curve_chart(comparison: Comparison, name: str, title: str, label: str) -> Chart | None:
    """Median and quantile bands over samples by step."""
    found = {}
    for data, curves in comparison.curves.items():
        steps = max(len(curve.get(name) or ()) for curve in curves)
        rows = [curve[name] for curve in curves if len(curve.get(name) or ()) == steps]
        if steps:
            found[data] = np.quantile(np.asarray(rows, dtype=np.float64), (0.1, 0.25, 0.5, 0.75, 0.9), axis=0)
    if not found:
        return None

    def draw(axes: Any) -> None:
        for number, (data, bands) in enumerate(found.items()):
            _draw_bands(axes, np.arange(bands.shape[1]), bands, bands[2], data, number)
        axes.set_xlabel("updates so far")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)

    rows = [
        [f"{data}, step {step}", *(f"{value:.4f}" for value in values)]
        for data, bands in found.items()
        for step, values in enumerate(bands.T)
    ]
    header = ["data", "10%", "25%", "median", "75%", "90%"]
    caption = "Line: median over samples; bands: the middle 50% and 80%."
    return draw_chart(f"curve-{name}", draw, PageTable(title, header, rows, caption))


def _draw_bands(
    axes: Any, places: np.ndarray, bands: np.ndarray, line: np.ndarray, label: str, number: int
) -> None:
    """A line, and the bands between the outer and the inner of five quantiles ``(5, places)``."""
    axes.plot(places, line, marker="", label=_SHOWN + label)
    for low, high, alpha in ((0, 4, 0.12), (1, 3, 0.2)):
        axes.fill_between(places, bands[low], bands[high], color=f"C{number}", alpha=alpha, lw=0)


def _binned_chart(
    comparison: Comparison, place: int, answers: pd.DataFrame, kind: str, name: str, label: str, where: str
) -> Chart | None:
    """The primary score by quantile bins of ``kind``, a property of one model's contexts."""
    score = comparison.primary_score(place)
    # Of a sample, any method may have measured it.
    values = answers.groupby("index")[kind].last().dropna()
    bins = min(_BINS, len(values) // _LEAST_OF_BIN)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1))) if bins > 1 else []
    if score is None or len(edges) < 3:
        return None
    # A value on an inner edge belongs to the bin above it.
    bin_of = pd.Series(np.searchsorted(edges[1:-1], values, "right"), values.index)
    scale, heading = _scale(score)
    series = {}
    for variant in answers["variant"].unique():
        scored = scale * comparison.values(place, variant, score)
        by_bin = scored.groupby(bin_of.reindex(scored.index))
        series[variant] = {int(bin_): estimate(own) for bin_, own in by_bin}
    ticks = [f"{low:.4g}–{high:.4g}" for low, high in pairwise(edges)]

    def draw(axes: Any) -> None:
        shown = {variant: points for variant, points in series.items() if points}
        for number, (variant, points) in enumerate(shown.items()):
            # Side by side, so that error bars do not hide each other.
            places = np.asarray(list(points)) + (number - (len(shown) - 1) / 2) * 0.08
            # Bars of many methods would hide the lines; they are in the numbers.
            bars = [one.error or 0.0 for one in points.values()] if len(shown) <= _MOST_BARS else None
            axes.errorbar(places, [one.value for one in points.values()], bars, label=_SHOWN + variant)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlabel(label)
        axes.set_ylabel(heading)

    rows = [
        [variant, ticks[bin_], f"{one.value:.1f} ± {one.error or 0.0:.1f}", one.n]
        for variant, points in series.items()
        for bin_, one in points.items()
    ]
    short = find_score(score).label
    title = f"{short.capitalize() if short.islower() else short} by {where}"
    caption = (
        f"Bins of about equally many samples{'; bars show standard errors' * (len(series) <= _MOST_BARS)}."
    )
    header = ["method", label, heading, "samples"]
    return draw_chart(name, draw, PageTable(title, header, rows, caption))


def _score_chart(comparison: Comparison, score: str, title: str, caption: str) -> Chart | None:
    """One score by method, grouped by data set."""
    scale, heading = _scale(score)
    values, errors = pd.DataFrame(index=comparison.variants), pd.DataFrame(index=comparison.variants)
    for (place, variant, name), one in comparison.results.items():
        if name == score and comparison.datasets[place].task:
            data = comparison.datasets[place].label
            values.loc[variant, data] = scale * one.estimate.value
            errors.loc[variant, data] = scale * (one.estimate.error or 0.0)
    # All zeros would be an empty picture; the table says so.
    values = values.loc[:, (values > 0).any()].dropna(how="all")
    return _bar_chart(score, title, caption, values, ["data", "method", heading], 1, errors)


def _strength_chart(comparison: Comparison, place: int) -> Chart | None:
    """What adaptive decoders chose, by token position: mean and quantiles over the samples."""
    found = {}
    for variant, answers in comparison.groups[place].items():
        strengths = pd.DataFrame([record.get("strengths") or [] for record in answers["record"]], dtype=float)
        # Positions that only a few answers reach would be noise; with few samples they are all there is.
        reached = strengths.count()
        strengths = strengths.loc[:, reached >= min(_LEAST_OF_BIN, max(reached, default=1), len(strengths))]
        if strengths.size:
            found[variant] = strengths
    if not found:
        return None
    header = ["method", "token", "mean", "10%", "25%", "median", "75%", "90%", "samples"]
    quantiles = {variant: one.quantile([0.1, 0.25, 0.5, 0.75, 0.9]) for variant, one in found.items()}

    def draw(axes: Any) -> None:
        for number, (variant, one) in enumerate(found.items()):
            places = one.columns.to_numpy() + 1
            _draw_bands(axes, places, quantiles[variant].to_numpy(), one.mean().to_numpy(), variant, number)
        axes.set_xlabel("token of the answer")
        axes.set_ylabel("strength")
        axes.xaxis.get_major_locator().set_params(integer=True)

    rows = [
        [
            variant,
            position + 1,
            f"{one[position].mean():.4f}",
            *(f"{value:.4f}" for value in quantiles[variant][position]),
            int(one[position].count()),
        ]
        for variant, one in found.items()
        for position in one
    ]
    data = f", {comparison.datasets[place].label}" if len(comparison.tasks) > 1 else ""
    caption = (
        "What the decoder chose, token by token. adacad, adacd: the strength of the contrast; coiecd: the "
        "probability of the tokens that are contrasted; cocoa: the weight of the context; ck-plug: that of "
        "the model's own knowledge, where the context made it less sure. Line: mean over samples; bands: the "
        "middle 50% and 80%."
    )
    table = PageTable(f"Strength by token{data}", header, rows, caption)
    return draw_chart(f"strength-{place}", draw, table)


def _layer_chart(comparison: Comparison, place: int) -> Chart | None:
    """Which premature layer DoLa chose, by method: share of tokens."""
    shares = {}
    for variant, answers in comparison.groups[place].items():
        counts = pd.DataFrame([record.get("dola_layers") or {} for record in answers["record"]]).sum()
        if counts.sum():
            shares[variant] = 100 * (counts / counts.sum()).rename(int)
    data = f", {comparison.datasets[place].label}" if len(comparison.tasks) > 1 else ""
    title = f"Layers that DoLa contrasts with{data}"
    caption = "The candidate whose prediction differs most from the last layer's, token by token."
    header = ["method", "layer", "share, %"]
    return _bar_chart(f"layers-{place}", title, caption, pd.DataFrame(shares).sort_index(), header)


def _scale(score: str) -> tuple[float, str]:
    """Factor of a score's values on a chart, and its heading there."""
    found = find_score(score)
    return (100.0, f"{found.label}, %") if found.percent else (1.0, found.label)


def draw_chart(name: str, draw: Callable[[Any], None], table: PageTable) -> Chart:
    """Let ``draw`` fill axes of an SVG in the page's colours; ``table`` holds title, caption and numbers."""
    # Slow to import, and only the page has pictures.
    from matplotlib import style
    from matplotlib.figure import Figure

    # Neither the user's matplotlibrc nor a random salt may change the picture.
    with style.context(["default", FOLDER / "charts.mplstyle", {"svg.hashsalt": f"fastmem-{name}"}]):
        figure = Figure()
        axes = figure.subplots()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        # Below the axes: eight methods would cover the curves.
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(4, len(labels))))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match.group()], file.getvalue())
    return Chart(name, table.title, table.caption, svg, replace(table, caption=""))


def _bar_chart(
    name: str,
    title: str,
    caption: str,
    values: pd.DataFrame,
    header: list[str],
    digits: int = 1,
    errors: pd.DataFrame | None = None,
    stacked: bool = False,
) -> Chart | None:
    """A group of bars per row, the first on top, of a series per column: side by side, or stacked.

    The table says them one by one; ``header`` names column, row and value.
    """
    if values.empty:
        return None
    rows = [
        [column, row, f"{value:.{digits}f}"]
        if errors is None
        else [column, row, f"{value:.{digits}f} ± {errors.loc[row, column]:.{digits}f}"]
        for column in values
        for row, value in values[column].dropna().items()
    ]

    def draw(axes: Any) -> None:
        look = {
            "color": [f"C{number}" for number in range(values.shape[1])],
            "width": 0.8,
            "stacked": stacked,
        }
        if errors is not None:
            look |= {"xerr": errors.add_prefix(_SHOWN), "ecolor": "#010001", "error_kw": {"lw": 1}}
        values.add_prefix(_SHOWN).plot.barh(ax=axes, legend=False, **look)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlim=(0, None), xlabel=header[2], ylabel=header[1])
        # Names and bars need height.
        axes.figure.set_figheight(max(3.5, 0.9 + 0.3 * max(len(values), values.size // 2)))

    return draw_chart(name, draw, PageTable(title, header, rows, caption))
