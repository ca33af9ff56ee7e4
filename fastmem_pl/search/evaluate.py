"""Answers of one sample at many points, at little more than the price of one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from fastmem_pl.data import ContextSample
from fastmem_pl.decoding import BASELINE, METHODS, Method, PrefillCache, SharedPrefill
from fastmem_pl.memory import ContextReader, Memory
from fastmem_pl.run.callbacks import SampleProgress
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.search import step
from fastmem_pl.search.grid import AXES, Point, key_of

# Rows memorized together at most, and on a CPU the padded tokens of them: more gain nothing, and their
# activations would fill the memory.
_MOST_ROWS, _CPU_TOKENS = 32, 4096

Record = dict[str, Any]


class SearchModule(LightningModule):
    """Answers every sample zero-shot and at every point that is asked for.

    Args:
        model: with the backbone loaded; its settings hold where a point does not say otherwise.
        method: that is searched for.
        todo: points to evaluate by index of the sample; ``None`` among them stands for zero-shot.
        trials: numbers of the trials by key of their points, to be written into the records.

    Attributes:
        progress: notified of the number of answers that came.
    """

    def __init__(
        self,
        model: FastMemModule,
        method: Method,
        todo: Mapping[int, list[Point | None]],
        trials: Mapping[Any, int] | None = None,
    ) -> None:
        super().__init__()
        # Kept out of the module tree, as the model keeps its backbone.
        object.__setattr__(self, "_model", model)
        self._method, self.todo, self._trials = method, todo, trials
        numbers = sorted({min(trials.values()), max(trials.values())}) if trials else []
        self.mode = f"trial {'-'.join(map(str, numbers))}" if trials else "search"
        self.progress: Callable[[int], None] = lambda count: None

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the texts alone."""
        return batch

    def predict_step(self, batch: list[ContextSample], batch_idx: int = 0) -> list[Record]:
        """Evaluate samples, one after the other; returns one record per sample and point."""
        records = []
        for sample in batch:
            records += SampleSearch(self._model, sample, self._method).run(
                self.todo[sample.index], self.progress
            )
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
    """One sample under search: the trunk reads its prompts and its context once.

    Args:
        model: whose settings hold wherever a point does not say otherwise.
        sample: to answer about.
        method: that is searched for.
    """

    def __init__(self, model: FastMemModule, sample: ContextSample, method: Method) -> None:
        self._model, self._sample, self._method = model, sample, method
        (self._encoded,) = step.encode(model, [sample])
        self._prefills = step.prefills(model, [self._encoded])
        self._reader: ContextReader | None = None
        # Shared by all points: seconds of the context's pass.
        self._reading, self._num_rows, self._num_points = 0.0, 1, 1

    def run(self, todo: Sequence[Point | None], progress: Callable[[int], None]) -> list[Record]:
        """A record for every point, and for zero-shot where ``None`` is among them.

        Args:
            todo: to evaluate.
            progress: notified of records as they come.

        Raises:
            OutOfMemoryError: when a single row does not fit.
        """
        rows: dict[tuple[float, float], list[Point]] = defaultdict(list)
        for point in filter(None, todo):
            rows[point["learning_rate"], point["kl_coeff"]].append(point)
        # Rows that go on longest first, so that those of one chunk stop at the same steps.
        ordered = sorted(rows.values(), key=lambda row: -max(p["steps"] for p in row))
        self._num_rows, self._num_points = len(ordered), len(todo)

        def work(chunk: Sequence[Sequence[Point]]) -> list[Record]:
            records: list[Record] = []
            try:
                for found in self._evaluate(chunk):
                    records += found
                    progress(len(found))
            except BaseException:
                progress(-len(records))
                raise
            return records

        records = step.halving(self._zero_shot, [None], self._model, self._sample) if None in todo else []
        progress(len(records))
        while ordered:
            most = self._rows_at_once(len(ordered))
            records += step.halving(work, ordered[:most], self._model, self._sample)
            ordered = ordered[most:]
        return records

    def _zero_shot(self, _: Sequence[None]) -> list[Record]:
        method = METHODS[BASELINE]
        (answer,), seconds = self._answer(method, None, 1, {})
        share = {"memorize": 0.0, "decode": seconds + sum(self._prefills.seconds.values())}
        return [self._record(method, answer, share, None, 0, None)]

    def _rows_at_once(self, wanted: int) -> int:
        model = self._model
        fitting = step.rows_that_fit(model, wanted, self._encoded.longest + model.longest_answer)
        if model.backbone.device.type == "cpu":
            fitting = min(fitting, _CPU_TOKENS // len(self._encoded.context.input_ids))
        return max(1, min(_MOST_ROWS, fitting))

    def _evaluate(self, rows: Sequence[Sequence[Point]]) -> Iterator[list[Record]]:
        """Records by number of steps, in the course of the rows' common fit."""
        model = self._model
        settings = [
            replace(model.memorization, learning_rate=row[0]["learning_rate"], kl_coeff=row[0]["kl_coeff"])
            for row in rows
        ]
        stops = sorted({point["steps"] for row in rows for point in row})
        if self._reader is None:
            with model.meter.measure("memorize") as timing:
                self._reader = ContextReader(model.memorizer, self._encoded.context, False)
            self._reading = timing["seconds"]
        snapshots, memorize = self._reader.snapshots(settings, stops), 0.0
        for _ in stops:
            with model.meter.measure("memorize") as timing:
                steps, memory = next(snapshots)
            memorize += timing["seconds"]
            yield self._at_step(rows, steps, memory, memorize / len(rows) + self._reading / self._num_rows)

    def _at_step(
        self, rows: Sequence[Sequence[Point]], steps: int, memory: Memory, memorize: float
    ) -> list[Record]:
        # Points that differ in the decoder's settings only share a memory, not a decode.
        by_decoder: dict[Any, list[tuple[int, Point]]] = defaultdict(list)
        for number, row in enumerate(rows):
            for point in row:
                if point["steps"] == steps:
                    own = {name: value for name, value in point.items() if AXES[name].group == "decode"}
                    by_decoder[key_of(own)].append((number, point))
        records = []
        for own, asked in by_decoder.items():
            numbers = [number for number, _ in asked]
            used = memory if numbers == list(range(len(rows))) else memory.rows(numbers)
            answers, seconds = self._answer(self._method, used, len(asked), dict(own))
            prompts = sum(self._prefills.seconds.values()) / self._num_points
            share = {"memorize": memorize, "decode": seconds / len(asked) + prompts}
            for place, (_, point) in enumerate(asked):
                records.append(self._record(self._method, answers[place], share, used, place, dict(point)))
        return records

    def _record(
        self,
        method: Method,
        answer: Any,
        seconds: dict[str, float],
        memory: Memory | None,
        row: int,
        point: Point | None,
    ) -> Record:
        record = step.record(self._model, self._sample, method, answer, self._encoded, seconds, memory, row)
        return {**record, "point": point}

    def _answer(
        self, method: Method, memory: Memory | None, count: int, settings: Mapping[str, float]
    ) -> tuple[Sequence[Any], float]:
        """Answers of ``count`` rows to the one prompt, and the seconds that they took."""
        decoding = replace(self._model.decoding, **settings)
        prefills = _SharedPrefills(self._prefills, count) if count > 1 else self._prefills
        samples, encoded = [self._sample] * count, [self._encoded] * count
        return step.answer(self._model, samples, encoded, method, memory, prefills, decoding)


class _SharedPrefills:
    """Prefills of one prompt as those of many rows; stands in for a :class:`PrefillCache`."""

    def __init__(self, prefills: PrefillCache, count: int) -> None:
        self._prefills, self._count = prefills, count

    def take(self, form: str) -> SharedPrefill:
        return SharedPrefill(self._prefills.take(form), self._count)


class AnswerProgress(SampleProgress):
    """Counts answers: a sample has one for every point.

    Args:
        total: answers of the whole search; those of an earlier session count as done.
        count: gives the number of answers so far, where other processes give some of them.
    """

    def __init__(self, total: int, count: Callable[[], int] | None = None) -> None:
        super().__init__()
        self._total, self._count = total, count

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        super().on_predict_start(trainer, pl_module)
        self._bar.unit, self._bar.total = "answer", self._total
        self._bar.initial = self._bar.n = self._total - sum(map(len, pl_module.todo.values()))
        self._bar.refresh()
        if not self._count:
            pl_module.progress = self._bar.update

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance where the answers are counted; else the module notifies of every one."""
        if self._count:
            super().on_predict_batch_end(*args, **kwargs)
