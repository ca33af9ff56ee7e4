"""Results in the terminal: the tables of a run or a comparison, and samples where methods differ."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from fastmem_pl.metrics import format_p, normalize_answer, score_label
from fastmem_pl.report.table import PageTable, method_table, rich_table

_COMPARED = ("accuracy", "contained")


def print_run(path: str | Path, console: Console | None = None) -> None:
    """Print table, paired tests, run folder, and three samples where the methods differ."""
    path = Path(path)
    console = console or make_console()
    metrics = json.loads((path / "metrics.json").read_text())
    groups = metrics["groups"]
    for group, methods in groups.items():
        console.print(rich_table(method_table(methods, group if len(groups) > 1 else "")))
    methods = next(iter(groups.values()))
    for line in comparison_lines(methods):
        console.print(line)
    for line in _notices(methods, metrics["num_samples"]):
        console.print(line, style="yellow")
    _print_differences(path / "predictions.jsonl", console)
    console.print(f"\nrun folder: {escape(str(path))}")


def print_comparison(tables: Sequence[PageTable], notices: Sequence[str], console: Console) -> None:
    """Print the tables of a report that compare methods, with what changed below each value."""
    legend = None
    for table in tables:
        shown = rich_table(table, stacked=True)
        for column in shown.columns:
            column.no_wrap = True
        console.print(shown)
        legend = table.caption or legend
    if legend:
        console.print(Text(legend, style="dim"))
    for notice in notices:
        console.print(Text(notice, style="yellow"))


def make_console(width: int = 120) -> Console:
    """A console on standard output; as wide as given where that is a file."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else width, highlight=False)


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
                lines.append(
                    f"{method} against zero-shot, {score_label(name)}: {test['gained']} samples gained, "
                    f"{test['lost']} lost, {format_p(test['p_value'])} ({test['test']})"
                )
    return lines


def _notices(methods: Mapping[str, Any], total: int) -> list[str]:
    lines = []
    answered = max(entry["n"] for entry in methods.values())
    if answered < total:
        lines.append(f"only {answered} of {total} samples are answered so far")
    for name, text in (
        ("truncated", "had a context over the limit, which was cut off"),
        ("failed", "could not be memorized and were answered by the base model (see 'status')"),
    ):
        counts = [round(e["metrics"][name]["value"] * e["metrics"][name]["n"]) for e in methods.values()]
        if max(counts):
            lines.append(f"{max(counts)} samples {text}")
    return lines


def _print_differences(path: Path, console: Console, count: int = 3) -> None:
    samples = differing_samples([json.loads(line) for line in path.read_bytes().splitlines()], count)
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
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
