"""Tables as rows of texts: those of scores are built here, and shown in the terminal and as Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastmem_pl.metrics import SCORES, Estimate, Paired, count_of, find_score, format_p, format_score

NONE = "–"
EFFORT = ("output_words", "seconds")
# Heading and name of each number of a phase.
_PHASE_COLUMNS = {
    "seconds": "seconds",
    "share": "share",
    "calls": "calls",
    "first call": "first_seconds",
    "others (median)": "median_seconds",
    "tokens": "tokens",
    "tokens/s": "tokens_per_second",
    "ms/token": "ms_per_token",
    "ms/step": "ms_per_step",
    "peak GiB": "peak_memory_gib",
}
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
        """Whether all cells of a column look like numbers, which are aligned to the right."""
        cells = (row[column].text.strip() for row in self.rows if column < len(row))
        return column > 0 and all(_NUMBER.fullmatch(text) for text in cells)


class Result(NamedTuple):
    """One method's score on one data set, beside zero-shot's and the paper's; ``total`` are its answers."""

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
    best = (min if find_score(score).lower_is_better else max)(values, default=None)
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


def phase_table(profile: Mapping[str, Any]) -> PageTable:
    """The phases of a ``profile.json``, decoding by method where there are several, and the sum."""
    phases = {}
    for phase, numbers in profile["phases"].items():
        phases[phase] = numbers
        methods = numbers.get("methods", {})
        if len(methods) > 1:
            phases |= {f"{phase}: {method}": own for method, own in methods.items()}
    peak = max(numbers.get("peak_memory_gib", 0.0) for numbers in profile["phases"].values())
    phases["all"] = {"seconds": profile["wall_seconds"], "share": 1.0, "peak_memory_gib": peak}
    rows = [
        [phase, *(_shown(name, numbers.get(name)) for name in _PHASE_COLUMNS.values())]
        for phase, numbers in phases.items()
    ]
    device, settings = profile["environment"]["device"], profile["settings"]
    processes, traced, notes = profile["environment"]["processes"], profile["traced_batches"], []
    title = (
        f"profile of {profile['mode']}: {count_of(profile['num_samples'], 'sample')}, "
        f"{settings['model']['backbone']['source']} in {settings['trainer']['precision']} on "
        f"{f'{processes} processes, ' if processes > 1 else ''}{device['name']}"
        + (f", {count_of(device['threads'], 'thread')}" if device["type"] == "cpu" else "")
    )
    if processes > 1:
        notes.append("seconds are those of the slowest process, tokens those of all")
    if traced:
        watched = "batch was" if traced == 1 else "batches were"
        notes.append(f"{traced} {watched} watched by torch.profiler, which slows them")
    if profile["files"]:
        notes.append(f"beside profile.json: {', '.join(profile['files'])}")
    return PageTable(title, ["phase", *_PHASE_COLUMNS], rows, "; ".join(notes))


def _shown(name: str, value: float | None) -> str:
    """Counts as they are; of other numbers three digits that count, and all of those before the point."""
    if value is None:
        return NONE
    if name == "share":
        return f"{value:.1%}"
    bounds = () if name in ("calls", "tokens") else ((0.0995, 3), (9.95, 2), (99.5, 1))
    digits = next((digits for bound, digits in bounds if abs(value) < bound), 0)
    return f"{value:,.{digits}f}"


def rich_table(table: PageTable, stacked: bool = False) -> Table:
    """A table for the terminal; ``stacked`` puts the words of headings below each other."""
    shown = Table(title=escape(table.title), title_justify="left")
    for number, name in enumerate(table.header):
        heading = name.replace(": ", ":\n").replace(" ", "\n") if stacked else name
        shown.add_column(escape(heading), justify="left" if number == 0 else "right")
    for row in table.rows:
        cells = [Text(cell.text, style="bold" if cell.best else "") for cell in row]
        for text, note in ((text, cell.note) for text, cell in zip(cells, row, strict=True) if cell.note):
            # Narrow columns: the samples in one line, the p-value in the next.
            text.append("\n" + re.sub("[,;] ", "\n", note), style="not bold dim")
        shown.add_row(*cells)
    return shown


def profile_table(profile: Mapping[str, Any]) -> Table:
    """The same for the terminal."""
    made = phase_table(profile)
    table = rich_table(made, stacked=True)
    table.rows[-1].style = "bold"
    table.caption, table.caption_justify = escape(made.caption) or None, "left"
    return table


def escaped(value: Any) -> str:
    """Text that Markdown leaves as it is, and in its table cell."""
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(str(value).split()))
    # A sign that something follows might begin HTML.
    return re.sub(r"<(?=\S)", "&lt;", text)
