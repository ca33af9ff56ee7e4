"""The table of a profile."""

import io
import json

import pytest
from rich.console import Console

from fastmem_pl import FastMemError
from fastmem_pl.report.runs import read_profile
from fastmem_pl.report.table import phase_table, profile_table

NUMBERS = {"calls": 2, "first_seconds": 3.0, "median_seconds": 1.0, "samples": 2, "peak_memory_gib": 1.5}


def made(**more):
    methods = {
        "zero-shot": {**NUMBERS, "seconds": 1.0, "tokens": 20, "steps": 20, "ms_per_token": 50.0},
        "mine[/bold]": {**NUMBERS, "seconds": 3.0, "tokens": 20, "steps": 20, "ms_per_token": 150.0},
    }
    return {
        "mode": "fit-predict",
        "wall_seconds": 10.0,
        "num_samples": 2,
        "phases": {
            "trunk": {**NUMBERS, "seconds": 5.0, "share": 0.5, "tokens": 5000, "tokens_per_second": 1000.0},
            "decode": {**NUMBERS, "seconds": 4.0, "share": 0.4, "methods": methods},
            "other": {"seconds": 1.0, "share": 0.1},
        },
        "environment": {"processes": 1, "device": {"type": "cpu", "name": "a [red] chip", "threads": 2}},
        "settings": {"model": {"backbone": {"source": "demo"}}, "trainer": {"precision": "32-true"}},
        "traced_batches": 0,
        "files": [],
        **more,
    }


def shown(profile):
    console = Console(file=io.StringIO(), width=140)
    console.print(profile_table(profile))
    return console.file.getvalue()


def test_rows_are_as_wide_as_the_header_and_end_with_the_sum():
    table = phase_table(made())
    rows = [[cell.text for cell in row] for row in table.rows]
    assert {len(row) for row in rows} == {len(table.header)}
    assert [row[0] for row in rows] == [
        *("trunk", "decode", "decode: zero-shot", "decode: mine[/bold]", "other", "all")
    ]
    assert rows[0][:8] == ["trunk", "5.00", "50.0%", "2", "3.00", "1.00", "5,000", "1,000"]
    assert rows[-1][:3] == ["all", "10.0", "100.0%"]
    assert rows[4][3:] == ["–"] * 8


def test_one_method_has_no_row_of_its_own():
    profile = made()
    del profile["phases"]["decode"]["methods"]["zero-shot"]
    rows = phase_table(profile).rows
    assert [row[0].text for row in rows] == ["trunk", "decode", "other", "all"]


def test_names_are_no_markup():
    text = shown(made(files=["trace-[b].json"], traced_batches=2))
    assert "fit-predict: 2 samples, demo in 32-true on a [red] chip, 2 threads" in text
    assert "mine[/bold]" in text
    assert "trace-[b].json" in text
    assert "2 batches were watched by torch.profiler" in text


def test_several_processes_are_said():
    alone = made()
    several = made(environment={**alone["environment"], "processes": 2})
    assert "slowest process" in shown(several)
    assert "2 processes, a [red] chip" in shown(several)
    assert "process" not in shown(alone)


def places(value, path=()):
    """Where something stands in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_a_profile_is_shown_or_called_damaged(tmp_path):
    """Without anything that it has, and with something else in its place."""
    assert read_profile(tmp_path) == {}
    (tmp_path / "profile").mkdir()
    file, damaged, missing = tmp_path / "profile" / "profile.json", 0, object()
    for place in places(made(files=["trace-0.json"])):
        for value in (missing, None, "x"):
            profile = made(files=["trace-0.json"])
            inner = profile
            for key in place[:-1]:
                inner = inner[key]
            if value is missing:
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            file.write_text(json.dumps(profile))
            try:
                shown(read_profile(tmp_path))
            except FastMemError:
                damaged += 1
    assert damaged > 20
    file.write_text('{"phases": ')
    with pytest.raises(FastMemError, match=r"profile\.json: not valid JSON"):
        read_profile(tmp_path)
