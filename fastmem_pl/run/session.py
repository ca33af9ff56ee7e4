"""One session of a run: what is left of it, the loop over that, and the results at the end."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from fastmem_pl.data import FastMemDataModule
from fastmem_pl.memory import MemoryFolder, usable_bytes
from fastmem_pl.run.callbacks import ALL, BatchTracer, MetricAggregation, PredictionWriter, RunLogging
from fastmem_pl.run.elastic import worker_name
from fastmem_pl.run.folder import SCHEMA_VERSION, RunFolder
from fastmem_pl.run.loggers import RunLog
from fastmem_pl.run.predict import FastMemModule, Mode
from fastmem_pl.run.profile import SCHEMA_VERSION as PROFILE_VERSION
from fastmem_pl.run.profile import has_earlier_profile, merge, profile_path, write_profile
from fastmem_pl.run.provenance import describe_run, environment
from fastmem_pl.run.scoring import score_records

if TYPE_CHECKING:
    from fastmem_pl.run.trainer import FastMemTrainer

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
        profile: where the time went (:mod:`fastmem_pl.run.profile`), where that was asked for.
    """

    path: Path
    mode: Mode
    num_samples: int
    metrics: dict[str, Any] = field(default_factory=dict)
    num_failed: int = 0
    num_new: int = 0
    added_scores: list[str] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)


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
        self._together = model.loading.tp_plan is not None
        self._wanted = {sample.index for sample in datamodule.samples}
        self._memories = MemoryFolder(run.memories_path)
        config = trainer.config_text or trainer.resolved_config(model, datamodule, run.path)
        self.log = RunLog(trainer.chosen_loggers, run.path, config)
        self._tracing = self._tracers()

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
        if new:
            processes.first(lambda: self.take_up(done, aggregation))
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

    def take_up(self, done: Collection[int], aggregation: MetricAggregation | None) -> None:
        """Begin the log and the metrics with what earlier sessions did."""
        if not (aggregation or self.trainer.chosen_loggers):
            return
        records = self._results(done)
        if aggregation:
            aggregation.feed(records)
        self.tell(records)

    def tell(self, records: Sequence[Mapping[str, Any]], groups: Mapping[str, Any] | None = None) -> None:
        """Log samples and, with ``groups``, the final metrics; what the log has of them is left out."""
        self.log.add(records)
        self.trainer.loggers = self.log.loggers
        if groups is not None:
            self.log.finish(groups)

    def _results(self, indices: Collection[int]) -> list[dict[str, Any]]:
        """What is on disk of samples: records of their answers or, under ``fit``, their curves."""
        if self.mode == "fit":
            return _curves(self._memories.headers(sorted(indices)))
        return [record for record in self.run.records() if record["index"] in indices]

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
        loggers = [RunLogging(self.log)] if self.log.is_open else []
        others = [*callbacks, *writer, *loggers]
        self.trainer.run_loop(self.model, self.datamodule, [*self._tracing, *others])

    def finish(
        self,
        new: int,
        peaks: dict[str, float],
        processes: int,
        fed: MetricAggregation | None = None,
        others: bool = False,
    ) -> RunResult:
        """Merge what all processes answered, write the metrics and log what is not logged yet.

        Args:
            new: samples that this session did.
            peaks: peak GiB by phase.
            processes: that took part.
            fed: aggregation of all records; made anew where there is none.
            others: whether further sessions did some beside it, and leave the end to it.
        """
        run, data, total = self.run, self.datamodule, len(self._wanted)
        run.gather()
        if self.mode == "fit":
            headers = self._memories.headers(sorted(self._wanted))
            failed = sum(header["status"] != "ok" for header in headers.values())
            if new or others:
                self.tell(_curves(headers), {})
            return RunResult(run.path, "fit", total, num_failed=failed, num_new=new)
        with self.model.meter.detail("scoring"):
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
        self.tell(records, metrics["groups"])
        return RunResult(run.path, self.mode, total, metrics, num_new=new, added_scores=added)

    def profiled(self, result: RunResult, session_id: str | None = None) -> RunResult:
        """Keep the profile of all processes beside the result, where there was something to measure.

        Args:
            result: of this session.
            session_id: of an elastic session, by which the profiles of its workers are told from others.
        """
        profiler, processes = self.trainer.run_profiler, self._processes
        if profiler is None or not (result.num_new or result.added_scores):
            return result
        worker = None if session_id is None else worker_name()
        parts = processes.gather(profiler.part(worker or str(processes.rank)))
        path = profile_path(self.run.path, worker)

        def write() -> dict[str, Any]:
            # That of an earlier session says more than one of scores alone.
            if not result.num_new and has_earlier_profile(self.run.path, session_id):
                return {}
            profile = {
                "schema_version": PROFILE_VERSION,
                "mode": self.mode,
                "session": session_id,
                "num_samples": result.num_new,
                **merge(parts, shared=not self._together),
                "environment": {**environment(self.model.backbone.device), "processes": processes.count},
                "settings": self.run.identity,
            }
            write_profile(path, profile)
            return profile

        result.profile = processes.first(write)
        return result

    def _tracers(self) -> list[Callback]:
        """What looks at single batches, if that is asked for."""
        profiler, device = self.trainer.run_profiler, self.model.backbone.device
        kinds = set(profiler.kinds) - {"phases"} if profiler else set()
        if "memory" in kinds and device.type != "cuda":
            if self._processes.rank == 0:
                log.warning(
                    "profile: memory is the history of a CUDA device's allocator, and this run is on %s: "
                    "none is kept (the profile tells the peak of each phase)",
                    "the CPU" if device.type == "cpu" else device.type,
                )
            kinds.discard("memory")
        name = worker_name() if self.trainer.elastic else str(self._processes.rank)
        folder = profile_path(self.run.path).parent
        return [BatchTracer(profiler, folder, name, device)] if kinds else []


def _curves(headers: Mapping[int, Mapping[str, str]]) -> list[dict[str, Any]]:
    """What the files of memories say of the fits, by index, in the form of records."""
    return [{"index": index, "curve": json.loads(header["curve"])} for index, header in headers.items()]


def _highest(peaks: Collection[dict[str, float]]) -> dict[str, float]:
    """The highest of all processes, by phase."""
    phases = {phase for own in peaks for phase in own}
    return {phase: max(own.get(phase, 0.0) for own in peaks) for phase in sorted(phases)}


def _lacks_scores(metrics: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    """Whether records hold scores that the metrics do not: a session was killed between the two."""
    methods = metrics["groups"][ALL]
    return any(record["scores"].keys() - methods[record["method"]]["metrics"].keys() for record in records)
