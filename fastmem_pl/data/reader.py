"""Reading a JSON list or JSON Lines file, with the line of every record for messages."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmem_pl.base.errors import FastMemError, nearest, one_line, unknown
from fastmem_pl.base.outside import as_text, read_bytes
from fastmem_pl.data.tasks import MIXED, OWN_FIELDS, TASKS, ContextSample, FieldError, RawRecord

_DEMO = Path(__file__).parent / "demo"
PACKAGED = {"demo": _DEMO / "conflicts.jsonl", "long": _DEMO / "long.jsonl"}
"""Data files that come with the package, by the name that ``data.path`` takes."""

_SPACE, _IN_LIST = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")


def data_file(name: str | Path) -> Path:
    """The packaged file of that name, or the path itself."""
    return PACKAGED.get(str(name)) or Path(os.path.expanduser(name))


def file_hash(path: Path) -> str:
    """Short hash of a data file, by which a run folder recognizes its data."""
    return hashlib.sha256(read_bytes(path)).hexdigest()[:16]


def read_samples(
    path: str | Path,
    task: str,
    fields: Mapping[str, str] | None = None,
    answer_prefix: str = "",
    limit: int | None = None,
) -> list[ContextSample]:
    """Read the samples of a JSON list or JSON Lines file, at most ``limit``.

    Args:
        task: name of the task, or ``"mixed"`` where every record names its own.
        fields: for the tasks ``qa`` and ``summary``, the file's own names of their fields.

    Raises:
        FastMemError: naming file, line and field of the first record that does not fit.
    """
    if task != MIXED and task not in TASKS:
        raise unknown("data.task", task, [*TASKS, MIXED])
    path = Path(path)
    samples: list[ContextSample] = []
    for line, data in _records(path):
        try:
            record = RawRecord(data, fields)
            name = record.text("task") if task == MIXED else task
            read = TASKS[name].read(record)
            sample_id = record.label("id") if record.has("id") else str(len(samples))
        except (FieldError, FastMemError) as error:
            hint = ""
            # A user's own file may have the field under another name.
            if task in OWN_FIELDS and "is missing" in str(error):
                hint = f"; other names: --data.fields '{{{OWN_FIELDS[task][0]}: your_name}}'"
            raise FastMemError(f"{path}, line {line}: {error}{hint}") from None
        samples.append(
            ContextSample(len(samples), sample_id, name, **vars(read), answer_prefix=answer_prefix)
        )
        if limit is not None and len(samples) >= limit:
            break
    if not samples:
        raise FastMemError(f"data.path: {path} holds no records")
    return samples


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield ``(line, value)`` of every JSON value, in a list or one after another."""
    try:
        text = as_text(read_bytes(path), path)
    except FastMemError as error:
        there = {file.name for file in path.parent.glob("*.json*")} - {path.name}
        hint = f"; give --data.path FILE{nearest(path.name, there)}"
        raise FastMemError(f"data.path: {error}{hint}") from error
    decoder = json.JSONDecoder()

    def mistake(position: int, what: str) -> FastMemError:
        return FastMemError(f"{path}, line {text.count(chr(10), 0, position) + 1}: {what}")

    opening = re.match(r"[ \t\r\n]*(\[?)[ \t\r\n]*", text)
    in_list, position, line, counted = opening[1] == "[", opening.end(), 1, 0
    while position < len(text) and not (in_list and text[position] == "]"):
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            where = f" (found on line {error.lineno})" if error.lineno != line else ""
            raise FastMemError(f"{path}, line {line}: not valid JSON: {error.msg}{where}") from None
        except (ValueError, RecursionError) as error:
            # Numbers of thousands of digits, or lists within lists without end.
            raise FastMemError(f"{path}, line {line}: not valid JSON: {one_line(error)}") from None
        yield line, value
        between = (_IN_LIST if in_list else _SPACE).match(text, position)
        position = between.end()
        if in_list and not between[1] and text[position : position + 1] != "]":
            raise mistake(position, "expected ',' or ']' after a record")
    if in_list and position == len(text):
        raise mistake(position, "the list does not end with ']'")
    if in_list and (end := _SPACE.match(text, position + 1).end()) < len(text):
        raise mistake(end, "there is more after the list's ']'")
