"""ROUGE of summaries (Lin, 2004), as the ``rouge-score`` package and ``evaluate``'s defaults compute it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fastmem_pl.base.errors import FastMemError

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(
    kind: str, prediction: str, references: Sequence[str], originals: Sequence[str] = ()
) -> float | None:
    r"""F-measure against the best reference, ``None`` without one.

    Shared words (``rouge1``), shared word pairs (``rouge2``), the longest common subsequence (``rougeL``), or
    the last line by line, where only newlines end a sentence (``rougeLsum``).

    >>> [rouge(kind, "The cat sat", ["the cat lay down"]) for kind in ("rouge1", "rouge2")]
    [0.5714285714285715, 0.4]
    >>> rouge("rougeL", "four five one two three", ["one two three four five"])
    0.6
    >>> rouge("rougeLsum", "four five\none two three", ["one two three\nfour five"])
    1.0

    Raises:
        FastMemError: when ``rouge-score`` is not installed.
    """
    return _fmeasures(prediction, tuple(references))[kind] if references else None


# The four scores of one answer are asked for in a row; the longest common subsequence is the slow part.
@functools.lru_cache(maxsize=32)
def _fmeasures(prediction: str, references: tuple[str, ...]) -> dict[str, float]:
    scores = _scorer().score_multi(references, prediction)
    return {kind: float(scores[kind].fmeasure) for kind in ROUGE_TYPES}


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise FastMemError(
            "the ROUGE scores need the rouge-score package; run: pip install rouge-score"
        ) from error
    # split_summaries would fetch NLTK's sentence splitter over the network; evaluate leaves it off as well.
    return RougeScorer(ROUGE_TYPES, use_stemmer=False, split_summaries=False)
