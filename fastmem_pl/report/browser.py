"""The samples of a report as its page browses them: context, prompt, and all answers side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.decoding.methods import METHODS
from fastmem_pl.metrics import SCORES
from fastmem_pl.report.collect import Comparison, Variant
from fastmem_pl.report.runs import perplexity
from fastmem_pl.report.table import primary_score, scores_of
from fastmem_pl.run.records import Record


def browser_data(comparison: Comparison) -> dict[str, Any]:
    """What ``page/filters.js`` documents: variants, scores, and every sample with its answers."""
    places = comparison.tasks
    names = [name for place in places for name in scores_of(comparison, place)]
    return {
        "variants": [
            {"label": v.label, "baselines": [_baseline(comparison, v, place) for place in places]}
            | {"memory": v.memory}
            for v in comparison.variants
        ],
        "scores": {name: _score(name) for name in dict.fromkeys(names)},
        "primary": {comparison.datasets[i].label: primary_score(comparison, i) for i in places},
        "datasets": [comparison.datasets[place].label for place in places],
        "samples": [
            {"dataset": number, **sample}
            for number, place in enumerate(places)
            for sample in _samples(comparison, place)
        ],
    }


def _baseline(comparison: Comparison, variant: Variant, place: int) -> int | None:
    """Number of the variant whose records of a data set this one is compared with."""
    records = comparison.baseline(variant, place) if place in variant.records else None
    for number, candidate in enumerate(comparison.variants):
        if records and candidate is not variant and candidate.records.get(place) is records:
            return number
    return None


def _score(name: str) -> dict[str, Any]:
    if name not in SCORES:
        return {"label": name, "percent": False, "binary": False, "lower": False}
    score = SCORES[name]
    return {
        "label": score.label,
        "percent": score.percent,
        "binary": score.binary,
        "lower": score.lower_is_better,
    }


def _samples(comparison: Comparison, place: int) -> Iterable[dict[str, Any]]:
    answered = [(number, v) for number, v in enumerate(comparison.variants) if place in v.records]
    known: dict[int, ContextSample] = {}
    for _, variant in answered:
        for run in comparison.runs_of(variant, place):
            known = run.samples | known
    models = comparison.models([variant for _, variant in answered])
    for index in sorted({index for _, variant in answered for index in variant.records[place]}):
        records = [(n, v.records[place][index]) for n, v in answered if index in v.records[place]]
        measured = {
            name: [v.records[place][index] for v in variants if index in v.records[place]]
            for name, variants in models.items()
        }
        yield _sample(records, known.get(index)) | {"measures": _measures(measured)}


def _measures(records: Mapping[str, Sequence[Record]]) -> list[str]:
    """What models make of a context: its tokens, and its perplexity; one model needs no name."""
    found = []
    for name, own in records.items():
        named = f" ({name})" if len(records) > 1 else ""
        tokens = next((r["n_context_tokens"] for r in own if r.get("n_context_tokens") is not None), None)
        value = next((value for record in own if (value := perplexity(record)) is not None), None)
        found += [] if tokens is None else [f"{tokens:,} context tokens{named}"]
        found += [] if value is None else [f"perplexity {value:{'.3g' if value < 1000 else ',.0f'}}{named}"]
    return found


def _sample(records: Sequence[tuple[int, Record]], sample: ContextSample | None) -> dict[str, Any]:
    first = records[0][1]
    references, originals = first.get("references") or [], first.get("originals") or []
    return {
        "id": str(first.get("id", first["index"])),
        "question": first.get("question", ""),
        "context": sample and marked(sample.context, references, originals),
        "prompt": sample and _prompt(sample, first["method"]),
        "references": references,
        "originals": originals,
        "answers": [
            {
                "v": number,
                "text": record["prediction"],
                "scores": {name: round(value, 4) for name, value in record["scores"].items()},
                "status": record.get("status", "ok"),
                "cut": record.get("n_truncated_tokens", 0),
                "words": record.get("output_words"),
                "seconds": round(sum(record["seconds"].values()), 2),
            }
            for number, record in records
        ],
    }


def _prompt(sample: ContextSample, method: str) -> str:
    """The user's turn, and what opens the assistant's; chat markup is the tokenizer's and left out."""
    form = METHODS[method].prompt if method in METHODS else "prompt"
    text = TASKS[sample.task].prompt_text(sample.context, sample.question, form)
    return f"{text}\n\n{sample.answer_prefix}" if sample.answer_prefix else text


def marked(text: str, references: Sequence[str], originals: Sequence[str]) -> list[list[str]]:
    """Cut a context into ``[text, kind]``; kinds are ``""``, ``"answer"`` and ``"original"``.

    Whole words only, whatever their case; where both match, the longer one counts, then the answer.

    >>> marked("Painted by Rembrandt, not Leonardo.", ["rembrandt"], ["Leonardo"])[1:4]
    [['Rembrandt', 'answer'], [', not ', ''], ['Leonardo', 'original']]
    """
    kinds = {name.strip().lower(): "original" for name in originals if name.strip()}
    kinds |= {name.strip().lower(): "answer" for name in references if name.strip()}
    if not kinds:
        return [[text, ""]]
    wanted = "|".join(re.escape(name) for name in sorted(kinds, key=len, reverse=True))
    parts, end = [], 0
    for match in re.finditer(rf"(?<!\w)(?:{wanted})(?!\w)", text, re.IGNORECASE):
        kind = kinds.get(match.group().lower())
        if kind is None:
            # Letters whose lower case has another length.
            continue
        parts += [[text[end : match.start()], ""], [match.group(), kind]]
        end = match.end()
    return [part for part in [*parts, [text[end:], ""]] if part[0]]
