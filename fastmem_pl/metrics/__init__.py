"""Scores of answers and their aggregation as torchmetrics."""

from fastmem_pl.metrics.aggregate import McNemar, SampleMean
from fastmem_pl.metrics.models import METRIC_MODELS, MetricModel, load_metric_model
from fastmem_pl.metrics.scores import SCORES, Score, format_score, lower_is_better, score_answer
from fastmem_pl.metrics.text import (
    contains_answer,
    extract_answer,
    has_answer_format,
    normalize_answer,
)

__all__ = [
    "METRIC_MODELS",
    "SCORES",
    "McNemar",
    "MetricModel",
    "SampleMean",
    "Score",
    "contains_answer",
    "extract_answer",
    "format_score",
    "has_answer_format",
    "load_metric_model",
    "lower_is_better",
    "normalize_answer",
    "score_answer",
]
