"""Seconds and peak memory of the phases of a run."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import record_function


@dataclass(frozen=True)
class PhaseCall:
    """One passage through a phase, as profiles keep it."""

    phase: str
    part: str  # what of the phase, such as the method that was decoded
    seconds: float  # of wall time, without those of phases inside
    peak_bytes: int  # of memory in use, with phases inside
    samples: int = 0
    tokens: int = 0
    steps: int = 0


@dataclass
class _Open:
    """A phase that has not ended: what the phases inside it took of it."""

    seconds_inside: float = 0.0
    peak_bytes: int = 0


class PhaseMeter:
    """Measures named phases: wall seconds, and the highest memory in use during each.

    Phases may hold others: the seconds and the peak of the outer one include theirs. Memory is what torch
    allocated on an accelerator; on the CPU it is the resident set of the process (weights included), 0 where
    the system does not tell. With ``calls``, which get an entry for every phase that ends without an
    exception, phases are labelled for torch.profiler; by default only the peaks are kept.
    """

    def __init__(self, device: torch.device, calls: list[PhaseCall] | None = None) -> None:
        self.device, self.calls = device, calls
        self.peak_bytes: dict[str, int] = defaultdict(int)
        self._open: list[_Open] = []

    def detail(self, phase: str, part: str = "", **counts: int) -> AbstractContextManager[dict[str, float]]:
        """Measure what only :attr:`calls` are for; without them do nothing, at no cost."""
        return nullcontext({}) if self.calls is None else self.measure(None, phase, part, **counts)

    @contextmanager
    def measure(
        self, phase: str | None, name: str | None = None, part: str = "", **counts: int
    ) -> Iterator[dict[str, float]]:
        """Measure a phase; its context is a dict whose ``seconds`` is set on leaving.

        The peak belongs to ``phase``, if any; :attr:`calls` list it as ``name``, by default the same. Counts
        (``samples``, ``tokens``, ``steps``) that are known at the end only are put into the dict.
        """
        name = name or phase
        timing = {"seconds": 0.0, **counts}
        inside = _Open()
        with ExitStack() as labels:
            for label in () if self.calls is None else filter(None, (name, part)):
                labels.enter_context(record_function(label))
            self._reset()
            self._open.append(inside)
            start = time.perf_counter()
            try:
                yield timing
            finally:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                timing["seconds"] = time.perf_counter() - start
                peak = max(inside.peak_bytes, self._peak())
                self._open.pop()
                if self._open:
                    outer = self._open[-1]
                    outer.seconds_inside += timing["seconds"]
                    outer.peak_bytes = max(outer.peak_bytes, peak)
                if phase is not None:
                    self.peak_bytes[phase] = max(self.peak_bytes[phase], peak)
        if self.calls is not None:
            counted = {key: int(value) for key, value in timing.items() if key != "seconds"}
            own = timing["seconds"] - inside.seconds_inside
            self.calls.append(PhaseCall(name, part, own, peak, **counted))

    def peak_gib(self) -> dict[str, float]:
        """Peak GiB by phase."""
        return {phase: round(peak / 2**30, 3) for phase, peak in self.peak_bytes.items()}

    def _reset(self) -> None:
        """Begin a new peak; what was reached so far is that of the phase around."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._open:
            self._open[-1].peak_bytes = max(self._open[-1].peak_bytes, self._peak())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return 0
        line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
        return int(line.split()[1]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host had no memory left."""
    signs = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(sign in str(error) for sign in signs)
