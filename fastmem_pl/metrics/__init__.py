"""Scores of answers, and the statistics of a table of them."""

from fastmem_pl.metrics.models import METRIC_MODELS, MetricModel, load_metric_model
from fastmem_pl.metrics.scores import (
    SCORES,
    Score,
    contains_answer,
    count_of,
    extract_answer,
    find_score,
    format_score,
    normalize_answer,
    score_answer,
)
from fastmem_pl.metrics.statistics import Estimate, Paired, estimate, format_p, paired

__all__ = [
    "METRIC_MODELS",
    "SCORES",
    "Estimate",
    "MetricModel",
    "Paired",
    "Score",
    "contains_answer",
    "count_of",
    "estimate",
    "extract_answer",
    "find_score",
    "format_p",
    "format_score",
    "load_metric_model",
    "normalize_answer",
    "paired",
    "score_answer",
]
