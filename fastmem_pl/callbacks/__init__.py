"""Callbacks: metric aggregation, prediction writer, loggers, traces, progress, ending early."""

from fastmem_pl.callbacks.logging import LoggersAside, RunLogging
from fastmem_pl.callbacks.metrics import ALL, MetricAggregation
from fastmem_pl.callbacks.progress import SampleProgress
from fastmem_pl.callbacks.stopping import StopOnSignal
from fastmem_pl.callbacks.tracing import BatchTracer
from fastmem_pl.callbacks.writer import PredictionWriter

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
