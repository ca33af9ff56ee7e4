"""A search by trials: batches of points that Optuna chooses, given up on the way or scored at the end.

Imports Optuna, which is an extra: import this module only where a study is asked for.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.data import ContextSample, FastMemDataModule
from fastmem_pl.metrics import METRIC_MODELS, lower_is_better
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.records import split_lines
from fastmem_pl.run.scoring import score_records
from fastmem_pl.search.grid import MEMORY_AXES, SearchSettings, tidy
from fastmem_pl.search.grid_search import SearchResult, key_of, missing, write_results
from fastmem_pl.search.plots import plot_study
from fastmem_pl.search.progress import AnswerProgress, answer_loop
from fastmem_pl.search.ranking import rank
from fastmem_pl.search.study import SharedStudy
from fastmem_pl.search.trial_batch import TrialBatch, TrialModule

if TYPE_CHECKING:
    from fastmem_pl.run.trainer import FastMemTrainer

log = logging.getLogger(__name__)

Record = Mapping[str, Any]


def run_trials(
    trainer: FastMemTrainer,
    model: FastMemModule,
    datamodule: FastMemDataModule,
    settings: SearchSettings,
    path: Path,
    identity: dict[str, Any],
) -> SearchResult:
    """Run trials until the study has as many as were asked for, and rank those of all its workers.

    Args:
        trainer: whose loop runs.
        model: settings of all that is no axis.
        datamodule: the samples.
        settings: of the search, checked.
        path: of the run folder.
        identity: what the folder's records depend on.

    Raises:
        FastMemError: for a study of other settings, or a storage that does not work.
    """
    start = time.perf_counter()
    if trainer.num_devices * trainer.num_nodes > 1:
        raise FastMemError(
            f"trainer.devices: {trainer.num_devices} on {trainer.num_nodes} node(s); workers of an Optuna "
            "study are single processes: start the command once for every device, with one "
            "--search.optuna.storage"
        )
    study = SharedStudy(settings.optuna, path, lower_is_better(settings.objective))
    study.check(_identity(identity, model, datamodule, settings))
    run = trainer.open_run(path, identity, [], model, datamodule)
    try:
        study.open(_identity(run.identity, model, datamodule, settings))
        new = _Worker(trainer, model, datamodule, settings, run, study).work()
        score_records(run, model, datamodule)
        records, unseen = _records_of_all(run, study, model, settings, datamodule.samples)
        points = [_point(model, settings, trial.params) for trial in study.finished()]
        axes = {name: [point[name] for point in points] for name in points[0]}
        ranking = rank(records, settings.objective, axes, settings.optuna.scales())
        ranking.warnings.extend(unseen)
        plots = plot_study(study.study, path, settings.objective)
        begin = start if new else None
        write_results(
            trainer, model, datamodule, run, settings, ranking, records, begin, study.as_dict(), plots
        )
        files = ("search.md", *plots, "search.json")
        return SearchResult(path, ranking, len(datamodule.samples), new, files=files)
    finally:
        study.close()
        run.close()


def _identity(
    identity: Mapping[str, Any], model: FastMemModule, datamodule: FastMemDataModule, settings: SearchSettings
) -> dict[str, Any]:
    """What the trials' values depend on: all that the records do, and on which samples they are judged."""
    # The number of samples says more than the limit, which a run folder lets grow.
    data = {name: value for name, value in identity["data"].items() if name != "limit"}
    return {
        **identity,
        "data": {**data, "samples": len(datamodule.samples)},
        "search": {
            "objective": settings.objective,
            "scorer": [
                model.metric_models[metric.setting.removeprefix("model.")]
                for name, metric in METRIC_MODELS.items()
                if name == settings.objective
            ],
            "every": settings.every,
            "method": settings.chosen_method().name,
            "exact": settings.exact,
            "space": {name: [tidy(name, v) for v in ends] for name, ends in settings.optuna.space.items()},
            "fixed": {
                name: getattr(model.memorization, name)
                for name in MEMORY_AXES
                if name not in settings.optuna.space
            },
        },
    }


def _point(model: FastMemModule, settings: SearchSettings, params: Mapping[str, float]) -> dict[str, float]:
    fixed = {name: getattr(model.memorization, name) for name in MEMORY_AXES}
    return fixed | {name: tidy(name, params[name]) for name in settings.optuna.space}


class _Worker:
    """Runs batches of trials until none is left to ask for."""

    def __init__(
        self,
        trainer: FastMemTrainer,
        model: FastMemModule,
        datamodule: FastMemDataModule,
        settings: SearchSettings,
        run: RunFolder,
        study: SharedStudy,
    ) -> None:
        self._trainer, self._model, self._datamodule = trainer, model, datamodule
        self._settings, self._run, self._study = settings, run, study

    def work(self) -> int:
        """Returns the number of new answers."""
        new = 0
        done, wanted = len(self._study.finished()), self._settings.optuna.trials
        if 0 < done < wanted:
            log.warning("going on in %s: %d of %d trials are finished", self._run.path, done, wanted)
        while trials := self._study.ask():
            batch = TrialBatch(self._study, self._settings.objective, len(self._datamodule.samples))
            for trial in trials:
                batch.add(trial, _point(self._model, self._settings, trial.params))
            try:
                with self._study.alive(trials):
                    new += self._answer(batch)
                    self._complete(batch)
            except BaseException:
                self._study.requeue(batch.left)
                raise
        return new

    def _answer(self, batch: TrialBatch) -> int:
        samples, model = self._datamodule.samples, self._model
        records = self._run.records()
        batch.take(records)
        todo = missing(batch.points(), [sample.index for sample in samples], records)
        if not todo:
            return 0
        search = TrialModule(model, self._settings.chosen_method(), todo, self._settings.exact)
        search.numbers = batch.numbers
        numbers = sorted(batch.numbers.values())
        named = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        bar = AnswerProgress(sum(map(len, todo.values())), f"trial {named}")
        answer_loop(self._trainer, search, model, self._datamodule, self._run, bar, [batch])
        return search.answers

    def _complete(self, batch: TrialBatch) -> None:
        if batch.scored_late:
            score_records(self._run, self._model, self._datamodule)
            batch.take(self._run.records())
        for trial in list(batch.left):
            scores = batch.scores_of(trial)
            if not scores:
                objective = self._settings.objective
                raise FastMemError(
                    f"search.objective: no answer has a score {objective!r}, so trials have no value"
                )
            self._study.finish(trial, sum(scores) / len(scores))
            batch.left.remove(trial)


def _records_of_all(
    run: RunFolder,
    study: SharedStudy,
    model: FastMemModule,
    settings: SearchSettings,
    samples: Sequence[ContextSample],
) -> tuple[list[Record], list[str]]:
    """Records of all workers' finished trials, and lines about those that are not to be had here."""
    trials = study.finished()
    running = study.running()
    elsewhere = (
        f"{running} trials are still running elsewhere; once they are done, the same command ranks them"
    )
    if not trials:
        raise FastMemError(f"search.optuna: no trial is finished yet; {elsewhere}")
    wanted = {sample.index for sample in samples}
    keys = {key_of(_point(model, settings, trial.params)) for trial in trials} | {None}
    folders = {str(run.path.resolve()): None} | {trial.user_attrs.get("run_dir"): None for trial in trials}
    records: dict[tuple[int, Any], Record] = {}
    for folder in filter(None, folders):
        for record in _read(Path(folder) / "predictions.jsonl"):
            key = record["index"], key_of(record["point"])
            if key[0] in wanted and key[1] in keys:
                records.setdefault(key, record)
    seen = {key for _, key in records}
    lost = [t for t in trials if key_of(_point(model, settings, t.params)) not in seen]
    complete = [t.number for t in trials if t.state == TrialState.COMPLETE]
    lines = [elsewhere] if running else []
    if lost:
        places = sorted({str(trial.user_attrs.get("run_dir")) for trial in lost})
        lines.append(
            f"{len(lost)} of {len(trials)} trials are not in this ranking, as their answers cannot be read "
            f"here ({', '.join(places)})"
        )
        if len(lost) == len(trials):
            raise FastMemError(f"search.optuna: {lines[-1]}")
    if not complete:
        lines.append("no trial was complete")
    return list(records.values()), lines


def _read(path: Path) -> list[Record]:
    """Records of a file that another worker may be writing to."""
    if not path.is_file():
        return []
    lines = split_lines(path.read_bytes())
    return [json.loads(line) for line in lines if line.endswith(b"\n")]
