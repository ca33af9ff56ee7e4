"""Keeping batches within memory: how large they are planned, and what is done when one is too large."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fastmem_pl.backbone import Backbone
from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.base.phases import is_out_of_memory
from fastmem_pl.data import BatchLimits
from fastmem_pl.decoding import GraphPool
from fastmem_pl.memory import MemorizationSettings, footprint_of, usable_bytes

log = logging.getLogger(__name__)

# Tokens of question and instruction that room is left for when batches are planned.
_AROUND_CONTEXT = 128
# More rows than these gain little (docs/performance.md).
_MOST_SAMPLES = {"cpu": 16, "other": 32}
# A CPU takes as long for a padded token as for any other, and gains little from large batches.
_SHORTEST = {"cpu": 0.5, "other": 0.0}
_DEFAULT_SAMPLES = 8

Item, Result = TypeVar("Item"), TypeVar("Result")


class Room:
    """What fits on the backbone's device beside its weights.

    Args:
        backbone: that runs the batches.
        settings: of memorizing.
        graphs: recorded steps, which give way when room is short.
        auto: choose the size of batches by the free memory, and halve those that do not fit all the same.
    """

    def __init__(
        self, backbone: Backbone, settings: MemorizationSettings, graphs: GraphPool, auto: bool = True
    ) -> None:
        self._backbone, self._graphs, self._auto = backbone, graphs, auto
        self._footprint = footprint_of(backbone, settings)
        self._too_much: int | None = None

    def limits(
        self,
        answer_tokens: int,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        most: int | None = None,
        budget: float | None = None,
    ) -> BatchLimits:
        """Bounds of a batch: as given, or by the free memory.

        Args:
            answer_tokens: of the longest answer.
            batch_size: samples of a batch; ``None`` for as many as fit.
            max_tokens: padded tokens of a batch; ``None`` for no bound.
            most: further bound of the samples, where several processes share them.
            budget: bytes to fill; by default what is free here.
        """
        most = most or 1 << 30
        if batch_size is not None or not self._auto:
            return BatchLimits(min(most, batch_size or _DEFAULT_SAMPLES), max_tokens)
        kind = "cpu" if self._backbone.device.type == "cpu" else "other"
        usable = usable_bytes(self._backbone.device) if budget is None else budget
        further = _AROUND_CONTEXT + answer_tokens
        return BatchLimits(
            min(most, _MOST_SAMPLES[kind]),
            max_tokens,
            lambda tokens: self._footprint.samples_in(usable, tokens + further),
            _SHORTEST[kind],
        )

    def process(
        self,
        batch: Sequence[Item],
        longest: Callable[[Sequence[Item]], int],
        work: Callable[[Sequence[Item]], list[Result]],
    ) -> list[Result]:
        """Do the work on a batch, in halves when it does not fit at once.

        Args:
            batch: to work on.
            longest: tells the tokens of a batch's longest row, answer included.
            work: returns the results of a batch, in its order.

        Raises:
            OutOfMemoryError: when a single item does not fit, or batches are not to be halved.
        """
        cost = self._footprint.cost(len(batch), longest(batch))
        # What was too much once is not tried again.
        known = self._too_much is not None and len(batch) > 1 and cost >= self._too_much
        if not known:
            if cost > usable_bytes(self._backbone.device):
                self._graphs.clear()
            results = self.attempt(lambda: work(batch))
            if results is not None:
                return results
            # Processes that hold one model together must go on with the same batches.
            if len(batch) == 1 or not self._auto or self._backbone.shards.processes > 1:
                raise OutOfMemoryError(
                    f"out of memory with {len(batch)} sample(s) at once; lower --data.batch_size, "
                    "--model.max_context_tokens or use --trainer.precision bf16-true; "
                    "what was answered before stays, and the same command goes on from there"
                )
            log.warning("out of memory with %d samples at once; trying %d", len(batch), len(batch) // 2)
            self._too_much = cost
        half = len(batch) // 2
        return self.process(batch[:half], longest, work) + self.process(batch[half:], longest, work)

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """Do the work; when out of memory, again without recorded steps; ``None`` when it does not fit."""
        for held in (bool(self._graphs), False):
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, so that the traceback no longer keeps the tensors alive.
            self._free_memory()
            # Graphs of earlier batches may have been what was too much.
            if not held:
                break
        return None

    def _free_memory(self) -> None:
        self._graphs.clear()
        gc.collect()
        if self._backbone.device.type == "cuda":
            torch.cuda.empty_cache()
