"""The unit of work: one context with its question and reference answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ContextSample:
    """One record of a data file, read by its task.

    Not frozen: Lightning's half-precision plugins copy the dataclasses of a batch field by field.

    Attributes:
        index: place in the data file, from 0.
        references: accepted answers; empty where the file gives none.
        originals: answers that the context contradicts (the model's own world), where known.
        answer_prefix: text that opens the assistant's turn and counts as part of the answer.
    """

    index: int
    id: str
    task: str
    context: str
    question: str
    references: tuple[str, ...] = ()
    originals: tuple[str, ...] = ()
    answer_prefix: str = ""
