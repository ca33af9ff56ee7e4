"""The table at the end of a run, and samples where methods differ; from the run folder's files only."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastmem_pl.metrics import SCORES, normalize_answer
from fastmem_pl.report.page import Cell, PageTable
from fastmem_pl.run.records import read_records

_COLUMNS = (
    *("accuracy", "contained", "exact_match", "format_failure", "original"),
    *("rouge1", "rouge2", "rougeL", "rougeLsum", "bert_precision", "factkb"),
)
_COMPARED = ("accuracy", "contained")
_LABELS = {"output_words": "words", "seconds": "s/sample"}


def print_run(path: str | Path, console: Console | None = None) -> None:
    """Print table, paired tests, run folder, and three samples where the methods differ."""
    path = Path(path)
    console = console or make_console()
    metrics = json.loads((path / "metrics.json").read_text())
    for group, methods in metrics["groups"].items():
        only = len(metrics["groups"]) == 1
        console.print(method_table(methods, "" if only else f"{group}: "))
    for line in comparison_lines(next(iter(metrics["groups"].values()))):
        console.print(line)
    for line in _notices(metrics):
        console.print(line, style="yellow")
    _print_differences(path / "predictions.jsonl", console)
    console.print(f"\nrun folder: {escape(str(path))}")


def print_comparison(tables: Sequence[PageTable], notices: Sequence[str], console: Console) -> None:
    """Print the tables of a report that compare methods, with what changed below each value."""
    legend = None
    for shown in tables:
        table = Table(title=escape(shown.title), title_justify="left")
        for number, name in enumerate(shown.header):
            # Words below each other, and values in one piece.
            title = escape(name.replace(": ", ":\n").replace(" ", "\n"))
            table.add_column(title, justify="left" if number == 0 else "right", no_wrap=True)
        for row in shown.rows:
            table.add_row(*map(_rich_cell, row))
        console.print(table)
        legend = shown.caption or legend
    if legend:
        console.print(Text(legend, style="dim"))
    for notice in notices:
        console.print(Text(notice, style="yellow"))


def _rich_cell(cell: Cell) -> Text:
    text = Text(cell.text, style="bold" if cell.best else "")
    if cell.note:
        # Narrow columns: the samples in one line, the p-value in the next.
        text.append("\n" + re.sub("[,;] ", "\n", cell.note), style="not bold dim")
    return text


def make_console(width: int = 120) -> Console:
    """A console on standard output; as wide as given where that is a file."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else width, highlight=False)


def method_table(methods: Mapping[str, Any], title: str = "") -> Table:
    """One row a method: value ± standard error."""
    count = max(entry["n"] for entry in methods.values())
    shown = [n for n in _COLUMNS if any(n in e["metrics"] for e in methods.values())]
    shown += list(_LABELS)
    table = Table(
        title=f"{title}{count} sample{'' if count == 1 else 's'}, mean ± standard error", title_justify="left"
    )
    table.add_column("method")
    for name in shown:
        table.add_column(_LABELS.get(name) or SCORES[name].label, justify="right")
    for method, entry in methods.items():
        table.add_row(method, *(_cell(name, entry["metrics"].get(name)) for name in shown))
    return table


def comparison_lines(methods: Mapping[str, Any]) -> list[str]:
    """Gains, losses and p-value of every method against zero-shot; a score is left out where it says the
    same as the one before.
    """
    lines = []
    for method, entry in methods.items():
        shown = None
        for name in _COMPARED:
            test = entry["against_zero_shot"].get(name)
            if test and test != shown:
                shown = test
                p_value = "p < 0.001" if test["p_value"] < 0.001 else f"p = {test['p_value']:.3f}"
                lines.append(
                    f"{method} against zero-shot, {SCORES[name].label}: {test['gained']} samples gained, "
                    f"{test['lost']} lost, {p_value} ({test['test']})"
                )
    return lines


def _cell(name: str, metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    percent = name in SCORES and SCORES[name].percent
    scale, digits = (100, 1) if percent else (1, 2 if name == "seconds" else 1)
    error = metric["standard_error"]
    spread = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * metric['value']:.{digits}f}{'%' if percent else ''}{spread}"


def _notices(metrics: Mapping[str, Any]) -> list[str]:
    methods = next(iter(metrics["groups"].values()))
    lines = []
    answered = max(entry["n"] for entry in methods.values())
    if answered < metrics["num_samples"]:
        lines.append(f"only {answered} of {metrics['num_samples']} samples are answered so far")
    for name, text in (
        ("truncated", "had a context over the limit, which was cut off"),
        ("failed", "could not be memorized and were answered by the base model (see 'status')"),
    ):
        counts = [round(e["metrics"][name]["value"] * e["metrics"][name]["n"]) for e in methods.values()]
        if max(counts):
            lines.append(f"{max(counts)} samples {text}")
    return lines


def _print_differences(path: Path, console: Console, count: int = 3) -> None:
    samples = differing_samples([record for _, record in read_records(path)], count)
    if not samples:
        return
    console.print("\nsamples where the methods differ:")
    for records in samples:
        first = records[0]
        wanted = f"(expected: {', '.join(first['references'])})" if first["references"] else ""
        about = first["question"] or f"sample {first['id']}"
        console.print(f"  [bold]{escape(_line(about))}[/bold]  {escape(_line(wanted, 120))}")
        width = max(len(record["method"]) for record in records)
        for record in records:
            correct = record["scores"].get("contained")
            mark = " " if correct is None else "✓" if correct else "✗"
            console.print(f"    {mark} {record['method']:<{width}}  {escape(_line(record['prediction']))}")


def differing_samples(records: Sequence[Mapping[str, Any]], count: int) -> list[list[Mapping[str, Any]]]:
    """Records of up to ``count`` samples whose methods disagree: first on correctness, then in words."""
    samples: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        samples.setdefault(record["index"], []).append(record)
    by_score = [s for s in samples.values() if len({r["scores"].get("contained") for r in s}) > 1]
    by_text = [
        s
        for s in samples.values()
        if s not in by_score and len({normalize_answer(r["prediction"]) for r in s}) > 1
    ]
    return (by_score + by_text)[:count]


def _line(text: str, limit: int = 90) -> str:
    # What a terminal cannot show must not end the run.
    text = " ".join(text.split()).encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"
