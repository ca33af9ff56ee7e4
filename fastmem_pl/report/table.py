"""Tables as rows of texts: those of scores are built here, and shown in the terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastmem_pl.metrics import SCORES, Estimate, Paired, find_score, format_p, format_score, lower_is_better

NONE = "–"
EFFORT = ("output_words", "seconds")
_NUMBER = re.compile(r"[<>=~+±−–-]?\s*\d.*|[-–—]?")


@dataclass(frozen=True)
class Cell:
    """A value, a smaller note below it, and whether it is marked as the best of its column."""

    text: str
    note: str = ""
    best: bool = False


@dataclass
class PageTable:
    """A table of cells, or of plain values; the first cell of a row is the row's heading."""

    title: str
    header: list[str]
    rows: Sequence[Iterable[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        self.rows: list[list[Cell]] = [
            [cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows
        ]

    def numeric(self, column: int) -> bool:
        """Whether all cells of a column look like numbers, which are aligned to the right.

        >>> table = PageTable("", ["", "n", "why"], [["a", "71.7% ± 5.9", "gold"]])
        >>> [table.numeric(column) for column in range(3)]
        [False, True, False]
        """
        cells = (row[column].text.strip() for row in self.rows if column < len(row))
        return column > 0 and all(_NUMBER.fullmatch(text) for text in cells)

    @property
    def has_best(self) -> bool:
        """Whether a cell is marked as the best."""
        return any(cell.best for row in self.rows for cell in row)


class Result(NamedTuple):
    """One method's score on one data set; ``total`` counts its answers, with or without the score.

    ``against`` compares with zero-shot on the same samples; ``published`` is the paper's value.
    """

    estimate: Estimate
    against: Paired | None = None
    published: float | None = None
    total: int = 0


def score_table(
    title: str,
    columns: Sequence[tuple[str, str]],
    rows: Mapping[str, Sequence[Result | None]],
) -> PageTable:
    """Build a table of scores: a column per ``(score, heading)``, a row per method."""
    best = [_best(score, [row[i] for row in rows.values()]) for i, (score, _) in enumerate(columns)]
    body = [
        [Cell(name), *(_cell(score, *found) for (score, _), *found in zip(columns, row, best, strict=True))]
        for name, row in rows.items()
    ]
    return PageTable(title, ["method", *(heading for _, heading in columns)], body)


def _best(score: str, results: Iterable[Result | None]) -> float | None:
    """The best value of a column, unless half of its rows or more have it."""
    values = [one.estimate.value for one in results if one and score not in EFFORT]
    best = (min if lower_is_better(score) else max)(values, default=None)
    return best if 2 * values.count(best) < len(values) or len(set(values)) == len(values) > 1 else None


def _cell(score: str, found: Result | None, best: float | None) -> Cell:
    if found is None:
        return Cell(NONE)
    value, against = found.estimate.value, found.against
    notes = [f"n = {found.estimate.n}"] if found.estimate.n < found.total else []
    if against and against.gained + against.lost:
        change = f"+{against.gained} −{against.lost}"
        if against.test != "exact McNemar":
            change = format_score(score, against.difference, sign="+").rstrip("%").replace("-", "−")
        notes.append(f"{change}, {format_p(against.p_value)}")
    if found.published is not None:
        notes.append(f"paper {format_score(score, found.published)}")
    return Cell(format_score(score, value, found.estimate.error), "; ".join(notes), value == best)


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
    """A table for the terminal; ``stacked`` puts the words of headings below each other."""
    shown = Table(title=escape(table.title), title_justify="left")
    for number, name in enumerate(table.header):
        heading = name.replace(": ", ":\n").replace(" ", "\n") if stacked else name
        shown.add_column(escape(heading), justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*map(_rich_cell, row))
    return shown


def _rich_cell(cell: Cell) -> Text:
    text = Text(cell.text, style="bold" if cell.best else "")
    # Narrow columns: the samples in one line, the p-value in the next.
    note = re.sub("[,;] ", "\n", cell.note)
    return text.append(f"\n{note}", style="not bold dim") if note else text


def escaped(text: str) -> str:
    """Text that Markdown leaves as it is, and in its table cell."""
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(text.split()))
    # A sign that something follows might begin HTML.
    return re.sub(r"<(?=\S)", "&lt;", text)


def count_of(number: int, noun: str) -> str:
    """A number with its noun, as ``1,200 samples``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
