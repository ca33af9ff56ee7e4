"""Answers of one sample at many points, at little more than the price of one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from fastmem_pl.data import ContextSample
from fastmem_pl.decoding import BASELINE, METHODS, Method
from fastmem_pl.memory import ContextReader, Memory
from fastmem_pl.run.callbacks import SampleProgress
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.records import Record
from fastmem_pl.search.grid import AXES, Point, Todo, key_of

# Rows memorized together at most, and on a CPU the padded tokens of them: more gain nothing, and their
# activations would fill the memory.
_MOST_ROWS, _CPU_TOKENS = 32, 4096


class SearchModule(LightningModule):
    """Answers every sample zero-shot and at every point of ``todo``; ``progress`` is notified of answers.

    Args:
        model: its settings hold where a point does not say otherwise.
        method: method that is searched for.
        trials: numbers of the trials by key of their points, to be written into the records.
    """

    def __init__(self, model: FastMemModule, method: Method, trials: Mapping[Any, int] | None = None) -> None:
        super().__init__()
        # Kept out of the module tree, as the model keeps its backbone.
        object.__setattr__(self, "_model", model)
        self._method, self._trials = method, trials
        numbers = sorted({min(trials.values()), max(trials.values())}) if trials else []
        self.mode = f"trial {'-'.join(map(str, numbers))}" if trials else "search"
        self.todo: Todo = {}
        self.progress: Callable[[int], None] = lambda count: None

    def configure_model(self) -> None:
        """Load the model; trials have it already."""
        if self._trials is None:
            self._model.load_for(self.trainer)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the texts alone."""
        return batch

    def predict_step(self, batch: list[ContextSample], batch_idx: int = 0) -> list[Record]:
        """Evaluate samples, one after the other; returns one record per sample and point."""
        records = []
        for sample in batch:
            search = SampleSearch(self._model, sample, self._method, self.progress)
            records += search.run(self.todo[sample.index])
        if self._trials is not None:
            records = [{**record, "trial": self._trials.get(key_of(record["point"]))} for record in records]
        return records

    def leave_out(self, point: Point) -> None:
        """Evaluate a point no further."""
        for todo in self.todo.values():
            if point in todo:
                todo.remove(point)
                self.progress(1)


class SampleSearch:
    """One sample under search: the trunk reads its prompts and its context once."""

    def __init__(
        self, model: FastMemModule, sample: ContextSample, method: Method, progress: Callable[[int], None]
    ) -> None:
        self._model, self._sample, self._method, self._progress = model, sample, method, progress
        (self._encoded,) = model.encode([sample])
        self._prefills = model.prefills([self._encoded])
        self._reader: ContextReader | None = None
        self._reading, self._num_rows, self._num_points = 0.0, 1, 1

    def run(self, todo: Sequence[Point | None]) -> list[Record]:
        """A record for every point, and for zero-shot where ``None`` is among them.

        Raises:
            OutOfMemoryError: when a single row does not fit.
        """
        rows: dict[tuple[float, float], list[Point]] = defaultdict(list)
        for point in filter(None, todo):
            rows[point["learning_rate"], point["kl_coeff"]].append(point)
        # Rows that go on longest first, so that those of one chunk stop at the same steps.
        ordered = sorted(rows.values(), key=lambda row: -max(p["steps"] for p in row))
        self._num_rows, self._num_points = len(ordered), len(todo)
        budget, tokens = self._model.budget, self._encoded.longest + self._model.longest_answer
        records: list[Record] = []
        if None in todo:
            records += budget.in_halves(self._answer_zero_shot, [None], lambda rows: tokens)
        while ordered:
            most = min(_MOST_ROWS, budget.rows_that_fit(tokens, len(ordered)))
            if self._model.backbone.device.type == "cpu":
                most = min(most, _CPU_TOKENS // len(self._encoded.context.input_ids))
            chunk, ordered = ordered[: max(1, most)], ordered[max(1, most) :]
            records += budget.in_halves(self._answer_rows, chunk, lambda rows: tokens)
        return records

    def _answer_zero_shot(self, _: Sequence[None]) -> list[Record]:
        records = self._answers(METHODS[BASELINE], None, 0.0, [None], {})
        self._progress(1)
        return records

    def _answer_rows(self, rows: Sequence[Sequence[Point]]) -> list[Record]:
        records: list[Record] = []
        try:
            for steps, memory, seconds in self._memories(rows):
                found = self._at_step(rows, steps, memory, seconds)
                records += found
                self._progress(len(found))
        except BaseException:
            self._progress(-len(records))
            raise
        return records

    def _memories(self, rows: Sequence[Sequence[Point]]) -> Iterator[tuple[int, Memory, float]]:
        """Numbers of steps that points have, the memory of all rows then, and seconds of a row so far."""
        model = self._model
        settings = [
            replace(model.memorization, learning_rate=row[0]["learning_rate"], kl_coeff=row[0]["kl_coeff"])
            for row in rows
        ]
        stops = sorted({point["steps"] for row in rows for point in row})
        if self._reader is None:
            with model.meter.measure("memorize") as timing:
                self._reader = ContextReader(model.memorizer, self._encoded.context)
            self._reading = timing["seconds"]
        snapshots, seconds = self._reader.snapshots(settings, stops), self._reading / self._num_rows
        for _ in stops:
            with model.meter.measure("memorize") as timing:
                steps, memory = next(snapshots)
            seconds += timing["seconds"] / len(rows)
            yield steps, memory.to(model.backbone.compute_dtype), seconds

    def _at_step(
        self, rows: Sequence[Sequence[Point]], steps: int, memory: Memory, seconds: float
    ) -> list[Record]:
        # Points that differ in the decoder's settings only share a memory, not a decode.
        by_decoder: dict[Any, dict[int, Point]] = defaultdict(dict)
        for number, row in enumerate(rows):
            for point in row:
                if point["steps"] == steps:
                    own = {name: value for name, value in point.items() if AXES[name].group == "decode"}
                    by_decoder[key_of(own)][number] = point
        records = []
        for own, asked in by_decoder.items():
            used = memory if len(asked) == len(rows) else memory.rows(list(asked))
            records += self._answers(self._method, used, seconds, [*asked.values()], dict(own))
        return records

    def _answers(
        self,
        method: Method,
        memory: Memory | None,
        seconds: float,
        points: Sequence[Point | None],
        settings: Mapping[str, float],
    ) -> list[Record]:
        """Records of rows that answer the one prompt."""
        decoding = replace(self._model.decoding, **settings)
        samples = [self._sample] * len(points)
        answers, decode = self._model.answer(
            samples, method, memory, self._prefills, decoding, sharing=self._num_points
        )
        share = {"memorize": seconds, "decode": decode}
        return [
            {
                **self._model.record(self._sample, method, answers[row], self._encoded, share, memory, row),
                "point": point and dict(point),
            }
            for row, point in enumerate(points)
        ]


class AnswerProgress(SampleProgress):
    """Counts answers: a sample has one for every point. Those of an earlier session count as done."""

    unit = "answer"

    def __init__(self, total: int) -> None:
        super().__init__()
        self._total = total

    def extent(self, trainer: Trainer, pl_module: LightningModule) -> tuple[int, int]:
        """Answers that are there, and all."""
        return self._total - sum(map(len, pl_module.todo.values())), self._total

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        super().on_predict_start(trainer, pl_module)
        if not self.count:
            pl_module.progress = self._bar.update

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance where the answers of other processes are counted; else the module notifies of every one."""
        if self.count:
            super().on_predict_batch_end(*args, **kwargs)
