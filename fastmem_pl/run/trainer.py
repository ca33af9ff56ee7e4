"""FastMemTrainer: Lightning's predict loop over samples, with a run folder around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.phases import PhaseMeter
from fastmem_pl.data import FastMemDataModule
from fastmem_pl.run.callbacks import LoggersAside, SampleProgress, StopOnSignal
from fastmem_pl.run.elastic import ElasticWorker, worker_name
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.identity import flatten
from fastmem_pl.run.loggers import select_loggers
from fastmem_pl.run.predict import FastMemModule, Mode
from fastmem_pl.run.processes import Processes, forward_signal, launched_by_others
from fastmem_pl.run.profile import ProfileKind, Profiler, check_kinds
from fastmem_pl.run.session import RunResult, Session

# What no answer depends on.
_DATA_FREE = {"batch_size", "max_batch_tokens", "path", "_instantiator"}


class FastMemTrainer(Trainer):
    """A Trainer whose ``fit``, ``predict`` and ``fit_predict`` run one loop over samples.

    Memorizing happens inside the predict step, so devices, precision, callbacks and loggers are those of
    any Lightning program.

    Args:
        precision: 32-true; bf16-true halves the memory and is fastest; bf16-mixed keeps float32 weights.
            Memories are kept apart from the weights, so bfloat16 follows the float32 loss curve.
        devices: several share out the samples, each with the whole model; "[1]" picks the second GPU. For one
            model over several devices see model.device_map and model.tp_plan.
        elastic: share the run folder with other processes of the same command, which may come and go: each
            takes the next samples that nobody has. No scheduler is needed, a shared file system is.
        chunk_samples: samples that an elastic process takes at once.
        stale_after: seconds without a sign of life after which the samples of an elastic process go to
            others; 60 at least on a network file system.
        profile: measure where the time of fit-predict, fit or predict goes (phases), and the peak memory of
            each phase: RUN/profile/profile.json, and a table at the end. trace adds the operators of up to
            three batches (trace-*.json, for Perfetto); memory a history of what they allocate on a CUDA
            device (memory-*.pickle). On the command line, --profile and --profile=trace,memory.
        inference_mode: Lightning's default is true; memorizing works under both.
        logger: csv (RUN/logs/metrics.csv), tensorboard, wandb, mlflow, a Lightning logger, several of these,
            or false. They get the curve and scores of every sample as they come, and the final metrics; those
            given by name write below RUN/logs/. The first process logs; of elastic ones, the one that comes
            to the end, all at once. A search logs nothing.
        enable_checkpointing: off, as there is nothing to checkpoint.
        enable_model_summary: off; the outer module has no parameters of its own.
        enable_progress_bar: shows samples done, rate and time left.
        callbacks: further callbacks.
        kwargs: as :class:`lightning.Trainer`.
    """

    config_text: str | None = None
    """Resolved configuration to keep in the run folder; the command line sets it."""

    command: Sequence[str] | None = None
    """Starts this program again, for further processes; the command line sets it."""

    def __init__(
        self,
        *,
        precision: Literal["32-true", "bf16-mixed", "bf16-true", "32", "bf16"] = "32-true",
        devices: list[int] | str | int = 1,
        elastic: bool = False,
        chunk_samples: int = 32,
        stale_after: float = 300.0,
        profile: list[ProfileKind] | str | None = None,
        inference_mode: bool = False,
        logger: bool | Logger | list[Logger | str] | str | None = "csv",
        enable_checkpointing: bool | None = False,
        enable_model_summary: bool | None = False,
        enable_progress_bar: bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("chunk_samples", chunk_samples), ("stale_after", stale_after)):
            if value < 1:
                raise FastMemError(f"trainer.{name}: {value} is out of range; allowed: at least 1")
        self.chosen_loggers = select_loggers(logger)
        given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        own: list[Callback] = [] if enable_progress_bar is False else [SampleProgress()]
        super().__init__(
            precision=precision,
            devices=devices,
            inference_mode=inference_mode,
            logger=[each for each in self.chosen_loggers if not isinstance(each, str)],
            enable_checkpointing=enable_checkpointing,
            enable_model_summary=enable_model_summary,
            enable_progress_bar=enable_progress_bar,
            callbacks=[*given, *own],
            **kwargs,
        )
        self.elastic, self.chunk_samples, self.stale_after = elastic, chunk_samples, stale_after
        self.profile, self.run_profiler = check_kinds(profile), None
        self.processes: Processes | None = None
        self._stop = StopOnSignal(forward_signal)

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

    def _run_samples(
        self, mode: Mode, model: FastMemModule, datamodule: FastMemDataModule, run_dir: str | None
    ) -> RunResult:
        start = time.perf_counter()
        datamodule.setup()
        path = Path(run_dir or Path("runs") / datamodule.task)
        model.use_mode(mode, path / "memories")
        methods = [] if mode == "fit" else [method.name for method in model.methods]
        identity = self.identity(model, datamodule, bool(methods))
        self.run_profiler = Profiler(self.profile, start) if self.profile else None
        with self.stoppable(model):
            run = self.open_run(path, identity, methods, model, datamodule)
            try:
                session = Session(self, run, mode, model, datamodule, start)
                with session.log:
                    if self.elastic:
                        worker = ElasticWorker(session, self.chunk_samples, self.stale_after)
                        return session.profiled(worker.work(), worker.session_id)
                    return session.profiled(session.work())
            finally:
                # What it measures from here on is nobody's.
                model.meter.calls = self.run_profiler = None
                run.close()

    @contextmanager
    def stoppable(self, model: FastMemModule) -> Iterator[None]:
        """Meanwhile, SIGTERM ends the run, after the batch in work if there is one."""

        def any_asked(asked: bool) -> bool:
            # Processes that hold one model together end after the same batch.
            return any(self.processes.gather(asked))

        self._stop = StopOnSignal(forward_signal, bool if model.loading.tp_plan is None else any_asked)
        with self._stop.listening():
            yield

    def open_run(
        self,
        path: Path,
        identity: dict[str, Any],
        methods: Sequence[str],
        model: FastMemModule,
        datamodule: FastMemDataModule,
    ) -> RunFolder:
        """Start the processes, load the model and open the run folder, once all that can be is checked.

        Args:
            path: of the folder.
            identity: what the results depend on.
            methods: one record each a sample; none where records are complete by another rule.
            model: to load.
            datamodule: the samples.

        Raises:
            FastMemError: for anything that cannot be done, before anything is written.
        """
        # `fit` answers nothing, the fingerprint is known late, and early versions knew one state only.
        optional = {"model.fingerprint", "data.answer_prefix"}
        optional |= {
            f"model.{name}"
            for name in flatten(model.identity(True)).keys() - flatten(model.identity(False)).keys()
        }
        run = RunFolder(path, identity, methods, optional)
        tensor_parallel = model.loading.tp_plan is not None
        self.processes = processes = Processes(self.strategy, self.command)
        self._check_processes(model)
        # What needs neither model nor company is refused before there are any.
        try:
            run.check()
        except FastMemError as error:
            if model.mode == "predict" and model.memories is None and path.is_dir():
                raise FastMemError(
                    f"{error}. No memories are in it, so that this would answer zero-shot: fastmem fit saves "
                    "some, --model.memories FOLDER names others"
                ) from error
            raise
        processes.start(tensor_parallel)
        processes.each(lambda: self._load(model))
        run.identity["model"]["fingerprint"] = model.backbone.fingerprint()
        config = self.config_text or self.resolved_config(model, datamodule, path)

        def open_folder() -> None:
            run.check()
            model.check_samples(datamodule.samples)
            if self.elastic:
                run.open_shared(config, worker_name())
            else:
                run.open(config)

        processes.first(open_folder)
        run_id = processes.gather(run.id)[0]
        if processes.rank > 0:
            run.join(worker_name(), run_id)
        return run

    def _load(self, model: FastMemModule) -> None:
        device, calls = self.strategy.root_device, self.run_profiler and self.run_profiler.calls
        with PhaseMeter(device, calls).detail("load"):
            model.load_backbone(str(self.precision), device)
        model.meter.calls = calls

    def _check_processes(self, model: FastMemModule) -> None:
        """Refuse ways to use several devices that exclude each other, and a launcher nobody reckons with."""
        count = self.processes.count
        if self.elastic and count > 1:
            raise FastMemError(
                f"trainer.elastic: each process works on its own, but trainer.devices asks for {count}; "
                "start the command once for every device, each with --trainer.devices 1"
            )
        if model.loading.device_map is not None and count > 1:
            raise FastMemError(
                "model.backbone.device_map: lays one model out over all devices of a process; give it with "
                "--trainer.devices 1"
            )
        if model.loading.tp_plan is not None and count == 1:
            raise FastMemError(
                "model.backbone.tp_plan: shards the model over several processes; give --trainer.devices N, "
                "or start them with torchrun and say how many (--trainer.devices, --trainer.num_nodes)"
            )
        launched, launcher = launched_by_others()
        if launched > 1 and count == 1 and not self.elastic:
            raise FastMemError(
                f"trainer.devices: {launcher} started {launched} processes, and each would do all of the "
                "work; give --trainer.devices with those of a node, and --trainer.num_nodes"
            )

    @contextmanager
    def counted_progress(self, count: Callable[[], int] | None) -> Iterator[None]:
        """Meanwhile, keep the progress bar from loop to loop, and let it show what ``count`` says is done."""
        bars = [callback for callback in self.callbacks if isinstance(callback, SampleProgress)]
        with ExitStack() as stack:
            for bar in bars:
                bar.count_by(count)
                stack.callback(bar.count_by, None)
                stack.enter_context(bar.lasting())
            yield

    def run_loop(
        self,
        module: LightningModule,
        datamodule: FastMemDataModule,
        callbacks: Sequence[Callback],
        progress: Callback | None = None,
    ) -> None:
        """Run Lightning's predict loop; it ends early, with all on disk, when SIGTERM comes.

        Args:
            module: whose predict step runs.
            datamodule: the batches.
            callbacks: that come before the trainer's own.
            progress: takes the place of the trainer's progress bar, where it has one.
        """
        usual, loggers = list(self.callbacks), LoggersAside(self.loggers)
        shown = [progress if progress and isinstance(c, SampleProgress) else c for c in usual]
        self.callbacks, self.loggers = [loggers, *callbacks, self._stop, *shown], []
        try:
            super().predict(module, datamodule=datamodule, return_predictions=False)
        finally:
            self.callbacks, self.loggers = usual, loggers.loggers

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
            "model": model.settings(),
            "data": {k: v for k, v in datamodule.hparams.items() if k != "_instantiator"},
            "run_dir": str(path),
        }
        return yaml.safe_dump(config, sort_keys=False)


# LightningCLI calls the trainer's attribute named like the subcommand.
setattr(FastMemTrainer, "fit-predict", FastMemTrainer.fit_predict)
