"""Answers of one sample at many points, at little more than the price of one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule

from fastmem_pl.data import ContextSample
from fastmem_pl.decoding import BASELINE, METHODS, Method
from fastmem_pl.memory import Memory
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.records import Record
from fastmem_pl.search.grid import AXES, Point, Todo, key_of

# Rows memorized together at most, and on a CPU the padded tokens of them: more gain nothing, and their
# activations would fill the memory.
_MOST_ROWS, _CPU_TOKENS = 32, 4096


class SearchModule(LightningModule):
    """Answers every sample zero-shot and at every point of ``todo``.

    The model's settings hold where a point does not say otherwise. ``trials`` are the numbers of Optuna's
    trials by key of their points, to be written into the records.
    """

    def __init__(self, model: FastMemModule, method: Method, trials: Mapping[Any, int] | None = None) -> None:
        super().__init__()
        # Kept out of the module tree, as the model keeps its backbone.
        object.__setattr__(self, "_model", model)
        self._method, self._trials = method, trials
        self.mode = "search"
        self.todo: Todo = {}

    def configure_model(self) -> None:
        """Load the model; trials have it already."""
        if self._trials is None:
            self._model.load_for(self.trainer)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the texts alone."""
        return batch

    def predict_step(self, batch: list[ContextSample], batch_idx: int = 0) -> list[Record]:
        """Evaluate a batch of one sample; returns one record per point."""
        (sample,) = batch
        records = SampleSearch(self._model, sample, self._method).run(self.todo[sample.index])
        if self._trials is not None:
            records = [{**record, "trial": self._trials.get(key_of(record["point"]))} for record in records]
        return records

    def leave_out(self, point: Point) -> None:
        """Evaluate a point no further."""
        for todo in self.todo.values():
            if point in todo:
                todo.remove(point)


class SampleSearch:
    """One sample under search: the trunk reads its prompts and its context once."""

    def __init__(self, model: FastMemModule, sample: ContextSample, method: Method) -> None:
        self._model, self._sample, self._method = model, sample, method
        (self._encoded,) = model.encode([sample])
        self._prefills = model.prefills([self._encoded])
        # What the trunk makes of the context.
        self._read: Any = None
        self._reading, self._num_rows, self._num_points = 0.0, 1, 1

    def run(self, todo: Sequence[Point | None]) -> list[Record]:
        """A record for every point, and for zero-shot where ``None`` is among them."""
        by_settings: dict[tuple[float, float], list[Point]] = defaultdict(list)
        for point in filter(None, todo):
            by_settings[point["learning_rate"], point["kl_coeff"]].append(point)
        # Rows that go on longest first, so that those of one chunk stop at the same steps.
        ordered = sorted(by_settings.values(), key=lambda row: -max(p["steps"] for p in row))
        self._num_rows, self._num_points = len(ordered), len(todo)
        budget, tokens = self._model.budget, self._encoded.longest + self._model.longest_answer
        records: list[Record] = []
        if None in todo:
            for attempt in budget.attempts([None], lambda rows: tokens):
                with attempt as points:
                    records += self._answers(METHODS[BASELINE], None, 0.0, points)
        while ordered:
            most = min(_MOST_ROWS, budget.rows_that_fit(tokens, len(ordered)))
            if self._model.backbone.device.type == "cpu":
                most = min(most, _CPU_TOKENS // len(self._encoded.context.input_ids))
            chunk, ordered = ordered[: max(1, most)], ordered[max(1, most) :]
            for attempt in budget.attempts(chunk, lambda rows: tokens):
                with attempt as rows:
                    records += self._answer_rows(rows)
        return records

    def _answer_rows(self, rows: Sequence[Sequence[Point]]) -> list[Record]:
        """Memorize with the settings of every row, and answer wherever points stop on the way."""
        model, records = self._model, []
        settings = [
            replace(model.memorization, learning_rate=row[0]["learning_rate"], kl_coeff=row[0]["kl_coeff"])
            for row in rows
        ]
        stops = sorted({point["steps"] for row in rows for point in row})
        if self._read is None:
            with model.meter.measure("memorize") as timing:
                self._read = model.memorizer.read([self._encoded.context])
            self._reading = timing["seconds"]
        snapshots = model.memorizer.snapshots(self._read, settings, stops)
        seconds = self._reading / self._num_rows
        for _ in stops:
            with model.meter.measure("memorize") as timing:
                steps, memory = next(snapshots)
            seconds += timing["seconds"] / len(rows)
            records += self._at_step(rows, steps, memory.to(model.backbone.compute_dtype), seconds)
        return records

    def _at_step(
        self, rows: Sequence[Sequence[Point]], steps: int, memory: Memory, seconds: float
    ) -> list[Record]:
        # Points that differ in the decoder's settings only share a memory, not a decode.
        by_decoder: dict[Any, dict[int, Point]] = defaultdict(dict)
        for number, row in enumerate(rows):
            for point in row:
                if point["steps"] == steps:
                    by_decoder[key_of(_decoding_of(point))][number] = point
        records = []
        for asked in by_decoder.values():
            used = memory if len(asked) == len(rows) else memory.rows(list(asked))
            records += self._answers(self._method, used, seconds, [*asked.values()])
        return records

    def _answers(
        self, method: Method, memory: Memory | None, seconds: float, points: Sequence[Point | None]
    ) -> list[Record]:
        """Records of rows that answer the one prompt, with one decoder."""
        decoding = replace(self._model.decoding, **_decoding_of(points[0] or {}))
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


def _decoding_of(point: Point) -> dict[str, float]:
    return {name: value for name, value in point.items() if AXES[name].group == "decode"}
