"""Results in the terminal: the tables of a run or a comparison, and samples where methods differ."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from fastmem_pl.base.errors import shown
from fastmem_pl.base.files import as_path
from fastmem_pl.metrics import find_score, format_p, normalize_answer
from fastmem_pl.report.runs import notices_of
from fastmem_pl.report.table import PageTable, method_table, rich_table
from fastmem_pl.run.records import Record, read_records


def print_run(path: str | Path, console: Console | None = None) -> None:
    """Print table, paired tests, run folder, and three samples where the methods differ."""
    path, console = as_path(path), console or make_console()
    metrics = json.loads((path / "metrics.json").read_text())
    groups = metrics["groups"]
    for group, methods in groups.items():
        console.print(rich_table(method_table(methods, group if len(groups) > 1 else "")))
    # Changes against zero-shot; a score is left out where it says the same as the one before.
    for method, entry in next(iter(groups.values())).items():
        shown = None
        for name in ("accuracy", "contained"):
            test = entry["against_zero_shot"].get(name)
            if test and test != shown:
                shown = test
                console.print(
                    f"{method} against zero-shot, {find_score(name).label}: {test['gained']} samples gained, "
                    f"{test['lost']} lost, {format_p(test['p_value'])} ({test['test']})"
                )
    records = [record for _, record in read_records(path / "predictions.jsonl")]
    for line in notices_of(records, metrics["num_samples"]):
        console.print(line, style="yellow")
    _print_differences(records, console)
    console.print(f"\nrun folder: {escape(str(path))}")


def print_comparison(tables: Sequence[PageTable], notices: Sequence[str], console: Console) -> None:
    """Print the tables of a report that compare methods, with what changed below each value."""
    for table in tables:
        shown = rich_table(table, stacked=True)
        for column in shown.columns:
            column.no_wrap = True
        console.print(shown)
    console.print(Text(tables[0].caption, style="dim"))
    for notice in notices:
        console.print(Text(notice, style="yellow"))


class _Console(Console):
    """Shows what comes from data without what a terminal would act on."""

    def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
        for part in super().render(*args, **kwargs):
            yield part if part.control else Segment(shown(part.text), part.style)


def make_console(width: int = 120) -> Console:
    """A console on standard output; as wide as given where that is a file."""
    return _Console(file=sys.stdout, width=None if sys.stdout.isatty() else width, highlight=False)


def _print_differences(records: Sequence[Record], console: Console) -> None:
    """Print three samples whose methods disagree: first on correctness, then in words."""
    samples: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        samples[record["index"]].append(record)
    by_score = [s for s in samples.values() if len({r["scores"].get("contained") for r in s}) > 1]
    by_text = [s for s in samples.values() if len({normalize_answer(r["prediction"]) for r in s}) > 1]
    shown = (by_score + [sample for sample in by_text if sample not in by_score])[:3]
    if shown:
        console.print("\nsamples where the methods differ:")
    for answers in shown:
        first = answers[0]
        wanted = f"(expected: {', '.join(first['references'])})" if first["references"] else ""
        about = _line(first["question"] or f"sample {first['id']}")
        console.print(f"  [bold]{escape(about)}[/bold]  {escape(_line(wanted, 120))}")
        width = max(len(record["method"]) for record in answers)
        for record in answers:
            correct = record["scores"].get("contained")
            mark = " " if correct is None else "✓" if correct else "✗"
            console.print(f"    {mark} {record['method']:<{width}}  {escape(_line(record['prediction']))}")


def _line(text: str, limit: int = 90) -> str:
    text = shown(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"
