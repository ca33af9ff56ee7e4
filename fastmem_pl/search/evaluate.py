"""Answers and losses of one sample at many points, at little more than the price of one."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.data import ContextSample
from fastmem_pl.decoding import BASELINE, METHODS, Method, Prefills, decode
from fastmem_pl.memory import ContextReader, Footprint, Memory, usable_bytes
from fastmem_pl.run.encoding import EncodedSample
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.search.grid import DECODER_AXES, Point

log = logging.getLogger(__name__)

# Rows memorized together at most, and on a CPU the padded tokens of them: more gain nothing, and their
# activations would fill the memory.
_MOST_ROWS, _CPU_TOKENS = 32, 4096

Record = dict[str, Any]


class SampleSearch:
    """One sample under search: its prompts and its context are read by the trunk once.

    Args:
        model: whose settings hold wherever a point does not say otherwise.
        sample: to answer about.
        method: that is searched for.
        exact: compute losses from the whole vocabulary.
    """

    def __init__(self, model: FastMemModule, sample: ContextSample, method: Method, exact: bool) -> None:
        self._model, self._sample, self._method, self._exact = model, sample, method, exact
        self._encoded: EncodedSample = model.encoder(sample)
        settings = model.settings
        self._prefills = Prefills(
            model.backbone,
            {form: [prompt] for form, prompt in self._encoded.prompts.items()},
            settings.num_layers,
            {form: model.early_layers(form) for form in self._encoded.prompts},
            model.meter,
        )
        self._reader: ContextReader | None = None
        # What all points have in common is shared out among them: seconds of the context's pass.
        self._reading, self._num_rows, self._num_points = 0.0, 1, 1
        self._footprint = Footprint.of(model.backbone, settings)

    @property
    def loss_error(self) -> float | None:
        """Largest error of the sampled loss that was seen, in nats a token; ``None`` without a check."""
        errors = self._reader.errors if self._reader else []
        return max(map(abs, errors), default=None)

    def zero_shot(self) -> Record:
        """The record of the base model.

        Raises:
            OutOfMemoryError: when it does not fit.
        """
        found = self._model.room.attempt(lambda: self._answer(METHODS[BASELINE], None, 1, {}))
        if found is None:
            raise self._too_large()
        (answer,), seconds = found
        seconds += sum(self._prefills.seconds.values())
        return self._record(METHODS[BASELINE], answer, {"memorize": 0.0, "decode": seconds}, None, None, 0)

    def points(self, points: Sequence[Point], progress: Callable[[int], None]) -> list[Record]:
        """A record for every point.

        Args:
            points: to evaluate.
            progress: told how many are done, as they are.

        Raises:
            OutOfMemoryError: when a single row does not fit.
        """
        rows: dict[tuple[float, float], list[Point]] = defaultdict(list)
        for point in points:
            rows[point["learning_rate"], point["kl_coeff"]].append(point)
        # Rows that go on longest first, so that those of one chunk stop at the same steps.
        ordered = sorted(rows.values(), key=lambda row: -max(p["steps"] for p in row))
        self._num_rows, self._num_points = len(ordered), len(points)
        records: list[Record] = []
        while ordered:
            most = self._rows_at_once(len(ordered))
            chunk, ordered = ordered[:most], ordered[most:]
            records += self._in_memory(chunk, progress)
        return records

    def _rows_at_once(self, wanted: int) -> int:
        """How many of the rows that are left go together."""
        model = self._model
        tokens, device = self._encoded.longest + model.longest_answer, model.backbone.device
        fitting = self._footprint.samples_in(usable_bytes(device), tokens)
        if fitting < wanted and model.graphs:
            model.graphs.clear()
            fitting = self._footprint.samples_in(usable_bytes(device), tokens)
        if device.type == "cpu":
            fitting = min(fitting, _CPU_TOKENS // len(self._encoded.context.input_ids))
        return max(1, min(_MOST_ROWS, fitting))

    def _in_memory(self, rows: Sequence[Sequence[Point]], progress: Callable[[int], None]) -> list[Record]:
        """Evaluate rows, in halves where they do not fit together."""
        records: list[Record] = []

        def work() -> list[Record]:
            if records:
                progress(-len(records))
                records.clear()
            for found in self._evaluate(rows):
                records.extend(found)
                progress(len(found))
            return records

        if self._model.room.attempt(work) is not None:
            return records
        if records:
            progress(-len(records))
        if len(rows) == 1 or not self._model.hparams.auto_batch:
            raise self._too_large()
        log.warning("out of memory with %d settings at once; trying %d", len(rows), len(rows) // 2)
        half = len(rows) // 2
        return self._in_memory(rows[:half], progress) + self._in_memory(rows[half:], progress)

    def _too_large(self) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"out of memory with one point of sample {self._sample.id}; lower --model.max_context_tokens or "
            "use --trainer.precision bf16-true; what is done stays, and the same command goes on from there"
        )

    def _evaluate(self, rows: Sequence[Sequence[Point]]) -> Iterator[list[Record]]:
        """Records by number of steps, as the rows' common fit comes by."""
        model = self._model
        settings = [
            replace(model.settings, learning_rate=row[0]["learning_rate"], kl_coeff=row[0]["kl_coeff"])
            for row in rows
        ]
        stops = sorted({point["steps"] for row in rows for point in row})
        with model.meter.measure("memorize") as timing:
            if self._reader is None:
                self._reader = ContextReader(model.memorizer, self._encoded.context, not self._exact)
        self._reading += timing["seconds"]
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
        by_decoder: dict[tuple[tuple[str, float], ...], list[tuple[int, Point]]] = defaultdict(list)
        for number, row in enumerate(rows):
            for point in row:
                if point["steps"] == steps:
                    own = tuple((name, point[name]) for name in DECODER_AXES if name in point)
                    by_decoder[own].append((number, point))
        records = []
        for own, asked in by_decoder.items():
            numbers = [number for number, _ in asked]
            used = memory if numbers == list(range(len(rows))) else memory.rows(numbers)
            answers, seconds = self._answer(self._method, used, len(asked), dict(own))
            prompts = sum(self._prefills.seconds.values()) / self._num_points
            share = {"memorize": memorize, "decode": seconds / len(asked) + prompts}
            for place, (_, point) in enumerate(asked):
                records.append(self._record(self._method, answers[place], share, point, used, place))
        return records

    def _answer(
        self, method: Method, memory: Memory | None, count: int, decoder_settings: dict[str, float]
    ) -> tuple[Sequence[Any], float]:
        """Answers of ``count`` rows to the one prompt, and the seconds that they took."""
        model = self._model
        answers, seconds, _ = decode(
            self._prefills,
            method.decoder,
            replace(model.decoding, **decoder_settings),
            memory and memory.to(model.backbone.compute_dtype).deltas,
            method.prompt,
            rows=count,
            keys=[self._sample.index] * count,
            # A pool holds graphs for one number of rows, and that of the points is the frequent one.
            graphs=model.graphs if count > 1 else None,
        )
        return answers, seconds

    def _record(
        self,
        method: Method,
        answer: Any,
        seconds: dict[str, float],
        point: Point | None,
        memory: Memory | None,
        row: int,
    ) -> Record:
        record = self._model.record(self._sample, method, answer, self._encoded, seconds)
        record["curve"] = memory.curves[row].as_dict() if memory else None
        record["status"] = memory.status[row] if memory else "ok"
        record["point"] = dict(point) if point else None
        return record
