"""FastMemTrainer: Lightning's predict loop over samples, with a run folder around it."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, Trainer

from fastmem_pl.callbacks import ALL, MetricAggregation, PredictionWriter, SampleProgress
from fastmem_pl.data import FastMemDataModule
from fastmem_pl.errors import FastMemError
from fastmem_pl.memory import MemoryFolder
from fastmem_pl.module import FastMemModule, Mode
from fastmem_pl.run import SCHEMA_VERSION, RunFolder
from fastmem_pl.scoring import add_model_scores, wanted_models
from fastmem_pl.search import SearchResult, SearchSettings, run_search

log = logging.getLogger(__name__)

_PACKAGES = ("fastmem-pl", "torch", "lightning", "transformers", "torchmetrics", "tokenizers", "safetensors")
_DATA_FREE = {"batch_size", "max_batch_tokens", "path", "_instantiator"}  # what no answer depends on


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


class FastMemTrainer(Trainer):
    """A Trainer whose ``fit``, ``predict`` and ``fit_predict`` run one loop over samples.

    Memorizing happens inside the predict step, so devices, precision, callbacks and loggers are those of
    any Lightning program.

    Args:
        precision: 32-true; bf16-true halves the memory and is fastest; bf16-mixed keeps float32 weights.
            Memories are kept apart from the weights, so bfloat16 follows the float32 loss curve.
        devices: one device so far; "[1]" picks the second GPU.
        inference_mode: Lightning's default is true; memorizing works under both.
        logger: none by default; results are in the run folder.
        enable_checkpointing: off, as there is nothing to checkpoint.
        enable_model_summary: off; the outer module has no parameters of its own.
        enable_progress_bar: shows samples done, rate and time left.
        callbacks: further callbacks.
        kwargs: as :class:`lightning.Trainer`.
    """

    config_text: str | None = None
    """Resolved configuration to keep in the run folder; the command line sets it."""

    search: Any
    """:meth:`search_settings`."""

    def __init__(
        self,
        *,
        precision: Literal["32-true", "bf16-mixed", "bf16-true", "32", "bf16"] = "32-true",
        devices: list[int] | str | int = 1,
        inference_mode: bool = False,
        logger: Any = False,
        enable_checkpointing: bool | None = False,
        enable_model_summary: bool | None = False,
        enable_progress_bar: bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        **kwargs: Any,
    ) -> None:
        given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        own: list[Callback] = [] if enable_progress_bar is False else [SampleProgress()]
        super().__init__(
            precision=precision,
            devices=devices,
            inference_mode=inference_mode,
            logger=logger,
            enable_checkpointing=enable_checkpointing,
            enable_model_summary=enable_model_summary,
            enable_progress_bar=enable_progress_bar,
            callbacks=[*given, *own],
            **kwargs,
        )

    def fit_predict(
        self, model: FastMemModule, datamodule: FastMemDataModule, run_dir: str | None = None
    ) -> RunResult:
        """Memorize each context and answer about it by every method; keeps the answers.

        Args:
            model: the methods and their settings.
            datamodule: the samples.
            run_dir: folder of the results; the same command goes on in it after a stop. Left out, it is
                runs/ and the names of the configs.
        """
        return self._run_samples("fit-predict", model, datamodule, run_dir)

    def fit(  # type: ignore[override]
        self, model: FastMemModule, datamodule: FastMemDataModule, run_dir: str | None = None
    ) -> RunResult:
        """Memorize each context and save its memory under the run folder's memories/.

        Args:
            model: the settings of memorizing.
            datamodule: the samples.
            run_dir: folder of the results; the same command goes on in it after a stop. Left out, it is
                runs/ and the names of the configs.
        """
        return self._run_samples("fit", model, datamodule, run_dir)

    def predict(  # type: ignore[override]
        self, model: FastMemModule, datamodule: FastMemDataModule, run_dir: str | None = None
    ) -> RunResult:
        """Answer with saved memories (model.memories, or those in the run folder); without any, zero-shot.

        Args:
            model: the methods and their settings.
            datamodule: the samples.
            run_dir: folder of the results; the same command goes on in it after a stop. Left out, it is
                runs/ and the names of the configs.
        """
        return self._run_samples("predict", model, datamodule, run_dir)

    def search_settings(
        self,
        model: FastMemModule,
        datamodule: FastMemDataModule,
        search: SearchSettings = SearchSettings(),  # noqa: B008 (jsonargparse shows it)
        run_dir: str | None = None,
    ) -> SearchResult:
        """Answer by every point of a grid of settings, and rank the points.

        Args:
            model: the settings of all that is no axis of the search.
            datamodule: the samples.
            search: axes, objective and samples of the search.
            run_dir: folder of the results; the same command goes on in it after a stop. Left out, it is
                runs/ and the names of the configs.
        """
        return run_search(self, model, datamodule, search, run_dir)

    def _run_samples(
        self, mode: Mode, model: FastMemModule, datamodule: FastMemDataModule, run_dir: str | None
    ) -> RunResult:
        start = time.perf_counter()
        datamodule.setup()
        path = Path(run_dir or Path("runs") / datamodule.task)
        model.use_mode(mode, path / "memories")
        methods = [] if mode == "fit" else [method.name for method in model.methods]
        identity = self.identity(model, datamodule, bool(methods))
        run = self.open_run(path, identity, methods, model, datamodule)
        try:
            if mode == "fit":
                return self._memorize_all(run, model, datamodule)
            return self._answer_all(run, mode, model, datamodule, start)
        finally:
            run.close()

    def open_run(
        self,
        path: Path,
        identity: dict[str, Any],
        methods: Sequence[str],
        model: FastMemModule,
        datamodule: FastMemDataModule,
    ) -> RunFolder:
        """Load the model and open the run folder, once all that can be refused is accepted.

        Args:
            path: of the folder.
            identity: what the results depend on.
            methods: one record each a sample; none where records are complete by another rule.
            model: to load.
            datamodule: the samples.

        Raises:
            FastMemError: for anything that cannot be done, before anything is written.
        """
        if self.num_devices * self.num_nodes > 1:
            raise FastMemError(
                f"trainer.devices: {self.num_devices} on {self.num_nodes} node(s); allowed: 1 device, as "
                "samples are not yet shared out over several (--trainer.devices 1)"
            )
        # `fit` answers nothing, the fingerprint is known late, and early versions knew one state only.
        optional = {"model.fingerprint", "data.answer_prefix", "model.optimizer_state"}
        optional |= {f"model.{name}" for name in model.identity(True).keys() - model.identity(False).keys()}
        run = RunFolder(path, identity, methods, optional)
        # What needs no model is refused before it is loaded.
        run.check()
        model.load_backbone(str(self.precision), self.strategy.root_device)
        run.identity["model"]["fingerprint"] = model.backbone.fingerprint()
        run.check()
        model.check_samples(datamodule.samples)
        run.open(self.config_text or self.resolved_config(model, datamodule, path))
        return run

    def _memorize_all(self, run: RunFolder, model: FastMemModule, datamodule: FastMemDataModule) -> RunResult:
        run.memories_path.mkdir(exist_ok=True)
        indices = [sample.index for sample in datamodule.samples]
        folder = MemoryFolder(run.memories_path)
        datamodule.skip(folder.headers(indices).keys())
        self._loop(model, datamodule, [])
        headers = folder.headers(indices)
        failed = sum(header["status"] != "ok" for header in headers.values())
        new = len(datamodule.remaining)
        return RunResult(run.path, "fit", len(datamodule.samples), num_failed=failed, num_new=new)

    def _answer_all(
        self, run: RunFolder, mode: Mode, model: FastMemModule, datamodule: FastMemDataModule, start: float
    ) -> RunResult:
        aggregation = MetricAggregation()
        wanted = {sample.index for sample in datamodule.samples}
        earlier = [record for record in run.records() if record["index"] in wanted]
        aggregation.feed(earlier)
        datamodule.skip({record["index"] for record in earlier})
        remaining = len(datamodule.remaining)
        if remaining and earlier:
            total = len(datamodule.samples)
            log.warning("going on in %s: %d of %d samples are done", run.path, total - remaining, total)
        if remaining:
            # Those of an earlier session would be stale, should this one be killed.
            run.metrics_path.unlink(missing_ok=True)
            self._loop(model, datamodule, [aggregation, PredictionWriter(run)])
        run.sort()
        added = self.score_with_models(run, model, datamodule)
        records = [record for record in run.records() if record["index"] in wanted]
        written = run.metrics_path.is_file()
        grown = bool(added) or (written and _lacks_scores(run.metrics(), records))
        if remaining or grown or not written:
            if grown:
                # Anew, as metric models added scores to records that were fed before.
                aggregation = MetricAggregation()
                aggregation.feed(records)
            metrics = self._metrics(aggregation, model, run)
            metrics["num_samples"] = len(datamodule.samples)
            metrics["seconds_of_last_session"] = round(time.perf_counter() - start, 2)
            if not remaining and written:
                # Only scores came: what was measured while answering stays.
                metrics = {**run.metrics(), "groups": metrics["groups"]}
            run.write_metrics(metrics)
        else:
            metrics = run.metrics()
        total = len(datamodule.samples)
        return RunResult(run.path, mode, total, metrics, num_new=remaining, added_scores=added)

    def score_with_models(
        self, run: RunFolder, model: FastMemModule, datamodule: FastMemDataModule
    ) -> list[str]:
        """Add the scores that need a model of their own; returns which came."""
        wanted = wanted_models(model.hparams, datamodule.samples)
        if not wanted:
            return []
        records = run.records()
        indices = {sample.index for sample in datamodule.samples}
        asked = [record for record in records if record["index"] in indices]
        device = model.backbone.device
        return add_model_scores(asked, datamodule.samples, wanted, device, lambda: run.replace(records))

    def _loop(self, model: FastMemModule, datamodule: FastMemDataModule, callbacks: list[Callback]) -> None:
        """Run Lightning's predict loop over the remaining samples."""
        if not datamodule.remaining:
            return
        limits = model.batch_limits(datamodule.batch_size, datamodule.max_batch_tokens)
        datamodule.plan(model.context_lengths(datamodule.remaining), limits)
        usual = list(self.callbacks)
        self.callbacks = [*callbacks, *usual]
        try:
            super().predict(model, datamodule=datamodule, return_predictions=False)
        finally:
            self.callbacks = usual
            model.graphs.clear()

    def identity(self, model: FastMemModule, datamodule: FastMemDataModule, answers: bool) -> dict[str, Any]:
        """Settings that the results depend on; memories depend on fewer than answers."""
        data = {name: value for name, value in datamodule.hparams.items() if name not in _DATA_FREE}
        data["file_hash"] = datamodule.file_hash()
        if not answers:
            del data["answer_prefix"]
        return {
            "model": model.identity(answers),
            "data": data,
            "trainer": {"precision": str(self.precision)},
        }

    def resolved_config(self, model: FastMemModule, datamodule: FastMemDataModule, path: Path) -> str:
        """The settings as a config file, for runs that Python started."""
        config = {
            "trainer": {"precision": str(self.precision)},
            "model": {k: v for k, v in model.hparams.items() if k != "_instantiator"},
            "data": {k: v for k, v in datamodule.hparams.items() if k != "_instantiator"},
            "run_dir": str(path),
        }
        return yaml.safe_dump(config, sort_keys=False)

    def _metrics(
        self, aggregation: MetricAggregation, model: FastMemModule, run: RunFolder
    ) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "groups": aggregation.compute(),
            **self.provenance(model, run),
        }

    def provenance(self, model: FastMemModule, run: RunFolder) -> dict[str, Any]:
        """By what model, with what settings, and where results were made."""
        backbone = model.backbone
        return {
            "model": {
                "backbone": backbone.name,
                "class": type(backbone.model).__name__,
                "fingerprint": backbone.fingerprint(),
                "precision": backbone.precision,
            },
            "peak_memory_gib": model.meter.peak_gib(),
            "environment": environment(backbone.device),
            "settings": run.identity,
        }


def _lacks_scores(metrics: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    """Whether records hold scores that the metrics do not: a session was killed between the two."""
    methods = metrics["groups"][ALL]
    return any(record["scores"].keys() - methods[record["method"]]["metrics"].keys() for record in records)


# LightningCLI calls the trainer's attribute named like the subcommand. A method called `search` could not
# have a parameter `search`: jsonargparse names a group of options after each.
setattr(FastMemTrainer, "fit-predict", FastMemTrainer.fit_predict)
FastMemTrainer.search = FastMemTrainer.search_settings


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device, as kept with every result."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
