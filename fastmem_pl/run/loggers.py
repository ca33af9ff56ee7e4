"""Lightning's loggers by name, and the callback that feeds them: settings, curves, scores, final metrics."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from fastmem_pl.base.errors import FastMemError, one_line, unknown
from fastmem_pl.run.identity import flatten

log = logging.getLogger(__name__)

NAMES = ("csv", "tensorboard", "wandb", "mlflow")
_FOLDER = "logs"
_PROJECT = "fastmem"


def select_loggers(given: object) -> list[str | Logger]:
    """Names and objects in what ``trainer.logger`` was given; nothing is made yet.

    That is a name, several with commas between, a Lightning logger, a list of either, ``False`` for none;
    ``True`` and ``None`` ask for the default.

    >>> select_loggers("csv,csv")
    ['csv']
    """
    if given is False:
        return []
    if given is None or given is True:
        given = "csv"
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",")]
    several = list(given) if isinstance(given, Iterable) else [given]
    for each in several:
        if isinstance(each, str):
            if each not in NAMES:
                raise unknown("trainer.logger", each, (*NAMES, "false"))
            # tensorboardX writes the same files.
            packages = {"csv": ["lightning"], "tensorboard": ["tensorboard", "tensorboardX"]}
            if not any(map(importlib.util.find_spec, packages.get(each, [each]))):
                raise FastMemError(
                    f"trainer.logger: {each} needs a package that is not here; pip install {each}"
                )
        elif not isinstance(each, Logger):
            raise FastMemError(
                f"trainer.logger: {each!r} is no logger; allowed: {', '.join(NAMES)}, "
                "Lightning's loggers, or false"
            )
    return list(dict.fromkeys(several))


def make_logger(name: str, run_path: Path) -> Logger:
    """A Lightning logger that writes to the run folder's ``logs/``; an earlier session's files are replaced.

    MLflow and W&B keep earlier sessions as runs of their own, and follow ``MLFLOW_TRACKING_URI``,
    ``MLFLOW_EXPERIMENT_NAME``, ``WANDB_MODE`` and ``WANDB_PROJECT``.
    """
    run_path = run_path.resolve()
    logs = run_path / _FOLDER
    if name == "csv":
        logger = CSVLogger(run_path, name=_FOLDER, version="")
        with warnings.catch_warnings():
            # That the earlier file will be deleted.
            warnings.simplefilter("ignore")
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
    # It speaks of the tables that it makes, and would wait minutes for a server that is not there.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
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

    Loggers are made when the run folder is open. One that fails is left out from then on, with a warning:
    the results are in the run folder. Callbacks find the loggers as ``trainer.loggers`` while batches run.
    ``config_text`` has the resolved settings, as YAML.
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

    def open(self) -> None:
        """Make the loggers and give them the settings."""
        for choice in self._chosen:
            with self._left_out_if_it_fails(choice):
                logger = make_logger(choice, self._run_path) if isinstance(choice, str) else choice
                logger.log_hyperparams(self._settings)
                self.loggers.append(logger)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the loggers to callbacks."""
        trainer.loggers = self.loggers

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        """Log the samples of a batch."""
        self.add(outputs)

    def teardown(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Hide the loggers from Lightning, which would close them."""
        trainer.loggers = []

    on_exception = teardown

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Log samples, without what was logged of them before; records of a sample come together.

        They have an ``index`` and, where there are any, ``curve``, ``method`` and ``scores``.
        """
        if not self.loggers:
            return
        for index, group in groupby(records, key=itemgetter("index")):
            own, rows = list(group), []
            if index not in self._logged:
                # Methods share the memory and its curve.
                curve = next((record["curve"] for record in own if record.get("curve")), {})
                # A record of an earlier session may be damaged: what its curve lacks is not finite.
                steps = zip_longest(*curve.values())
                rows = [dict(zip(curve, map(_number, values), strict=True)) for values in steps]
            scores = {
                f"{record['method']}/{name}": _number(value)
                for record in own
                for name, value in record.get("scores", {}).items()
            }
            logged = self._logged.setdefault(index, set())
            rows.append({name: value for name, value in scores.items() if name not in logged})
            logged.update(scores)
            for row in filter(None, rows):
                self._log({"sample": index, **row})
        self._each(lambda logger: logger.save())

    def add_final(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Log the final metrics, ``groups`` of ``metrics.json``."""
        self._log(_final_metrics(groups), final=True)
        self._each(lambda logger: logger.save())

    def close(self, finished: bool) -> None:
        """End what the loggers have open; their status says whether the run was finished."""

        def end(logger: Logger) -> None:
            logger.finalize("success" if finished else "failed")
            # Another run of this program would go on in it; one that was given is its owner's to end.
            if isinstance(logger, WandbLogger) and logger not in self._chosen:
                logger.experiment.finish()

        self._each(end)

    def _log(self, metrics: Mapping[str, float], final: bool = False) -> None:
        step, self._step = self._step, self._step + 1

        def pass_on(logger: Logger) -> None:
            if final and isinstance(logger, TensorBoardLogger):
                # Its table of runs has settings beside metrics.
                logger.log_hyperparams(self._settings, dict(metrics), step)
                return
            # MLflow takes no + in names.
            plus = "_" if isinstance(logger, MLFlowLogger) else "+"
            logger.log_metrics({name.replace("+", plus): value for name, value in metrics.items()}, step)

        self._each(pass_on)

    def _each(self, work: Callable[[Logger], Any]) -> None:
        for logger in list(self.loggers):
            with self._left_out_if_it_fails(logger):
                work(logger)

    @contextmanager
    def _left_out_if_it_fails(self, logger: str | Logger) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            name = logger if isinstance(logger, str) else type(logger).__name__
            log.warning("trainer.logger: %s stopped (%s); the run goes on without it", name, one_line(error))
            if logger in self.loggers:
                self.loggers.remove(logger)


def _number(value: float | None) -> float:
    # Records have null for what is not finite.
    return float("nan") if value is None else value


def _final_metrics(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Values of ``metrics.json`` under flat names."""
    found: dict[str, float | None] = {}
    for group, methods in groups.items():
        for method, entry in methods.items():
            for name, metric in entry["metrics"].items():
                found[f"{group}/{method}/{name}"] = _number(metric["value"])
                found[f"{group}/{method}/{name}/standard_error"] = metric["standard_error"]
            for name, test in entry["against_zero_shot"].items():
                found[f"{group}/{method}/{name}/p_value"] = test["p_value"]
    return {name: value for name, value in found.items() if value is not None}
