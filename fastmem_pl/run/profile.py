"""Profiles of runs: where the time of a session went, and how much memory each phase took.

``RUN/profile/profile.json`` holds the profile of the last session that answered something, of all processes
together. Phases do not overlap: their seconds and ``other`` add up to those of the session.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity

from fastmem_pl.base.errors import one_line, unknown
from fastmem_pl.base.files import whole_file
from fastmem_pl.base.phases import PhaseCall

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
ProfileKind = Literal["phases", "trace", "memory"]
KINDS: tuple[str, ...] = get_args(ProfileKind)
"""What a run can be asked for: seconds and memory by phase, a trace of its operators, a history of the
allocator of a GPU."""

PHASES = ("load", "trunk", "memorize", "prefill", "decode", "memories", "scoring", "trace", "other")
"""Phases in the order of a run; docs/profiling.md describes them."""

FOLDER, FILE = "profile", "profile.json"
"""Of the numbers, within a run folder; traces lie beside them."""

# Of more than two batches the first is left out, in which kernels are compiled. A batch takes millions of
# operators, and torch.profiler keeps all of them until it is written.
_MOST_BATCHES = 3
# Allocations and frees, the last ones.
_HISTORY = 200_000
# What stands at the end of every trace: its own name.
_END_BYTES = 8192


def check_kinds(kinds: Sequence[str] | str | None, option: str = "trainer.profile") -> list[str]:
    """What is asked for, ``phases`` first, each once; empty for ``None``. A string has commas between names.

    >>> check_kinds("trace")
    ['phases', 'trace']
    """
    if isinstance(kinds, str):
        kinds = [name.strip() for name in kinds.strip("[]").split(",")]
    for kind in kinds or ():
        if kind not in KINDS:
            raise unknown(option, kind, KINDS)
    return [kind for kind in KINDS if kind == "phases" or kind in kinds] if kinds else []


@dataclass(frozen=True)
class Measured:
    """What one process measured in a session."""

    wall_seconds: float
    calls: list[PhaseCall]
    traced_batches: int  # that torch.profiler watched, which slows them
    files: list[str]  # traces that were written


class RunProfile(Callback):
    """What one process measures in a session, and its traces of single batches.

    What cannot be written is a warning, and the run goes on. ``start`` of the session is by
    :func:`time.perf_counter`; ``calls`` are filled by the meters that get the list.
    """

    def __init__(self, kinds: Sequence[str], start: float, run_path: Path) -> None:
        self.calls: list[PhaseCall] = []
        self._kinds, self._start, self._folder = kinds, start, run_path / FOLDER
        self._files: list[str] = []
        self._first = self._batches = self._traced = 0
        self._trace: torch.profiler.profile | None = None
        self._history = False

    def measured(self) -> Measured:
        """What this process did until now."""
        return Measured(time.perf_counter() - self._start, self.calls, self._traced, self._files)

    def keep(self, profile: Mapping[str, Any]) -> None:
        """Write the numbers of all processes."""
        content = (json.dumps(profile, indent=2, ensure_ascii=False) + "\n").encode()
        self._write(FILE, lambda path: path.write_bytes(content))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the first batch by how many there are."""
        self._first = 1 if sum(trainer.num_predict_batches) > 2 else 0
        if "memory" in self._kinds and trainer.strategy.root_device.type != "cuda" and trainer.is_global_zero:
            log.warning(
                "profile: memory is the history of a CUDA device's allocator, and this run has none (the "
                "profile has the peak of each phase)"
            )

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Begin with the first batch."""
        on_gpu = trainer.strategy.root_device.type == "cuda"
        traces, history = "trace" in self._kinds, "memory" in self._kinds and on_gpu
        if batch_idx != self._first or not (traces or history):
            return
        with pl_module.meter.detail("trace"):
            if history:
                self._history = True
                torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
            if traces:
                # Kineto writes a line to standard error at every start.
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")
                activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
                trace = torch.profiler.profile(activities=activities)
                try:
                    trace.start()
                    self._trace = trace
                except RuntimeError as error:
                    # Such as another profiler, which a program of the user's runs.
                    log.warning("profile: no trace: %s", one_line(error))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Count, and write after the last batch."""
        self._traced += self._trace is not None
        self._batches += self._trace is not None or self._history
        if self._batches == _MOST_BATCHES:
            self.on_predict_end(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what there is."""
        trace, self._trace = self._trace, None
        history, self._history = self._history, False
        if trace is None and not history:
            return
        with pl_module.meter.detail("trace"):
            if trace is not None:
                trace.stop()
                self._write(f"trace-{trainer.global_rank}.json", lambda path: _export(trace, path))
            if history:
                # Written, never read here: https://docs.pytorch.org/memory_viz reads it.
                name = f"memory-{trainer.global_rank}.pickle"
                self._write(name, lambda path: torch.cuda.memory._dump_snapshot(str(path)))
                torch.cuda.memory._record_memory_history(enabled=None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop without the trace, which takes long; the history of a batch that had no room tells why."""
        if self._trace is not None:
            self._trace.stop()
            self._trace = None
        self.on_predict_end(trainer, pl_module)

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            with whole_file(self._folder / name) as partial:
                write(partial)
        except OSError as error:
            reason = error.strerror or error
            log.warning("profile: cannot write %s: %s; the run goes on", self._folder / name, reason)
        else:
            self._files.append(name)


def _export(trace: torch.profiler.profile, path: Path) -> None:
    """Write a trace."""
    trace.export_chrome_trace(str(path))
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        if b'"traceName"' not in file.read():
            raise OSError(f"it ends after {size / 1e6:.0f} MB; the disk may be full")


def summarize(processes: Sequence[Measured], shared: bool = True) -> dict[str, Any]:
    """The numbers of a session, from what each of its processes measured.

    Seconds and shares are those of the process that was busy longest, for which the others wait. Calls,
    samples, tokens and steps are added up where processes ``shared`` out the samples; those that hold one
    model together do the same work, which counts once. Peaks are the highest of all.
    """
    busy = [sum(call.seconds for call in process.calls) for process in processes]
    slowest = processes[busy.index(max(busy))]
    counting = processes if shared else [slowest]
    groups = [[call for one in group for call in one.calls] for group in ([slowest], counting, processes)]
    kinds = dict.fromkeys((call.phase, call.part) for call in groups[-1])
    found = {phase for phase, _ in kinds}
    phases = {phase: _numbers(groups, phase) for phase in PHASES if phase in found}
    if "decode" in phases:
        methods = [part for phase, part in kinds if phase == "decode"]
        phases["decode"]["methods"] = {method: _numbers(groups, "decode", method) for method in methods}
    wall = slowest.wall_seconds
    phases["other"] = {"seconds": max(0.0, wall - max(busy))}
    for phase in phases.values():
        # Of a session, so that they add up to 1.
        phase["share"] = phase["seconds"] / wall
    return {
        "wall_seconds": wall,
        "phases": phases,
        "batch_sizes": _batch_sizes(groups[1]),
        "traced_batches": sum(process.traced_batches for process in counting),
        "files": sorted(name for process in processes for name in process.files),
    }


def _numbers(groups: Sequence[Sequence[PhaseCall]], *kind: str) -> dict[str, Any]:
    """Sums, medians and rates of a phase, or of a part of it: of the calls of the slowest process, of those
    whose work counts, and of all.
    """
    slowest, counted, every = (
        [call for call in calls if (call.phase, call.part)[: len(kind)] == kind] for calls in groups
    )
    seconds = sum(call.seconds for call in slowest)
    tokens, steps = sum(call.tokens for call in counted), sum(call.steps for call in counted)
    numbers: dict[str, Any] = {
        "seconds": seconds,
        "calls": len(counted),
        "first_seconds": slowest[0].seconds if slowest else 0.0,
        "median_seconds": median(call.seconds for call in slowest[1:]) if len(slowest) > 1 else None,
        "samples": sum(call.samples for call in counted),
        "peak_memory_gib": round(max(call.peak_bytes for call in every) / 2**30, 3),
    }
    if tokens:
        numbers |= {"tokens": tokens, "tokens_per_second": tokens / seconds if seconds else None}
    own_tokens, own_steps = sum(call.tokens for call in slowest), sum(call.steps for call in slowest)
    if steps:
        numbers |= {"steps": steps, "ms_per_step": 1000 * seconds / max(1, own_steps)}
        if kind[0] == "decode":
            numbers["ms_per_token"] = 1000 * seconds / own_tokens if own_tokens else None
    return numbers


def _batch_sizes(calls: Sequence[PhaseCall]) -> dict[str, int]:
    """How often there were batches of each size; the keys are text as in JSON."""
    order = ("memorize", "memories", "decode")
    kinds = [(call.phase, call.part) for call in calls if call.phase in order]
    # Every batch passes it once.
    chosen = min(kinds, key=lambda kind: order.index(kind[0]), default=None)
    sizes = Counter(call.samples for call in calls if (call.phase, call.part) == chosen)
    return {str(size): sizes[size] for size in sorted(sizes)}
