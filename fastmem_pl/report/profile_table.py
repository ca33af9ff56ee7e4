"""A profile as a table: where the time of a run went, phase by phase."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.report.table import NONE, PageTable, count_of, rich_table
from fastmem_pl.run.profile import FILE, FOLDER

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


def read_profile(run: Path) -> dict[str, Any]:
    """The profile of a run's last session; empty where there is none.

    Raises:
        FastMemError: for a file of which no table can be made.
    """
    path = run / FOLDER / FILE
    if not path.is_file():
        return {}
    try:
        profile = json.loads(path.read_bytes())
        profile_table(profile)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastMemError(f"{path} is damaged; remove it, or run again with --profile") from error
    return profile


def profile_page_table(profile: Mapping[str, Any]) -> PageTable:
    """The phases of a run, decoding by method where there are several, and the sum.

    Args:
        profile: content of ``profile.json``.
    """
    rows = []
    for phase, numbers in profile["phases"].items():
        rows.append(_row(phase, numbers))
        methods = numbers.get("methods", {})
        if len(methods) > 1:
            rows += [_row(f"{phase}: {method}", own) for method, own in methods.items()]
    wall = profile["wall_seconds"]
    peaks = [numbers.get("peak_memory_gib", 0.0) for numbers in profile["phases"].values()]
    rows.append(_row("all", {"seconds": wall, "share": 1.0, "peak_memory_gib": max(peaks)}))
    caption = "; ".join([_title(profile), *_notes(profile)])
    return PageTable.of("", ["phase", *_COLUMNS], rows, caption)


def profile_table(profile: Mapping[str, Any]) -> Table:
    """The same for the terminal."""
    table = rich_table(replace(profile_page_table(profile), title=_title(profile)), stacked=True)
    table.rows[-1].style = "bold"
    table.caption, table.caption_justify = escape("; ".join(_notes(profile))) or None, "left"
    return table


def _title(profile: Mapping[str, Any]) -> str:
    """What was measured, by what model, and on what."""
    device, settings = profile["environment"]["device"], profile["settings"]
    count = profile["environment"]["processes"]
    return (
        f"profile of {profile['mode']}: {count_of(profile['num_samples'], 'sample')}, "
        f"{settings['model']['backbone']['source']} in {settings['trainer']['precision']} on "
        f"{f'{count} processes, ' if count > 1 else ''}{device['name']}"
        + (f", {count_of(device['threads'], 'thread')}" if device["type"] == "cpu" else "")
    )


def _notes(profile: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of the numbers, and the files that lie beside them."""
    notes = []
    if profile["environment"]["processes"] > 1:
        notes.append("seconds are those of the slowest process, tokens those of all")
    if profile["traced_batches"]:
        count = profile["traced_batches"]
        watched = "batch was" if count == 1 else "batches were"
        notes.append(f"{count} {watched} watched by torch.profiler, which slows them")
    if profile["files"]:
        notes.append(f"beside profile.json: {', '.join(profile['files'])}")
    return notes


def _row(phase: str, numbers: Mapping[str, Any]) -> list[str]:
    return [phase, *(_shown(name, numbers.get(name)) for name in _COLUMNS.values())]


def _shown(name: str, value: float | None) -> str:
    """Counts as they are; of other numbers three digits that count, and all of those before the point."""
    if value is None:
        return NONE
    if name == "share":
        return f"{value:.1%}"
    bounds = () if name in ("calls", "tokens") else ((0.0995, 3), (9.95, 2), (99.5, 1))
    digits = next((digits for bound, digits in bounds if abs(value) < bound), 0)
    return f"{value:,.{digits}f}"
