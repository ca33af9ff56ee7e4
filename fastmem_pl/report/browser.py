"""The samples of a report as its page browses them: context, prompt, and all answers side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from math import isnan
from operator import itemgetter
from typing import Any

from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.decoding.methods import METHODS
from fastmem_pl.metrics import find_score
from fastmem_pl.report.collect import Comparison
from fastmem_pl.run.records import Record


def browser_data(comparison: Comparison) -> dict[str, Any]:
    """What ``page/filters.js`` documents: variants, scores, and every sample with its answers."""
    places, variants = comparison.tasks, comparison.variants
    memory = comparison.answers.groupby("variant")["memory"].first()
    names = dict.fromkeys(name for place in places for name in comparison.scores_of(place))
    return {
        "variants": [
            {
                "label": variant,
                "baselines": [_baseline(comparison, variant, place) for place in places],
                "memory": bool(memory[variant]),
            }
            for variant in variants
        ],
        "scores": {name: _score(name) for name in names},
        "primary": {comparison.datasets[i].label: comparison.primary_score(i) for i in places},
        "datasets": [comparison.datasets[place].label for place in places],
        "samples": [
            {"dataset": number, **sample}
            for number, place in enumerate(places)
            for sample in _samples(comparison, place)
        ],
    }


def _baseline(comparison: Comparison, variant: str, place: int) -> int | None:
    """Number of the variant that this one is compared with."""
    known = variant in comparison.groups[place]
    baseline = comparison.baseline(place, variant) if known else None
    return None if baseline is None else comparison.variants.index(baseline)


def _score(name: str) -> dict[str, Any]:
    score = find_score(name)
    shown = {"label": score.label, "percent": score.percent, "binary": score.binary}
    return {**shown, "lower": score.lower_is_better}


def _samples(comparison: Comparison, place: int) -> Iterator[dict[str, Any]]:
    numbers = {variant: number for number, variant in enumerate(comparison.variants)}
    answers = comparison.answers[comparison.answers["dataset"] == place]
    answers = answers.assign(number=answers["variant"].map(numbers)).sort_values(["index", "number"])
    known: dict[int, ContextSample] = {}
    for number in sorted(answers["run"].unique(), reverse=True):
        known |= comparison.runs[number].samples
    several = answers["model"].nunique() > 1
    by_model = answers.groupby(["index", "model"], sort=False)[["length", "perplexity"]].first()
    measures: dict[int, list[str]] = {}
    for (index, model), length, perplexity in by_model.itertuples():
        measures.setdefault(index, []).extend(_measures(length, perplexity, f" ({model})" if several else ""))
    columns = zip(answers["index"], answers["number"], answers["record"], strict=True)
    for index, group in groupby(columns, key=itemgetter(0)):
        records = [(number, record) for _, number, record in group]
        yield _sample(records, known.get(index)) | {"measures": measures[index]}


def _measures(length: float, perplexity: float, named: str) -> list[str]:
    """What a model makes of a context: its tokens, and its perplexity; one model needs no name."""
    found = [] if isnan(length) else [f"{int(length):,} context tokens{named}"]
    shown = f"{perplexity:{'.3g' if perplexity < 1000 else ',.0f'}}"
    return found if isnan(perplexity) else [*found, f"perplexity {shown}{named}"]


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
