"""Means with standard errors, and what differs between two methods on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import binomtest

_RESAMPLES, _LEAST_RESAMPLES = 9999, 999
# Bounds time and memory: more samples need fewer resamples for the same accuracy.
_DRAWS = 2e7
_BLOCKS = 16


@dataclass(frozen=True)
class Estimate:
    """Mean of one number per sample.

    Attributes:
        value: the mean.
        error: its standard error; ``None`` below two samples.
        n: samples.
    """

    value: float
    error: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """A method against a baseline on the samples that both answered.

    Attributes:
        difference: mean of method minus baseline.
        p_value: two-sided, of "there is no difference".
        test: ``"exact McNemar"`` for scores of 0 and 1, else ``"paired bootstrap"``.
        n: pairs.
        gained: samples that the method has right and the baseline has not; of numbers, those that rose.
        lost: the other way round.
        interval: bootstrap interval of the difference, 95%; ``None`` with McNemar's test.
    """

    difference: float
    p_value: float
    test: str
    n: int
    gained: int
    lost: int
    interval: tuple[float, float] | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error ``s / sqrt(n)``.

    >>> estimate([1.0, 0.0, 1.0, 1.0])
    Estimate(value=0.75, error=0.25, n=4)
    """
    # In sorted order, so that rounding does not depend on the order of the samples.
    numbers = np.sort(np.asarray(values, dtype=np.float64))
    error = float(numbers.std(ddof=1) / len(numbers) ** 0.5) if len(numbers) > 1 else None
    return Estimate(float(numbers.mean()), error, len(numbers))


def paired(baseline: Sequence[float], method: Sequence[float], binary: bool) -> Paired:
    """Compare two methods sample by sample.

    Scores of 0 and 1 are compared by McNemar's exact test (McNemar, 1947), others by bootstrap resampling of
    the paired differences (Koehn, EMNLP 2004; Efron and Tibshirani, 1993), seeded: the same numbers give the
    same p-value. Where few differ, no resample may cross zero: p is at least ``2 / 2**k`` with ``k`` samples
    that differ, the least that flipping the signs of their differences (Fisher, 1935) can give.

    Args:
        baseline: of each sample.
        method: of the same samples.
        binary: whether all values are 0 or 1.

    >>> paired([0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1], binary=True).p_value
    0.03125
    """
    differences = np.asarray(method, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    mean, n = float(differences.mean()), len(differences)
    if binary:
        p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        return Paired(mean, p_value, "exact McNemar", n, gained, lost)
    if gained + lost == 0:
        return Paired(mean, 1.0, "paired bootstrap", n, 0, 0, (0.0, 0.0))
    # In blocks, since each is copied to the precision of the differences.
    blocks = np.array_split(_resampling(n), _BLOCKS)
    means = np.concatenate([block @ differences for block in blocks]) / n
    below, above = ((means <= 0).sum() + 1) / (len(means) + 1), ((means >= 0).sum() + 1) / (len(means) + 1)
    low, high = np.quantile(means, (0.025, 0.975))
    p_value = min(1.0, max(2 * float(min(below, above)), 2.0 ** (1 - gained - lost)))
    return Paired(mean, p_value, "paired bootstrap", n, gained, lost, (float(low), float(high)))


@lru_cache(maxsize=2)
def _resampling(n: int) -> np.ndarray:
    """How often each of ``n`` samples stands in each resample, ``(R, n)``; the same for all scores."""
    resamples = int(min(_RESAMPLES, max(_LEAST_RESAMPLES, _DRAWS // n)))
    random = np.random.default_rng(0)
    counts = np.empty((resamples, n), dtype=np.float32)
    for row in counts:
        row[:] = np.bincount(random.integers(n, size=n), minlength=n)
    return counts


def format_p(p_value: float) -> str:
    """``p = 0.012``, or ``p < 0.001``."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
