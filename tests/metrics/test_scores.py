"""Normalization as published, and the scores of one answer."""

import json

import pytest

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.metrics import (
    SCORES,
    Score,
    contains_answer,
    extract_answer,
    format_score,
    normalize_answer,
    score_answer,
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many"])
def test_a_score_that_is_no_finite_number_is_refused(monkeypatch, value):
    monkeypatch.setitem(SCORES, "odd", Score("odd", "odd", lambda *given: value))
    with pytest.raises(FastMemError, match=f"metric odd: it gave {value!r} for the answer 'Rome'"):
        score_answer(["odd"], "Rome", ["Rome"], [])


def test_a_score_may_be_a_truth_value_or_not_apply(monkeypatch):
    monkeypatch.setitem(SCORES, "true", Score("true", "true", lambda *given: True))
    monkeypatch.setitem(SCORES, "none", Score("none", "none", lambda *given: None))
    scores = score_answer(["true", "none"], "Rome", ["Rome"], [])
    assert scores == {"true": 1.0}
    assert type(scores["true"]) is float


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("  The  Beatles ", "beatles"),
        ("a. The answer is: b", "answer is b"),
        ("1,340 moons", "1340 moons"),
        ("Rolls - Royce", "rolls  royce"),
        ("Rolls-Royce", "rollsroyce"),
        ("“Café” $5 – ok", "café 5  ok"),
        ("Theatre an ant", "theatre ant"),
    ],
)
def test_normalization(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("THE ANSWER IS:   \n\t Paris  ", "Paris"),
        ("the answer is:x. The answer is: y", "y"),
        ("The answer is Paris", "Unknown"),
        ("", "Unknown"),
    ],
)
def test_extraction(text, expected):
    assert extract_answer(text) == expected


def test_text_functions_of_the_reference_run(shared):
    golden = json.loads((shared / "golden" / "text_functions.json").read_text())
    for pair in golden["pairs"]:
        assert normalize_answer(pair["input"]) == pair["normalize_text"]
        assert extract_answer(pair["input"]) == pair["postprocess_text"]
    for case in golden["scoring"]:
        answer = extract_answer(case["output_text"])
        assert contains_answer(answer, case["answers"], published=True) == case["matched"]


@pytest.mark.parametrize(
    ("name", "prediction", "references", "originals", "expected"),
    [
        ("accuracy", "The answer is: the Lyon area", ["Lyon"], [], 1.0),
        ("accuracy", "Lyon", ["Lyon"], [], 0.0),
        ("contained", "Lyon", ["Lyon"], [], 1.0),
        ("exact_match", "The answer is: the Lyon area", ["Lyon"], [], 0.0),
        ("exact_match", "The answer is: the Lyon.", ["Lyon"], [], 1.0),
        ("f1", "The answer is: Lyon area", ["Paris", "Lyon"], [], 2 / 3),
        ("f1", "The answer is: x", ["Paris"], [], 0.0),
        ("format_failure", "the ANSWER is: x", ["x"], [], 0.0),
        ("format_failure", "x", ["x"], [], 1.0),
        ("original", "It is Paris.", ["Lyon"], ["Paris"], 1.0),
        ("original", "It is Paris.", ["Lyon"], [], None),
        ("accuracy", "The answer is: x", [], [], None),
        # Normalization leaves nothing of these references.
        ("accuracy", "The answer is: B", ["A"], [], 0.0),
        ("accuracy", "The answer is: A", ["A"], [], 1.0),
        ("exact_match", "The answer is: the", ["A"], [], 0.0),
        ("f1", "The answer is: A", ["a"], [], 1.0),
        ("contained", "it is +", ["+"], [], 1.0),
        # The original is part of the right answer.
        ("original", "The answer is: twenty five", ["twenty five"], ["five"], None),
    ],
)
def test_scores(name, prediction, references, originals, expected):
    assert SCORES[name].function(prediction, references, originals) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("accuracy", 0.525, 0.0312), "52.5% ± 3.1"),
        (("accuracy", 0.025, 0.0, "+"), "+2.5% ± 0.0"),
        (("accuracy", -0.00001, None, "+"), "+0.0%"),
        (("output_words", 12.34), "12.3"),
    ],
)
def test_scores_as_text(arguments, expected):
    assert format_score(*arguments) == expected
