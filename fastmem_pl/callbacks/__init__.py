"""Callbacks: metric aggregation, prediction writer, progress."""

from fastmem_pl.callbacks.metrics import ALL, MetricAggregation
from fastmem_pl.callbacks.progress import SampleProgress
from fastmem_pl.callbacks.writer import PredictionWriter

__all__ = ["ALL", "MetricAggregation", "PredictionWriter", "SampleProgress"]
