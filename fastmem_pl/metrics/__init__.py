"""Scores of answers, and the statistics of a table of them."""

from fastmem_pl.metrics.models import METRIC_MODELS, MetricModel, load_metric_model
from fastmem_pl.metrics.scores import (
    SCORES,
    Score,
    format_score,
    is_percent,
    lower_is_better,
    score_answer,
    score_label,
)
from fastmem_pl.metrics.statistics import Estimate, Paired, estimate, format_p, paired
from fastmem_pl.metrics.text import contains_answer, extract_answer, has_answer_format, normalize_answer

__all__ = [
    "METRIC_MODELS",
    "SCORES",
    "Estimate",
    "MetricModel",
    "Paired",
    "Score",
    "contains_answer",
    "estimate",
    "extract_answer",
    "format_p",
    "format_score",
    "has_answer_format",
    "is_percent",
    "load_metric_model",
    "lower_is_better",
    "normalize_answer",
    "paired",
    "score_answer",
    "score_label",
]
