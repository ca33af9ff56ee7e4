"""Tables as rows of texts: those of scores are built here, and shown in the terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastmem_pl.metrics import SCORES, Estimate, Paired, find_score, format_p, format_score, lower_is_better

NONE = "–"
EFFORT = ("output_words", "seconds")
_NUMBER = re.compile(r"[<>=~+±−–-]?\s*\d.*|[-–—]?")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: its value.
        note: a second, smaller line.
        best: mark it as the best of its column.
    """

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table; the first cell of a row is the row's heading."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    caption: str = ""

    @classmethod
    def of(
        cls, title: str, header: Sequence[str], rows: Iterable[Iterable[Any]], caption: str = ""
    ) -> PageTable:
        """Make a table of plain values."""
        return cls(title, list(header), [[Cell(str(value)) for value in row] for row in rows], caption)

    def numeric(self, column: int) -> bool:
        """Whether all cells of a column look like numbers, which are aligned to the right.

        >>> table = PageTable.of("", ["", "n", "why"], [["a", "71.7% ± 5.9", "gold"]])
        >>> [table.numeric(column) for column in range(3)]
        [False, True, False]
        """
        cells = (row[column].text.strip() for row in self.rows if column < len(row))
        return column > 0 and all(_NUMBER.fullmatch(text) for text in cells)

    @property
    def has_best(self) -> bool:
        """Whether a cell is marked as the best."""
        return any(cell.best for row in self.rows for cell in row)


@dataclass(frozen=True)
class Result:
    """One method's score on one data set.

    Attributes:
        estimate: mean over the samples that have the score.
        against: comparison with zero-shot on the same samples; ``None`` for zero-shot itself, or without it.
        published: the paper's value, where settings are the paper's.
        total: samples that the method answered; where the score is of fewer, the cell says of how many.
    """

    estimate: Estimate
    against: Paired | None = None
    published: float | None = None
    total: int = 0


def score_table(
    title: str,
    columns: Sequence[tuple[str, str]],
    rows: Mapping[str, Sequence[Result | None]],
    caption: str = "",
) -> PageTable:
    """Build a table of scores, one row per method.

    Args:
        title: heading.
        columns: score and heading of each column.
        rows: results by name of the method, one per column, ``None`` where there is none.
        caption: what the values mean.
    """
    best = [_best(score, [row[i] for row in rows.values()]) for i, (score, _) in enumerate(columns)]
    body = [
        [Cell(name), *(_cell(score, *found) for (score, _), *found in zip(columns, row, best, strict=True))]
        for name, row in rows.items()
    ]
    return PageTable(title, ["method", *(heading for _, heading in columns)], body, caption)


def _best(score: str, results: Iterable[Result | None]) -> float | None:
    """The best value of a column, unless half of its rows or more have it."""
    values = [one.estimate.value for one in results if one and score not in EFFORT]
    best = (min if lower_is_better(score) else max)(values, default=None)
    return best if 2 * values.count(best) < len(values) or len(set(values)) == len(values) > 1 else None


def _cell(score: str, found: Result | None, best: float | None) -> Cell:
    if found is None:
        return Cell(NONE)
    notes = [f"n = {found.estimate.n}"] if found.estimate.n < found.total else []
    if found.against and found.against.gained + found.against.lost:
        notes.append(_change(score, found.against))
    if found.published is not None:
        notes.append(f"paper {format_score(score, found.published)}")
    text = format_score(score, found.estimate.value, found.estimate.error)
    return Cell(text, "; ".join(notes), found.estimate.value == best)


def _change(score: str, against: Paired) -> str:
    """``+11 −1, p = 0.006`` or ``+1.2, p = 0.300``."""
    if against.test == "exact McNemar":
        change = f"+{against.gained} −{against.lost}"
    else:
        change = format_score(score, against.difference, sign="+").rstrip("%").replace("-", "−")
    return f"{change}, {format_p(against.p_value)}"


def method_table(methods: Mapping[str, Any], group: str = "") -> PageTable:
    """Value ± standard error of one group of ``metrics.json``, one row per method."""
    found = {method: entry["metrics"] for method, entry in methods.items()}
    # F1 stands in reports only, for the table to fit in a terminal.
    names = [name for name in SCORES if name != "f1" and any(name in metrics for metrics in found.values())]
    names += EFFORT
    count = max(entry["n"] for entry in methods.values())
    rows = {
        method: [
            Result(Estimate(one["value"], one["standard_error"], one["n"])) if one else None
            for one in map(metrics.get, names)
        ]
        for method, metrics in found.items()
    }
    title = f"{f'{group}: ' if group else ''}{count_of(count, 'sample')}, mean ± standard error"
    return score_table(title, [(name, find_score(name).label) for name in names], rows)


def rich_table(table: PageTable, stacked: bool = False) -> Table:
    """A table for the terminal.

    Args:
        table: to show.
        stacked: put the words of headings below each other, for tables of many columns.
    """
    shown = Table(title=escape(table.title), title_justify="left")
    for number, name in enumerate(table.header):
        heading = name.replace(": ", ":\n").replace(" ", "\n") if stacked else name
        shown.add_column(escape(heading), justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*map(_rich_cell, row))
    return shown


def _rich_cell(cell: Cell) -> Text:
    text = Text(cell.text, style="bold" if cell.best else "")
    if cell.note:
        # Narrow columns: the samples in one line, the p-value in the next.
        text.append("\n" + re.sub("[,;] ", "\n", cell.note), style="not bold dim")
    return text


def markdown_table(table: PageTable) -> str:
    """A table as Markdown; the best cells are bold, notes stand in parentheses."""
    lines = [[escaped(name) for name in table.header], ["---", *(["---:"] * (len(table.header) - 1))]]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text)
    return f"{text} ({escaped(cell.note)})" if cell.note else text


def escaped(text: str) -> str:
    """Text that Markdown leaves as it is, and in its table cell."""
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(text.split()))
    # A sign that something follows might begin HTML.
    return re.sub(r"<(?=\S)", "&lt;", text)


def count_of(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count_of(1, "sample"), count_of(1200, "sample")
    ('1 sample', '1,200 samples')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
