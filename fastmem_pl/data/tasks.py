"""Tasks: how a record of a data set becomes a sample, its prompt, and how answers are scored.

Prompts and record formats follow the published evaluation (IAAR-Shanghai/FastMem, ``src/utils.py``).
"""

from __future__ import annotations

import ast
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastmem_pl.errors import nearest
from fastmem_pl.registry import Registry


class FieldError(ValueError):
    """A record's field is missing or wrong; the reader adds file and line."""


class Record:
    """One JSON object with checked access to its fields, by a user's own names if given."""

    def __init__(self, data: Any, names: Mapping[str, str] | None = None) -> None:
        if not isinstance(data, dict):
            raise FieldError(f"expected an object with named fields, found {type(data).__name__}")
        self.data = data
        self.names = names or {}

    def has(self, field: str) -> bool:
        """Whether the record has the field."""
        return self.names.get(field, field) in self.data

    def value(self, field: str) -> Any:
        """The field's value.

        Raises:
            FieldError: when it is missing.
        """
        name = self.names.get(field, field)
        if name not in self.data:
            found = ", ".join(map(str, self.data)) or "none"
            raise FieldError(f"field {name!r} is missing; found: {found}{nearest(name, map(str, self.data))}")
        return self.data[name]

    def text(self, field: str) -> str:
        """The field's value as text that is not empty.

        Raises:
            FieldError: when it is missing, no text, or empty.
        """
        value = self.value(field)
        name = self.names.get(field, field)
        if not isinstance(value, str):
            raise FieldError(f"field {name!r} must be text, found {_shown(value)}")
        if not value.strip():
            raise FieldError(f"field {name!r} is empty; every record needs a {field}")
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:39] + '…'}"


@dataclass(frozen=True)
class Fields:
    """What a task reads out of one record.

    Raises:
        FieldError: when context or question hold no letter or digit.
    """

    context: str
    question: str
    references: tuple[str, ...] = ()
    originals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("context", "question"):
            if not any(character.isalnum() for character in getattr(self, name)):
                raise FieldError(f"the {name} is empty: {getattr(self, name)!r}")


@dataclass(frozen=True)
class Task:
    """A kind of data with its prompt and scores.

    Attributes:
        name: as in ``--data.task``.
        description: one line for humans.
        prompt: user turn with the places ``{context}`` and ``{question}``.
        read: reads one record.
        scores: names in :data:`fastmem_pl.metrics.SCORES`, computed where references are known.
    """

    name: str
    description: str
    prompt: str
    read: Callable[[Record], Fields]
    scores: tuple[str, ...] = ("accuracy", "contained", "exact_match", "f1", "format_failure", "original")

    def prompt_text(self, context: str, question: str) -> str:
        """Fill the prompt; braces in the data stay as they are."""
        before, rest = self.prompt.split("{context}")
        between, after = rest.split("{question}")
        return before + context + between + question + after


_EXTRACT = (
    "Please extract from the context the span that best answers the question and provide the answer in "
    'the following format: "The answer is: ...".\nContext: {context}\nQuestion: {question}'
)
_CANDIDATES = (
    "Please choose the candidate that best fits the instructions and provide the answer in the following "
    'format: "The answer is: ...".\nInstruction: {context}\nSentence: {question}'
)


def _read_nq(record: Record) -> Fields:
    return Fields(record.text("context"), record.text("input") + "?", (record.text("answer"),))


def _read_nqswap(record: Record) -> Fields:
    answer, original = record.text("sub_answer"), record.text("answer")
    originals = () if original == answer else (original,)
    return Fields(record.text("sub_context"), record.text("input") + "?", (answer,), originals)


def _read_memotrap(record: Record) -> Fields:
    instruction, colon, sentence = record.text("prompt").partition(":")
    if not colon:
        raise FieldError("field 'prompt' has no ':' between instruction and sentence")
    classes = record.value("classes")
    try:
        classes = ast.literal_eval(classes) if isinstance(classes, str) else classes
        candidates = [str(c).strip().strip(string.punctuation + " ") for c in classes]
    except (ValueError, SyntaxError, TypeError):
        candidates = []
    if len(candidates) != 2 or not all(candidates):
        raise FieldError(f"field 'classes' must be a list of two endings, found {_shown(classes)}")
    index = record.value("answer_index")
    if index not in (0, 1):
        raise FieldError(f"field 'answer_index' must be 0 or 1, found {_shown(index)}")
    question = f'{sentence.strip()}\nCandidates: "{candidates[0]}" or "{candidates[1]}"'
    return Fields(instruction.strip() + ".", question, (candidates[index],), (candidates[1 - index],))


def _read_hotpotqa(record: Record) -> Fields:
    try:
        paragraphs = [" ".join(sentences) for sentences in record.value("context")["sentences"]]
    except (TypeError, KeyError):
        found = _shown(record.value("context"))
        raise FieldError(
            f"field 'context' must hold 'sentences', a list of lists of text, found {found}"
        ) from None
    question = record.text("question").rstrip(string.punctuation) + "?"
    return Fields("\n".join(paragraphs), question, (record.text("answer"),))


def _read_qa(record: Record) -> Fields:
    name = "answers" if record.has("answers") or not record.has("answer") else "answer"
    answers = record.value(name) if record.has(name) else []
    if isinstance(answers, dict) and "text" in answers:  # SQuAD
        answers = answers["text"]
    if isinstance(answers, str) or answers is None:
        answers = [answers or ""]
    if not (isinstance(answers, list) and all(isinstance(a, str) for a in answers)):
        field = record.names.get(name, name)
        raise FieldError(f"field {field!r} must be text or a list of texts, found {_shown(answers)}")
    # A blank answer would be part of any output.
    known = tuple(answer for answer in answers if answer.strip())
    return Fields(record.text("context"), record.text("question"), known)


TASKS: Registry[Task] = Registry("data.task")
for _task in (
    Task("nqswap", "NQ-Swap: the answer in the context was swapped for another", _EXTRACT, _read_nqswap),
    Task("nq", "Natural Questions with the original contexts (same file as nqswap)", _EXTRACT, _read_nq),
    Task("memotrap", "MemoTrap: end a proverb otherwise than it ends", _CANDIDATES, _read_memotrap),
    Task("hotpotqa", "HotpotQA: ten paragraphs, two of them needed", _EXTRACT, _read_hotpotqa),
    Task("qa", "your own file: context, question, and answer(s) if known", _EXTRACT, _read_qa),
):
    TASKS.register(_task.name, _task)

MIXED = "mixed"
"""Pseudo task of files whose records name their own task in the field ``task``."""
