"""Work that independent processes share through a folder: each takes the next part that nobody has.

Only what a network file system does atomically is used, and no clocks of two machines are compared. A
part's claims are numbered files; whoever creates the next one has the part. A claim lives while its file's
time changes, which its owner sees to; one that has not changed for long enough, by the clock of the worker
who looks, is stale, and the next number may be claimed.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastmem_pl.targets import create_whole

log = logging.getLogger(__name__)

# Signs of life in the time after which a claim is stale.
_SIGNS = 6
_NAME = re.compile(r"(?P<part>.+)\.(?P<number>\d+)\.(?P<kind>claim|free)|(?P<done>.+)\.done")
# What workers agree on, and files that were being written when a worker was killed.
_FURTHER = re.compile(r"first_worker|session|num_samples|chunk_samples|\.fastmem-.+\.partial")


def remove_claims(path: Path) -> None:
    """Delete the files of claims in a folder, and the folder if it held nothing else."""
    with suppress(OSError):
        for name in os.listdir(path):
            if _NAME.fullmatch(name) or _FURTHER.fullmatch(name):
                (path / name).unlink(missing_ok=True)
        path.rmdir()


@dataclass
class _Part:
    """What the folder says of one part."""

    number: int = 0
    free: bool = True
    done: bool = False


@dataclass
class ClaimFolder:
    """The parts of a work that are claimed, given back or done.

    Args:
        path: of the folder, shared by all workers.
        worker: name of this one, shown to the others.
        stale_after: seconds without a sign of life until a claim may be taken over. On a network file system
            signs arrive late, by up to a minute.
    """

    path: Path
    worker: str
    stale_after: float = 300.0
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict, init=False)

    def open(self) -> None:
        """Make the folder.

        Raises:
            OSError: when it cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Remove the folder at once: all of the work is done."""
        # Emptied in its place, it would show parts as free to those who look meanwhile.
        aside = self.path.with_name(f".{self.path.name}-{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
        remove_claims(aside)
        if aside.exists():
            # It holds files that are not ours.
            with suppress(OSError):
                aside.rename(self.path)

    def agree(self, name: str, value: str) -> str:
        """A value that all workers use: that of the first who says it."""
        create_whole(self.path / name, value)
        return (self.path / name).read_text()

    @contextmanager
    def taken(self, parts: Sequence[str]) -> Iterator[tuple[str, bool] | None]:
        """Hold the first part that is free or whose claim is stale, and give signs of life meanwhile.

        It is given back at the end, if it is not done by then.

        Yields:
            the part, and whether somebody had it before; ``None`` when there is none at present.
        """
        found = self._claim(parts)
        if found is None:
            yield None
            return
        part, number = found
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.stale_after / _SIGNS):
                # One may be missed; and the folder goes when others have done all of the work.
                with suppress(OSError):
                    os.utime(self._file(part, number, "claim"))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield part, number > 1
        finally:
            stop.set()
            thread.join()
            with suppress(OSError):
                if not (self.path / f"{part}.done").exists():
                    self._give_back(part, number)

    def _claim(self, parts: Sequence[str]) -> tuple[str, int] | None:
        """Claim a part; returns it with the claim's number."""
        state = self._state()
        for part in parts:
            known = state.get(part, _Part())
            if known.done or not (known.free or self._is_stale(part, known.number)):
                continue
            if create_whole(self._file(part, known.number + 1, "claim"), self.worker + "\n"):
                if not known.free:
                    log.warning("took over %s: its worker gave no sign of life", part)
                return part, known.number + 1
        return None

    def finish(self, part: str) -> None:
        """Note that a part is done."""
        create_whole(self.path / f"{part}.done", self.worker + "\n")

    def reopen(self, parts: Sequence[str]) -> None:
        """Let parts that were done be claimed again."""
        for part in parts:
            self._give_back(part, self._state()[part].number)
            (self.path / f"{part}.done").unlink(missing_ok=True)

    def left(self, parts: Sequence[str]) -> dict[str, str]:
        """Parts that are not done, with the worker who has each (an empty string where nobody does)."""
        state = self._state()
        found = {}
        for part in parts:
            known = state.get(part, _Part())
            if not known.done:
                found[part] = "" if known.free else self._owner(part, known.number)
        return found

    def _give_back(self, part: str, number: int) -> None:
        # Renaming needs no room, which a full disk has not.
        self._file(part, number, "claim").rename(self._file(part, number, "free"))

    def _state(self) -> dict[str, _Part]:
        state: dict[str, _Part] = {}
        for name in sorted(os.listdir(self.path)):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            part = state.setdefault(match["part"] or match["done"], _Part())
            if match["done"]:
                part.done = True
            elif int(match["number"]) > part.number:
                part.number, part.free = int(match["number"]), match["kind"] == "free"
            elif int(match["number"]) == part.number and match["kind"] == "free":
                part.free = True
        return state

    def _is_stale(self, part: str, number: int) -> bool:
        """Whether a claim's file has not changed for long enough since this worker first saw it so."""
        key = f"{part}.{number}"
        try:
            changed = os.stat(self._file(part, number, "claim")).st_mtime_ns
        except OSError:
            return False
        now = time.monotonic()
        if key not in self._seen or self._seen[key][0] != changed:
            self._seen[key] = (changed, now)
        return now - self._seen[key][1] >= self.stale_after

    def _owner(self, part: str, number: int) -> str:
        with suppress(OSError):
            return self._file(part, number, "claim").read_text().strip()
        return ""

    def _file(self, part: str, number: int, kind: str) -> Path:
        return self.path / f"{part}.{number:04d}.{kind}"
