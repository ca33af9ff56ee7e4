"""Lightning loggers by name, and what a run tells them: settings, curves, scores and final metrics."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Self

import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fastmem_pl.base.errors import FastMemError, TerminatedError, unknown
from fastmem_pl.run.identity import flatten

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
        elif not hasattr(each, "log_metrics"):
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
    """A logger that writes to the run folder's ``logs/``; what an earlier session left there goes.

    MLflow and W&B keep earlier sessions as runs of their own. ``MLFLOW_TRACKING_URI``,
    ``MLFLOW_EXPERIMENT_NAME``, ``WANDB_MODE`` and ``WANDB_PROJECT`` are minded.
    """
    run_path = run_path.resolve()
    logs = run_path / FOLDER
    if name == "csv":
        return TableLogger(run_path, name=FOLDER, version="")
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
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
    # By default a run would wait four minutes for a server that is not there, and longer for a silent one.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
    place: dict[str, Any] = {"tracking_uri": uri}
    if not uri:
        (logs / name).mkdir(parents=True, exist_ok=True)
        # A folder of plain files, Lightning's default, is refused by MLflow from version 3.
        place["tracking_uri"] = f"sqlite:///{(logs / name / 'mlflow.db').as_posix()}"
        place["artifact_location"] = (logs / name / "artifacts").as_uri()
    return MLFlowLogger(experiment, run_path.name, synchronous=False, **place)


class TableLogger(CSVLogger):
    """Lightning's logger, whose file keeps its columns in the order they come in.

    It takes the place of an earlier session's file. New columns come late in a run: the final metrics are as
    many as there are groups, methods and scores. They are added without the whole file in memory.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The file's writer."""
        if self._experiment is None:
            with warnings.catch_warnings():
                # That it deletes the earlier file.
                warnings.simplefilter("ignore")
                self._experiment = _TableWriter(self.log_dir)
        return self._experiment


class _TableWriter(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.metrics_keys = ["step"]

    def save(self) -> None:
        """Append what was logged since."""
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        path, before = Path(self.metrics_file_path), len(self.metrics_keys)
        self.metrics_keys = list(dict.fromkeys([*self.metrics_keys, *(key for row in rows for key in row)]))
        there = path.is_file()
        if there and len(self.metrics_keys) > before:
            self._widen(path, len(self.metrics_keys) - before)
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys, lineterminator="\n")
            if not there:
                writer.writeheader()
            writer.writerows(rows)

    def _widen(self, path: Path, added: int) -> None:
        wider = path.with_suffix(".partial")
        try:
            with open(path, newline="") as old, open(wider, "w", newline="") as new:
                reader, writer = csv.reader(old), csv.writer(new, lineterminator="\n")
                next(reader)
                writer.writerow(self.metrics_keys)
                writer.writerows([*row, *[""] * added] for row in reader)
            os.replace(wider, path)
        finally:
            wider.unlink(missing_ok=True)


class RunLog:
    """Tells the loggers of a run what its samples gave, one sample after another.

    Every update of a memory is a step of its own: ``cross_entropy``, ``kl``, ``grad_norm`` and ``sample``,
    the index in the data. The scores of a sample follow as ``<method>/<score>``, and at the end of the run
    the metrics as ``<group>/<method>/<metric>`` with ``/standard_error`` and ``/p_value``. Steps only grow.

    Loggers are made when there is something to tell. One that fails is left out from then on, with a line in
    the log: the results are in the run folder. The line comes once the run has gone on or was stopped by a
    signal, since what ends both (a full disk, a folder that is gone) is for the run to say.

    Args:
        chosen: of :func:`select_loggers`.
        run_path: folder of the run.
        config_text: resolved settings, as YAML.
    """

    def __init__(self, chosen: Sequence[str | Logger], run_path: Path, config_text: str) -> None:
        self.loggers: list[Logger] = []
        self.is_open = False
        self._chosen, self._run_path, self._config_text = chosen, run_path, config_text
        self._working: list[Logger] = []
        self._own: list[Logger] = []
        self._settings: dict[str, Any] = {}
        self._step = 0
        # Names of the scores that were told of each sample; most samples share one set.
        self._told: dict[int, frozenset[str]] = {}
        self._kinds: dict[frozenset[str], frozenset[str]] = {}
        self._finished = False
        self._unsaid: list[str] = []

    def open(self) -> None:
        """Make the loggers, unless that was done, and tell them the settings."""
        if self.is_open:
            return
        self.is_open = True
        settings = flatten(yaml.safe_load(self._config_text) or {})
        # What loggers are given may be for their eyes only.
        self._settings = {k: v for k, v in settings.items() if not k.startswith("trainer.logger")}
        for choice in self._chosen:
            with self._guarded(choice):
                logger = choice if not isinstance(choice, str) else make_logger(choice, self._run_path)
                if logger is not choice:
                    self._own.append(logger)
                self.loggers.append(logger)
                logger.log_hyperparams(self._settings)
                self._working.append(logger)
        self._say()

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Tell of samples; what was told before is left out.

        Args:
            records: with ``index`` and, where there are any, ``curve``, ``method`` and ``scores``; those of
                all methods of a sample.
        """
        self.open()
        self._say()
        if not self._working:
            return
        samples: dict[int, list[Mapping[str, Any]]] = {}
        for record in records:
            samples.setdefault(record["index"], []).append(record)
        for index, own in samples.items():
            if index not in self._told:
                # Methods share the memory and its curve.
                curve = next((record["curve"] for record in own if record.get("curve")), {})
                # A record of an earlier session may be damaged: what its curve lacks is told as not finite.
                for values in zip_longest(*curve.values()):
                    self._log({"sample": index, **dict(zip(curve, map(_number, values), strict=True))})
            told = self._told.get(index, frozenset())
            scores = {
                f"{record['method']}/{name}": _number(value)
                for record in own
                for name, value in record.get("scores", {}).items()
            }
            if scores.keys() - told:
                self._log({"sample": index, **{k: v for k, v in scores.items() if k not in told}})
            names = told.union(scores)
            self._told[index] = self._kinds.setdefault(names, names)
        self._tell(lambda logger: logger.save())

    def finish(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Tell the final metrics.

        Args:
            groups: of ``metrics.json``.
        """
        self._say()
        metrics = _final_metrics(groups)
        if metrics:
            self._log(metrics, final=True)
        self._finished = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # By its status, as another process of the run may have been the one that was stopped.
        asked = getattr(error, "exit_status", None) == TerminatedError.exit_status
        self.close(stopped=asked or isinstance(error, (KeyboardInterrupt, SystemExit)))

    def close(self, stopped: bool = False) -> None:
        """End what the loggers have open; whether the run was finished is its status.

        Args:
            stopped: whether a signal ended the run, which says nothing of what a logger met.
        """
        self._tell(lambda logger: logger.finalize("success" if self._finished else "failed"))
        # Another run of this program would go on in it; one that was given is its owner's to end.
        runs = [logger for logger in self._working if logger in self._own and isinstance(logger, WandbLogger)]
        self._tell(lambda logger: logger.experiment.finish(int(not self._finished)), runs)
        self._working = []
        if self._finished or stopped:
            self._say()

    def _say(self) -> None:
        """Warn of the loggers that failed."""
        while self._unsaid:
            log.warning("%s", self._unsaid.pop(0))

    def _log(self, metrics: Mapping[str, float], final: bool = False) -> None:
        step, self._step = self._step, self._step + 1
        settings = self._settings

        def tell(logger: Logger) -> None:
            if isinstance(logger, MLFlowLogger):
                # It takes no + in names.
                items = iter((name.replace("+", "_"), value) for name, value in metrics.items())
                while part := dict(islice(items, _MLFLOW_LIMIT)):
                    logger.log_metrics(part, step)
            elif final and isinstance(logger, TensorBoardLogger):
                # Its table of runs has settings beside metrics.
                logger.log_hyperparams(settings, dict(metrics), step)
            else:
                logger.log_metrics(dict(metrics), step)

        self._tell(tell)

    def _tell(self, tell: Callable[[Logger], Any], loggers: Sequence[Logger] | None = None) -> None:
        for logger in list(self._working if loggers is None else loggers):
            with self._guarded(logger):
                tell(logger)

    @contextmanager
    def _guarded(self, logger: str | Logger) -> Iterator[None]:
        """Go on without a logger that fails."""
        # The process that writes the results is the one that logs, whatever number a scheduler gave it.
        rank, rank_zero_only.rank = getattr(rank_zero_only, "rank", 0), 0
        try:
            yield
        except FastMemError:
            # The end that SIGTERM asks for.
            raise
        except Exception as error:
            name = logger if isinstance(logger, str) else type(logger).__name__
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._unsaid.append(f"trainer.logger: {name} stopped ({reason}); the run goes on without it")
            self._working = [other for other in self._working if other is not logger]
        finally:
            rank_zero_only.rank = rank


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
            for name, test in entry["against_zero_shot"].items():
                found[f"{group}/{method}/{name}/p_value"] = test["p_value"]
    return found
