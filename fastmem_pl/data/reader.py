"""Reading a JSON list or JSON Lines file, with the line of every record for messages."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmem_pl.base.errors import FastMemError, nearest, unknown
from fastmem_pl.data.tasks import MIXED, OWN_FIELDS, TASKS, ContextSample, FieldError, RawRecord

_DEMO = Path(__file__).parent / "demo"
PACKAGED = {"demo": _DEMO / "conflicts.jsonl", "long": _DEMO / "long.jsonl"}
"""Data files that come with the package, by the name that ``data.path`` takes."""

_SPACE, _IN_LIST = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")


def data_file(name: str | Path) -> Path:
    """The packaged file of that name, or the path itself."""
    return PACKAGED.get(str(name), Path(name))


def file_hash(path: Path) -> str:
    """Short hash of a data file, by which a run folder recognizes its data."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


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
    if path.is_dir():
        raise FastMemError(f"data.path: {path} is a folder; give a JSON or JSONL file")
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.glob("*.json*")))
        raise FastMemError(f"data.path: no such file: {path}; give --data.path FILE{near}")
    samples: list[ContextSample] = []
    for line, data in _records(path):
        try:
            record = RawRecord(data, fields)
            name = record.text("task") if task == MIXED else task
            read = TASKS[name].read(record)
            sample_id = str(record.value("id")) if record.has("id") else str(len(samples))
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
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastMemError(f"data.path: {path} is not UTF-8 text (byte {error.start})") from None
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
        yield line, value
        between = (_IN_LIST if in_list else _SPACE).match(text, position)
        position = between.end()
        if in_list and not between[1] and text[position : position + 1] != "]":
            raise mistake(position, "expected ',' or ']' after a record")
    if in_list and position == len(text):
        raise mistake(position, "the list does not end with ']'")
    if in_list and (end := _SPACE.match(text, position + 1).end()) < len(text):
        raise mistake(end, "there is more after the list's ']'")
