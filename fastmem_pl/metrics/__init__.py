"""Scores of answers, and the statistics of a table of them."""

from fastmem_pl.metrics.models import METRIC_MODELS, MetricModel, load_metric_model
from fastmem_pl.metrics.scores import SCORES, Score, find_score, format_score, lower_is_better, score_answer
from fastmem_pl.metrics.statistics import Estimate, Paired, estimate, format_p, paired
from fastmem_pl.metrics.text import contains_answer, extract_answer, normalize_answer

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
    "find_score",
    "format_p",
    "format_score",
    "load_metric_model",
    "lower_is_better",
    "normalize_answer",
    "paired",
    "score_answer",
]
