"""Seconds and peak memory of the phases of a run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class PhaseMeter:
    """Measures named phases: wall seconds, and the highest memory in use during each.

    Memory is what torch allocated on an accelerator; on the CPU it is the resident set of the process
    (weights included), 0 where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes: dict[str, int] = defaultdict(int)

    @contextmanager
    def measure(self, phase: str) -> Iterator[dict[str, float]]:
        """Yield a dict whose ``seconds`` is set on leaving."""
        self._reset()
        timing = {"seconds": 0.0}
        start = time.perf_counter()
        try:
            yield timing
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            timing["seconds"] = time.perf_counter() - start
            self.peak_bytes[phase] = max(self.peak_bytes[phase], self._peak())

    def peak_gib(self) -> dict[str, float]:
        """Peak GiB by phase."""
        return {phase: round(peak / 2**30, 3) for phase, peak in self.peak_bytes.items()}

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
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
