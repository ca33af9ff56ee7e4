"""Samples, tasks (prompts and scores per data set), and the datamodule."""

from fastmem_pl.data.batches import BatchLimits
from fastmem_pl.data.reader import read_samples
from fastmem_pl.data.tasks import MIXED, TASKS, ContextSample, FieldError, Fields, RawRecord, Task

__all__ = [
    "MIXED",
    "TASKS",
    "BatchLimits",
    "ContextSample",
    "FastMemDataModule",
    "FieldError",
    "Fields",
    "RawRecord",
    "Task",
    "read_samples",
]


def __getattr__(name: str) -> object:
    # Imported on first use, so that `fastmem tasks` does not wait for torch.
    if name == "FastMemDataModule":
        from fastmem_pl.data.datamodule import FastMemDataModule

        return FastMemDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
