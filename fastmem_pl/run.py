"""The run folder: what is on disk after every batch, and how a killed run goes on.

``config.yaml`` (resolved settings), ``run.json`` (what the results depend on), ``predictions.jsonl``
(one record per sample and method, appended batch by batch), ``metrics.json``, ``memories/``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmem_pl.errors import FastMemError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder go unnoticed there
    fcntl = None

SCHEMA_VERSION = 1
_OWN_FILES = ("predictions.jsonl", "metrics.json", "config.yaml")


class RunFolder:
    """One folder of results. Nothing is written before :meth:`open`.

    Args:
        path: of the folder.
        identity: nested settings that the results depend on; another run's folder is refused.
        methods: names of the methods, one record each per sample; none where nothing is answered.
        optional: dotted names of settings that are compared only where both runs state them.
    """

    def __init__(
        self,
        path: str | Path,
        identity: Mapping[str, Any],
        methods: Sequence[str],
        optional: Collection[str] = (),
    ) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self.methods = list(methods)
        self._optional = optional
        self._lock: Any = None
        self._found: Mapping[str, Any] = {}

    @property
    def predictions_path(self) -> Path:
        """One record per sample and method."""
        return self.path / "predictions.jsonl"

    @property
    def metrics_path(self) -> Path:
        """Aggregated results."""
        return self.path / "metrics.json"

    @property
    def memories_path(self) -> Path:
        """Folder of saved memories."""
        return self.path / "memories"

    def check(self) -> None:
        """Refuse a folder that holds something else; reads only.

        Raises:
            FastMemError: naming the settings that differ.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FastMemError(f"run_dir: {self.path} is a file; give a folder")
        manifest = self.path / "run.json"
        if not manifest.is_file():
            foreign = [name for name in _OWN_FILES if (self.path / name).exists()]
            if foreign:
                raise FastMemError(
                    f"run_dir: {self.path} holds {foreign[0]} but no run.json, so it is not from fastmem; "
                    "give another --run_dir"
                )
            return
        try:
            found = json.loads(manifest.read_text())["identity"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise FastMemError(
                f"run_dir: {manifest} is damaged; remove it or give another --run_dir"
            ) from None
        self._found = found
        different = differences(found, self.identity, self._optional)
        if different:
            raise FastMemError(
                f"run_dir: {self.path} holds results of other settings ({'; '.join(different)}); "
                "give another --run_dir, or the settings of that run to go on with it"
            )

    def open(self, config_text: str) -> None:
        """Create or reopen the folder, take its lock, and repair what a killed run left behind.

        Raises:
            FastMemError: when the folder cannot be written or another process writes to it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.check()
            identity = _merged(self._found, self.identity)
            manifest = {"schema_version": SCHEMA_VERSION, "identity": identity}
            # First, since a folder with any other file but without this one is taken for somebody else's.
            write_atomic(self.path / "run.json", json.dumps(manifest, indent=2) + "\n")
            write_atomic(self.path / "config.yaml", config_text)
            self._repair()
        except OSError as error:
            self.close()
            raise FastMemError(f"run_dir: cannot write {self.path}: {error.strerror}") from error
        except FastMemError:
            self.close()
            raise

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def records(self) -> list[dict[str, Any]]:
        """All records, as they stand in the file."""
        return [json.loads(line) for line in self._lines()]

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the records of a batch; on disk when this returns.

        Raises:
            FastMemError: when the disk is full or gone; what was there before stays.
        """
        text = "".join(_line(record) for record in records)
        try:
            with open(self.predictions_path, "ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FastMemError(
                f"cannot write {self.predictions_path}: {error.strerror}; what was answered before stays, "
                "and the same command goes on from there"
            ) from error

    def sort(self) -> None:
        """Bring the records into the order of the data; batches were formed by length."""
        order = {name: i for i, name in enumerate(self.methods)}
        lines = self._lines()

        def place(line: bytes) -> tuple[int, int]:
            record = json.loads(line)
            return record["index"], order.get(record["method"], len(order))

        ordered = sorted(lines, key=place)
        if ordered != lines:
            write_atomic(self.predictions_path, b"".join(ordered))

    def replace(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write all records anew, at once."""
        write_atomic(self.predictions_path, "".join(_line(record) for record in records))

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json`` at once."""
        write_atomic(self.metrics_path, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")

    def metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``."""
        return json.loads(self.metrics_path.read_text())

    def _lines(self) -> list[bytes]:
        if not self.predictions_path.is_file():
            return []
        return self.predictions_path.read_bytes().splitlines(keepends=True)

    def _repair(self) -> None:
        """Drop a half-written last line and samples that lack one of their methods."""
        lines = self._lines()
        if not lines:
            return
        whole: list[tuple[bytes, dict[str, Any]]] = []
        for number, line in enumerate(lines, 1):
            try:
                whole.append((line, json.loads(line)))
                complete = line.endswith(b"\n")
            except (json.JSONDecodeError, UnicodeDecodeError):
                complete = False
            if not complete and number < len(lines):
                raise FastMemError(
                    f"{self.predictions_path}, line {number}: not a record; "
                    "remove the line or give another --run_dir"
                )
            if not complete and whole and whole[-1][0] is line:
                whole.pop()
        methods: dict[int, set[str]] = {}
        for _, record in whole:
            methods.setdefault(record["index"], set()).add(record["method"])
        kept = [line for line, record in whole if methods[record["index"]] >= set(self.methods)]
        if len(kept) < len(lines):
            write_atomic(self.predictions_path, b"".join(kept))

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise FastMemError(
                f"run_dir: another process is writing to {self.path}; wait for it or give another --run_dir"
            ) from None


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a crash, finds the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], optional: Collection[str]) -> list[str]:
    """List ``name: there X, here Y`` of every setting that differs; a raised limit is no difference."""
    there, here = _flatten(found), _flatten(wanted)
    lines = []
    for name in sorted(there.keys() | here.keys()):
        if name in optional and not (name in there and name in here):
            continue
        old, new = there.get(name), here.get(name)
        grown = name == "data.limit" and old is not None and (new is None or new >= old)
        if old != new and not grown:
            lines.append(f"{name}: there {old!r}, here {new!r}")
    return lines


def _merged(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Wanted settings, and those that only the earlier run stated."""
    merged = {key: dict(value) for key, value in found.items()}
    for key, value in wanted.items():
        merged.setdefault(key, {}).update(value)
    return merged


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
