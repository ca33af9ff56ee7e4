"""An Optuna study that may be stopped at any time, goes on later, and is shared by several workers.

Imports Optuna, which is an extra: import this module only where a study is asked for.
"""

from __future__ import annotations

import functools
import json
import logging
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.run.identity import differences
from fastmem_pl.search.optuna_settings import OptunaSettings
from fastmem_pl.search.sampler import SeededByTrial, place_of

log = logging.getLogger(__name__)

# Seconds between signs of life, and without one until a worker's trials go to others.
_HEARTBEAT, _GRACE = 60, 180
_SQLITE_TIMEOUT = 60
_IDENTITY, _FOLDER, _HOST = "fastmem", "run_dir", "host"
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def _in_one_line(method: Callable[..., Any]) -> Callable[..., Any]:
    """Raise what goes wrong with the storage as a :class:`FastMemError`."""

    @functools.wraps(method)
    def wrapped(self: SharedStudy, *args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():
                # Heartbeats beside ask and tell are what this class is for.
                warnings.filterwarnings("ignore", message=".*supposed to be used with Study.optimize")
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return method(self, *args, **kwargs)
        except (SQLAlchemyError, RuntimeError, optuna.exceptions.OptunaError, ImportError, OSError) as error:
            cause = str(getattr(error.__cause__, "orig", None) or getattr(error, "orig", None) or error)
            raise FastMemError(
                f"search.optuna.storage: {self.url} failed: {' '.join(cause.split())}; what was answered "
                "stays, and the same command goes on from there"
            ) from error

    return wrapped


class SharedStudy:
    """The study of a search, as one of its workers sees it. Nothing is written before :meth:`open`.

    Args:
        settings: of the study.
        folder: of this worker's results, which no other process writes to.
        minimize: whether a small objective is the good one.
    """

    def __init__(self, settings: OptunaSettings, folder: Path, minimize: bool) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.settings, self._minimize = settings, minimize
        self._folder, self._host = str(folder.resolve()), socket.gethostname()
        self._distributions = settings.distributions()
        self._url = make_url(settings.storage or f"sqlite:///{Path(self._folder) / 'optuna.db'}")
        self.url = self._url.render_as_string(hide_password=True)
        self._storage: RDBStorage | None = None
        self.study: optuna.Study | None = None

    @_in_one_line
    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse a study of other settings, should there be one already; reads only.

        Raises:
            FastMemError: naming the settings that differ.
        """
        file = self._url.database if self._url.get_backend_name() == "sqlite" else None
        if file and not Path(file).is_file():
            if self.settings.storage and not Path(file).absolute().parent.is_dir():
                raise FastMemError(f"search.optuna.storage: {self.url}: no such folder; make it first")
            return
        self._connect()
        try:
            self.study = optuna.load_study(study_name=self.settings.study, storage=self._storage)
            self._compare(identity)
        except KeyError:
            return
        finally:
            self.close()

    @_in_one_line
    def open(self, identity: Mapping[str, Any]) -> None:
        """Make the study, or join it; what this folder's earlier process left undone is queued again.

        Raises:
            FastMemError: for a study of other settings, or a storage that does not work.
        """
        pruners = {"median": optuna.pruners.MedianPruner, "none": optuna.pruners.NopPruner}
        self._connect()
        self.study = optuna.create_study(
            storage=self._storage,
            study_name=self.settings.study,
            sampler=SeededByTrial(self.settings, self._distributions),
            pruner=pruners[self.settings.pruner](),
            direction="minimize" if self._minimize else "maximize",
            load_if_exists=True,
        )
        self._compare(identity)
        if _IDENTITY not in self.study.user_attrs:
            self.study.set_user_attr(_IDENTITY, json.loads(json.dumps(identity)))
        self.requeue([trial for trial in self._trials() if self._is_dead(trial)])

    def close(self) -> None:
        """Leave the storage."""
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
        self._storage = self.study = None

    @_in_one_line
    def ask(self) -> list[Trial]:
        """The next trials to run, at most ``settings.parallel``; none when nothing is left to ask for."""
        optuna.storages.fail_stale_trials(self.study)
        asked: list[Trial] = []
        left = self.settings.trials - len(self.finished()) - self.running()
        for _ in range(min(self.settings.parallel, left)):
            trial = self.study.ask(self._distributions)
            trial.set_user_attr(_HOST, self._host)
            trial.set_user_attr(_FOLDER, self._folder)
            self._beat(trial.number)
            if place_of(self._trials(), trial.number) >= self.settings.trials:
                # Another worker asked at the same moment.
                self.study.tell(trial, state=TrialState.FAIL)
                break
            asked.append(trial)
        return asked

    @_in_one_line
    def report(self, trial: Trial, value: float, samples: int) -> bool:
        """Keep the mean after so many samples; returns whether the trial should be given up."""
        try:
            trial.report(value, step=samples)
        except optuna.exceptions.UpdateFinishedTrialError:
            log.warning("trial %d went to another worker, as this one gave no sign of life", trial.number)
            return True
        return trial.should_prune()

    @_in_one_line
    def finish(self, trial: Trial, value: float | None = None) -> None:
        """End a trial with its value, or give it up: its last report is all that will be known of it."""
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        self.study.tell(trial, value, state=state, skip_if_finished=True)

    @_in_one_line
    def requeue(self, trials: Sequence[Trial | FrozenTrial]) -> None:
        """Let trials that were not finished be run again, by whoever asks next."""
        for trial in trials:
            told = self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            if told.state == TrialState.FAIL:
                _queue_again(self.study, told)

    @_in_one_line
    def finished(self) -> list[FrozenTrial]:
        """Trials that are complete or were given up, of all workers."""
        return [trial for trial in self._trials() if trial.state in _FINISHED]

    @_in_one_line
    def running(self) -> int:
        """How many trials are at work, of all workers."""
        return sum(trial.state == TrialState.RUNNING for trial in self._trials())

    @contextmanager
    def alive(self, trials: Sequence[Trial]) -> Iterator[None]:
        """Give signs of life for these trials meanwhile, so that no other worker takes them over."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_HEARTBEAT):
                try:
                    for trial in trials:
                        self._beat(trial.number)
                except Exception as error:  # one sign of life may be missed
                    log.debug("no heartbeat: %s", error)
            self._storage.remove_session()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def as_dict(self) -> dict[str, Any]:
        """Where the study is, and how many trials are in which state."""
        states = Counter(trial.state.name.lower() for trial in self._trials())
        return {"name": self.settings.study, "storage": self.url, "trials": dict(sorted(states.items()))}

    def _connect(self) -> None:
        sqlite = self._url.get_backend_name() == "sqlite"
        self._storage = RDBStorage(
            self._url.render_as_string(hide_password=False),
            engine_kwargs={"connect_args": {"timeout": _SQLITE_TIMEOUT}} if sqlite else None,
            heartbeat_interval=_HEARTBEAT,
            grace_period=_GRACE,
            heartbeat_stale_trial_callback=_queue_again,
        )

    def _compare(self, identity: Mapping[str, Any]) -> None:
        found = self.study.user_attrs.get(_IDENTITY)
        if found is None and not self.finished():
            return
        optional = {"model.fingerprint"}  # not known before the model is loaded
        different = ["fastmem did not make it"] if found is None else differences(found, identity, optional)
        if different:
            raise FastMemError(
                f"search.optuna.study: {self.settings.study!r} in {self.url} is of other settings "
                f"({'; '.join(different)}); give another --search.optuna.study, or the settings of that one"
            )

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether a trial is running by its state only: this process has its folder's lock."""
        if trial.state != TrialState.RUNNING:
            return False
        if _FOLDER in trial.user_attrs:
            # Containers have folders of the same name.
            here = trial.user_attrs.get(_HOST, self._host) == self._host
            return here and trial.user_attrs[_FOLDER] == self._folder
        # Killed in the moment after it was asked for, before it had a heartbeat.
        old = datetime.now() - trial.datetime_start > timedelta(seconds=_GRACE)
        return old or self.settings.storage is None

    def _beat(self, number: int) -> None:
        study = self._storage.get_study_id_from_name(self.settings.study)
        self._storage.record_heartbeat(self._storage.get_trial_id_from_study_id_trial_number(study, number))

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)


def _queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    if trial.params:
        study.enqueue_trial(trial.params)
