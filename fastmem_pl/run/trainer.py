"""FastMemTrainer: Lightning's predict loop over samples, with a run folder around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import as_path, is_remote
from fastmem_pl.data import FastMemDataModule
from fastmem_pl.run.callbacks import SampleProgress, StopOnSignal
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.identity import identity_of, only_of_answers, settings_of
from fastmem_pl.run.loggers import select_loggers
from fastmem_pl.run.pool import RayPool
from fastmem_pl.run.predict import FastMemModule, Mode
from fastmem_pl.run.profile import ProfileKind, RunProfile, check_kinds
from fastmem_pl.run.provenance import Provenance
from fastmem_pl.run.ranks import Ranks, check_launcher, end_with_first, one_may_be_gone
from fastmem_pl.run.session import RunResult, RunSession


class FastMemTrainer(Trainer):
    """A Trainer whose ``fit``, ``predict`` and ``fit_predict`` run one loop over samples.

    Memorizing happens inside the predict step, so devices, precision, callbacks and loggers are those of
    any Lightning program.

    Args:
        precision: 32-true; bf16-true halves the memory and is fastest; bf16-mixed keeps float32 weights.
            Memories are kept apart from the weights, so bfloat16 follows the float32 loss curve.
        devices: several share out the samples, each with the whole model; "[1]" picks the second GPU. For one
            model over several devices see model.backbone.device_map and model.backbone.tp_plan.
        ray: answer on a Ray cluster, whose workers each hold the whole model: true for the cluster that
            RAY_ADDRESS names, or else one that is started on this machine; auto or HOST:PORT for the one that
            this machine belongs to. Workers may come and go (docs/scaling.md); needs fastmem-pl[ray].
        ray_workers: a number of workers, or "[least,most]" for a cluster that grows and shrinks; left out,
            from one to as many as the cluster has GPUs, or machines where it has none.
        ray_gpus: GPUs of a worker, also a part of one; left out, 1 where the cluster has any.
        profile: measure where the time of fit-predict, fit or predict goes (phases), and the peak memory of
            each phase: RUN/profile/profile.json, and a table at the end. trace adds the operators of up to
            three batches (trace-*.json, for Perfetto); memory a history of what they allocate on a CUDA
            device (memory-*.pickle). On the command line, --profile and --profile=trace,memory.
        inference_mode: Lightning's default is true; memorizing works under both.
        logger: csv (RUN/logs/metrics.csv), tensorboard, wandb, mlflow, a Lightning logger, several of these,
            or false. They get the curve and scores of every sample as they come, and the final metrics; those
            given by name write below RUN/logs/. The first process logs. A search logs nothing.
        enable_checkpointing: off, as there is nothing to checkpoint.
        enable_model_summary: off; the outer module has no parameters of its own.
        enable_progress_bar: shows samples done, rate and time left.
        callbacks: further callbacks.
        kwargs: as :class:`lightning.Trainer`.
    """

    config_text: str | None = None
    """Resolved configuration to keep in the run folder; the command line sets it."""
    result: Any = None
    """What the last command returned: Lightning's command line drops it."""

    def __init__(
        self,
        *,
        precision: Literal["32-true", "bf16-mixed", "bf16-true", "32", "bf16"] = "32-true",
        devices: list[int] | str | int = 1,
        ray: bool | str = False,
        ray_workers: int | list[int] | None = None,
        ray_gpus: float | None = None,
        profile: list[ProfileKind] | str | None = None,
        inference_mode: bool = False,
        logger: bool | Logger | list[Logger | str] | str | None = "csv",
        enable_checkpointing: bool | None = False,
        enable_model_summary: bool | None = False,
        enable_progress_bar: bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        **kwargs: Any,
    ) -> None:
        self.chosen_loggers = select_loggers(logger)
        given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        own: list[Callback] = [] if enable_progress_bar is False else [SampleProgress()]
        super().__init__(
            precision=precision,
            devices=devices,
            inference_mode=inference_mode,
            # Lightning would make and end them at each loop; a run may have several.
            logger=False,
            enable_checkpointing=enable_checkpointing,
            enable_model_summary=enable_model_summary,
            enable_progress_bar=enable_progress_bar,
            callbacks=[*given, *own],
            **kwargs,
        )
        self.profile = check_kinds(profile)
        self.ranks = Ranks(self.strategy)
        self.pool = RayPool(ray, ray_workers, ray_gpus) if ray else None
        if self.pool and self.profile:
            raise FastMemError("trainer.profile: not with trainer.ray, whose workers are elsewhere")

    def fit_predict(
        self, model: FastMemModule, datamodule: FastMemDataModule, run_dir: str | None = None
    ) -> RunResult:
        """Memorize each context and answer about it by every method; keeps the answers.

        Args:
            run_dir: folder of the results; the same command goes on in it after a stop. Left out, it is
                runs/ and the names of the configs.
        """
        with self._session("fit-predict", model, datamodule, run_dir) as step:
            super().predict(step, datamodule=datamodule, return_predictions=False)
        return self.result

    def fit(  # type: ignore[override]
        self, model: FastMemModule, datamodule: FastMemDataModule, run_dir: str | None = None
    ) -> RunResult:
        """Memorize each context and save its memory under the run folder's memories/.

        Args:
            run_dir: folder of the results; the same command goes on in it after a stop. Left out, it is
                runs/ and the names of the configs.
        """
        with self._session("fit", model, datamodule, run_dir) as step:
            super().predict(step, datamodule=datamodule, return_predictions=False)
        return self.result

    def predict(  # type: ignore[override]
        self, model: FastMemModule, datamodule: FastMemDataModule, run_dir: str | None = None
    ) -> RunResult:
        """Answer with saved memories (model.memories, or those in the run folder); without any, zero-shot.

        Args:
            run_dir: folder of the results; the same command goes on in it after a stop. Left out, it is
                runs/ and the names of the configs.
        """
        with self._session("predict", model, datamodule, run_dir) as step:
            super().predict(step, datamodule=datamodule, return_predictions=False)
        return self.result

    @contextmanager
    def _session(
        self, mode: Mode, model: FastMemModule, datamodule: FastMemDataModule, run_dir: str | None
    ) -> Iterator[LightningModule]:
        """What a command does before the loop over samples, which runs inside, and after it."""
        start = time.perf_counter()
        datamodule.setup()
        path = as_path(run_dir or f"runs/{datamodule.task}")
        if self.profile and is_remote(path):
            raise FastMemError("trainer.profile: its traces need files; give a folder as --run_dir")
        model.use_mode(mode, path / "memories")
        methods = [] if mode == "fit" else [method.name for method in model.methods]
        run = self.prepare_run(
            path, identity_of(model, datamodule, str(self.precision), bool(methods)), methods, model
        )
        profile = RunProfile(self.profile, start, path) if self.profile else None
        session = RunSession(self, run, mode, model, datamodule, start, profile)
        try:
            with self.looping(model, model, datamodule, run, session.plan, session.callbacks) as step:
                yield step
            self.result = session.finish()
        finally:
            session.close()

    def prepare_run(
        self, path: Path, identity: dict[str, Any], methods: Sequence[str], model: FastMemModule
    ) -> RunFolder:
        """Refuse what needs neither the model nor other processes to be refused.

        Args:
            path: folder of the run.
            identity: what the results depend on.
            methods: one record each a sample; none where records are complete by another rule.
            model: to load.
        """
        loading = model.loading
        self.ranks = Ranks(self.strategy, loading.tp_plan is not None)
        if loading.device_map is not None and self.ranks.count > 1:
            raise FastMemError(
                "model.backbone.device_map: lays one model out over all devices of a process; give it with "
                "--trainer.devices 1"
            )
        if loading.tp_plan is not None and self.ranks.count == 1:
            raise FastMemError(
                "model.backbone.tp_plan: shards the model over several processes; give --trainer.devices N, "
                "or start them with torchrun and say how many (--trainer.devices, --trainer.num_nodes)"
            )
        if self.pool is not None and (self.ranks.count > 1 or loading.tp_plan is not None):
            other = "trainer.devices" if self.ranks.count > 1 else "model.backbone.tp_plan"
            raise FastMemError(
                f"{other}: not with trainer.ray; its workers are as many as trainer.ray_workers"
            )
        if self.pool is not None:
            self.pool.begin()
        else:
            check_launcher(self.ranks.count)
            end_with_first(self.strategy)
        # `fit` answers nothing, and the fingerprint is known late.
        optional = {"model.fingerprint", *only_of_answers(model)}
        run = RunFolder(path, identity, methods, optional)
        try:
            run.check()
        except FastMemError as error:
            if model.mode == "predict" and model.memories is None and path.is_dir():
                raise FastMemError(
                    f"{error}. No memories are in it, so that this would answer zero-shot: fastmem fit saves "
                    "some, --model.memories FOLDER names others"
                ) from error
            raise
        return run

    def open_run(self, run: RunFolder, model: FastMemModule, datamodule: FastMemDataModule) -> None:
        """Open the run folder once the model is loaded and all processes have met."""
        if self.pool is None:
            run.identity["model"]["fingerprint"] = model.backbone.fingerprint()
        config = self.config_of(model, datamodule, run.path)

        def open_folder() -> str:
            run.check()
            if self.pool is None:
                model.check_samples(datamodule.samples)
            run.open(config)
            return run.id

        run_id = self.ranks.first(open_folder)
        if self.ranks.rank > 0:
            run.join(self.ranks.rank, run_id)

    @contextmanager
    def looping(
        self,
        model: FastMemModule,
        step: LightningModule,
        datamodule: FastMemDataModule,
        run: RunFolder,
        plan: Callable[[], None],
        callbacks: Sequence[Callback],
    ) -> Iterator[LightningModule]:
        """Prepare Lightning's predict loop, which runs inside and ends early, with all on disk, on SIGTERM.

        Gives the module to loop with: ``step``, or what stands in for it where others do the work.

        Args:
            model: whose model answers.
            step: whose predict step runs.
            datamodule: the samples.
            run: folder of the results.
            plan: chooses the batches (``datamodule.use_plan``), once the model is loaded.
            callbacks: come before the trainer's own.
        """
        usual = list(self.callbacks)
        # Processes that hold one model together end after the same batch.
        agree = (lambda asked: any(self.ranks.gather(asked))) if datamodule.whole else bool
        # Where others do the work, there is no batch in work to wait for.
        self.callbacks = [*callbacks, StopOnSignal(agree, at_once=self.pool is not None), *usual]
        datamodule.planner = plan
        try:
            with one_may_be_gone():
                if self.pool is None:
                    yield step
                else:
                    with self.pool.loop(model, step, datamodule, str(self.precision), run) as remote:
                        yield remote
        finally:
            self.callbacks, datamodule.planner = usual, None

    def provenance(self, model: FastMemModule) -> Provenance | None:
        """By what and where answers were made; ``None`` where a pool of workers had nothing to do."""
        return Provenance.of(model) if self.pool is None else self.pool.provenance

    def device_of(self, model: FastMemModule) -> torch.device:
        """Where models of this process run."""
        return model.backbone.device if model.is_loaded else self.strategy.root_device

    def config_of(self, model: FastMemModule, datamodule: FastMemDataModule, path: Path) -> str:
        """The settings as a config file: the command line's, or those that Python gave."""
        if self.config_text is not None:
            return self.config_text
        config = {
            "trainer": {"precision": str(self.precision)},
            "model": settings_of(model),
            "data": {k: v for k, v in datamodule.hparams.items() if k != "_instantiator"},
            "run_dir": str(path),
        }
        return yaml.safe_dump(config, sort_keys=False)


# LightningCLI calls the trainer's attribute named like the subcommand.
setattr(FastMemTrainer, "fit-predict", FastMemTrainer.fit_predict)
