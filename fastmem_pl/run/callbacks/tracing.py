"""A look at a few batches with torch.profiler, and at the memory that they allocate on a GPU."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity

from fastmem_pl.base.files import write_whole
from fastmem_pl.run.profile import Profiler

log = logging.getLogger(__name__)

# A batch takes millions of operators, and torch.profiler keeps all of them until it is written.
_MOST_BATCHES = 3
# Allocations and frees, the last ones.
_HISTORY = 200_000
# What stands at the end of every trace: its own name.
_END_BYTES = 8192


class BatchTracer(Callback):
    """Writes a trace of the operators of up to three batches, a history of the allocator, or both.

    Of more than two batches the first is left out, in which kernels are compiled. What cannot be written is
    said in one line, and the run goes on.

    Args:
        profiler: says what is asked for, and is told what was written.
        folder: to write to.
        name: of this process, as part of the names of the files.
        device: that the batches run on.
    """

    def __init__(self, profiler: Profiler, folder: Path, name: str, device: torch.device) -> None:
        self._profiler, self._folder, self._name, self._device = profiler, folder, name, device
        self._history = "memory" in profiler.kinds and device.type == "cuda"
        self._trace: torch.profiler.profile | None = None
        self._first = self._seen = 0
        self._running, self._done = False, not (self._history or "trace" in profiler.kinds)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the first batch by how many there are."""
        self._first = 1 if sum(trainer.num_predict_batches) > 2 else 0

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Begin, if it is time."""
        if self._done or self._running or batch_idx < self._first:
            return
        self._running = True
        with pl_module.meter.detail("trace"):
            if self._history:
                torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
            if "trace" in self._profiler.kinds:
                self._start()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count, and write after the last batch."""
        if self._running:
            self._seen += 1
            # The history of the allocator alone has no profiler running, nor has a trace that did not start.
            self._profiler.traced_batches += self._trace is not None
            if self._seen == _MOST_BATCHES:
                self._finish(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what there is."""
        if self._running:
            self._finish(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop; the history of a batch that had no room is what tells why."""
        if not self._running:
            return
        self._running, self._done = False, True
        if self._trace is not None:
            self._trace.stop()
            self._trace = None
        self._end_history()

    def _start(self) -> None:
        # Kineto tells of every start on standard error.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        trace = torch.profiler.profile(activities=activities)
        try:
            trace.start()
            self._trace = trace
        except RuntimeError as error:
            # Such as another profiler, which a program of the user's runs.
            log.warning("profile: no trace: %s", " ".join(str(error).split())[:200])

    def _finish(self, module: Any) -> None:
        self._running, self._done = False, True
        with module.meter.detail("trace"):
            trace, self._trace = self._trace, None
            if trace is not None:
                trace.stop()
                self._write(f"trace-{self._name}.json", lambda path: _export(trace, path))
            self._end_history()

    def _end_history(self) -> None:
        if self._history:
            # Written, never read here: what reads it is https://docs.pytorch.org/memory_viz.
            self._write(
                f"memory-{self._name}.pickle", lambda path: torch.cuda.memory._dump_snapshot(str(path))
            )
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str, write: Any) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            write_whole(self._folder / name, write)
        except OSError as error:
            log.warning(
                "profile: cannot write %s: %s; the run goes on without it",
                *(self._folder / name, error.strerror or error),
            )
        else:
            self._profiler.files.append(name)


def _export(trace: torch.profiler.profile, path: Path) -> None:
    """Write a trace.

    Raises:
        OSError: when it cannot be written in full, which torch does not tell.
    """
    trace.export_chrome_trace(str(path))
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        if b'"traceName"' not in file.read():
            raise OSError(f"it ends after {size / 1e6:.0f} MB; the disk may be full")
