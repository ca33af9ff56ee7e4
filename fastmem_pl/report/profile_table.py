"""A profile as a table: where the time of a run went, phase by phase."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.run.profile import FILE, FOLDER

_HEADER = (
    *("phase", "seconds", "share", "calls", "first call", "others (median)", "tokens", "tokens/s"),
    *("ms/token", "ms/step", "peak GiB"),
)
_NONE = "–"


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


def profile_rows(profile: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a profile's table: its phases, decoding by method where there are several, the sum.

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
    return list(_HEADER), rows


def profile_table(profile: Mapping[str, Any]) -> Table:
    """The same for the terminal."""
    header, rows = profile_rows(profile)
    table = Table(title=escape(profile_title(profile)), title_justify="left", caption_justify="left")
    for number, name in enumerate(header):
        # Words below each other: eleven columns are many.
        table.add_column(escape(name.replace(" ", "\n", 1)), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row), style="bold" if row is rows[-1] else None)
    notes = profile_notes(profile)
    if notes:
        table.caption = escape("; ".join(notes))
    return table


def profile_title(profile: Mapping[str, Any]) -> str:
    """What was measured, by what model, and on what."""
    device, settings = profile["environment"]["device"], profile["settings"]
    count = profile["environment"]["processes"]
    return (
        f"profile of {profile['mode']}: {_count(profile['num_samples'], 'sample')}, "
        f"{settings['model']['backbone']['source']} in {settings['trainer']['precision']} on "
        f"{f'{count} processes, ' if count > 1 else ''}{device['name']}"
        + (f", {_count(device['threads'], 'thread')}" if device["type"] == "cpu" else "")
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def profile_notes(profile: Mapping[str, Any]) -> list[str]:
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


def _row(name: str, numbers: Mapping[str, Any]) -> list[str]:
    seconds, share = numbers["seconds"], numbers.get("share")
    return [
        name,
        _number(seconds),
        _NONE if share is None else f"{100 * share:.1f}%",
        f"{numbers['calls']:,}" if "calls" in numbers else _NONE,
        _number(numbers.get("first_seconds")),
        _number(numbers.get("median_seconds")),
        f"{numbers['tokens']:,}" if "tokens" in numbers else _NONE,
        _number(numbers.get("tokens_per_second")),
        _number(numbers.get("ms_per_token")),
        _number(numbers.get("ms_per_step")),
        _number(numbers.get("peak_memory_gib")),
    ]


def _number(value: float | None) -> str:
    """Three digits that count; all of those before the point."""
    if value is None:
        return _NONE
    digits = next((d for bound, d in ((0.0995, 3), (9.95, 2), (99.5, 1)) if abs(value) < bound), 0)
    return f"{value:,.{digits}f}"
