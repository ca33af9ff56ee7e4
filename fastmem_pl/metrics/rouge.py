"""ROUGE of summaries (Lin, 2004), as the ``rouge-score`` package and ``evaluate``'s defaults compute it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fastmem_pl.base.errors import FastMemError

_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge1(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float | None:
    """F-measure of words shared with the best reference, ``None`` without one.

    >>> rouge1("The cat sat", ["the cat lay down"])
    0.5714285714285715

    Raises:
        FastMemError: when ``rouge-score`` is not installed.
    """
    return _best(prediction, references, "rouge1")


def rouge2(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float | None:
    """F-measure of word pairs shared with the best reference, ``None`` without one.

    >>> rouge2("The cat sat", ["the cat lay down"])
    0.4

    Raises:
        FastMemError: when ``rouge-score`` is not installed.
    """
    return _best(prediction, references, "rouge2")


def rougeL(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float | None:
    """F-measure of the longest common subsequence with the best reference, ``None`` without one.

    >>> rougeL("four five one two three", ["one two three four five"])
    0.6

    Raises:
        FastMemError: when ``rouge-score`` is not installed.
    """
    return _best(prediction, references, "rougeL")


def rougeLsum(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float | None:
    r"""Like :func:`rougeL`, line by line: a sentence is what stands between newlines.

    >>> rougeLsum("four five\none two three", ["one two three\nfour five"])
    1.0
    >>> rougeLsum("four five. one two three.", ["one two three. four five."])
    0.6

    Raises:
        FastMemError: when ``rouge-score`` is not installed.
    """
    return _best(prediction, references, "rougeLsum")


def _best(prediction: str, references: Sequence[str], kind: str) -> float | None:
    return _fmeasures(prediction, tuple(references))[kind] if references else None


# The four scores of one answer are asked for in a row; the longest common subsequence is the slow part.
@functools.lru_cache(maxsize=32)
def _fmeasures(prediction: str, references: tuple[str, ...]) -> dict[str, float]:
    scores = _scorer().score_multi(references, prediction)
    return {kind: float(scores[kind].fmeasure) for kind in _TYPES}


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise FastMemError(
            "the ROUGE scores need the rouge-score package; run: pip install rouge-score"
        ) from error
    # split_summaries would fetch NLTK's sentence splitter over the network; evaluate leaves it off as well.
    return RougeScorer(_TYPES, use_stemmer=False, split_summaries=False)
