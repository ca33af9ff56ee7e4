"""A report of run folders: one HTML page, and its tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmem_pl.report.browser import browser_data
from fastmem_pl.report.charts import make_charts
from fastmem_pl.report.collect import Comparison
from fastmem_pl.report.page import Page, render_page
from fastmem_pl.report.profile_table import profile_page_table
from fastmem_pl.report.results import cost_table, curve_table, dataset_table, memory_table, overview
from fastmem_pl.report.runs import ReportRun
from fastmem_pl.report.table import NONE, PageTable, count_of, escaped, markdown_table

# By these a file is known that may be replaced; the page's stands in page.html.
_HTML_MARK = '<meta name="generator" content="fastmem report">'
_MARKDOWN_MARK = "<!-- Made by fastmem report. -->"
_SETTINGS = ("learning_rate", "steps", "kl_coeff", "num_layers", "alpha", "max_new_tokens", "temperature")


def result_tables(comparison: Comparison) -> list[PageTable]:
    """Method by data set, then all scores of each data set."""
    tables = [overview(comparison), *(dataset_table(comparison, place) for place in range(len(comparison.datasets)))]
    first, *others = (table for table in tables if table)
    # What the values mean is said once.
    return [first, *(replace(table, caption="") for table in others)]


def all_tables(comparison: Comparison) -> list[PageTable]:
    """Results, then what they cost."""
    further = [curve_table(comparison), cost_table(comparison), memory_table(comparison)]
    tables = [*result_tables(comparison), *(table for table in further if table)]
    profiles = [
        replace(profile_page_table(run.profile), title=f"Profile of {run.label}")
        for run in comparison.runs
        if run.profile
    ]
    return [*tables, *profiles, _run_table(comparison.runs)]


def notices(comparison: Comparison) -> list[str]:
    """What a reader should know of all runs."""
    return [notice for run in comparison.runs for notice in run.notices]


def html(comparison: Comparison, title: str) -> str:
    """The page; the same folders give the same bytes."""
    runs = comparison.runs
    # Each once, whoever answered about it.
    answered = {(run.data_key, r["task"], r["index"]) for run in runs for r in run.records}
    methods = comparison.answers["method"].unique()
    page = Page(
        title=title,
        subtitle=f"{count_of(len(answered), 'sample')}, {count_of(len(methods), 'method')}, "
        + count_of(len(runs), "run"),
        facts=_facts(runs),
        notices=notices(comparison),
        tables=all_tables(comparison),
        charts=make_charts(comparison),
        browser=browser_data(comparison),
        footer="Made by fastmem report. FastMem: Zhu et al., Findings of EMNLP 2024, arXiv 2406.16069.",
    )
    return render_page(page)


def markdown(comparison: Comparison, title: str) -> str:
    """The tables as Markdown."""
    facts = [f"- {escaped(name)}: {escaped(value)}" for name, value in _facts(comparison.runs)]
    blocks = [f"# {escaped(title)}", "\n".join(facts), *(f"> {escaped(one)}" for one in notices(comparison))]
    for table in all_tables(comparison):
        blocks += [f"## {escaped(table.title)}", markdown_table(table), table.caption]
    return "\n\n".join(filter(None, [*blocks, _MARKDOWN_MARK])) + "\n"


def is_ours(path: Path) -> bool:
    """Whether a file is a page or tables that :func:`html` or :func:`markdown` made."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if path.suffix == ".md":
        # The last line: tables that somebody put into a text of their own are not ours any more.
        return content.rstrip().endswith(_MARKDOWN_MARK.encode())
    return _HTML_MARK.encode() in content


def _facts(runs: Sequence[ReportRun]) -> list[tuple[str, str]]:
    """What all runs share, in a few lines."""
    environments = [run.metrics.get("environment") or {} for run in runs]
    devices = (str((e.get("device") or {}).get("name", "")) for e in environments)
    versions = (e.get("packages") or {} for e in environments)
    packages = ("fastmem-pl", "torch", "transformers")
    facts = {
        "model": _distinct(run.model for run in runs),
        "precision": _distinct(run.precision for run in runs),
        "device": _distinct(devices),
        "versions": _distinct(", ".join(f"{n} {v[n]}" for n in packages if n in v) for v in versions),
    }
    return [(name, value) for name, value in facts.items() if value]


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value))


def _run_table(runs: Sequence[ReportRun]) -> PageTable:
    """The settings of every run."""
    header = ["run", "model", "task", "samples", "precision", *(name.replace("_", " ") for name in _SETTINGS)]
    rows = []
    for run in runs:
        cells = [
            run.label,
            run.model,
            run.identity["data"].get("task", ""),
            run.answered,
            run.precision or NONE,
        ]
        rows.append([*cells, *(_setting(run.settings.get(name)) for name in _SETTINGS)])
    return PageTable("Runs and settings", header, rows, "All settings: config.yaml in each run folder.")


def _setting(value: Any) -> str:
    return NONE if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)
