"""Scores of one answer; each is the mean over samples in the table."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import isfinite, nan
from typing import Any

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.registry import Registry

_ANSWER_MARK = re.compile(r"the answer is:\s*", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def normalize_answer(text: str) -> str:
    """Lower-case, drop articles, fold white space, drop punctuation and symbols, in this order.

    As the published evaluation does: spaces on both sides of dropped punctuation remain.

    >>> normalize_answer("The Beatles, (1960)")
    'beatles 1960'
    """
    text = " ".join(_ARTICLES.sub("", text.lower()).split())
    return "".join(c for c in text if unicodedata.category(c)[0] not in "PS").strip()


def extract_answer(text: str) -> str:
    """Return what follows the last "The answer is:", or ``"Unknown"`` where it is missing."""
    parts = _ANSWER_MARK.split(text)
    return parts[-1].strip() if len(parts) > 1 else "Unknown"


def contains_answer(text: str, answers: Sequence[str], published: bool = False) -> bool:
    """Whether a normalized answer is part of the normalized text.

    An answer of which normalization leaves nothing (the choice "A", a symbol) is looked for as a word of
    its own. ``published`` restores the published evaluation, where such an answer is part of any text.

    >>> contains_answer("The answer is: B", ["A"]), contains_answer("The answer is: A.", ["A"])
    (False, True)
    >>> contains_answer("The answer is: B", ["A"], published=True)
    True
    """
    normalized = normalize_answer(text)
    words = {word.strip(string.punctuation) or word for word in text.lower().split()}
    for answer in answers:
        key = normalize_answer(answer)
        if (key in normalized) if key or published else (answer.strip().lower() in words):
            return True
    return False


@dataclass(frozen=True)
class Score:
    """One number per answer.

    Attributes:
        name: in records and ``metrics.json``.
        label: heading in tables.
        function: ``(prediction, references, originals) -> number``, ``None`` where it does not apply; a score
            without a function is computed after the answers (:mod:`fastmem_pl.metrics.models`).
        percent: shown as a percentage.
        binary: it is 0 or 1, so that methods are compared sample by sample with McNemar's test.
        lower_is_better: whether small values are the good ones.
    """

    name: str
    label: str
    function: Callable[[str, Sequence[str], Sequence[str]], float | None] | None
    percent: bool = True
    binary: bool = False
    lower_is_better: bool = False


def accuracy(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float | None:
    """Whether a reference is part of what follows "The answer is:" (the published accuracy)."""
    return float(contains_answer(extract_answer(prediction), references)) if references else None


def contained(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float | None:
    """Whether a reference is part of the output, in whatever format."""
    return float(contains_answer(prediction, references)) if references else None


def exact_match(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float | None:
    """Whether the answer equals a reference after normalization."""
    answer = _comparable(extract_answer(prediction))
    return float(any(answer == _comparable(r) for r in references)) if references else None


def f1(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float | None:
    """Harmonic mean of word precision and recall against the best reference (SQuAD's F1)."""
    answer = Counter(_comparable(extract_answer(prediction)).split())
    words = [Counter(_comparable(reference).split()) for reference in references]
    values = (2 * (answer & own).total() / ((answer.total() + own.total()) or 1) for own in words)
    return max(values, default=None)


def format_failure(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float:
    """Whether the output lacks "The answer is:"."""
    return float(_ANSWER_MARK.search(prediction) is None)


def original(prediction: str, references: Sequence[str], originals: Sequence[str] = ()) -> float | None:
    """Whether the output holds the answer that the context contradicts."""
    # An original inside a right answer ("five" in "twenty five") would be found in every right output.
    originals = [o for o in originals if not any(contains_answer(r, [o]) for r in references)]
    return float(contains_answer(prediction, originals)) if originals else None


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
    """
    return _fmeasures(prediction, tuple(references))[kind] if references else None


# The four scores of one answer are asked for in a row; the longest common subsequence is the slow part.
@lru_cache(maxsize=32)
def _fmeasures(prediction: str, references: tuple[str, ...]) -> dict[str, float]:
    scores = _scorer().score_multi(references, prediction)
    return {kind: float(score.fmeasure) for kind, score in scores.items()}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    # split_summaries would fetch NLTK's sentence splitter over the network; evaluate leaves it off as well.
    return RougeScorer(_ROUGE, use_stemmer=False, split_summaries=False)


def _comparable(text: str) -> str:
    return normalize_answer(text) or text.strip().lower()


SCORES: Registry[Score] = Registry("metric")
for _score in (
    Score("accuracy", "accuracy", accuracy, binary=True),
    Score("contained", "contained", contained, binary=True),
    Score("exact_match", "exact", exact_match, binary=True),
    Score("f1", "F1", f1),
    Score("format_failure", "format failure", format_failure, binary=True, lower_is_better=True),
    Score("original", "original", original, binary=True, lower_is_better=True),
    *(Score(kind, kind.replace("rouge", "ROUGE-"), partial(rouge, kind)) for kind in _ROUGE),
    Score("bert_precision", "BERT-P", None),
    Score("factkb", "FactKB", None),
):
    SCORES.register(_score.name, _score)
_OTHER = {"output_words": "words", "seconds": "s/sample"}


def score_answer(
    names: Sequence[str], prediction: str, references: Sequence[str], originals: Sequence[str]
) -> dict[str, float]:
    """Values by name of those scores that apply and need no model; none without references."""
    scores = {}
    for name in names if references else ():
        function = SCORES[name].function
        value = function(prediction, references, originals) if function else None
        if value is None:
            continue
        try:
            scores[name] = float(value)
        except (TypeError, ValueError):
            scores[name] = nan
        if not isfinite(scores[name]):
            raise FastMemError(
                f"metric {name}: it gave {value!r} for the answer {prediction[:60]!r}; a score is a finite "
                "number, or None where it does not apply"
            )
    return scores


def find_score(name: str) -> Score:
    """The score of that name; for other numbers of records, how tables show them."""
    return SCORES[name] if name in SCORES else Score(name, _OTHER.get(name, name), None, percent=False)


def format_score(name: str, value: float, error: float | None = None, sign: str = "") -> str:
    """Return a score as tables show it; ``sign="+"`` marks a difference.

    >>> format_score("accuracy", 0.525, 0.031), format_score("output_words", 3.25)
    ('52.5% ± 3.1', '3.2')
    """
    percent, digits = find_score(name).percent, 2 if name == "seconds" else 1
    scale = 100 if percent else 1
    shown = round(scale * value, digits) + 0.0  # no minus before a zero
    spread = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{shown:{sign}.{digits}f}{'%' if percent else ''}{spread}"


def count_of(number: int, noun: str) -> str:
    """A number with its noun, as ``1,200 samples``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
