"""Samples, tasks (prompt and scoring per data set), and the datamodule."""

from fastmem_pl.data.datamodule import FastMemDataModule
from fastmem_pl.data.reader import read_samples
from fastmem_pl.data.samples import ContextSample
from fastmem_pl.data.tasks import MIXED, TASKS, FieldError, Fields, Record, Task

__all__ = [
    "MIXED",
    "TASKS",
    "ContextSample",
    "FastMemDataModule",
    "FieldError",
    "Fields",
    "Record",
    "Task",
    "read_samples",
]
