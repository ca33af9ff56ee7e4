"""One context memorized under many settings at once, as rows of a batch, with a look at several steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fastmem_pl.backbone import EncodedContext
from fastmem_pl.memory.loss import MemorizationBatch, prepare
from fastmem_pl.memory.memorizer import Memorizer, ReadContexts
from fastmem_pl.memory.memory import Memory
from fastmem_pl.memory.module import MemorizationModule
from fastmem_pl.memory.sampled import SampledBatch, SampledContext, sampling_fits
from fastmem_pl.memory.settings import MemorizationSettings


class ContextReader:
    """The trunk's pass over one context, from which all settings memorize it.

    Args:
        memorizer: of the model; its settings are those that all rows share.
        encoded: the context.
        sample_vocabulary: estimate the loss from a sample of the vocabulary where that can be done
            (:mod:`fastmem_pl.memory.sampled`); otherwise it is computed from all of it.
    """

    def __init__(self, memorizer: Memorizer, encoded: EncodedContext, sample_vocabulary: bool = True) -> None:
        self._memorizer, self._backbone = memorizer, memorizer.backbone
        self._read: ReadContexts = memorizer.read([encoded])
        self._tail = self._backbone.tail(memorizer.settings.num_layers)
        self._sampled: SampledContext | None = None
        if sample_vocabulary and sampling_fits(self._tail):
            with self._backbone.numerics():
                self._sampled = SampledContext(self._tail, self._read)

    @property
    def errors(self) -> list[float]:
        """Errors of the sampled loss in nats a token, one for every time that it was checked."""
        return self._sampled.vocabulary.errors if self._sampled else []

    def snapshots(
        self, rows: Sequence[MemorizationSettings], stops: Sequence[int]
    ) -> Iterator[tuple[int, Memory]]:
        """Memorize under the settings of each row, which may differ in learning rate and kl_coeff.

        With a constant learning rate, fewer steps are the beginning of more (paper, section 4.1).

        Args:
            rows: settings, one a row.
            stops: numbers of steps to stop at, ascending; 0 for the base model.

        Yields:
            number of steps, and the memory of all rows then. Its deltas go on being trained: use or copy
            them before the next.
        """
        backbone, count = self._backbone, len(rows)
        with backbone.numerics(grad=True):
            settings = replace(self._memorizer.settings, steps=max(stops))
            module = MemorizationModule(backbone, count, settings, rows)
            batch = self._prepare(count) if settings.steps else None
            steps = self._memorizer.run(module, [batch], settings.steps)
        taken = 0
        for stop in stops:
            while taken < stop:
                with backbone.numerics(grad=True):
                    taken = next(steps)
            with backbone.numerics():
                memory = module.memory()
                if self._sampled and stop and stop == stops[-1]:
                    self._sampled.vocabulary.check()
            yield stop, memory

    def _prepare(self, count: int) -> MemorizationBatch | SampledBatch:
        if self._sampled:
            return self._sampled.batch(count)
        read, budget = self._read, self._memorizer.reference_budget()
        labels, mask = (t.expand(count, -1) for t in (read.labels, read.label_mask))
        with self._backbone.numerics():
            return prepare(self._tail, read.inputs.expand(count), labels, mask, budget)
