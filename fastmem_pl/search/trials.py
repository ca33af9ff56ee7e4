"""A search by trials of Optuna, which is an extra: import this module only where a study is asked for."""

from __future__ import annotations

import logging
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
from lightning.pytorch import Callback, Trainer
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.metrics import METRIC_MODELS, find_score
from fastmem_pl.run.identity import differences
from fastmem_pl.run.records import Record, merge_records
from fastmem_pl.search.evaluate import SearchModule
from fastmem_pl.search.grid import AXES, OptunaSettings, key_of, missing
from fastmem_pl.search.job import SearchJob, SearchResult
from fastmem_pl.search.ranking import rank
from fastmem_pl.search.summary import plot_study

log = logging.getLogger(__name__)

# Seconds between heartbeats, and without one until a worker's trials go to others.
_HEARTBEAT, _GRACE = 60, 180
_SQLITE_TIMEOUT = 60
_FINISHED, _RUNNING = (TrialState.COMPLETE, TrialState.PRUNED), (TrialState.RUNNING,)
# User attributes: what the study depends on, and the folder of the run that has a trial.
_IDENTITY, _FOLDER = "fastmem", "run_dir"
# The mean of the first few samples says nothing, and the median pruner would keep whatever began well.
_UNREPORTED_SHARE = 4


def search_by_trials(job: SearchJob) -> SearchResult:
    """Run trials until the study has as many as were asked for, and rank those of all its workers."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings, run = job.settings.optuna, job.run
    try:
        url = make_url(settings.storage or f"sqlite:///{job.path.resolve() / 'optuna.db'}")
    except (SQLAlchemyError, ValueError):
        wrong = f"search.optuna.storage: {settings.storage!r} is no URL; such as sqlite:///study.db"
        raise FastMemError(wrong) from None
    with warnings.catch_warnings():
        # Heartbeats beside ask and tell work, and workers need both.
        warnings.filterwarnings("ignore", message=".*supposed to be used with Study.optimize")
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if settings.storage:
            # Mistakes in it show before the model is loaded and anything is written.
            with _connected(url) as storage:
                if settings.study in optuna.get_all_study_names(storage):
                    _check(optuna.load_study(study_name=settings.study, storage=storage), job, url)
        try:
            # The study may lie in the run folder, and needs neither loop nor other processes.
            if job.trainer.pool is None:
                job.model.load_for(job.trainer)
            job.trainer.open_run(run, job.model, job.datamodule)
            with _connected(url) as storage:
                return _search(job, _open_study(job, url, storage), url)
        finally:
            run.close()


def distributions_of(space: Mapping[str, Sequence[float]]) -> dict[str, BaseDistribution]:
    """Ranges as Optuna takes them."""
    return {
        name: (IntDistribution if AXES[name].whole else FloatDistribution)(
            *map(AXES[name].tidy, ends), log=AXES[name].logarithmic
        )
        for name, ends in space.items()
    }


def sampler_of(settings: OptunaSettings, begun: int, folder: Path) -> optuna.samplers.BaseSampler:
    """The sampler of one session of one worker, where the study has begun some trials.

    It needs random numbers of its own: with the same ones it would ask for the points that are there.
    """
    if settings.sampler == "qmc":
        # Counts its points in the storage, and needs one seed for all of them.
        return optuna.samplers.QMCSampler(seed=settings.seed, scramble=True, warn_independent_sampling=False)
    worker = zlib.crc32(str(folder.resolve()).encode()) if settings.storage else 0
    seed = int(np.random.SeedSequence([settings.seed, begun, worker]).generate_state(1)[0])
    if settings.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _search(job: SearchJob, study: optuna.Study, url: URL) -> SearchResult:
    """Run what is left, and rank all."""
    settings, notes = job.settings.optuna, []
    done = len(_trials(study, _FINISHED))
    if 0 < done < settings.trials:
        log.warning("going on in %s: %d of %d trials are finished", job.path, done, settings.trials)
    while trials := _ask(job, study):
        with ExitStack() as alive:
            for trial in trials:
                alive.enter_context(get_heartbeat_thread(trial._trial_id, study._storage))
            TrialBatch(job, study, trials).run()
    if running := len(_trials(study, _RUNNING)):
        notes.append(f"{running} trials are still running elsewhere: later, the same command ranks them too")
    finished = _trials(study, _FINISHED)
    if not finished:
        raise FastMemError(f"search.optuna: no trial is finished yet; {notes[0]}")
    records = _records_of_all(job, finished, notes)
    points = [job.settings.point(job.model, trial.params) for trial in finished]
    ranges = {name: (*ends, AXES[name].logarithmic) for name, ends in settings.space.items()}
    ranking = rank(records, job.settings.objective, points, ranges)
    ranking.warnings.extend(notes)
    states = Counter(trial.state.name.lower() for trial in _trials(study))
    state = {"name": settings.study, "storage": repr(url), "trials": dict(sorted(states.items()))}
    return job.finish(ranking, state, plot_study(study, job.path, job.settings.objective))


def _trials(study: optuna.Study, states: tuple[TrialState, ...] | None = None) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _ask(job: SearchJob, study: optuna.Study) -> list[Trial]:
    """The next trials to run."""
    settings, trials = job.settings.optuna, []
    fail_stale_trials(study)
    # A worker that was killed in the moment after it had asked left a trial without a folder.
    running = sum(_FOLDER in trial.user_attrs for trial in _trials(study, _RUNNING))
    left = settings.trials - len(_trials(study, _FINISHED)) - running
    for _ in range(min(settings.parallel, left)):
        trial = study.ask(distributions_of(settings.space))
        trial.set_user_attr(_FOLDER, str(job.path.resolve()))
        trials.append(trial)
    return trials


class TrialBatch(Callback):
    """Trials that run at once, by the keys of their points: in small spaces several may have one."""

    def __init__(self, job: SearchJob, study: optuna.Study, trials: Sequence[Trial]) -> None:
        self._job, self._study = job, study
        self._objective, self._samples = job.settings.objective, len(job.samples)
        self.points: dict[Any, dict[str, float]] = {}
        self.trials: dict[Any, list[Trial]] = defaultdict(list)
        for trial in trials:
            point = job.settings.point(job.model, trial.params)
            self.points[key_of(point)] = point
            self.trials[key_of(point)].append(trial)
        self.scores: dict[Any, dict[int, float]] = {key: {} for key in self.points}

    def run(self) -> None:
        """Answer what is missing, and end the trials."""
        records = self._job.run.records()
        self._take(records)
        if todo := missing(self.points.values(), self._job.samples, records):
            numbers = {key: trials[0].number for key, trials in self.trials.items()}
            self._job.answer(lambda: todo, self, numbers)
        if self._objective in METRIC_MODELS:
            self._take(self._job.scored_records())
        for key, trials in self.trials.items():
            scores = self.scores[key].values()
            if trials and not scores:
                raise FastMemError(f"search.objective: no answer has a score {self._objective!r}")
            for trial in trials:
                self._study.tell(trial, fmean(scores), skip_if_finished=True)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: SearchModule, outputs: list[Record], *args: Any
    ) -> None:
        """Report, and leave out what is given up."""
        self._take(outputs)
        for key, scores in self.scores.items():
            if not scores or len(scores) < self._samples / _UNREPORTED_SHARE or not self.trials[key]:
                continue
            mean = fmean(scores.values())
            self.trials[key] = [t for t in self.trials[key] if not self._falls_behind(t, mean, len(scores))]
            if not self.trials[key]:
                # Workers elsewhere have their shares of it already.
                self._job.search.leave_out(self.points[key])

    def _take(self, records: Sequence[Record]) -> None:
        for record in records:
            if self._objective in record["scores"] and key_of(record["point"]) in self.scores:
                self.scores[key_of(record["point"])][record["index"]] = record["scores"][self._objective]

    def _falls_behind(self, trial: Trial, mean: float, samples: int) -> bool:
        try:
            trial.report(mean, step=samples)
        except optuna.exceptions.UpdateFinishedTrialError:
            log.warning("trial %d went to another worker, as this one gave no sign of life", trial.number)
            return True
        if samples == self._samples or not trial.should_prune():
            return False
        self._study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        return True


def _records_of_all(job: SearchJob, finished: Sequence[FrozenTrial], notes: list[str]) -> list[Record]:
    """Records of all workers' trials; a note is added about those that cannot be read here."""
    job.scored_records()
    folders = {trial.user_attrs[_FOLDER] for trial in finished} - {str(job.path.resolve())}
    name, indices = job.run.predictions_path.name, {sample.index for sample in job.samples}
    merged = merge_records([job.path / name, *(Path(folder) / name for folder in sorted(folders))], [])
    records = [record for _, record in merged if record["index"] in indices]
    points = {key_of(record["point"]) for record in records}
    lost = [t for t in finished if key_of(job.settings.point(job.model, t.params)) not in points]
    if lost:
        places = ", ".join(sorted({trial.user_attrs[_FOLDER] for trial in lost}))
        notes.append(f"answers of {len(lost)} of {len(finished)} trials cannot be read here ({places})")
        if len(lost) == len(finished):
            raise FastMemError(f"search.optuna: {notes[-1]}")
    return records


def _open_study(job: SearchJob, url: URL, storage: RDBStorage) -> optuna.Study:
    """Make the study, or join it; what this folder's earlier process left undone is queued again."""
    settings = job.settings.optuna
    pruner = optuna.pruners.MedianPruner if settings.pruner == "median" else optuna.pruners.NopPruner
    direction = "minimize" if find_score(job.settings.objective).lower_is_better else "maximize"
    wanted = {"study_name": settings.study, "direction": direction, "pruner": pruner()}
    study = optuna.create_study(storage=storage, load_if_exists=True, **wanted)
    _check(study, job, url)
    study.set_user_attr(_IDENTITY, job.run.identity)
    study.sampler = sampler_of(settings, len(_trials(study)), job.path)
    for trial in _trials(study, _RUNNING):
        # This process holds the folder's lock, so the one that began the trial is gone.
        if not settings.storage or trial.user_attrs.get(_FOLDER) == str(job.path.resolve()):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            storage.get_heartbeat_stale_trial_callback()(study, trial)
    return study


def _check(study: optuna.Study, job: SearchJob, url: URL) -> None:
    """Refuse a study of other settings."""
    found = study.user_attrs.get(_IDENTITY)
    if found is None and not _trials(study):
        return
    optional = {"model.fingerprint"}  # not known before the model is loaded
    different = differences(found, job.run.identity, optional) if found else ["fastmem did not make it"]
    if different:
        raise FastMemError(
            f"search.optuna.study: {study.study_name!r} in {url!r} is of other settings "
            f"({'; '.join(different)}); give another"
        )


@contextmanager
def _connected(url: URL) -> Iterator[RDBStorage]:
    """The storage; what goes wrong with it is raised as a :class:`FastMemError`."""
    sqlite = url.get_backend_name() == "sqlite"
    alive = {"heartbeat_interval": _HEARTBEAT, "grace_period": _GRACE}
    alive["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback()
    arguments = {"connect_args": {"timeout": _SQLITE_TIMEOUT}} if sqlite else None
    storage: RDBStorage | None = None
    try:
        storage = RDBStorage(url.render_as_string(hide_password=False), arguments, **alive)
        yield storage
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, ImportError) as error:
        # The last two only while it is opened: tables of another Optuna, or no driver.
        if storage is not None and not isinstance(error, (SQLAlchemyError, optuna.exceptions.OptunaError)):
            raise
        cause = str(getattr(error.__cause__, "orig", None) or getattr(error, "orig", None) or error)
        raise FastMemError(
            f"search.optuna.storage: {url!r} failed: {' '.join(cause.split())}; what was answered "
            "stays, and the same command goes on from there"
        ) from error
    finally:
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()
