"""The samples of a report as its page browses them: context, prompt, and all answers side by side."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import isnan
from typing import Any

from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.decoding.methods import METHODS
from fastmem_pl.metrics import find_score
from fastmem_pl.report.collect import Comparison


def browser_data(comparison: Comparison) -> dict[str, Any]:
    """What ``page/filters.js`` documents: variants, scores, and every sample with its answers."""
    places = comparison.tasks
    labels = [comparison.datasets[place].label for place in places]
    numbers = {variant: number for number, variant in enumerate(comparison.variants)}
    memory = comparison.answers.groupby("variant")["memory"].first()
    scores = [find_score(n) for n in dict.fromkeys(n for i in places for n in comparison.scores_of(i))]
    return {
        "variants": [
            {
                "label": variant,
                "baselines": [numbers.get(comparison.baseline(place, variant)) for place in places],
                "memory": bool(memory[variant]),
            }
            for variant in numbers
        ],
        "scores": {
            one.name: dict(label=one.label, percent=one.percent, binary=one.binary, lower=one.lower_is_better)
            for one in scores
        },
        "primary": dict(zip(labels, map(comparison.primary_score, places), strict=True)),
        "datasets": labels,
        "samples": [
            {"dataset": number, **sample}
            for number, place in enumerate(places)
            for sample in _samples(comparison, place)
        ],
    }


def _samples(comparison: Comparison, place: int) -> Iterator[dict[str, Any]]:
    answers = comparison.answers[comparison.answers["dataset"] == place]
    numbers = answers["variant"].map(comparison.variants.index)
    answers = answers.assign(number=numbers).sort_values(["index", "number"])
    known: dict[int, ContextSample] = {}
    for number in sorted(answers["run"].unique(), reverse=True):
        known |= comparison.runs[number].samples
    # What a model makes of a context, which any of its methods may have measured; one model needs no name.
    several = answers["model"].nunique() > 1
    measures: dict[int, list[str]] = defaultdict(list)
    by_model = answers.groupby(["index", "model"], sort=False)[["length", "perplexity"]].first()
    for (index, model), length, perplexity in by_model.itertuples():
        named = f" ({model})" if several else ""
        if not isnan(length):
            measures[index].append(f"{int(length):,} context tokens{named}")
        if not isnan(perplexity):
            measures[index].append(f"perplexity {perplexity:{'.3g' if perplexity < 1000 else ',.0f'}}{named}")
    for index, group in answers.groupby("index"):
        answered = list(zip(group["number"], group["record"], strict=True))
        sample, first = known.get(index), answered[0][1]
        references, originals = first.get("references") or [], first.get("originals") or []
        yield {
            "id": str(first.get("id", index)),
            "question": first.get("question", ""),
            "context": sample and marked(sample.context, references, originals),
            "prompt": sample and _prompt(sample, first["method"]),
            "references": references,
            "originals": originals,
            "measures": measures[index],
            "answers": [
                {
                    "v": number,
                    "text": record["prediction"],
                    "scores": {name: round(value, 4) for name, value in record["scores"].items()},
                    "status": record.get("status", "ok"),
                    "cut": record.get("n_truncated_tokens", 0),
                    "words": record["output_words"],
                    "seconds": round(sum(record["seconds"].values()), 2),
                }
                for number, record in answered
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
        # None has it among letters whose lower case has another length.
        kind = kinds.get(match.group().lower(), "")
        parts += [[text[end : match.start()], ""], [match.group(), kind]]
        end = match.end()
    return [part for part in [*parts, [text[end:], ""]] if part[0]]
