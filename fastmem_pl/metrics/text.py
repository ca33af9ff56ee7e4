"""Text normalization of the published evaluation, kept exactly (its quirks included)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

_ANSWER_MARK = re.compile(r"the answer is:\s*", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower-case, drop articles, fold white space, drop punctuation and symbols, in this order.

    Spaces on both sides of dropped punctuation remain, as in the published evaluation.

    >>> normalize_answer("The Beatles, (1960)")
    'beatles 1960'
    """
    text = _ARTICLES.sub("", text.lower())
    text = " ".join(text.split())
    return "".join(c for c in text if unicodedata.category(c)[0] not in "PS").strip()


def extract_answer(text: str) -> str:
    """Return what follows the last "The answer is:", or ``"Unknown"`` where it is missing."""
    parts = _ANSWER_MARK.split(text)
    return parts[-1].strip() if len(parts) > 1 else "Unknown"


def has_answer_format(text: str) -> bool:
    """Whether the text says "The answer is:" as the prompt asks."""
    return _ANSWER_MARK.search(text) is not None


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
