"""What is counted of the batches that are looked at."""

from types import SimpleNamespace

import pytest
import torch

from fastmem_pl.base.phases import PhaseMeter
from fastmem_pl.run.callbacks.tracing import BatchTracer
from fastmem_pl.run.profile import Profiler


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Let a tracer see four batches of a GPU that is not there; returns the profiler."""
    monkeypatch.setattr("torch.cuda.memory._record_memory_history", lambda *args, **kwargs: None)
    monkeypatch.setattr("torch.cuda.memory._dump_snapshot", lambda path: open(path, "w").close())

    def watch(kinds):
        profiler = Profiler(kinds, 0.0)
        tracer = BatchTracer(profiler, tmp_path, "0", torch.device("cuda"))
        module = SimpleNamespace(meter=PhaseMeter(torch.device("cpu"), profiler.calls))
        trainer = SimpleNamespace(num_predict_batches=[4])
        tracer.on_predict_start(trainer, module)
        for index in range(4):
            tracer.on_predict_batch_start(trainer, module, None, index)
            tracer.on_predict_batch_end(trainer, module, None, None, index)
        tracer.on_predict_end(trainer, module)
        return profiler

    return watch


def test_a_history_of_memory_alone_slows_no_batch(watched):
    profiler = watched(["phases", "memory"])
    assert (profiler.traced_batches, profiler.files) == (0, ["memory-0.pickle"])


def test_a_trace_that_did_not_start_slows_no_batch(watched, monkeypatch, caplog):
    def busy(self):
        raise RuntimeError("another one is running")

    monkeypatch.setattr(torch.profiler.profile, "start", busy)
    profiler = watched(["phases", "trace", "memory"])
    assert (profiler.traced_batches, profiler.files) == (0, ["memory-0.pickle"])
    assert "no trace: another one is running" in caplog.text
