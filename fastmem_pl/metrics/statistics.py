"""Means with standard errors, and what differs between two methods on the same samples; tests by scipy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap

_RESAMPLES, _LEAST_RESAMPLES = 9999, 999
# Bounds the time: more samples need fewer resamples for the same accuracy.
_DRAWS, _DRAWS_AT_ONCE = 2e7, 1e6


class Estimate(NamedTuple):
    """Mean of one number per sample, and its standard error: ``None`` below two samples."""

    value: float
    error: float | None
    n: int


class Paired(NamedTuple):
    """A method against a baseline on the ``n`` samples that both answered.

    ``difference``: mean of method minus baseline; ``test``: ``"exact McNemar"`` for scores of 0 and 1, else
    ``"paired bootstrap"``, its ``p_value`` two-sided; ``gained`` samples rose, ``lost`` ones fell.
    """

    difference: float
    p_value: float
    test: str
    n: int
    gained: int
    lost: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error ``s / sqrt(n)``; the same bits in whatever order the values come.

    >>> estimate([1.0, 0.0, 1.0, 1.0])
    Estimate(value=0.75, error=0.25, n=4)
    """
    # Rounding depends on the order in which numbers are added.
    numbers = np.sort(np.asarray(values, dtype=np.float64))
    error = float(numbers.std(ddof=1) / len(numbers) ** 0.5) if len(numbers) > 1 else None
    return Estimate(float(numbers.mean()), error, len(numbers))


def paired(baseline: Sequence[float], method: Sequence[float], binary: bool) -> Paired:
    """Compare two methods sample by sample.

    Scores of 0 and 1 are compared by McNemar's exact test (McNemar, 1947), others by bootstrap resampling of
    the paired differences (Koehn, EMNLP 2004; Efron and Tibshirani, 1993), seeded: the same numbers give the
    same p-value. Where few differ, no resample may cross zero: p is at least ``2 / 2**k`` with ``k`` samples
    that differ, the least that flipping the signs of their differences (Fisher, 1935) can give.

    >>> paired([0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1], binary=True).p_value
    0.03125
    """
    differences = np.asarray(method, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    gained, lost, n = int((differences > 0).sum()), int((differences < 0).sum()), len(differences)
    if gained + lost == 0 or n < 2:
        p_value = 1.0
    elif binary:
        p_value = float(binomtest(gained, gained + lost).pvalue)
    else:
        p_value = max(_bootstrap_p(differences), 2.0 ** (1 - gained - lost))
    test = "exact McNemar" if binary else "paired bootstrap"
    return Paired(float(differences.mean()), p_value, test, n, gained, lost)


def _bootstrap_p(differences: np.ndarray) -> float:
    """Twice the share of resampled means on the other side of zero."""
    n = len(differences)
    resamples = int(min(_RESAMPLES, max(_LEAST_RESAMPLES, _DRAWS // n)))
    batch = max(1, int(_DRAWS_AT_ONCE // n))
    # The percentile method, since BCa's further resamples (jackknife) are for intervals, which are not used.
    drawn = bootstrap((differences,), np.mean, n_resamples=resamples, batch=batch, method="percentile", rng=0)
    means = drawn.bootstrap_distribution
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (resamples + 1))


def format_p(p_value: float) -> str:
    """``p = 0.012``, or ``p < 0.001``."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
