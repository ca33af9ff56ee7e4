"""Callbacks: metric aggregation, prediction writer, progress, ending early."""

from fastmem_pl.run.callbacks.metrics import ALL, MetricAggregation
from fastmem_pl.run.callbacks.progress import SampleProgress
from fastmem_pl.run.callbacks.stopping import StopOnSignal
from fastmem_pl.run.callbacks.writer import PredictionWriter

__all__ = ["ALL", "MetricAggregation", "PredictionWriter", "SampleProgress", "StopOnSignal"]
