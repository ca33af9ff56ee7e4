"""The run folder: what is on disk after every batch, and how a killed run goes on.

``config.yaml`` (resolved settings), ``run.json`` (what the results depend on), ``predictions.jsonl``
(one record per sample and method, appended batch by batch), ``metrics.json``, ``memories/``. While
several processes answer, all but the first write to files of their own in ``parts/``.
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
from filelock import FileLock, Timeout

from fastmem_pl.base.errors import FastMemError, RunStoppedError
from fastmem_pl.base.files import as_path, cannot_write, is_remote, write_atomic
from fastmem_pl.base.outside import fit, read_json
from fastmem_pl.run.identity import differences
from fastmem_pl.run.records import Record, append_records, as_line, merge_records, rescued

SCHEMA_VERSION = 1


class Manifest(msgspec.Struct):
    """Content of ``run.json``."""

    schema_version: int
    # It becomes part of a file's name.
    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    identity: dict[str, dict[str, Any]]


class _Metrics(msgspec.Struct):
    groups: dict[str, dict[str, dict[str, Any]]]
    num_samples: int
    peak_memory_gib: dict[str, float]


_MANIFEST = "run.json"
# What a process that was killed before it had written the manifest can leave behind.
_BEFORE_MANIFEST = re.compile(r"\.lock|\.fastmem-.+\.partial")
# Named after a process: its rank, and random digits.
_PART = re.compile(r"rank\d+-[0-9a-f]{8,16}\.jsonl")


def read_manifest(run: Path) -> Manifest:
    """Read the ``run.json`` of a run folder; that of a later program is refused."""
    path = run / _MANIFEST
    try:
        found = read_json(path, Manifest)
    except FastMemError as error:
        raise FastMemError(f"{error}; the file is damaged or not from fastmem") from error
    if found.schema_version != SCHEMA_VERSION:
        raise FastMemError(
            f"{path} is of schema {found.schema_version}, and this program reads {SCHEMA_VERSION}: use the "
            "fastmem that wrote it"
        )
    return found


class RunFolder:
    """One folder of results. Nothing is written before :meth:`open`.

    Args:
        path: folder of the run.
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
        self.path = as_path(path)
        self.identity = json.loads(json.dumps(identity))
        self.methods = list(methods)
        self.id = secrets.token_hex(8)
        self.predictions_path = self.path / "predictions.jsonl"
        self.metrics_path = self.path / "metrics.json"
        self.memories_path = self.path / "memories"
        self._manifest_path = self.path / _MANIFEST
        self._parts_path = self.path / "parts"
        self._written_to = self.predictions_path
        self._optional = optional
        self._remote = is_remote(self.path)
        self._lock: FileLock | None = None
        self._found: Mapping[str, Any] = {}
        self._counted: dict[Path, tuple[int, int]] = {}

    def check(self) -> None:
        """Refuse a folder that holds something else; reads only."""
        if _MANIFEST not in self._check_ours():
            return
        try:
            found = read_manifest(self.path)
        except FastMemError as error:
            raise FastMemError(f"run_dir: {error}; give another --run_dir") from error
        self._found, self.id = found.identity, found.id
        if different := differences(found.identity, self.identity, self._optional):
            raise FastMemError(
                f"run_dir: {self.path} holds results of other settings ({'; '.join(different)}); "
                "give another --run_dir, or the settings of that run to go on with it"
            )

    def _check_ours(self) -> set[str]:
        """Refuse a folder with files in it that no run has made: results would take the place of some.

        Returns the names of what is in it.
        """
        try:
            names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        except NotADirectoryError:
            raise FastMemError(f"run_dir: {self.path} is a file; give a folder") from None
        except OSError as error:
            raise FastMemError(f"run_dir: cannot read {self.path}: {error.strerror or error}") from error
        foreign = sorted(name for name in names if not _BEFORE_MANIFEST.fullmatch(name))
        if foreign and _MANIFEST not in names:
            raise FastMemError(
                f"run_dir: {self.path} holds {foreign[0]} but no {_MANIFEST}, so it is not from fastmem; "
                "give another --run_dir"
            )
        return names

    def open(self, config_text: str) -> None:
        """Create or reopen the folder, take its lock, and repair what a killed run left behind."""
        try:
            # Before the lock's file is in the folder.
            self._check_ours()
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.check()
            # What cannot be gone on with is left as it is.
            self.records()
            # First, since a folder with any other file but without this one is taken for somebody else's.
            write_atomic(self._manifest_path, self._manifest())
            write_atomic(self.path / "config.yaml", config_text)
            self.merge_parts()
            for folder in (self.path, self.memories_path):
                for partial in folder.glob(".fastmem-*.partial"):
                    partial.unlink(missing_ok=True)
        except FastMemError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise cannot_write("run_dir: ", self.path, error) from error

    @property
    def known_fingerprint(self) -> str | None:
        """That of the model which the run was begun with; ``None`` before anything was answered."""
        return self._found.get("model", {}).get("fingerprint")

    def confirm(self, fingerprint: str) -> None:
        """Note the fingerprint of the model that answers, where it is known late; refuse another run's."""
        self.identity["model"]["fingerprint"] = fingerprint
        self.check()
        self._write(self._manifest_path, self._manifest())

    def join(self, rank: int, run_id: str) -> None:
        """Write records to a file of this process alone, in a folder that the first process has opened."""
        self.id = run_id
        self._written_to = self._parts_path / f"rank{rank}-{secrets.token_hex(4)}.jsonl"

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def records(self) -> list[Record]:
        """Records of complete samples in the order of the data, those of other processes included."""
        return [record for _, record in merge_records(self._files(), self.methods)]

    def append(self, records: Sequence[Record]) -> None:
        """Add the records of a batch; on disk when this returns."""
        path = self._parts_path / f"rank0-{secrets.token_hex(8)}.jsonl" if self._remote else self._written_to
        append_records(path, records, self.id, self._manifest_path)

    def merge_parts(self) -> None:
        """Bring all records together in the order of the data; batches were formed by length.

        Half-written lines, samples that lack one of their methods and repeated records are dropped.
        """
        files = self._files()
        content = b"".join(line for line, _ in merge_records(files, self.methods))
        there = self.predictions_path.read_bytes() if self.predictions_path.is_file() else b""
        self._write(self.predictions_path, None if content == there else content, files[1:])
        if not self._remote:
            # Stores have no folders; universal-pathlib would remove what is in one.
            with suppress(OSError):
                self._parts_path.rmdir()

    def count_lines(self) -> int:
        """Records so far, by the lines of all files; of the files only what is new is read."""
        for file in self._files():
            offset, count = self._counted.get(file, (0, 0))
            with suppress(OSError), file.open("rb") as opened:
                opened.seek(offset)
                content = opened.read()
                self._counted[file] = (offset + len(content), count + content.count(b"\n"))
        return sum(count for _, count in self._counted.values())

    def replace(self, records: Sequence[Record]) -> None:
        """Write all records anew, at once."""
        self._write(self.predictions_path, "".join(map(as_line, records)))

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json`` at once."""
        self._write(self.metrics_path, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")

    def metrics(self) -> dict[str, Any]:
        """Content of ``metrics.json``; empty where there is none."""
        if not self.metrics_path.exists():
            return {}
        metrics = read_json(self.metrics_path, dict[str, Any])
        fit(metrics, _Metrics, self.metrics_path)
        return metrics

    def _files(self) -> list[Path]:
        """Files that may hold records, the merged one first."""
        parts = sorted(path for path in self._parts_path.glob("*.jsonl") if _PART.fullmatch(path.name))
        return [self.predictions_path, *parts, *rescued(self.id)]

    def _manifest(self) -> str:
        # Settings that only the earlier session stated stay.
        identity = {key: dict(value) for key, value in self._found.items()}
        for key, value in self.identity.items():
            identity.setdefault(key, {}).update(value)
        content = {"schema_version": SCHEMA_VERSION, "id": self.id, "identity": identity}
        return json.dumps(content, indent=2) + "\n"

    def _write(self, path: Path, content: str | bytes | None, merged: Sequence[Path] = ()) -> None:
        """Write a file anew, if there is ``content``, and remove those that were ``merged`` into it."""
        try:
            if content is not None:
                write_atomic(path, content)
            for file in merged:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise RunStoppedError(
                f"cannot write {path}: {error.strerror or error}; what was answered stays, and the same "
                "command goes on from there"
            ) from error

    def _take_lock(self) -> None:
        if self._remote:
            # Stores have no locks.
            return
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise FastMemError(
                f"run_dir: another process is writing to {self.path}; wait for it or give another --run_dir"
            ) from None
        except NotImplementedError:
            # A file system without locks: two processes in one folder go unnoticed there.
            return
        self._lock = lock
