"""The charts of a report, each with its numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastmem_pl.metrics import SCORES
from fastmem_pl.metrics.statistics import estimate
from fastmem_pl.report.collect import Comparison, Variant
from fastmem_pl.report.figure import INK, SERIES, draw_chart, line_look, marker, name_rows, series_name
from fastmem_pl.report.page import Cell, Chart
from fastmem_pl.report.runs import perplexity
from fastmem_pl.report.table import curves_of, primary_score, result
from fastmem_pl.run.records import Record

_BINS, _LEAST_OF_BIN, _MOST_BARS = 5, 4, 4


def make_charts(comparison: Comparison) -> list[Chart]:
    """All charts that the records have numbers for."""
    return [chart for chart in _all(comparison) if chart is not None]


def _all(comparison: Comparison) -> Iterator[Chart | None]:
    yield _curve_chart(comparison, "cross_entropy", "Loss over the steps", "cross-entropy, nats a token")
    yield _curve_chart(comparison, "kl", "Distance from the model itself", "KL(p₀ ‖ pₙ), nats a token")
    yield from _binned_charts(comparison, "length", "context tokens", _length)
    yield from _binned_charts(comparison, "perplexity", "perplexity of the context (base model)", perplexity)
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
    yield from _layer_charts(comparison)


def _curve_chart(comparison: Comparison, name: str, title: str, label: str) -> Chart | None:
    """Median and quantile bands over samples by step."""
    found = {}
    for data, curves in curves_of(comparison).items():
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
        [Cell(f"{data}, step {step}"), *(Cell(f"{value:.4f}") for value in bands[:, step])]
        for data, bands in found.items()
        for step in range(bands.shape[1])
    ]
    header = ["data", "10%", "25%", "median", "75%", "90%"]
    caption = "Line: median over samples; bands: the middle 50% and 80%."
    return draw_chart(f"curve-{name}", title, caption, draw, header, rows, legend=len(found) > 1)


def _binned_charts(
    comparison: Comparison, kind: str, label: str, value_of: Callable[[Record], float | None]
) -> Iterator[Chart | None]:
    """Charts of scores by a property of the contexts; models have tokens and perplexities of their own."""
    for place in comparison.tasks:
        models = comparison.models([v for v in comparison.variants if place in v.records])
        for number, (name, variants) in enumerate(models.items()):
            data = [comparison.datasets[place].label] if len(comparison.tasks) > 1 else []
            about = ", ".join(["", *data, *([name] if len(models) > 1 else [])])
            chart = f"{kind}-{place}" + (f"-{number}" if number else "")
            yield _binned_chart(comparison, place, variants, (chart, kind, label, about), value_of)


def _binned_chart(
    comparison: Comparison,
    place: int,
    variants: Sequence[Variant],
    names: tuple[str, str, str, str],
    value_of: Callable[[Record], float | None],
) -> Chart | None:
    """Score by quantile bins of a property of the samples; ``names``: id, kind, axis, end of the title."""
    chart, kind, label, data = names
    score = primary_score(comparison, place)
    values = {
        index: value
        for variant in variants
        for index, record in variant.records[place].items()
        if (value := value_of(record)) is not None
    }
    edges = _edges(list(values.values()))
    if score is None or len(edges) < 3:
        return None
    # A value on an inner edge belongs to the bin above it.
    of_sample = {index: int(np.searchsorted(edges[1:-1], value, "right")) for index, value in values.items()}
    scale, unit = _scale(score)
    series: list[tuple[Variant, list[tuple[int, float, float, int]]]] = []
    for variant in variants:
        points = []
        for number in range(len(edges) - 1):
            scored = [
                record["scores"][score]
                for index, record in variant.records[place].items()
                if of_sample.get(index) == number and score in record["scores"]
            ]
            if scored:
                found = estimate(scored)
                points.append((number, scale * found.value, scale * (found.error or 0.0), found.n))
        series.append((variant, points))
    bins = [f"{low:.4g}–{high:.4g}" for low, high in pairwise(edges)]

    def draw(axes: Any) -> None:
        shown = [entry for entry in series if entry[1]]
        for number, (variant, points) in enumerate(shown):
            numbers, means, errors, _ = zip(*points, strict=True)
            # Side by side, so that error bars do not hide each other.
            places = np.asarray(numbers) + (number - (len(shown) - 1) / 2) * 0.08
            # Bars of many methods would hide the lines; they are in the numbers.
            bars = errors if len(shown) <= _MOST_BARS else None
            look = {**line_look(number), "marker": marker(number), "ms": 4}
            axes.errorbar(places, means, bars, label=series_name(variant.label), capsize=2, **look)
        axes.set_xticks(range(len(bins)), bins)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{_name(score)}{unit}")

    rows = [
        [Cell(variant.label), Cell(bins[number]), Cell(f"{mean:.1f} ± {error:.1f}"), Cell(str(count))]
        for variant, points in series
        for number, mean, error, count in points
    ]
    bars = "; bars show standard errors" if len(variants) <= _MOST_BARS else ""
    about = "context length" if kind == "length" else "perplexity of the context"
    return draw_chart(
        chart,
        f"{_name(score).capitalize() if _name(score).islower() else _name(score)} by {about}{data}",
        f"Bins of about equally many samples{bars}.",
        draw,
        ["method", label, f"{_name(score)}{unit}", "samples"],
        rows,
    )


def _bars(groups: int, each: int) -> int:
    """Rows of text that groups of thin bars take the height of."""
    return max(groups, groups * each // 2)


def _length(record: Record) -> float | None:
    return record.get("n_context_tokens")


def _edges(values: Sequence[float]) -> list[float]:
    """Edges of bins with about as many values each; too few values make fewer bins."""
    if not values:
        return []
    bins = min(_BINS, len(values) // _LEAST_OF_BIN)
    return sorted(set(np.quantile(values, np.linspace(0, 1, bins + 1)).tolist())) if bins > 1 else []


def _bar_chart(comparison: Comparison, score: str, title: str, caption: str) -> Chart | None:
    """One score by method, grouped by data set."""
    places = comparison.tasks
    found = {
        place: {v.label: r for v in comparison.variants if (r := result(comparison, v, place, score))}
        for place in places
    }
    # All zeros would be an empty picture; the table says so.
    shown = [place for place in places if any(one.estimate.value for one in found[place].values())]
    labels = [v.label for v in comparison.variants if any(v.label in found[place] for place in shown)]
    if not shown:
        return None
    scale, unit = _scale(score)

    def draw(axes: Any) -> None:
        height = 0.8 / len(shown)
        for number, place in enumerate(shown):
            own = [label for label in labels if label in found[place]]
            estimates = [found[place][label].estimate for label in own]
            axes.barh(
                [labels.index(label) + (number - (len(shown) - 1) / 2) * height for label in own],
                [scale * one.value for one in estimates],
                0.9 * height,
                xerr=[scale * (one.error or 0.0) for one in estimates],
                color=SERIES[number % len(SERIES)],
                error_kw={"ecolor": INK, "capsize": 2, "lw": 1},
                label=series_name(comparison.datasets[place].label),
            )
        name_rows(axes, labels)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{_name(score)}{unit}")

    rows = []
    for place in shown:
        for label, one in found[place].items():
            value, error = scale * one.estimate.value, scale * (one.estimate.error or 0.0)
            cells = [label, comparison.datasets[place].label, f"{value:.1f} ± {error:.1f}"]
            rows.append([Cell(cell) for cell in cells])
    header = ["method", "data", f"{_name(score)}{unit}"]
    many = len(shown) > 1
    return draw_chart(
        score, title, caption, draw, header, rows, legend=many, rows_shown=_bars(len(labels), len(shown))
    )


def _seconds_chart(comparison: Comparison) -> Chart | None:
    """Memorizing and decoding stacked, by data set and method."""
    labels, parts = [], {"memorize": [], "decode": []}
    for place in comparison.tasks:
        data = f"{comparison.datasets[place].label}: " if len(comparison.tasks) > 1 else ""
        for variant in comparison.variants:
            records = list(variant.records.get(place, {}).values())
            if not records:
                continue
            labels.append(f"{data}{variant.label}")
            for name, values in parts.items():
                values.append(float(np.mean([record["seconds"].get(name, 0.0) for record in records])))

    def draw(axes: Any) -> None:
        left = np.zeros(len(labels))
        for number, (name, values) in enumerate(parts.items()):
            axes.barh(range(len(labels)), values, 0.72, left=left, label=name, color=SERIES[number])
            left += values
        name_rows(axes, labels)
        axes.set_xlabel("seconds a sample")

    rows = [
        [Cell(label), *(Cell(f"{parts[name][row]:.3f}") for name in parts)]
        for row, label in enumerate(labels)
    ]
    caption = "A batch's seconds are shared out among its samples; decoding counts the prompt's pass."
    header = ["method", "memorize, s", "decode, s"]
    return draw_chart("seconds", "Time", caption, draw, header, rows, rows_shown=len(labels))


def _memory_chart(comparison: Comparison) -> Chart | None:
    """Peak memory by phase and run."""
    runs = [run for run in comparison.runs if run.metrics.get("peak_memory_gib")]
    phases = list(dict.fromkeys(phase for run in runs for phase in run.metrics["peak_memory_gib"]))
    if not runs:
        return None

    def draw(axes: Any) -> None:
        height = 0.8 / len(runs)
        for number, run in enumerate(runs):
            peaks = run.metrics["peak_memory_gib"]
            places = [phases.index(phase) + (number - (len(runs) - 1) / 2) * height for phase in peaks]
            look = {"color": SERIES[number % len(SERIES)], "label": series_name(run.label)}
            axes.barh(places, list(peaks.values()), 0.9 * height, **look)
        name_rows(axes, phases)
        axes.set_xlabel("peak GiB")

    rows = [
        [Cell(run.label), Cell(phase), Cell(f"{peak:.2f}")]
        for run in runs
        for phase, peak in run.metrics["peak_memory_gib"].items()
    ]
    caption = "The weights included: allocated on a GPU, resident on a CPU."
    header, many, shown = ["run", "phase", "peak GiB"], len(runs) > 1, _bars(len(phases), len(runs))
    return draw_chart("memory", "Memory", caption, draw, header, rows, legend=many, rows_shown=shown)


def _layer_charts(comparison: Comparison) -> Iterator[Chart]:
    """Which premature layer DoLa chose, by method: share of tokens."""
    for place in comparison.tasks:
        dataset = comparison.datasets[place]
        shares: dict[str, dict[int, float]] = {}
        for variant in comparison.variants:
            counts: dict[int, int] = {}
            for record in variant.records.get(place, {}).values():
                for layer, count in (record.get("dola_layers") or {}).items():
                    counts[int(layer)] = counts.get(int(layer), 0) + int(count)
            total = sum(counts.values())
            if total:
                shares[variant.label] = {layer: counts[layer] / total for layer in sorted(counts)}
        if not shares:
            continue
        layers = sorted({layer for own in shares.values() for layer in own})

        def draw(axes: Any, shares: dict[str, dict[int, float]] = shares, layers: list[int] = layers) -> None:
            width = 0.8 / len(shares)
            for number, (label, own) in enumerate(shares.items()):
                places = np.arange(len(layers)) + (number - (len(shares) - 1) / 2) * width
                heights = [100 * own.get(layer, 0.0) for layer in layers]
                axes.bar(
                    places, heights, 0.9 * width, label=series_name(label), color=SERIES[number % len(SERIES)]
                )
            axes.set_xticks(range(len(layers)), layers)
            axes.set_xlabel("premature layer")
            axes.set_ylabel("share of tokens, %")

        rows = [
            [Cell(label), Cell(str(layer)), Cell(f"{100 * share:.1f}")]
            for label, own in shares.items()
            for layer, share in own.items()
        ]
        data = f", {dataset.label}" if len(comparison.tasks) > 1 else ""
        title = f"Layers that DoLa contrasts with{data}"
        caption = "The candidate whose prediction differs most from the last layer's, token by token."
        yield draw_chart(f"layers-{place}", title, caption, draw, ["method", "layer", "share, %"], rows)


def _scale(score: str) -> tuple[float, str]:
    return (100.0, ", %") if score in SCORES and SCORES[score].percent else (1.0, "")


def _name(score: str) -> str:
    return SCORES[score].label if score in SCORES else score
