"""The charts of a report, each with its numbers as a table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from fastmem_pl.metrics import estimate, find_score
from fastmem_pl.report.collect import Comparison
from fastmem_pl.report.figure import draw_chart, grouped_bars, line_look, marker, series_name, stacked_bars
from fastmem_pl.report.page import Chart

_BINS, _LEAST_OF_BIN, _MOST_BARS = 5, 4, 4


def make_charts(comparison: Comparison) -> list[Chart]:
    """All charts that the records have numbers for."""
    return [chart for chart in _all(comparison) if chart is not None]


def _all(comparison: Comparison) -> Iterator[Chart | None]:
    yield _curve_chart(comparison, "cross_entropy", "Loss over the steps", "cross-entropy, nats a token")
    yield _curve_chart(comparison, "kl", "Distance from the model itself", "KL(p₀ ‖ pₙ), nats a token")
    for kind, label, about in (
        ("length", "context tokens", "context length"),
        ("perplexity", "perplexity of the context (base model)", "perplexity of the context"),
    ):
        for place in comparison.tasks:
            # Models have tokens and perplexities of their own.
            for number, model in enumerate(comparison.models(place)):
                yield _binned_chart(comparison, place, number, model, (kind, label, about))
    yield _bar_chart(
        comparison,
        "format_failure",
        "Format failures",
        'Answers without "The answer is:". Lower is better; bars show standard errors.',
    )
    yield _bar_chart(
        comparison,
        "original",
        "Answers of the memorized world",
        "Answers that repeat the fact the context contradicts: what the model learned instead of what it was "
        "given to read. Lower is better; bars show standard errors.",
    )
    yield _seconds_chart(comparison)
    yield _memory_chart(comparison)
    for place in comparison.tasks:
        yield _layer_chart(comparison, place)


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
            look, steps = line_look(number), np.arange(bands.shape[1])
            axes.plot(steps, bands[2], label=series_name(data), **look)
            for low, high, alpha in ((0, 4, 0.12), (1, 3, 0.2)):
                axes.fill_between(steps, bands[low], bands[high], color=look["color"], alpha=alpha, lw=0)
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
    return draw_chart(f"curve-{name}", title, caption, draw, header, rows, legend=len(found) > 1)


def _binned_chart(
    comparison: Comparison, place: int, number: int, model: str, names: tuple[str, str, str]
) -> Chart | None:
    """Score by quantile bins of a property of one model's contexts; ``names``: column, axis, in the title."""
    kind, label, about = names
    models, score = comparison.models(place), comparison.primary_score(place)
    answers = models[model]
    # Of a sample, any method may have measured it.
    values = answers.groupby("index")[kind].last().dropna()
    bins = min(_BINS, len(values) // _LEAST_OF_BIN)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1))) if bins > 1 else []
    if score is None or len(edges) < 3:
        return None
    # A value on an inner edge belongs to the bin above it.
    bin_of = pd.Series(np.searchsorted(edges[1:-1], values, "right"), values.index)
    scale, unit = _scale(score)
    variants = answers["variant"].unique()
    series = {}
    for variant in variants:
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
            look = {**line_look(number), "marker": marker(number), "ms": 4}
            means = [one.value for one in points.values()]
            axes.errorbar(places, means, bars, label=series_name(variant), capsize=2, **look)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{find_score(score).label}{unit}")

    rows = [
        [variant, ticks[bin_], f"{one.value:.1f} ± {one.error or 0.0:.1f}", one.n]
        for variant, points in series.items()
        for bin_, one in points.items()
    ]
    name = find_score(score).label
    data = [comparison.datasets[place].label] if len(comparison.tasks) > 1 else []
    title = f"{name.capitalize() if name.islower() else name} by {about}"
    return draw_chart(
        f"{kind}-{place}" + (f"-{number}" if number else ""),
        ", ".join([title, *data, *([model] if len(models) > 1 else [])]),
        f"Bins of about equally many samples{'; bars show standard errors' * (len(variants) <= _MOST_BARS)}.",
        draw,
        ["method", label, f"{name}{unit}", "samples"],
        rows,
    )


def _bar_chart(comparison: Comparison, score: str, title: str, caption: str) -> Chart | None:
    """One score by method, grouped by data set."""
    scale, unit = _scale(score)
    found = pd.DataFrame(
        [
            (place, variant, scale * one.estimate.value, scale * (one.estimate.error or 0.0))
            for (place, variant, name), one in comparison.results.items()
            if name == score and comparison.datasets[place].task
        ],
        columns=["place", "variant", "value", "error"],
    )
    # All zeros would be an empty picture; the table says so.
    found = found[found.groupby("place")["value"].transform("any")]
    if found.empty:
        return None
    found["data"] = [comparison.datasets[place].label for place in found["place"]]
    shown = [variant for variant in comparison.variants if variant in set(found["variant"])]
    values, errors = (
        found.pivot(index="variant", columns="data", values=name).loc[shown, found["data"].unique()]
        for name in ("value", "error")
    )

    def draw(axes: Any) -> None:
        grouped_bars(axes, values, errors)
        axes.set_xlim(left=0)
        axes.set_xlabel(header[2])

    header = ["method", "data", f"{find_score(score).label}{unit}"]
    rows = [[one.variant, one.data, f"{one.value:.1f} ± {one.error:.1f}"] for one in found.itertuples()]
    many = len(values.columns) > 1
    return draw_chart(score, title, caption, draw, header, rows, many, _height(values))


def _seconds_chart(comparison: Comparison) -> Chart:
    """Memorizing and decoding stacked, by data set and method."""
    means = {}
    for place in comparison.tasks:
        data = f"{comparison.datasets[place].label}: " if len(comparison.tasks) > 1 else ""
        for variant, answers in comparison.groups[place].items():
            means[f"{data}{variant}"] = answers[["memorize", "decode"]].mean()
    frame = pd.DataFrame(means).T

    def draw(axes: Any) -> None:
        stacked_bars(axes, frame)
        axes.set_xlabel("seconds a sample")

    rows = [[label, *(f"{value:.3f}" for value in own)] for label, own in frame.iterrows()]
    caption = "A batch's seconds are shared out among its samples; decoding counts the prompt's pass."
    header = ["method", "memorize, s", "decode, s"]
    return draw_chart("seconds", "Time", caption, draw, header, rows, rows_shown=len(frame))


def _memory_chart(comparison: Comparison) -> Chart | None:
    """Peak memory by phase and run."""
    peaks = comparison.peak_memory
    if peaks.empty:
        return None
    frame = peaks.rename(lambda number: comparison.runs[number].label).T

    def draw(axes: Any) -> None:
        grouped_bars(axes, frame)
        axes.set_xlabel("peak GiB")

    rows = [[run, phase, f"{peak:.2f}"] for run in frame for phase, peak in frame[run].dropna().items()]
    caption = "The weights included: allocated on a GPU, resident on a CPU."
    header = ["run", "phase", "peak GiB"]
    return draw_chart("memory", "Memory", caption, draw, header, rows, len(peaks) > 1, _height(frame))


def _layer_chart(comparison: Comparison, place: int) -> Chart | None:
    """Which premature layer DoLa chose, by method: share of tokens."""
    shares = {}
    for variant, answers in comparison.groups[place].items():
        counts = pd.DataFrame([record.get("dola_layers") or {} for record in answers["record"]]).sum()
        if counts.sum():
            shares[variant] = 100 * (counts / counts.sum()).rename(int).sort_index()
    if not shares:
        return None
    frame = pd.DataFrame(shares).sort_index()

    def draw(axes: Any) -> None:
        grouped_bars(axes, frame, upright=True)
        axes.set_xlabel("premature layer")
        axes.set_ylabel("share of tokens, %")

    rows = [[name, layer, f"{share:.1f}"] for name, own in shares.items() for layer, share in own.items()]
    data = f", {comparison.datasets[place].label}" if len(comparison.tasks) > 1 else ""
    title = f"Layers that DoLa contrasts with{data}"
    caption = "The candidate whose prediction differs most from the last layer's, token by token."
    return draw_chart(f"layers-{place}", title, caption, draw, ["method", "layer", "share, %"], rows)


def _height(frame: pd.DataFrame) -> int:
    """Rows of text that groups of thin bars take the height of."""
    return max(len(frame), len(frame) * len(frame.columns) // 2)


def _scale(score: str) -> tuple[float, str]:
    return (100.0, ", %") if find_score(score).percent else (1.0, "")
