"""Callbacks: metric aggregation, prediction writer, loggers, traces, progress, ending early."""

from fastmem_pl.run.callbacks.logging import LoggersAside, RunLogging
from fastmem_pl.run.callbacks.metrics import ALL, MetricAggregation
from fastmem_pl.run.callbacks.progress import SampleProgress
from fastmem_pl.run.callbacks.stopping import StopOnSignal
from fastmem_pl.run.callbacks.tracing import BatchTracer
from fastmem_pl.run.callbacks.writer import PredictionWriter

__all__ = [
    "ALL",
    "BatchTracer",
    "LoggersAside",
    "MetricAggregation",
    "PredictionWriter",
    "RunLogging",
    "SampleProgress",
    "StopOnSignal",
]
