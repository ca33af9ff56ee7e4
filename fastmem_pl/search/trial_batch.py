"""Trials that run at once: whose records are whose, what is reported on the way, and who is given up.

Imports Optuna, which is an extra: import this module only where a study is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.trial import Trial

from fastmem_pl.data import ContextSample
from fastmem_pl.metrics import METRIC_MODELS
from fastmem_pl.search.grid import Point
from fastmem_pl.search.grid_search import key_of
from fastmem_pl.search.search_module import SearchModule
from fastmem_pl.search.study import SharedStudy

Record = Mapping[str, Any]

# The mean of the first few samples says nothing, and the median pruner would keep whatever began well.
_UNTOLD_SHARE = 4


class TrialModule(SearchModule):
    """Writes into each record whose trial it belongs to."""

    numbers: Mapping[Any, int]
    answers = 0

    def predict_step(self, batch: list[ContextSample], batch_idx: int = 0) -> list[dict[str, Any]]:
        """As of any search, with the number of the trial in each record."""
        records = super().predict_step(batch, batch_idx)
        for record in records:
            record["trial"] = record["point"] and self.numbers[key_of(record["point"])]
        self.answers += len(records)
        return records


class TrialBatch(Callback):
    """Trials that run at once: reports their means sample by sample, and gives up those that fall behind."""

    def __init__(self, study: SharedStudy, objective: str, samples: int) -> None:
        self._study, self._objective, self._samples = study, objective, samples
        self._points: dict[int, dict[str, float]] = {}
        self._scores: dict[Any, dict[int, float]] = {}
        self.left: list[Trial] = []
        self.numbers: dict[Any, int] = {}
        self.scored_late = objective in METRIC_MODELS

    def add(self, trial: Trial, point: dict[str, float]) -> None:
        """Run this trial in the batch."""
        self.left.append(trial)
        self._points[trial.number] = point
        self._scores[key_of(point)] = {}
        self.numbers.setdefault(key_of(point), trial.number)

    def points(self) -> list[Point]:
        """Each once; trials in small spaces may share one."""
        return list({key_of(point): point for point in self._points.values()}.values())

    def scores_of(self, trial: Trial) -> list[float]:
        """What is known of a trial, by sample."""
        return list(self._scores[key_of(self._points[trial.number])].values())

    def take(self, records: Sequence[Record]) -> None:
        """Note the scores of the batch's points."""
        for record in records:
            scores = self._scores.get(key_of(record["point"]))
            if scores is not None and self._objective in record["scores"]:
                scores[record["index"]] = record["scores"][self._objective]

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Sequence[Record], *args: Any
    ) -> None:
        """Report, and take what is given up out of what is left to do."""
        self.take(outputs)
        if self.scored_late:
            return
        for trial in list(self.left):
            scores = self.scores_of(trial)
            if len(scores) < self._samples / _UNTOLD_SHARE:
                continue
            behind = self._study.report(trial, sum(scores) / len(scores), len(scores))
            if behind and len(scores) < self._samples:
                self._study.finish(trial)
                self.left.remove(trial)
                self._leave_out(self._points[trial.number], pl_module)

    def _leave_out(self, point: Point, module: SearchModule) -> None:
        if any(self._points[trial.number] == point for trial in self.left):
            return
        for todo in module.todo.values():
            if point in todo:
                todo.remove(point)
                module.progress(1)
