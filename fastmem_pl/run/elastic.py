"""Processes that come and go: each takes the next samples of a shared run folder that nobody has."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from functools import cache
from typing import TYPE_CHECKING

from fastmem_pl.base.errors import FastMemError, RunStoppedError
from fastmem_pl.run.claims import ClaimFolder

if TYPE_CHECKING:
    from fastmem_pl.run.session import RunResult, Session

log = logging.getLogger(__name__)

# The last part of a run: merging the records, and the metrics.
_FINISH = "finish"
_LONGEST_POLL = 5.0


def worker_name() -> str:
    """What tells this process from all others that work in a folder."""
    return f"{socket.gethostname()}-{os.getpid()}-{_name_of(os.getpid())}"


@cache
def _name_of(pid: int) -> str:
    # Containers have processes of the same number.
    return secrets.token_hex(2)


class ElasticWorker:
    """Does chunks of a run beside other workers, until all of it is done.

    A chunk is a range of the data. Its results are kept batch by batch, so that whoever takes over a chunk
    goes on where its worker was lost. The worker that finds all chunks done merges the records.

    Args:
        session: of the run, whose folder is open for sharing.
        chunk_samples: samples of a chunk; what the first worker says holds for all.
        stale_after: seconds without a sign of life after which a chunk goes to another worker.

    Attributes:
        session_id: what the workers that share out the same claims have in common.
    """

    def __init__(self, session: Session, chunk_samples: int, stale_after: float) -> None:
        self._session, self._data = session, session.datamodule
        self._claims = ClaimFolder(session.run.claims_path, worker_name(), stale_after)
        self._chunk_samples, self._stale_after = chunk_samples, stale_after
        self.session_id = secrets.token_hex(8)
        self._chunks: dict[str, list[int]] = {}
        self._done: set[int] = set()
        self._new = 0

    def work(self) -> RunResult:
        """Work until the run is done, by this process or by others.

        Raises:
            FastMemError: when other workers have more or fewer samples.
            RunStoppedError: when the folder is gone before the run is done.
        """
        session = self._session
        try:
            if self._is_finished():
                return self._finished()
            self._begin()
            while (result := self._share()) is None:
                pass
            return result
        except (OSError, RunStoppedError) as error:
            # The folder of claims goes when another worker has finished the run.
            if not self._claims.path.is_dir() and self._is_finished():
                return self._finished()
            if getattr(error, "filename", None) is None or not self._concerns_claims(error):
                raise
            raise RunStoppedError(
                f"cannot work in {self._claims.path}: {error.strerror}; what was answered is kept, and the "
                "same command goes on from there"
            ) from error
        finally:
            session.model.graphs.clear()

    def _begin(self) -> None:
        claims, samples = self._claims, self._data.samples
        claims.open()
        if claims.agree("first_worker", claims.worker) == claims.worker:
            # Nobody else is here who could have written metrics.
            self._session.begin()
        self._session.prepare()
        self._done = self._session.done()
        # The first worker does not tell sessions apart: a program may have several.
        self.session_id = claims.agree("session", self.session_id)
        count = claims.agree("num_samples", str(len(samples)))
        if count != str(len(samples)):
            raise FastMemError(
                f"data.limit: {len(samples)} samples here, {count} where {self._session.run.path} is being "
                "worked on; give the same, or wait for the end of that run (if none of its processes is "
                "left, remove its folder work/)"
            )
        size = int(claims.agree("chunk_samples", str(self._chunk_samples)))
        if size != self._chunk_samples:
            log.warning("trainer.chunk_samples: %d, as the first worker of this run said", size)
        for sample in samples:
            first = sample.index - sample.index % size
            self._chunks.setdefault(f"{first:07d}", []).append(sample.index)

    def _share(self) -> RunResult | None:
        """Do chunks until all are done, then finish the run; ``None`` when there are chunks to do again."""
        with self._session.trainer.counted_progress(self._session.count_done):
            while left := self._claims.left(list(self._chunks)):
                with self._claims.taken(list(left)) as taken:
                    if taken is not None:
                        self._do(*taken)
                if taken is None:
                    self._wait(left)
        return self._finish()

    def _do(self, chunk: str, had_before: bool) -> None:
        if had_before:
            self._done |= self._session.done()
        mine = set(self._chunks[chunk]) - self._done
        self._data.skip({sample.index for sample in self._data.samples} - mine)
        self._session.loop(self._session.plan())
        self._claims.finish(chunk)
        self._done |= mine
        self._new += len(mine)

    def _wait(self, left: dict[str, str]) -> None:
        """Wait for chunks that others have, or until one of their claims is stale."""
        others = sorted(set(left.values()) - {""})
        if others:
            log.info("waiting for %d chunk(s) of %s", len(left), ", ".join(others))
        time.sleep(min(_LONGEST_POLL, self._stale_after / 10))

    def _finish(self) -> RunResult | None:
        session, claims = self._session, self._claims
        while True:
            with claims.taken([_FINISH]) as taken:
                if taken is not None:
                    if claims.left(list(self._chunks)):
                        return None
                    missing = {sample.index for sample in self._data.samples} - session.done()
                    lost = [name for name, chunk in self._chunks.items() if missing & set(chunk)]
                    if lost:
                        log.warning("%d answers are gone from %s: again", len(missing), session.run.path)
                        self._done -= missing
                        claims.reopen(lost)
                        return None
                    peaks, workers = session.model.meter.peak_gib(), len(session.run.parts())
                    result = session.finish(self._new, peaks, max(1, workers), others=True)
                    # The folder's absence says that the run is done: no other mark can be left behind.
                    claims.close()
                    return result
            self._wait(claims.left([_FINISH]))

    def _is_finished(self) -> bool:
        session = self._session
        if self._claims.path.is_dir() or len(session.done()) < len(self._data.samples):
            return False
        return session.mode == "fit" or session.run.metrics_path.is_file()

    def _finished(self) -> RunResult:
        result = self._session.finish(0, {}, 1)
        result.num_new = self._new
        return result

    def _concerns_claims(self, error: OSError) -> bool:
        return str(error.filename).startswith(str(self._claims.path))
