"""Phases inside phases: whose seconds and whose peak is whose."""

import pytest
import torch

from fastmem_pl.base.phases import PhaseMeter

CPU = torch.device("cpu")


class Machine:
    """A clock, and a high-water mark of memory, that move only when told to."""

    def __init__(self, meter, monkeypatch):
        self.now, self.used, self.high = 100.0, 1000, 0
        monkeypatch.setattr("fastmem_pl.base.phases.time.perf_counter", lambda: self.now)
        real = meter._reset

        def reset():
            with monkeypatch.context() as patched:
                patched.setattr("fastmem_pl.base.phases.Path.write_text", lambda path, text: None)
                real()
            self.high = self.used

        monkeypatch.setattr(meter, "_reset", reset)
        monkeypatch.setattr(meter, "_peak", lambda: self.high)

    def work(self, seconds, peak):
        self.now += seconds
        self.high = max(self.high, peak)


@pytest.fixture
def meter():
    return PhaseMeter(CPU, [])


@pytest.fixture
def machine(meter, monkeypatch):
    return Machine(meter, monkeypatch)


def test_the_outer_phase_has_the_seconds_and_the_peak_of_the_inner(meter, machine):
    with meter.measure("outer") as outer:
        machine.work(1, 5000)
        with meter.measure("inner") as inner:
            machine.work(2, 3000)
            with meter.measure("innermost"):
                machine.work(4, 9000)
        machine.work(8, 2000)
    assert (inner["seconds"], outer["seconds"]) == (6, 15)
    calls = {call.phase: (call.seconds, call.peak_bytes) for call in meter.calls}
    assert calls == {"innermost": (4, 9000), "inner": (2, 9000), "outer": (9, 9000)}
    assert meter.peak_bytes == {"innermost": 9000, "inner": 9000, "outer": 9000}


def test_what_came_before_or_after_is_no_part_of_an_inner_peak(meter, machine):
    with meter.measure("outer"):
        machine.work(1, 7000)
        with meter.measure("inner"):
            machine.work(1, 2000)
        machine.work(1, 4000)
        with meter.measure("inner"):
            machine.work(1, 3000)
    assert meter.peak_bytes == {"inner": 3000, "outer": 7000}
    assert [call.peak_bytes for call in meter.calls] == [2000, 3000, 7000]


def test_a_phase_that_fails_is_no_call_and_shuts_what_it_opened(meter, machine):
    def fail():
        with meter.measure("outer"), meter.measure("inner"):
            machine.work(3, 8000)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert meter.calls == []
    assert meter.peak_bytes == {"inner": 8000, "outer": 8000}
    with meter.measure("next"):
        machine.work(1, 2000)
    assert [(call.phase, call.seconds, call.peak_bytes) for call in meter.calls] == [("next", 1, 2000)]


def test_counts_may_be_known_before_or_after(meter):
    with meter.measure("decode", part="fastmem", samples=2) as timing:
        timing.update(tokens=7, steps=4)
    with meter.measure("decode", name="prefill"):
        pass
    first, second = meter.calls
    assert (first.phase, first.part) == ("decode", "fastmem")
    assert (first.samples, first.tokens, first.steps) == (2, 7, 4)
    assert (second.phase, second.part, second.samples) == ("prefill", "", 0)
    assert set(meter.peak_bytes) == {"decode"}


def test_details_are_no_part_of_the_peaks_that_every_run_keeps(meter):
    with meter.detail("trunk"):
        pass
    assert [call.phase for call in meter.calls] == ["trunk"]
    assert meter.peak_gib() == {}


def test_without_calls_details_touch_nothing_and_nothing_is_kept(monkeypatch):
    plain = PhaseMeter(CPU)
    with plain.measure("decode", part="x", samples=1) as timing:
        timing.update(tokens=3)
        monkeypatch.setattr(plain, "_reset", pytest.fail)
        with plain.detail("trunk", samples=1) as inner:
            inner.update(tokens=3)
    assert plain.calls is None
    assert timing["seconds"] > 0
    assert set(plain.peak_gib()) == {"decode"}
