"""Files of records, one JSON object a line: appending, repairing, and merging those of several processes."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastmem_pl.base.errors import FastMemError, RunStoppedError
from fastmem_pl.base.files import to_bytes, write_atomic
from fastmem_pl.base.hub import cache_dir

Record = dict[str, Any]


def split_lines(content: bytes) -> list[bytes]:
    """Lines with their ends: of JSON Lines, only ``\\n`` ends one."""
    return io.BytesIO(content).readlines()


def read_records(path: Path) -> list[tuple[bytes, Record]]:
    """Whole lines of a file with what they say; a half-written last line is left out.

    Raises:
        FastMemError: for a line before the last that is no record.
    """
    try:
        lines = split_lines(path.read_bytes())
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            whole = line.endswith(b"\n") and _names_itself(record)
        except (json.JSONDecodeError, UnicodeDecodeError):
            whole = False
        if whole:
            found.append((line, record))
        elif number < len(lines):
            raise FastMemError(
                f"{path}, line {number}: not a record; remove the line or give another --run_dir"
            )
    return found


def _names_itself(record: Any) -> bool:
    """Whether it says which sample it is of, and by which method."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("index"), int)
        and isinstance(record.get("method"), str)
    )


def merge_records(paths: Iterable[Path], methods: Sequence[str]) -> list[tuple[bytes, Record]]:
    """Records of several files in the order of the data, each once, of complete samples only.

    Args:
        paths: where the same sample may have been answered twice, the first of them counts.
        methods: that a complete sample has been answered by; none where records are complete by
            another rule.

    Raises:
        FastMemError: as :func:`read_records`.
    """
    found: dict[tuple[int, str, str], tuple[bytes, Record]] = {}
    for path in paths:
        for line, record in read_records(path):
            found.setdefault(_key(record), (line, record))
    complete = complete_samples((record for _, record in found.values()), methods)
    order = {name: i for i, name in enumerate(methods)}
    kept = [item for item in found.values() if item[1]["index"] in complete]
    return sorted(kept, key=lambda item: (item[1]["index"], order.get(item[1]["method"], len(order))))


def _key(record: Mapping[str, Any]) -> tuple[int, str, str]:
    # Records of a search have a point beside the method.
    return record["index"], record["method"], json.dumps(record.get("point"), sort_keys=True)


def complete_samples(records: Iterable[Mapping[str, Any]], methods: Collection[str]) -> set[int]:
    """Indices of the samples that were answered by all methods."""
    answered: dict[int, set[str]] = {}
    for record in records:
        answered.setdefault(record["index"], set()).add(record["method"])
    return {index for index, names in answered.items() if names >= set(methods)}


def as_line(record: Mapping[str, Any]) -> str:
    """A record as a line of a file."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def append_records(
    path: Path, records: Sequence[Mapping[str, Any]], rescue: RescueFolder, witness: Path
) -> None:
    """Add the records of a batch; on disk when this returns.

    Args:
        path: of the file.
        records: to add.
        rescue: takes them when the file cannot.
        witness: file of the same folder: without it, the folder is another one (of a file system that is not
            mounted any more).

    Raises:
        RunStoppedError: when the disk is full or gone; what was there before stays, and these records are in
            the rescue folder.
    """
    content = to_bytes("".join(map(as_line, records)))
    size = None
    try:
        witness.stat()
        path.parent.mkdir(exist_ok=True)
        with open(path, "ab") as file:
            size = file.tell()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if size is not None:
            # A line cut off in the middle would be in the way of the next.
            with suppress(OSError):
                os.truncate(path, size)
        kept = rescue.keep(content)
        where = f"the batch in work is kept in {kept}" if kept else "the batch in work is lost"
        raise RunStoppedError(
            f"cannot write {path}: {error.strerror}; what was answered before stays, {where}, and the same "
            "command goes on from there"
        ) from error


class RescueFolder:
    """Keeps what a run folder had no room for, until the run goes on on this machine.

    Args:
        run_id: of the run: another one in a folder of the same name has nothing to do with it.
    """

    def __init__(self, run_id: str) -> None:
        self._name = run_id
        try:
            # In the user's own cache, not in a folder for all, where others could leave answers.
            self._path: Path | None = cache_dir() / "rescued"
        except RuntimeError:
            # A container whose user has no home.
            self._path = None

    def keep(self, content: bytes) -> Path | None:
        """Write lines to a new file; ``None`` where there is no room either."""
        if self._path is None:
            return None
        path = self._path / f"{self._name}-{secrets.token_hex(8)}.jsonl"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        except OSError:
            return None
        return path

    def files(self) -> list[Path]:
        """What is kept for this run."""
        return [] if self._path is None else sorted(self._path.glob(f"{self._name}-*.jsonl"))
