"""What a search needs of a run's step, by today's calls; each function stands for a method of the module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.data import ContextSample
from fastmem_pl.decoding import Decoding, DecodingSettings, Generated, Method, Prefill, PrefillCache
from fastmem_pl.memory import Footprint, Memory, usable_bytes
from fastmem_pl.run.encoding import EncodedSample
from fastmem_pl.run.predict import FastMemModule

log = logging.getLogger(__name__)

Item, Result = TypeVar("Item"), TypeVar("Result")


def encode(model: FastMemModule, samples: Sequence[ContextSample]) -> list[EncodedSample]:
    """``model.encode(samples)``."""
    return [model.encoder(sample) for sample in samples]


def prefills(model: FastMemModule, encoded: Sequence[EncodedSample]) -> PrefillCache:
    """Prompts of a batch, read when they are first needed."""
    num_layers = model.memorization.num_layers
    return PrefillCache(
        lambda form: Prefill(
            model.backbone, [s.prompts[form] for s in encoded], num_layers, model.early_layers(form)
        ),
        model.meter,
    )


def answer(
    model: FastMemModule,
    samples: Sequence[ContextSample],
    encoded: Sequence[EncodedSample],
    method: Method,
    memory: Memory | None,
    prefills: PrefillCache,
    decoding: DecodingSettings,
) -> tuple[list[Generated], float]:
    """``model.answer(samples, encoded, method, memory, prefills, decoding)``."""
    forms = [method.prompt, *["without_context"] * model.decoder_of(method).needs_without_context]
    prompts, *without_context = (prefills.take(form) for form in forms)
    with model.meter.measure("decode") as timing:
        answers = Decoding(
            prompts,
            method.decoder,
            decoding,
            memory and memory.to(model.backbone.compute_dtype).deltas,
            *without_context,
            keys=[sample.index for sample in samples],
            # A pool holds graphs for one number of rows, and that of the points is the frequent one.
            graphs=model.graphs if len(samples) > 1 else None,
        ).run()
    return answers, timing["seconds"]


def record(
    model: FastMemModule,
    sample: ContextSample,
    method: Method,
    generated: Generated,
    encoded: EncodedSample,
    seconds: dict[str, float],
    memory: Memory | None,
    row: int,
) -> dict[str, Any]:
    """``model.record(sample, method, generated, encoded, seconds, memory, row)``."""
    made = model.record(sample, method, generated, encoded, seconds)
    made["curve"] = memory.curves[row].as_dict() if memory else None
    made["status"] = memory.status[row] if memory else "ok"
    return made


def rows_that_fit(model: FastMemModule, wanted: int, tokens: int) -> int:
    """``budget.rows_that_fit(tokens)``."""
    footprint, device = Footprint.of(model.backbone, model.memorization), model.backbone.device
    fitting = footprint.samples_in(usable_bytes(device), tokens)
    if fitting < wanted and model.graphs:
        model.graphs.clear()
        fitting = footprint.samples_in(usable_bytes(device), tokens)
    return fitting


def halving(
    work: Callable[[Sequence[Item]], list[Result]],
    items: Sequence[Item],
    model: FastMemModule,
    sample: ContextSample,
) -> list[Result]:
    """``halving(work, items, budget)``."""
    results = model.room.attempt(lambda: work(items))
    if results is not None:
        return results
    if len(items) == 1 or not model.auto_batch:
        raise OutOfMemoryError(
            f"out of memory with one point of sample {sample.id}; lower "
            "--model.memorize.max_context_tokens or use --trainer.precision bf16-true; what is done stays, "
            "and the same command goes on from there"
        )
    log.warning("out of memory with %d settings at once; trying %d", len(items), len(items) // 2)
    half = len(items) // 2
    return halving(work, items[:half], model, sample) + halving(work, items[half:], model, sample)
