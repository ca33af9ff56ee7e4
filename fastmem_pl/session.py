"""One session of a run: what is left of it, the loop over that, and the results at the end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from fastmem_pl.callbacks import ALL, MetricAggregation, PredictionWriter
from fastmem_pl.data import FastMemDataModule
from fastmem_pl.memory import MemoryFolder, usable_bytes
from fastmem_pl.module import FastMemModule, Mode
from fastmem_pl.provenance import describe_run
from fastmem_pl.run import SCHEMA_VERSION, RunFolder
from fastmem_pl.scoring import score_records

if TYPE_CHECKING:
    from fastmem_pl.trainer import FastMemTrainer

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a run leaves.

    Attributes:
        path: the run folder.
        mode: the command.
        num_samples: samples of the data.
        metrics: content of ``metrics.json``; empty after ``fit``, which answers nothing.
        num_failed: after ``fit``, memories whose loss was not finite.
        num_new: samples that were not done before this session.
        added_scores: those of metric models that came in this session.
    """

    path: Path
    mode: Mode
    num_samples: int
    metrics: dict[str, Any] = field(default_factory=dict)
    num_failed: int = 0
    num_new: int = 0
    added_scores: list[str] = field(default_factory=list)


class Session:
    """What the processes of a run do from opening its folder to its metrics.

    Args:
        trainer: whose loop runs.
        run: the folder, open.
        mode: the command.
        model: with the backbone loaded.
        datamodule: the samples.
        start: of the session, by :func:`time.perf_counter`.
    """

    def __init__(
        self,
        trainer: FastMemTrainer,
        run: RunFolder,
        mode: Mode,
        model: FastMemModule,
        datamodule: FastMemDataModule,
        start: float,
    ) -> None:
        self.trainer, self.run, self.mode = trainer, run, mode
        self.model, self.datamodule = model, datamodule
        self._start, self._processes = start, trainer.processes
        # Processes that hold one model together do the same work, and one of them writes it.
        self._together = model.hparams.tp_plan is not None
        self._wanted = {sample.index for sample in datamodule.samples}
        self._memories = MemoryFolder(run.memories_path)

    def work(self) -> RunResult:
        """Do all that is left, and the metrics."""
        processes, data = self._processes, self.datamodule
        done = processes.first(self.begin)
        data.skip(done)
        new = len(data.remaining)
        # Of several processes, the first feeds it with the records of all at the end.
        aggregation = MetricAggregation() if processes.count == 1 and self.mode != "fit" else None
        if new and done and self.mode != "fit" and processes.rank == 0:
            log.warning(
                "going on in %s: %d of %d samples are done", self.run.path, len(done), len(self._wanted)
            )
        if new and aggregation:
            aggregation.feed([r for r in self.run.records() if r["index"] in done])
        batches = self.plan()
        try:
            # One bar shows what all do.
            with self.trainer.counted_progress(self.count_done if processes.count > 1 else None):
                processes.each(lambda: self.loop(batches, [aggregation] if aggregation else []))
        finally:
            self.model.graphs.clear()
        peaks = _highest(processes.gather(self.model.meter.peak_gib()))
        fed = aggregation if new else None
        return processes.first(lambda: self.finish(new, peaks, processes.count, fed))

    def begin(self) -> set[int]:
        """Make room for results; returns the indices of samples that are done."""
        self.prepare()
        done = self.done()
        if self.mode != "fit" and self._wanted - done:
            # Those of an earlier session would be stale, should this one be killed.
            self.run.metrics_path.unlink(missing_ok=True)
        return done

    def prepare(self) -> None:
        """Make the folder that memories go to."""
        if self.mode == "fit":
            self._memories.path.mkdir(exist_ok=True)

    def done(self) -> set[int]:
        """Indices of the samples that are done, here or by another process."""
        if self.mode == "fit":
            return set(self._memories.headers(sorted(self._wanted)))
        return {record["index"] for record in self.run.records()} & self._wanted

    def count_done(self) -> int:
        """Samples that are done, at a glance at the files."""
        if self.mode == "fit":
            return sum(1 for _ in self._memories.path.glob("*.safetensors"))
        return self.run.count_lines() // max(1, len(self.run.methods))

    def plan(self) -> list[list[int]]:
        """Batches of the remaining samples, the same in every process."""
        model, data, processes = self.model, self.datamodule, self._processes
        if not data.remaining:
            return []
        device = model.backbone.device
        # Processes on a CPU have one memory, those with a GPU one each.
        sharing = processes.on_this_node if device.type == "cpu" else 1
        budget = min(processes.gather(usable_bytes(device) / sharing))
        shards = 1 if self._together else processes.count
        limits = model.room.limits(
            model.longest_answer,
            data.batch_size,
            data.max_batch_tokens,
            math.ceil(len(data.remaining) / shards),
            budget,
        )
        return processes.first(lambda: data.plan(model.context_lengths(data.remaining), limits))

    def loop(self, batches: Sequence[Sequence[int]], callbacks: Sequence[Callback] = ()) -> None:
        """Run Lightning's predict loop over the batches of a plan."""
        if not batches:
            return
        self.datamodule.use_plan(batches, whole=self._together)
        together = self._processes if self._together else None
        writer = [] if self.mode == "fit" else [PredictionWriter(self.run, together)]
        self.trainer.run_loop(self.model, self.datamodule, [*callbacks, *writer])

    def finish(
        self, new: int, peaks: dict[str, float], processes: int, fed: MetricAggregation | None = None
    ) -> RunResult:
        """Merge what all processes answered, and write the metrics.

        Args:
            new: samples that this session did.
            peaks: peak GiB by phase.
            processes: that took part.
            fed: aggregation of all records; made anew where there is none.
        """
        run, data, total = self.run, self.datamodule, len(self._wanted)
        run.gather()
        if self.mode == "fit":
            headers = self._memories.headers(sorted(self._wanted))
            failed = sum(header["status"] != "ok" for header in headers.values())
            return RunResult(run.path, "fit", total, num_failed=failed, num_new=new)
        added = score_records(run, self.model, data)
        records = [record for record in run.records() if record["index"] in self._wanted]
        written = run.metrics_path.is_file()
        grown = bool(added) or (written and _lacks_scores(run.metrics(), records))
        if not (new or grown or not written):
            return RunResult(run.path, self.mode, total, run.metrics())
        if fed is None or grown:
            fed = MetricAggregation()
            fed.feed(records)
        metrics = {
            "schema_version": SCHEMA_VERSION,
            "groups": fed.compute(),
            **describe_run(self.model, run, peaks, processes),
            "num_samples": total,
            "seconds_of_last_session": round(time.perf_counter() - self._start, 2),
        }
        if not new and written:
            # Only scores came: what was measured while answering stays.
            metrics = {**run.metrics(), "groups": metrics["groups"]}
        run.write_metrics(metrics)
        return RunResult(run.path, self.mode, total, metrics, num_new=new, added_scores=added)


def _highest(peaks: Collection[dict[str, float]]) -> dict[str, float]:
    """The highest of all processes, by phase."""
    phases = {phase for own in peaks for phase in own}
    return {phase: max(own.get(phase, 0.0) for own in peaks) for phase in sorted(phases)}


def _lacks_scores(metrics: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    """Whether records hold scores that the metrics do not: a session was killed between the two."""
    methods = metrics["groups"][ALL]
    return any(record["scores"].keys() - methods[record["method"]]["metrics"].keys() for record in records)
