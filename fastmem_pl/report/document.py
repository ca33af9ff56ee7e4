"""A report of run folders: its tables, one HTML page, and the tables as Markdown."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from fastmem_pl.data import TASKS
from fastmem_pl.metrics import Estimate, count_of, estimate, find_score
from fastmem_pl.report.browser import browser_data
from fastmem_pl.report.charts import make_charts
from fastmem_pl.report.collect import Comparison
from fastmem_pl.report.page import render, render_page
from fastmem_pl.report.runs import ReportRun
from fastmem_pl.report.table import EFFORT, NONE, PageTable, Result, phase_table, score_table

# By these a file is known that may be replaced; they stand in page.html and tables.md.
_HTML_MARK = b'<meta name="generator" content="fastmem report">'
_MARKDOWN_MARK = b"<!-- Made by fastmem report. -->"
_LEGEND = (
    "Mean ± standard error, and the change against zero-shot on the same samples (samples gained and lost, "
    "exact McNemar test; of scores that are not 0 or 1 the mean difference, paired bootstrap). The p-values "
    "are not corrected for the number of comparisons. Where the settings are the paper's, its value stands "
    "beside, on its own data."
)
_SETTINGS = ("learning_rate", "steps", "kl_coeff", "num_layers", "alpha", "max_new_tokens", "temperature")


def result_tables(comparison: Comparison) -> list[PageTable]:
    """Method by data set, then all scores of each data set."""
    tables = [overview(comparison)] if len(comparison.datasets) > 1 else []
    tables += [dataset_table(comparison, place) for place in range(len(comparison.datasets))]
    # What the values mean is said once.
    tables[0].caption = _LEGEND
    return tables


def all_tables(comparison: Comparison) -> list[PageTable]:
    """Results, then what they cost."""
    costs = [table(comparison) for table in (_curve_table, _cost_table, _memory_table)]
    tables = [*result_tables(comparison), *costs]
    for run in comparison.runs:
        if run.profile:
            table = phase_table(run.profile)
            table.caption = "; ".join(filter(None, (table.title, table.caption)))
            table.title = f"Profile of {run.label}"
            tables.append(table)
    return [table for table in (*tables, _run_table(comparison.runs)) if table.rows]


def overview(comparison: Comparison) -> PageTable:
    """Method by data set, one score each."""
    places = range(len(comparison.datasets))
    chosen = [(place, score) for place in places if (score := comparison.primary_score(place))]
    columns = [(score, f"{comparison.datasets[i].label}: {find_score(score).label}") for i, score in chosen]
    rows = {
        variant: [comparison.results.get((place, variant, score)) for place, score in chosen]
        for variant in comparison.variants
    }
    return score_table("All data sets", columns, rows)


def dataset_table(comparison: Comparison, place: int) -> PageTable:
    """All scores of one data set, length and seconds of the answers."""
    scores, groups = comparison.scores_of(place), comparison.groups[place]
    dataset = comparison.datasets[place]
    rows = {
        variant: [
            *(comparison.results.get((place, variant, score)) for score in scores),
            Result(estimate(answers["output_words"])),
            Result(Estimate(answers["memorize"].add(answers["decode"]).mean(), None, len(answers))),
        ]
        for variant, answers in groups.items()
    }
    columns = [(name, find_score(name).label) for name in (*scores, *EFFORT)]
    counts = {len(answers) for answers in groups.values()}
    shown = "–".join(str(count) for count in sorted({min(counts), max(counts)}))
    about = f" ({TASKS[dataset.task].description})" if dataset.task in TASKS else ""
    title = f"{dataset.label}: {shown} sample{'' if shown == '1' else 's'}{about}"
    return score_table(title, columns, rows)


def _cost_table(comparison: Comparison) -> PageTable:
    """Seconds a sample for memorizing and decoding, by method and data set."""
    rows = []
    for place in comparison.tasks:
        for variant, answers in comparison.groups[place].items():
            memorize, decode, tokens = answers[["memorize", "decode", "tokens"]].mean()
            seconds = [f"{value:.3f}" for value in (memorize, decode, memorize + decode)]
            per_token = f"{1000 * decode / tokens:.1f}" if tokens else NONE
            rows.append([variant, comparison.datasets[place].label, *seconds, f"{tokens:.1f}", per_token])
    caption = (
        "Means over samples; a batch's seconds are shared out among its samples. Every method that memorizes "
        "counts the memorizing that all of them share, and decoding counts the prompt's pass, "
        "in its milliseconds a token, too."
    )
    header = ["method", "data", "memorize, s", "decode, s", "sum, s", "tokens of the answer"]
    return PageTable("Seconds a sample", [*header, "decode, ms a token"], rows, caption)


def _memory_table(comparison: Comparison) -> PageTable:
    """Peak memory by phase and run; without rows where no run measured it."""
    rows = []
    for number, own in comparison.peak_memory.iterrows():
        run = comparison.runs[number]
        device = (run.metrics.get("environment") or {}).get("device") or {}
        name = device.get("name") or device.get("type") or NONE
        rows.append([run.label, name, *(NONE if pd.isna(peak) else f"{peak:.2f}" for peak in own)])
    caption = "GiB, the weights included: allocated on a GPU, resident on a CPU."
    return PageTable("Peak memory", ["run", "device", *comparison.peak_memory.columns], rows, caption)


def _curve_table(comparison: Comparison) -> PageTable:
    """What memorizing did to the loss, by data set and system; without rows where nothing was memorized."""
    rows = []
    for label, curves in comparison.curves.items():
        ends = [(c["cross_entropy"][0], c["cross_entropy"][-1], c["kl"][-1]) for c in curves]
        first, last, kl = np.median(np.asarray(ends, dtype=np.float64), axis=0)
        steps = max(len(curve["cross_entropy"]) for curve in curves)
        rows.append([label, len(curves), steps, f"{first:.3f}", f"{last:.3f}", f"{kl:.4f}"])
    caption = (
        "Medians over samples, nats a token; each value is from before its step's update, so "
        "that the last update shows in none."
    )
    header = ["data", "samples", "steps", "cross-entropy, first step", "last step", "KL, last step"]
    return PageTable("Memorizing", header, rows, caption)


def _run_table(runs: Sequence[ReportRun]) -> PageTable:
    """The settings of every run."""
    rows = []
    for run in runs:
        about = [run.model, run.identity["data"].get("task", ""), run.answered, run.precision or NONE]
        values = [run.settings.get(name, NONE) for name in _SETTINGS]
        # What was left open is the decoder's own value.
        settings = [
            f"{value:g}" if isinstance(value, (int, float)) else "own" if value is None else value
            for value in values
        ]
        rows.append([run.label, *about, *settings])
    header = ["run", "model", "task", "samples", "precision", *(name.replace("_", " ") for name in _SETTINGS)]
    return PageTable("Runs and settings", header, rows, "All settings: config.yaml in each run folder.")


def notices(comparison: Comparison) -> list[str]:
    """What a reader should know of all runs."""
    return [notice for run in comparison.runs for notice in run.notices]


def html(comparison: Comparison, title: str) -> str:
    """The page; the same folders give the same bytes."""
    runs = comparison.runs
    # Each once, whoever answered about it.
    answered = {(run.data_key, r["task"], r["index"]) for run in runs for r in run.records}
    counts = {"sample": len(answered), "method": comparison.answers["method"].nunique(), "run": len(runs)}
    return render_page(
        title=title,
        subtitle=", ".join(count_of(number, noun) for noun, number in counts.items()),
        facts=_facts(runs),
        notices=notices(comparison),
        tables=all_tables(comparison),
        charts=make_charts(comparison),
        browser=browser_data(comparison),
        footer="Made by fastmem report. FastMem: Zhu et al., Findings of EMNLP 2024, arXiv 2406.16069.",
    )


def markdown(comparison: Comparison, title: str) -> str:
    """The tables as Markdown."""
    facts, tables = _facts(comparison.runs), all_tables(comparison)
    return render("tables.md", title=title, facts=facts, notices=notices(comparison), tables=tables) + "\n"


def is_ours(path: Path) -> bool:
    """Whether a file is a page or tables that :func:`html` or :func:`markdown` made."""
    with suppress(OSError):
        content = path.read_bytes()
        # The last line: tables that somebody put into a text of their own are not ours any more.
        return content.rstrip().endswith(_MARKDOWN_MARK) if path.suffix == ".md" else _HTML_MARK in content
    return False


def _facts(runs: Sequence[ReportRun]) -> list[tuple[str, str]]:
    """What all runs share, in a few lines."""
    environments = [run.metrics.get("environment") or {} for run in runs]
    versions = [e.get("packages") or {} for e in environments]
    packages = ("fastmem-pl", "torch", "transformers")
    facts = {
        "model": [run.model for run in runs],
        "precision": [run.precision for run in runs],
        "device": [str((e.get("device") or {}).get("name", "")) for e in environments],
        "versions": [", ".join(f"{name} {v[name]}" for name in packages if name in v) for v in versions],
    }
    shown = {name: "; ".join(dict.fromkeys(filter(None, values))) for name, values in facts.items()}
    return [(name, value) for name, value in shown.items() if value]
