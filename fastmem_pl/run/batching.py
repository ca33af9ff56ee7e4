"""Keeping batches within memory: how large they are planned, and what is done when one is too large."""

import functools
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from fastmem_pl.backbone import Backbone, usable_bytes
from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.base.phases import is_out_of_memory
from fastmem_pl.data import BatchLimits
from fastmem_pl.decoding import GraphPool
from fastmem_pl.memory import MemorizationSettings, footprint_of

log = logging.getLogger(__name__)

# Tokens of question and instruction that room is left for when batches are planned.
_AROUND_CONTEXT = 128
# More rows than these gain little (docs/performance.md).
_MOST_SAMPLES = {"cpu": 16, "other": 32}
# A CPU takes as long for a padded token as for any other, and gains little from large batches.
_SHORTEST = {"cpu": 0.5, "other": 0.0}
_DEFAULT_SAMPLES = 8

Item = TypeVar("Item")


class MemoryBudget:
    """What fits on the backbone's device beside its weights; recorded steps (``graphs``) give way.

    Unless ``auto``, batches have a fixed size, and those that do not fit are not halved.
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
        """Bounds of a batch: as given, or by the free memory, a ``budget`` in bytes.

        There are at most ``max_tokens`` padded tokens and, where several processes share samples, ``most``.
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

    def rows_that_fit(self, tokens: int, wanted: int) -> int:
        """How many of ``wanted`` rows of ``tokens`` fit in the free memory; recorded steps give way."""
        device = self._backbone.device
        fitting = self._footprint.samples_in(usable_bytes(device), tokens)
        if fitting < wanted and self._graphs:
            self._graphs.clear()
            fitting = self._footprint.samples_in(usable_bytes(device), tokens)
        return fitting

    def attempts(
        self, items: Sequence[Item], longest_row: Callable[[Sequence[Item]], int]
    ) -> Iterator["Attempt"]:
        """Attempts at a batch, in order, each to be entered by ``with``: one, or those at halves of what did
        not fit.

        ``longest_row`` returns the tokens of the longest row of some items, answer included.
        """
        waiting = [items]
        while waiting:
            part = waiting.pop()
            cost = self._footprint.cost(len(part), longest_row(part))
            # What was too much once is not tried again.
            if self._too_much is None or len(part) == 1 or cost < self._too_much:
                if cost > usable_bytes(self._backbone.device):
                    self._graphs.clear()
                # Graphs of earlier batches may be what is too much: without them, once more.
                attempt = Attempt(part)
                for _ in range(2 if self._graphs else 1):
                    yield attempt
                    if attempt.succeeded:
                        break
                    self._free()
                if attempt.succeeded:
                    continue
                self._note_or_refuse(len(part), cost)
            half = len(part) // 2
            waiting += [part[half:], part[:half]]

    def _free(self) -> None:
        self._graphs.clear()
        gc.collect()
        if self._backbone.device.type == "cuda":
            torch.cuda.empty_cache()

    def _note_or_refuse(self, samples: int, cost: float) -> None:
        # Processes that hold one model together must go on with the same batches.
        if samples == 1 or not self._auto or self._backbone.shards.processes > 1:
            raise OutOfMemoryError(
                f"out of memory with {samples} sample(s) at once; lower --data.batch_size, "
                "--model.memorize.max_context_tokens or use --trainer.precision bf16-true; "
                "what was answered before stays, and the same command goes on from there"
            )
        log.warning("out of memory with %d samples at once; trying %d", samples, samples // 2)
        self._too_much = cost


class Attempt:
    """One attempt at some items; running out of memory ends it without an error."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items
        self.succeeded = False

    def __enter__(self) -> Sequence[Any]:
        return self._items

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        self.succeeded = error is None
        return isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error)


def halved_when_too_large(step: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Let the step of a module with ``budget`` and ``longest_row`` halve a batch that does not fit."""

    @functools.wraps(step)
    def in_halves(self: Any, batch: Sequence[Any], batch_idx: int = 0) -> list[Any]:
        results: list[Any] = []
        for attempt in self.budget.attempts(batch, self.longest_row):
            with attempt as part:
                results += step(self, part)
        return results

    return in_halves
