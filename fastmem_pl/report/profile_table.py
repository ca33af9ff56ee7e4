"""A profile as a table: where the time of a run went, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastmem_pl.report.table import NONE, PageTable, count_of, rich_table

# Heading and name of each number of a phase.
_COLUMNS = {
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


def profile_page_table(profile: Mapping[str, Any]) -> PageTable:
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
        [phase, *(_shown(name, numbers.get(name)) for name in _COLUMNS.values())]
        for phase, numbers in phases.items()
    ]
    device, settings = profile["environment"]["device"], profile["settings"]
    processes, traced, notes = len(profile["processes"]), profile["traced_batches"], []
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
    return PageTable(title, ["phase", *_COLUMNS], rows, "; ".join(notes))


def profile_table(profile: Mapping[str, Any]) -> Table:
    """The same for the terminal."""
    made = profile_page_table(profile)
    table = rich_table(made, stacked=True)
    table.rows[-1].style = "bold"
    table.caption, table.caption_justify = escape(made.caption) or None, "left"
    return table


def _shown(name: str, value: float | None) -> str:
    """Counts as they are; of other numbers three digits that count, and all of those before the point."""
    if value is None:
        return NONE
    if name == "share":
        return f"{value:.1%}"
    bounds = () if name in ("calls", "tokens") else ((0.0995, 3), (9.95, 2), (99.5, 1))
    digits = next((digits for bound, digits in bounds if abs(value) < bound), 0)
    return f"{value:,.{digits}f}"
