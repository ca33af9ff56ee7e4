"""The run folder: what is on disk after every batch, and how a killed run goes on.

``config.yaml`` (resolved settings), ``run.json`` (what the results depend on), ``predictions.jsonl``
(one record per sample and method, appended batch by batch), ``metrics.json``, ``memories/``. While
several processes answer, all but the first write to files of their own in ``parts/``.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastmem_pl.claims import remove_claims
from fastmem_pl.errors import FastMemError, RunStoppedError
from fastmem_pl.identity import differences, merged
from fastmem_pl.records import (
    RescueFolder,
    append_records,
    as_line,
    merge_records,
)
from fastmem_pl.targets import create_whole, write_atomic

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder go unnoticed there
    fcntl = None

SCHEMA_VERSION = 1
_LOCK_TRIES = 5
_MANIFEST = "run.json"
# What a process that was killed before it had written the manifest can leave behind.
_BEFORE_MANIFEST = re.compile(r"\.lock|\.ranks|\.fastmem-.+\.partial")
# Named after a process: host, number of the process, random digits.
_PART = re.compile(r".+-\d+-[0-9a-f]{4}\.jsonl")


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
        self._ranks_lock: Any = None
        self._found: Mapping[str, Any] = {}
        self.id = secrets.token_hex(8)
        self._written_to = self.predictions_path
        self._counted: dict[Path, tuple[int, int]] = {}

    @property
    def predictions_path(self) -> Path:
        """One record per sample and method."""
        return self.path / "predictions.jsonl"

    @property
    def parts_path(self) -> Path:
        """Folder of the records that were not merged yet, one file a process."""
        return self.path / "parts"

    @property
    def metrics_path(self) -> Path:
        """Aggregated results."""
        return self.path / "metrics.json"

    @property
    def memories_path(self) -> Path:
        """Folder of saved memories."""
        return self.path / "memories"

    @property
    def claims_path(self) -> Path:
        """Folder of what independent workers have in hand (:mod:`fastmem_pl.claims`)."""
        return self.path / "work"

    @property
    def _manifest_path(self) -> Path:
        return self.path / _MANIFEST

    def check(self) -> None:
        """Refuse a folder that holds something else; reads only.

        Raises:
            FastMemError: naming the settings that differ.
        """
        self._check_ours()
        manifest = self._manifest_path
        if not manifest.is_file():
            return
        try:
            content = json.loads(manifest.read_text())
            found = content["identity"]
        except (ValueError, KeyError, TypeError):
            raise FastMemError(
                f"run_dir: {manifest} is damaged or not from fastmem; give another --run_dir"
            ) from None
        run_id = content.get("id")
        self._found = found
        # It becomes part of a file's name.
        self.id = run_id if isinstance(run_id, str) and re.fullmatch("[0-9a-f]{16}", run_id) else self.id
        different = differences(found, self.identity, self._optional)
        if different:
            raise FastMemError(
                f"run_dir: {self.path} holds results of other settings ({'; '.join(different)}); "
                "give another --run_dir, or the settings of that run to go on with it"
            )

    def _check_ours(self) -> None:
        """Refuse a folder with files in it that no run has made: results would take the place of some.

        Raises:
            FastMemError: naming one of the files.
        """
        try:
            names = {path.name for path in self.path.iterdir()}
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise FastMemError(f"run_dir: {self.path} is a file; give a folder") from None
        except OSError as error:
            raise FastMemError(f"run_dir: cannot read {self.path}: {error.strerror}") from error
        foreign = sorted(name for name in names if not _BEFORE_MANIFEST.fullmatch(name))
        if foreign and _MANIFEST not in names:
            raise FastMemError(
                f"run_dir: {self.path} holds {foreign[0]} but no {_MANIFEST}, so it is not from fastmem; "
                "give another --run_dir"
            )

    def open(self, config_text: str) -> None:
        """Create or reopen the folder, take its lock, and repair what a killed run left behind.

        Raises:
            FastMemError: when the folder cannot be written or another process writes to it.
        """
        with self._opening():
            # Before the lock's file is in the folder.
            self._check_ours()
            self._take_lock(alone=True)
            self.check()
            self._write_settings(config_text)
            self.gather()
            if self._lock is not None:
                # Nobody else is here: what others had in hand, or had not put in its place, is free.
                remove_claims(self.claims_path)
                for partial in self.path.glob(".fastmem-*.partial"):
                    partial.unlink(missing_ok=True)

    def open_shared(self, config_text: str, worker: str) -> None:
        """Create the folder, or join the workers that are in it; records go to this worker's own file.

        Raises:
            FastMemError: when the folder cannot be written, or a process writes to it that shares nothing.
        """
        with self._opening():
            self._check_ours()
            self._share_lock()
            # Of workers that start together, the first to put its manifest there names the run.
            if not self._manifest_path.is_file():
                create_whole(self._manifest_path, self._manifest())
            self.check()
            self._write_settings(config_text)
            self.join(worker)

    def join(self, part: str, run_id: str | None = None) -> None:
        """Write records to a file of this process alone, in a folder that is open already.

        Args:
            part: name of the process, as of ``worker_name``, which no other process has had.
            run_id: of the run, where another process opened the folder.
        """
        if run_id is not None:
            self.id = run_id
            self._ranks_lock = self._locked(".ranks", alone=False)
        self._written_to = self.parts_path / f"{part}.jsonl"

    def close(self) -> None:
        """Give the lock back."""
        for lock in (self._lock, self._ranks_lock):
            if lock is not None:
                lock.close()
        self._lock = self._ranks_lock = None

    def records(self) -> list[dict[str, Any]]:
        """Records of complete samples in the order of the data, those of other processes included."""
        return [record for _, record in merge_records(self._files(), self.methods)]

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the records of a batch; on disk when this returns.

        Raises:
            RunStoppedError: when the disk is full or gone; what was there before stays.
        """
        append_records(self._written_to, records, self._rescue, self._manifest_path)

    def gather(self) -> None:
        """Bring all records together in the order of the data; batches were formed by length.

        Half-written lines, samples that lack one of their methods and repeated records are dropped.

        Raises:
            FastMemError: for a damaged file, or when it cannot be written; nothing is lost then.
        """
        files = self._files()
        content = b"".join(line for line, _ in merge_records(files, self.methods))
        there = self.predictions_path.read_bytes() if self.predictions_path.is_file() else b""
        with self._writing(self.predictions_path):
            if content != there:
                write_atomic(self.predictions_path, content)
            for file in files[1:]:
                file.unlink(missing_ok=True)
            with suppress(OSError):
                self.parts_path.rmdir()
            (self.path / ".ranks").unlink(missing_ok=True)

    def parts(self) -> list[Path]:
        """Files of records that were not merged yet, one a process."""
        return sorted(path for path in self.parts_path.glob("*.jsonl") if _PART.fullmatch(path.name))

    def count_lines(self) -> int:
        """Records so far, by the lines of all files; of the files only what is new is read."""
        for file in (self.predictions_path, *self.parts()):
            offset, count = self._counted.get(file, (0, 0))
            try:
                with open(file, "rb") as opened:
                    opened.seek(offset)
                    content = opened.read()
            except OSError:
                continue
            self._counted[file] = (offset + len(content), count + content.count(b"\n"))
        return sum(count for _, count in self._counted.values())

    def replace(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write all records anew, at once."""
        with self._writing(self.predictions_path):
            write_atomic(self.predictions_path, "".join(map(as_line, records)))

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json`` at once."""
        with self._writing(self.metrics_path):
            write_atomic(self.metrics_path, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")

    def metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``."""
        return json.loads(self.metrics_path.read_text())

    @property
    def _rescue(self) -> RescueFolder:
        return RescueFolder(self.id)

    def _files(self) -> list[Path]:
        """Files that may hold records, the merged one first."""
        return [self.predictions_path, *self.parts(), *self._rescue.files()]

    def _manifest(self) -> str:
        identity = merged(self._found, self.identity)
        content = {"schema_version": SCHEMA_VERSION, "id": self.id, "identity": identity}
        return json.dumps(content, indent=2) + "\n"

    def _write_settings(self, config_text: str) -> None:
        # First, since a folder with any other file but without this one is taken for somebody else's.
        write_atomic(self._manifest_path, self._manifest())
        write_atomic(self.path / "config.yaml", config_text)

    @contextmanager
    def _opening(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            self.close()
            raise FastMemError(f"run_dir: cannot write {self.path}: {error.strerror}") from error
        except FastMemError:
            self.close()
            raise

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunStoppedError(
                f"cannot write {path}: {error.strerror}; what was answered stays, and the same command goes "
                "on from there"
            ) from error

    def _take_lock(self, alone: bool) -> None:
        try:
            self._lock = self._locked(".lock", alone)
            ranks = self.path / ".ranks"
            if alone and ranks.exists() and (held := self._locked(ranks.name, alone=True)) is not None:
                # None of a run whose first process was killed is still at work.
                held.close()
        except BlockingIOError:
            self.close()
            raise FastMemError(
                f"run_dir: another process is writing to {self.path}; wait for it or give another --run_dir "
                "(several processes share one when each has --trainer.elastic true)"
            ) from None

    def _share_lock(self) -> None:
        """Take the lock with other workers; where there are none, claims are of workers that are gone."""
        for _ in range(_LOCK_TRIES):
            with suppress(BlockingIOError):
                self._lock = self._locked(".lock", alone=True)
                if self._lock is not None:
                    remove_claims(self.claims_path)
                    fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            # Another worker may be at this very point, alone for a moment.
            with suppress(BlockingIOError):
                self._lock = self._locked(".lock", alone=False)
                return
            time.sleep(0.1)
        self._take_lock(alone=False)

    def _locked(self, name: str, alone: bool) -> Any:
        """A locked file; ``None`` where the system or the file system has no locks."""
        if fcntl is None:
            return None
        # A network file system wants it open for reading where it is shared, for writing where it is not.
        file = open(self.path / name, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            # Claims do without; a run of its own goes unguarded.
            file.close()
            return None
        return file
