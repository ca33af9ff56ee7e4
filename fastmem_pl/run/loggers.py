"""Lightning's loggers by name, and the callback that feeds them: settings, curves, scores, final metrics."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.run.folder import flatten

log = logging.getLogger(__name__)

NAMES = ("csv", "tensorboard", "wandb", "mlflow")
FOLDER = "logs"
_PROJECT = "fastmem"
# MLflow takes no more metrics at once.
_MLFLOW_LIMIT = 1000


def select_loggers(given: object) -> list[str | Logger]:
    """Names and objects in what ``trainer.logger`` was given; nothing is made yet.

    Args:
        given: a name, several with commas between, a Lightning logger, a list of either, ``False`` for none;
            ``True`` and ``None`` ask for the default.

    Raises:
        FastMemError: for an unknown name, or one whose package is not installed.

    >>> select_loggers("csv,csv")
    ['csv']
    """
    if given is None or given is True:
        given = "csv"
    if given is False:
        return []
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",")]
    several = list(given) if isinstance(given, Iterable) else [given]
    for each in several:
        if isinstance(each, str):
            _check(each)
        elif not isinstance(each, Logger):
            raise FastMemError(
                f"trainer.logger: {each!r} is no logger; allowed: {', '.join(NAMES)}, "
                "Lightning's loggers, or false"
            )
    return list(dict.fromkeys(several))


def _check(name: str) -> None:
    if name not in NAMES:
        raise unknown("trainer.logger", name, (*NAMES, "false"))
    # TensorBoard's other name is a package that writes the same files.
    packages = {"csv": (), "tensorboard": ("tensorboard", "tensorboardX")}.get(name, (name,))
    if packages and not any(map(importlib.util.find_spec, packages)):
        raise FastMemError(f"trainer.logger: {name} needs a package that is not here; pip install {name}")


def make_logger(name: str, run_path: Path) -> Logger:
    """A Lightning logger that writes to the run folder's ``logs/``; an earlier session's files are replaced.

    MLflow and W&B keep earlier sessions as runs of their own, and follow ``MLFLOW_TRACKING_URI``,
    ``MLFLOW_EXPERIMENT_NAME``, ``WANDB_MODE`` and ``WANDB_PROJECT``.
    """
    run_path = run_path.resolve()
    logs = run_path / FOLDER
    if name == "csv":
        with warnings.catch_warnings():
            # That the earlier file will be deleted.
            warnings.simplefilter("ignore")
            logger = CSVLogger(run_path, name=FOLDER, version="", flush_logs_every_n_steps=1)
            _ = logger.experiment
        return logger
    if name == "tensorboard":
        for old in (logs / name).glob("events.out.tfevents.*"):
            old.unlink()
        # Settings come with the final metrics: a placeholder in place of these would be shown as a curve.
        return TensorBoardLogger(logs, name=name, version="", default_hp_metric=False)
    if name == "wandb":
        logs.mkdir(exist_ok=True)
        return WandbLogger(run_path.name, logs, project=os.environ.get("WANDB_PROJECT") or _PROJECT)
    # What it says when it makes its tables is of no use to anybody.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # By default a run would wait four minutes for a server that is not there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    place: dict[str, Any] = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI")}
    if place["tracking_uri"] is None:
        (logs / name).mkdir(parents=True, exist_ok=True)
        # A folder of plain files, Lightning's default, is refused by MLflow from version 3.
        place["tracking_uri"] = f"sqlite:///{(logs / name / 'mlflow.db').as_posix()}"
        place["artifact_location"] = (logs / name / "artifacts").as_uri()
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
    return MLFlowLogger(experiment, run_path.name, synchronous=False, **place)


class RunLogging(Callback):
    """Feeds loggers with what the samples of a run gave, one sample after another.

    Every update of a memory is a step of its own: ``cross_entropy``, ``kl``, ``grad_norm`` and ``sample``,
    the index in the data. The scores of a sample follow as ``<method>/<score>``, and at the end of the run
    the metrics as ``<group>/<method>/<metric>`` with ``/standard_error`` and ``/p_value``. Steps only grow.

    Loggers are made when the run folder is open. One that fails is left out from then on, with a line in the
    log: the results are in the run folder. Callbacks find them as ``trainer.loggers`` while batches run;
    Lightning does not, as at each end of a loop it would close them.

    Args:
        chosen: names and loggers (:func:`select_loggers`).
        run_path: folder of the run.
        config_text: resolved settings, as YAML.
    """

    def __init__(self, chosen: Sequence[str | Logger], run_path: Path, config_text: str) -> None:
        self.loggers: list[Logger] = []
        self._chosen, self._run_path = chosen, run_path
        settings = flatten(yaml.safe_load(config_text) or {})
        # What loggers are given may be for their eyes only.
        self._settings = {k: v for k, v in settings.items() if not k.startswith("trainer.logger")}
        self._step = 0
        # Scores that were logged of each sample.
        self._logged: dict[int, set[str]] = {}
        self._finished = False

    def open(self) -> None:
        """Make the loggers and give them the settings."""

        def make(choice: str | Logger) -> None:
            logger = make_logger(choice, self._run_path) if isinstance(choice, str) else choice
            logger.log_hyperparams(self._settings)
            self.loggers.append(logger)

        for choice in self._chosen:
            _succeeds(choice, lambda: make(choice))  # noqa: B023 (called at once)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the loggers to callbacks."""
        trainer.loggers = self.loggers

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the samples of a batch."""
        self.add(outputs)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hide the loggers from Lightning."""
        trainer.loggers = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hide the loggers from Lightning."""
        trainer.loggers = []

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Log samples, without what was logged of them before.

        Args:
            records: with ``index`` and, where there are any, ``curve``, ``method`` and ``scores``; those of
                all methods of a sample.
        """
        if not self.loggers:
            return
        samples: dict[int, list[Mapping[str, Any]]] = {}
        for record in records:
            samples.setdefault(record["index"], []).append(record)
        for index, own in samples.items():
            if index not in self._logged:
                # Methods share the memory and its curve.
                curve = next((record["curve"] for record in own if record.get("curve")), {})
                # A record of an earlier session may be damaged: what its curve lacks is not finite.
                for values in zip_longest(*curve.values()):
                    self._log({"sample": index, **dict(zip(curve, map(_number, values), strict=True))})
            scores = {
                f"{record['method']}/{name}": _number(value)
                for record in own
                for name, value in record.get("scores", {}).items()
            }
            logged = self._logged.setdefault(index, set())
            if scores.keys() - logged:
                self._log({"sample": index, **{k: v for k, v in scores.items() if k not in logged}})
            logged.update(scores)
        self._each(lambda logger: logger.save())

    def finish(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Log the final metrics, ``groups`` of ``metrics.json``."""
        metrics = _final_metrics(groups)
        if metrics:
            self._log(metrics, final=True)
        self._finished = True

    def close(self) -> None:
        """End what the loggers have open; their status says whether the run was finished."""
        self._each(lambda logger: logger.finalize("success" if self._finished else "failed"))
        # Another run of this program would go on in it; one that was given is its owner's to end.
        for logger in self.loggers:
            if isinstance(logger, WandbLogger) and logger not in self._chosen:
                _succeeds(logger, logger.experiment.finish)

    def _log(self, metrics: Mapping[str, float], final: bool = False) -> None:
        step, self._step = self._step, self._step + 1

        def tell(logger: Logger) -> None:
            if isinstance(logger, MLFlowLogger):
                # It takes no + in names.
                items = iter((name.replace("+", "_"), value) for name, value in metrics.items())
                while part := dict(islice(items, _MLFLOW_LIMIT)):
                    logger.log_metrics(part, step)
            elif final and isinstance(logger, TensorBoardLogger):
                # Its table of runs has settings beside metrics.
                logger.log_hyperparams(self._settings, dict(metrics), step)
            else:
                logger.log_metrics(dict(metrics), step)

        self._each(tell)

    def _each(self, tell: Callable[[Logger], Any]) -> None:
        for logger in list(self.loggers):
            if not _succeeds(logger, lambda: tell(logger)):  # noqa: B023 (called at once)
                self.loggers.remove(logger)


def _succeeds(logger: str | Logger, work: Callable[[], Any]) -> bool:
    """Do what a logger may fail at; a failure is a warning."""
    try:
        work()
    except FastMemError:
        # SIGTERM ends the run here.
        raise
    except Exception as error:
        name = logger if isinstance(logger, str) else type(logger).__name__
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        log.warning("trainer.logger: %s stopped (%s); the run goes on without it", name, reason)
        return False
    return True


def _number(value: float | None) -> float:
    # Records have null for what is not finite.
    return float("nan") if value is None else value


def _final_metrics(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Values of ``metrics.json`` under flat names."""
    found: dict[str, float] = {}
    for group, methods in groups.items():
        for method, entry in methods.items():
            for name, metric in entry["metrics"].items():
                found[f"{group}/{method}/{name}"] = _number(metric["value"])
                if metric["standard_error"] is not None:
                    found[f"{group}/{method}/{name}/standard_error"] = metric["standard_error"]
            for name, test in entry.get("against_zero_shot", {}).items():
                found[f"{group}/{method}/{name}/p_value"] = test["p_value"]
    return found
