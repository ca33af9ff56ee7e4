"""Decoding steps recorded as CUDA graphs, kept from batch to batch.

Launching the kernels of one token one by one takes the host longer than the GPU needs for them. A pool keeps
graphs with the tensors that they work on, and later batches of the same shapes put their values there.
"""

import logging
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastmem_pl.base.phases import is_out_of_memory
from fastmem_pl.decoding.state import DecodeState

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Recorded:
    """A state whose steps run as a graph, from the second step on."""

    state: DecodeState
    # Libraries choose and load their kernels in the first step, which must not happen in a recording.
    _warm: bool = False
    _replay: Callable[[], None] | None = None

    def step(self) -> None:
        """Take one step."""
        if self._warm and self._replay is None:
            self._replay = _record(self.state.step)
        (self._replay or self.state.step)()
        self._warm = True


def _record(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step, which does not run it; returns what runs it from now on."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    try:
        # Not torch.cuda.graph: it empties the allocator's cache, which the next batch would have to fill.
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                # It fails as well then, and would hide the cause.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        log.warning("decoding without a CUDA graph, several times slower: %s", str(error).splitlines()[0])
        return step
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    # One for all: libraries keep a workspace for every stream that they ran on.
    return torch.cuda.Stream(device)


@dataclass(eq=False)
class Lease:
    """A state and what takes its next step, for as long as the borrower holds it."""

    state: DecodeState
    step: Callable[[], None]


class GraphPool:
    """Recorded states by shape, for one decode at a time; all read memories from the same tensors."""

    def __init__(self) -> None:
        self._lent: Callable[[], Lease | None] = lambda: None
        self._idle: dict[Hashable, Recorded] = {}
        self.clear()

    def take(self, key: Hashable, fresh: DecodeState) -> Lease:
        """Lend a state with the values of ``fresh``; ``key`` is all else that steps depend on."""
        # One at a time.
        if self._lent() is not None:
            return Lease(fresh, fresh.step)
        rows = fresh.last.shape[1]
        # States of another batch size would hold their memory beside the new one.
        if rows != self._rows:
            self.clear()
            self._rows = rows
        recorded = self._idle.get(key)
        if recorded is None:
            fresh.views.deltas = self._own(fresh.views.deltas)
            recorded = self._idle[key] = Recorded(fresh)
        else:
            torch._foreach_copy_(recorded.state.tensors(), fresh.tensors())
        lease = Lease(recorded.state, recorded.step)
        self._lent = weakref.ref(lease)
        return lease

    def __len__(self) -> int:
        return len(self._idle)

    def clear(self) -> None:
        """Forget all, and free its memory."""
        self._idle.clear()
        self._deltas: list[dict[str, Tensor]] | None = None
        self._rows = 0

    def _own(self, deltas: list[dict[str, Tensor]] | None) -> list[dict[str, Tensor]] | None:
        """Copy a memory, which belongs to the caller, to the pool's tensors."""
        if deltas is None:
            return None
        shapes = [[t.shape for t in layer.values()] for layer in deltas]
        if self._deltas is None or [[t.shape for t in layer.values()] for layer in self._deltas] != shapes:
            self._deltas = [{name: torch.empty_like(t) for name, t in layer.items()} for layer in deltas]
        for own, given in zip(self._deltas, deltas, strict=True):
            for name, tensor in given.items():
                own[name].copy_(tensor)
        return self._deltas
