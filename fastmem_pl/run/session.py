"""One session of a run: what is left of it, what is kept of every batch, and the results at the end."""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from fastmem_pl.backbone.footprint import usable_bytes
from fastmem_pl.base.environment import environment
from fastmem_pl.base.errors import FastMemError, RunStoppedError
from fastmem_pl.data import FastMemDataModule
from fastmem_pl.memory import MemoryFolder
from fastmem_pl.run.callbacks import MetricAggregation, PredictionWriter, SampleProgress
from fastmem_pl.run.folder import SCHEMA_VERSION, RunFolder
from fastmem_pl.run.loggers import RunLogging
from fastmem_pl.run.predict import FastMemModule, Mode
from fastmem_pl.run.profile import SCHEMA_VERSION as PROFILE_VERSION
from fastmem_pl.run.profile import RunProfile, summarize
from fastmem_pl.run.provenance import Provenance
from fastmem_pl.run.records import Record
from fastmem_pl.run.scoring import score_records

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a run leaves."""

    path: Path  # the run folder
    mode: Mode
    num_samples: int  # of the data
    # Content of metrics.json; empty after fit, which answers nothing.
    metrics: dict[str, Any] = field(default_factory=dict)
    num_failed: int = 0  # after fit, memories whose loss was not finite
    num_new: int = 0  # samples that were not done before this session
    added_scores: list[str] = field(default_factory=list)  # of metric models, in this session
    profile: dict[str, Any] = field(default_factory=dict)  # see fastmem_pl.run.profile, where asked for


class RunSession:
    """What the processes of a run do from opening its folder to its metrics.

    ``trainer`` is the :class:`~fastmem_pl.run.trainer.FastMemTrainer` whose loop runs, and ``start`` the
    beginning of the session by :func:`time.perf_counter`.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: RunFolder,
        mode: Mode,
        model: FastMemModule,
        datamodule: FastMemDataModule,
        start: float,
        profile: RunProfile | None = None,
    ) -> None:
        self._trainer, self._ranks = trainer, trainer.ranks
        self._run, self._mode, self._model, self._data = run, mode, model, datamodule
        self._start, self._profile = start, profile
        self._wanted = {sample.index for sample in datamodule.samples}
        self._memories = MemoryFolder(run.memories_path)
        # Processes that hold one model together do the same work, and one of them writes it.
        datamodule.whole = model.loading.tp_plan is not None
        first = self._ranks.rank == 0
        config = trainer.config_of(model, datamodule, run.path)
        self._logging = RunLogging(trainer.chosen_loggers if first else [], run.path, config)
        together = self._ranks if datamodule.whole else None
        writer = None if mode == "fit" else PredictionWriter(run, together)
        # Of several processes, the first feeds one with the records of all at the end.
        alone = self._ranks.count == 1 and mode != "fit"
        self._aggregation = MetricAggregation() if alone else None
        callbacks = (profile, self._aggregation, writer, self._logging)
        self.callbacks: list[Callback] = [one for one in callbacks if one is not None]
        model.meter.calls = profile.calls if profile else None
        self._new = 0
        self._finished = False

    def plan(self) -> None:
        """Open the folder, leave out what is done, and form batches of the rest."""
        ranks, data, model = self._ranks, self._data, self._model
        self._trainer.open_run(self._run, model, data)
        done = ranks.first(self._begin)
        data.skip(done)
        self._new = len(data.remaining)
        if self._new and done and self._mode != "fit" and ranks.rank == 0:
            log.warning(
                "going on in %s: %d of %d samples are done", self._run.path, len(done), len(self._wanted)
            )
        if self._trainer.pool is not None:
            self._trainer.pool.plan(data, self._mode != "fit" and not self._metrics())
            return
        device = model.backbone.device
        # Processes on a CPU have one memory, those with a GPU one each.
        sharing = ranks.on_this_node if device.type == "cpu" else 1
        limits = model.limits(
            data.batch_size,
            data.max_batch_tokens,
            math.ceil(self._new / (1 if data.whole else ranks.count)),
            min(ranks.gather(usable_bytes(device) / sharing)),
        )
        data.use_plan(ranks.first(lambda: data.plan(model.context_lengths(data.remaining), limits)))
        # One bar shows what all do.
        for bar in (c for c in self._trainer.callbacks if isinstance(c, SampleProgress)):
            bar.count = self._count_done if ranks.count > 1 else None

    def _begin(self) -> set[int]:
        """Make room for results; returns the indices of samples that are done."""
        if self._mode == "fit":
            self._memories.path.mkdir(exist_ok=True)
            headers = self._memories.headers(sorted(self._wanted))
            done = set(headers)
        else:
            records = [record for record in self._run.records() if record["index"] in self._wanted]
            done = {record["index"] for record in records}
        if self._wanted - done:
            if self._mode != "fit":
                # Those of an earlier session would be stale, should this one be killed.
                self._run.metrics_path.unlink(missing_ok=True)
            # The log and the metrics begin with what earlier sessions did.
            self._logging.open()
            self._logging.add(_curves(headers) if self._mode == "fit" else records)
            if self._aggregation is not None:
                self._aggregation.feed(records)
        return done

    def _count_done(self) -> int:
        """Samples that are done, at a glance at the files."""
        if self._mode == "fit":
            return sum(1 for _ in self._memories.path.glob("*.safetensors"))
        return self._run.count_lines() // max(1, len(self._run.methods))

    def finish(self) -> RunResult:
        """Once all processes are done, merge what they answered and write the metrics."""
        ranks, model = self._ranks, self._model
        provenance = Provenance.joined(ranks.gather(self._trainer.provenance(model)))
        finish = self._finish_fit if self._mode == "fit" else self._results
        result = ranks.first(lambda: finish(provenance))
        if self._profile is not None and (result.num_new or result.added_scores):
            measured = ranks.gather(self._profile.measured())
            result.profile = ranks.first(lambda: self._keep_profile(measured, result.num_new))
        self._finished = True
        return result

    def close(self) -> None:
        """End what is open; to be called whatever happened."""
        self._model.meter.calls = None
        if self._model.is_loaded:
            self._model.graphs.clear()
        self._logging.close(self._finished)
        self._run.close()

    def _finish_fit(self, provenance: Provenance | None) -> RunResult:
        fingerprint = provenance and provenance.model["fingerprint"]
        headers = self._memories.headers(sorted(self._wanted), fingerprint)
        if missing := len(self._wanted) - len(headers):
            raise RunStoppedError(
                f"{missing} of {len(self._wanted)} memories are not in {self._memories.path}, or of another "
                "model; workers on other machines must write to the same folder"
            )
        failed = sum(header["status"] != "ok" for header in headers.values())
        if self._new:
            self._logging.add(_curves(headers))
        return RunResult(self._run.path, "fit", len(self._wanted), num_failed=failed, num_new=self._new)

    def _results(self, provenance: Provenance | None) -> RunResult:
        run, total, new = self._run, len(self._wanted), self._new
        run.merge_parts()
        with self._model.meter.detail("scoring"):
            added = score_records(run, self._model, self._data, self._trainer.device_of(self._model))
        records = [record for record in run.records() if record["index"] in self._wanted]
        written = self._metrics()
        aggregation = self._aggregation
        if aggregation is None or added or not new:
            # Other processes answered too, scores came afterwards, or nothing was answered now.
            aggregation = MetricAggregation()
            aggregation.feed(records)
        groups = aggregation.compute()
        if written and not new:
            # What was measured while answering stays.
            metrics = {**written, "groups": groups, "num_samples": total}
            if metrics == written and not added:
                return RunResult(run.path, self._mode, total, metrics)
        else:
            metrics = {
                "schema_version": SCHEMA_VERSION,
                "groups": groups,
                **provenance.describe(run.identity, self._ranks.count),
                "num_samples": total,
                "seconds_of_last_session": round(time.perf_counter() - self._start, 2),
            }
        if not new:
            self._logging.open()
        self._logging.add(records)
        self._logging.add_final(groups)
        # Last: where this is on disk, the log is complete as well.
        run.write_metrics(metrics)
        return RunResult(run.path, self._mode, total, metrics, num_new=new, added_scores=added)

    def _metrics(self) -> dict[str, Any]:
        """Content of ``metrics.json``; empty where it is damaged, as the records have what it needs."""
        try:
            return self._run.metrics()
        except FastMemError as error:
            log.warning("%s; it is made again from the records", error)
            return {}

    def _keep_profile(self, measured: Sequence[Any], num_new: int) -> dict[str, Any]:
        # That of an earlier session says more than one of scores alone.
        path = self._run.path
        if not num_new and (path / "profile").is_dir():
            return {}
        device = self._trainer.device_of(self._model)
        profile = {
            "schema_version": PROFILE_VERSION,
            "mode": self._mode,
            "num_samples": num_new,
            **summarize(measured, shared=not self._data.whole),
            "environment": {**environment(device), "processes": self._ranks.count},
            "settings": self._run.identity,
        }
        self._profile.keep(profile)
        return profile


def _curves(headers: Mapping[int, Mapping[str, str]]) -> list[Record]:
    """Curves of saved memories, as records that have nothing else."""
    return [{"index": index, "curve": json.loads(header["curve"])} for index, header in headers.items()]
