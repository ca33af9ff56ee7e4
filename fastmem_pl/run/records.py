"""Files of records, one JSON object a line: appending, repairing, and merging those of several processes."""

import codecs
import io
import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fastmem_pl.base.errors import FastMemError, RunStoppedError
from fastmem_pl.base.files import is_remote, to_bytes, write_atomic
from fastmem_pl.base.hub import cache_dir
from fastmem_pl.base.outside import fit, parse_json, read_bytes

Record = dict[str, Any]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Seconds(msgspec.Struct):
    memorize: float
    decode: float


class _Curve(msgspec.Struct):
    cross_entropy: list[float | None]
    kl: list[float | None]


class _Answer(msgspec.Struct):
    """What is read of a record, as :meth:`fastmem_pl.run.predict.FastMemModule.record` makes it."""

    index: _Count
    id: str
    task: str
    method: str
    question: str
    prediction: str
    references: list[str]
    scores: dict[str, float]
    output_words: _Count
    seconds: _Seconds
    n_truncated_tokens: _Count
    status: str
    n_context_tokens: _Count = 0
    token_ids: list[int] = []
    curve: _Curve | None = None
    point: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, [*self.scores.values(), self.seconds.memorize, self.seconds.decode])):
            raise ValueError("a number of it is not finite")
        # That of a memory that failed ends in what is no number.
        if self.curve and self.status == "ok":
            losses, distances = self.curve.cross_entropy, self.curve.kl
            numbers = [math.nan if number is None else number for number in (*losses, *distances)]
            if len(losses) != len(distances) or not all(map(math.isfinite, numbers)):
                raise ValueError("its curve has gaps")


def read_records(path: Path) -> list[tuple[bytes, Record]]:
    """Whole lines of a file with what they say; a half-written last line is left out."""
    content = read_bytes(path).removeprefix(codecs.BOM_UTF8) if path.exists() else b""
    found = []
    for number, line in enumerate(io.BytesIO(content), 1):
        if not line.endswith(b"\n"):
            break
        name = f"{path}, line {number}: not a record"
        try:
            record = parse_json(line, name)
            fit(record, _Answer, name)
        except FastMemError as error:
            raise FastMemError(f"{error}; remove the line or give another --run_dir") from error
        found.append((line, record))
    return found


def merge_records(paths: Iterable[Path], methods: Sequence[str]) -> list[tuple[bytes, Record]]:
    """Records of several files in the order of the data, each once, of complete samples only.

    Of repeated records the first counts. A complete sample has been answered by all ``methods``; with none,
    records are complete by another rule.
    """
    found: dict[tuple[int, str, str], tuple[bytes, Record]] = {}
    for path in paths:
        for line, record in read_records(path):
            # Records of a search have a point beside the method.
            key = record["index"], record["method"], json.dumps(record.get("point"), sort_keys=True)
            found.setdefault(key, (line, record))
    answered: dict[int, set[str]] = {}
    for _, record in found.values():
        answered.setdefault(record["index"], set()).add(record["method"])
    complete = {index for index, names in answered.items() if names >= set(methods)}
    order = {name: i for i, name in enumerate(methods)}
    kept = [item for item in found.values() if item[1]["index"] in complete]
    return sorted(kept, key=lambda item: (item[1]["index"], order.get(item[1]["method"], len(order))))


def as_line(record: Mapping[str, Any]) -> str:
    """A record as a line of a file."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def append_records(path: Path, records: Sequence[Mapping[str, Any]], run_id: str, witness: Path) -> None:
    """Add the records of a batch to a file, a new one where that is a URL's; on disk when this returns.

    Without the ``witness``, a file of the same folder, the folder is another one: its file system is not
    mounted any more. What it has no room for is kept under the ``run_id``.
    """
    content = to_bytes("".join(map(as_line, records)))
    size = None
    try:
        witness.stat()
        path.parent.mkdir(exist_ok=True)
        if is_remote(path):
            write_atomic(path, content)
            return
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
        kept = _rescue(content, run_id)
        where = f"the batch in work is kept in {kept}" if kept else "the batch in work is lost"
        raise RunStoppedError(
            f"cannot write {path}: {error.strerror or error}; what was answered before stays, {where}, and "
            "the same command goes on from there"
        ) from error


def rescued(run_id: str) -> list[Path]:
    """Files of records that a run folder had no room for."""
    folder = _rescue_folder()
    return [] if folder is None else sorted(folder.glob(f"{run_id}-*.jsonl"))


def _rescue(content: bytes, run_id: str) -> Path | None:
    """Keep records for when the run goes on on this machine; ``None`` where there is no room either."""
    folder = _rescue_folder()
    if folder is None:
        return None
    path = folder / f"{run_id}-{secrets.token_hex(8)}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError:
        return None
    return path


def _rescue_folder() -> Path | None:
    try:
        # In the user's own cache, not in a folder for all, where others could leave answers.
        return cache_dir() / "rescued"
    except RuntimeError:
        # A container whose user has no home.
        return None
