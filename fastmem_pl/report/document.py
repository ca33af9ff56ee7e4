"""A report of run folders: one HTML page, and its tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmem_pl.report.browser import browser_data
from fastmem_pl.report.charts import make_charts
from fastmem_pl.report.collect import Comparison
from fastmem_pl.report.page import Cell, Page, PageTable, render_page
from fastmem_pl.report.runs import ReportRun
from fastmem_pl.report.table import (
    cost_table,
    curve_table,
    dataset_table,
    memory_table,
    overview,
)

# By these a file is known that may be replaced; the page's stands in page.html.
_HTML_MARK = '<meta name="generator" content="fastmem report">'
_MARKDOWN_MARK = "<!-- Made by fastmem report. -->"
_SETTINGS = ("learning_rate", "steps", "kl_coeff", "num_layers", "alpha", "max_new_tokens", "temperature")


def result_tables(comparison: Comparison) -> list[PageTable]:
    """Method by data set, then all scores of each data set."""
    tables = [overview(comparison), *(dataset_table(comparison, place) for place in comparison.order)]
    first, *others = (table for table in tables if table)
    # What the values mean is said once.
    return [first, *(replace(table, caption="") for table in others)]


def all_tables(comparison: Comparison) -> list[PageTable]:
    """Results, then what they cost."""
    further = [curve_table(comparison), cost_table(comparison), memory_table(comparison)]
    tables = [*result_tables(comparison), *(table for table in further if table)]
    return [*tables, *_profiles(comparison.runs), _run_table(comparison.runs)]


def notices(comparison: Comparison) -> list[str]:
    """What a reader should know of all runs."""
    return [notice for run in comparison.runs for notice in run.notices]


def html(comparison: Comparison, title: str) -> str:
    """The page; the same folders give the same bytes."""
    runs = comparison.runs
    # Each once, whoever answered about it.
    answered = {(run.data_key, r["task"], r["index"]) for run in runs for r in run.records}
    methods = {variant.method for variant in comparison.variants}
    page = Page(
        title=title,
        subtitle=f"{_count(len(answered), 'sample')}, {_count(len(methods), 'method')}, "
        + _count(len(runs), "run"),
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
    blocks = [f"# {_escaped(title)}"]
    blocks += [f"- {_escaped(name)}: {_escaped(value)}" for name, value in _facts(comparison.runs)]
    for notice in notices(comparison):
        blocks.append(f"> {_escaped(notice)}")
    for table in all_tables(comparison):
        blocks += [f"## {_escaped(table.title)}", _markdown_table(table)]
        blocks += [table.caption] if table.caption else []
    blocks.append(_MARKDOWN_MARK)
    return "\n".join(_spaced(blocks)) + "\n"


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


def _spaced(blocks: Sequence[str]) -> Iterator[str]:
    for number, block in enumerate(blocks):
        follows_item = number and block.startswith("- ") and blocks[number - 1].startswith("- ")
        if number and not follows_item:
            yield ""
        yield block


def _markdown_table(table: PageTable) -> str:
    lines = [[_escaped(name) for name in table.header], ["---", *(["---:"] * (len(table.header) - 1))]]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    if cell.best:
        text = f"**{text}**"
    return f"{text} ({_escaped(cell.note)})" if cell.note else text


def _escaped(text: str) -> str:
    """Text that stays text, and in its table cell."""
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(text.split()))
    # A sign that something follows might begin HTML.
    return re.sub(r"<(?=\S)", "&lt;", text)


def _facts(runs: Sequence[ReportRun]) -> list[tuple[str, str]]:
    """What all runs share, in a few lines."""
    environments = [run.metrics.get("environment") or {} for run in runs]
    devices = (str((e.get("device") or {}).get("name", "")) for e in environments)
    versions = (e.get("packages") or {} for e in environments)
    packages = ("fastmem-pl", "torch", "transformers")
    facts = {
        "model": _distinct(run.model for run in runs),
        "precision": _distinct(str(run.identity.get("trainer", {}).get("precision", "")) for run in runs),
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
        settings = run.identity["model"]
        answered = len({record["index"] for record in run.records})
        cells = [run.label, run.model, str(run.identity["data"].get("task", "")), str(answered)]
        cells += [str(run.identity.get("trainer", {}).get("precision", "–"))]
        cells += [_setting(settings.get(name)) for name in _SETTINGS]
        rows.append([Cell(cell) for cell in cells])
    return PageTable("Runs and settings", header, rows, "All settings: config.yaml in each run folder.")


def _setting(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _profiles(runs: Sequence[ReportRun]) -> Iterator[PageTable]:
    """Where the time of profiled runs went."""
    for run in runs:
        if not run.profile:
            continue
        from fastmem_pl.report.profile_table import profile_notes, profile_rows, profile_title

        header, rows = profile_rows(run.profile)
        cells = [[Cell(str(cell)) for cell in row] for row in rows]
        caption = "; ".join([profile_title(run.profile), *profile_notes(run.profile)])
        yield PageTable(f"Profile of {run.label}", list(header), cells, caption)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
