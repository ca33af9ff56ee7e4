"""Tasks: how a record of a data set becomes a sample, its prompt, and how answers are scored.

Prompts and record formats follow the published evaluation (IAAR-Shanghai/FastMem, ``src/utils.py``).
"""

import ast
import json
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fastmem_pl.base.errors import nearest
from fastmem_pl.base.registry import Registry


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


class FieldError(ValueError):
    """A record's field is missing or wrong; the reader adds file and line."""


class RawRecord:
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
        """The field's value; a :class:`FieldError` where it is missing, or holds what no file can."""
        name = self.names.get(field, field)
        if name not in self.data:
            found = ", ".join(map(str, self.data)) or "none"
            raise FieldError(f"field {name!r} is missing; found: {found}{nearest(name, map(str, self.data))}")
        value = self.data[name]
        # JSON can hold halves of characters ("\\ud83d"), which no file or model takes.
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if half := re.search("[\ud800-\udfff]", text):
            raise FieldError(
                f"field {name!r} holds half of a character (\\u{ord(half[0]):04x}, a lone surrogate); put "
                "the whole character there, or remove it"
            )
        return value

    def label(self, field: str) -> str:
        """The field's value as text, where it is one or a number."""
        value = self.value(field)
        if isinstance(value, (dict, list)):
            raise FieldError(f"field {field!r} must be text or a number, found {_shown(value)}")
        return str(value)

    def text(self, field: str) -> str:
        """The field's value as text; a :class:`FieldError` where it is missing, no text, or empty."""
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
    """What a task reads out of one record; a context without a letter or digit is a :class:`FieldError`."""

    context: str
    question: str = ""
    references: tuple[str, ...] = ()
    originals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_words("context", self.context)


def _require_words(name: str, text: str) -> str:
    if not any(character.isalnum() for character in text):
        raise FieldError(f"the {name} is empty: {text!r}")
    return text


@dataclass(frozen=True)
class Task:
    """A kind of data with its prompts and scores; the shipped ones stand in ``tasks.yaml``.

    Attributes:
        format: how a record is read, a name in :data:`FORMATS`.
        prompt: user turn with the places ``{context}`` and, where the task has questions, ``{question}``.
        one_shot: the same with one worked example before it.
        without_context: the same with nothing of the context.
        scores: names in :data:`fastmem_pl.metrics.SCORES`, computed where references are known.
        context: form of the text that is memorized and put in the prompt's place ``{context}``.
    """

    name: str
    description: str
    format: str
    prompt: str
    one_shot: str
    without_context: str
    scores: tuple[str, ...]
    context: str = "{context}"

    @property
    def is_summary(self) -> bool:
        """Whether there is a text to summarize rather than a question."""
        return "{question}" not in self.prompt

    def read(self, record: RawRecord) -> Fields:
        """Read one record; a :class:`FieldError` where it does not fit the task's format."""
        fields = FORMATS[self.format](record)
        return replace(fields, context=_fill(self.context, fields.context, fields.question))

    def prompt_text(self, context: str, question: str, form: str = "prompt") -> str:
        """Fill one of the task's prompts; braces in the data stay as they are."""
        return _fill(getattr(self, form), context, question)


def _fill(template: str, context: str, question: str) -> str:
    parts = re.split(r"\{(context|question)\}", template)
    values = {"context": context, "question": question}
    return "".join(values[part] if place % 2 else part for place, part in enumerate(parts))


def _question(record: RawRecord, field: str) -> str:
    return _require_words("question", record.text(field)) + "?"


def _read_nq(record: RawRecord) -> Fields:
    return Fields(record.text("context"), _question(record, "input"), (record.text("answer"),))


def _read_nqswap(record: RawRecord) -> Fields:
    answer, original = record.text("sub_answer"), record.text("answer")
    originals = () if original == answer else (original,)
    return Fields(record.text("sub_context"), _question(record, "input"), (answer,), originals)


def _read_memotrap(record: RawRecord) -> Fields:
    instruction, colon, sentence = record.text("prompt").partition(":")
    if not colon:
        raise FieldError("field 'prompt' has no ':' between instruction and sentence")
    classes = record.value("classes")
    try:
        classes = ast.literal_eval(classes) if isinstance(classes, str) else classes
        candidates = [str(c).strip().strip(string.punctuation + " ") for c in classes]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        candidates = []
    if len(candidates) != 2 or not all(candidates):
        raise FieldError(f"field 'classes' must be a list of two endings, found {_shown(classes)}")
    index = record.value("answer_index")
    if type(index) is not int or index not in (0, 1):
        raise FieldError(f"field 'answer_index' must be 0 or 1, found {_shown(index)}")
    question = f'{sentence.strip()}\nCandidates: "{candidates[0]}" or "{candidates[1]}"'
    return Fields(instruction.strip() + ".", question, (candidates[index],), (candidates[1 - index],))


def _read_hotpotqa(record: RawRecord) -> Fields:
    context = record.value("context")
    try:
        paragraphs = [" ".join(sentences) for sentences in context["sentences"]]
    except (TypeError, KeyError):
        raise FieldError(
            f"field 'context' must hold 'sentences', a list of lists of text, found {_shown(context)}"
        ) from None
    question = _require_words("question", record.text("question")).rstrip(string.punctuation) + "?"
    return Fields("\n".join(paragraphs), question, (record.text("answer"),))


def _read_qa(record: RawRecord) -> Fields:
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
    return Fields(record.text("context"), _require_words("question", record.text("question")), known)


def _read_summary(record: RawRecord) -> Fields:
    summary = record.text("summary") if record.has("summary") else None
    return Fields(record.text("article"), references=(summary,) if summary else ())


FORMATS: dict[str, Callable[[RawRecord], Fields]] = {
    "nqswap": _read_nqswap,
    "nq": _read_nq,
    "memotrap": _read_memotrap,
    "hotpotqa": _read_hotpotqa,
    "qa": _read_qa,
    "summary": _read_summary,
}


def load_tasks(path: Path) -> list[Task]:
    """Read tasks from a YAML file of the form of ``tasks.yaml``."""
    tasks = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Task(name, **{**task, "scores": tuple(task["scores"])}) for name, task in tasks.items()]


TASKS: Registry[Task] = Registry("data.task")
for _task in load_tasks(Path(__file__).with_name("tasks.yaml")):
    TASKS.register(_task.name, _task)

OWN_FIELDS = {
    "qa": ("context", "question", "answers", "answer", "id"),
    "summary": ("article", "summary", "id"),
}
"""Fields of the tasks for a user's own file, which may have other names there."""

MIXED = "mixed"
"""Pseudo task of files whose records name their own task."""
