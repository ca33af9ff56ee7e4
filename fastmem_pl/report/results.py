"""The tables that a report makes of a comparison."""

from __future__ import annotations

import pandas as pd

from fastmem_pl.data import TASKS
from fastmem_pl.metrics import Estimate, estimate, find_score
from fastmem_pl.report.collect import Comparison
from fastmem_pl.report.table import EFFORT, NONE, PageTable, Result, score_table

LEGEND = (
    "Mean ± standard error, and the change against zero-shot on the same samples (samples gained and lost, "
    "exact McNemar test; of scores that are not 0 or 1 the mean difference, paired bootstrap). The p-values "
    "are not corrected for the number of comparisons. Where the settings are the paper's, its value stands "
    "beside, on its own data."
)


def overview(comparison: Comparison) -> PageTable | None:
    """Method by data set, one score each; ``None`` where there is one data set only."""
    if len(comparison.datasets) < 2:
        return None
    chosen = [(place, score) for place in range(len(comparison.datasets)) if (score := comparison.primary_score(place))]
    columns = [(score, f"{comparison.datasets[i].label}: {find_score(score).label}") for i, score in chosen]
    rows = {
        variant: [comparison.results.get((place, variant, score)) for place, score in chosen]
        for variant in comparison.variants
    }
    return score_table("All data sets", columns, rows, LEGEND)


def dataset_table(comparison: Comparison, dataset: int) -> PageTable:
    """All scores of one data set, length and seconds of the answers."""
    scores, groups = comparison.scores_of(dataset), comparison.groups[dataset]
    rows = {
        variant: [
            *(comparison.results.get((dataset, variant, score)) for score in scores),
            Result(estimate(answers["output_words"])),
            Result(Estimate(answers["memorize"].add(answers["decode"]).mean(), None, len(answers))),
        ]
        for variant, answers in groups.items()
    }
    columns = [(name, find_score(name).label) for name in (*scores, *EFFORT)]
    return score_table(_title(comparison, dataset), columns, rows, LEGEND)


def _title(comparison: Comparison, dataset: int) -> str:
    counts = sorted({len(answers) for answers in comparison.groups[dataset].values()})
    shown = "–".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    found = comparison.datasets[dataset]
    about = TASKS[found.task].description if found.task in TASKS else ""
    return f"{found.label}: {shown} sample{'' if shown == '1' else 's'}" + (f" ({about})" if about else "")


def cost_table(comparison: Comparison) -> PageTable:
    """Seconds a sample for memorizing and decoding, by method and data set."""
    rows = []
    for dataset in comparison.tasks:
        for variant, answers in comparison.groups[dataset].items():
            means = answers[["memorize", "decode", "tokens"]].mean()
            per_token = f"{1000 * means['decode'] / means['tokens']:.1f}" if means["tokens"] else NONE
            cells = [f"{means['memorize']:.3f}", f"{means['decode']:.3f}"]
            cells += [f"{means['memorize'] + means['decode']:.3f}", f"{means['tokens']:.1f}", per_token]
            rows.append([variant, comparison.datasets[dataset].label, *cells])
    caption = (
        "Means over samples; a batch's seconds are shared out among its samples. Every method that memorizes "
        "counts the memorizing that all of them share, and decoding counts the prompt's pass, "
        "in its milliseconds a token, too."
    )
    header = ["method", "data", "memorize, s", "decode, s", "sum, s", "tokens of the answer"]
    return PageTable("Seconds a sample", [*header, "decode, ms a token"], rows, caption)


def memory_table(comparison: Comparison) -> PageTable | None:
    """Peak memory by phase and run; ``None`` where no run measured it."""
    peaks = comparison.peak_memory
    rows = []
    for number, own in peaks.iterrows():
        run = comparison.runs[number]
        device = (run.metrics.get("environment") or {}).get("device") or {}
        name = str(device.get("name") or device.get("type") or NONE)
        rows.append([run.label, name, *(NONE if pd.isna(peak) else f"{peak:.2f}" for peak in own)])
    caption = "GiB, the weights included: allocated on a GPU, resident on a CPU."
    return PageTable("Peak memory", ["run", "device", *peaks.columns], rows, caption) if rows else None


def curve_table(comparison: Comparison) -> PageTable | None:
    """What memorizing did to the loss, by data set and system; ``None`` where nothing was memorized."""
    rows = []
    for label, curves in comparison.curves.items():
        first, last = (
            pd.DataFrame([{name: values[end] for name, values in curve.items()} for curve in curves]).median()
            for end in (0, -1)
        )
        steps = max(len(curve["cross_entropy"]) for curve in curves)
        values = [f"{first['cross_entropy']:.3f}", f"{last['cross_entropy']:.3f}", f"{last['kl']:.4f}"]
        rows.append([label, len(curves), steps, *values])
    caption = (
        "Medians over samples, nats a token; each value is from before its step's update, so "
        "that the last update shows in none."
    )
    header = ["data", "samples", "steps", "cross-entropy, first step", "last step", "KL, last step"]
    return PageTable("Memorizing", header, rows, caption) if rows else None
