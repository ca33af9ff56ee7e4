"""ROUGE against values computed by hand."""

import pytest

from fastmem_pl.metrics import SCORES, scores

ALL = [SCORES[kind].function for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")]
rouge1, rouge2, rougeL, rougeLsum = ALL
REFERENCE = "the cat sat on the mat"


def f_measure(hits: int, predicted: int, expected: int) -> float:
    precision, recall = hits / predicted, hits / expected
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        # Words: the, the, cat, mat of 5 and 6; pairs: the cat, the mat; in order: the cat the mat.
        ("The cat likes the MAT!", (f_measure(4, 5, 6), f_measure(2, 4, 5), f_measure(4, 5, 6))),
        # The same words backwards: no pair; in order: the on the.
        ("mat the on sat cat the", (1.0, 0.0, f_measure(3, 6, 6))),
        # No stemmer: "cats" is not "cat".
        ("cats", (0.0, 0.0, 0.0)),
        (REFERENCE, (1.0, 1.0, 1.0)),
    ],
)
def test_values_by_hand(prediction, expected):
    values = [score(prediction, [REFERENCE]) for score in (rouge1, rouge2, rougeL)]
    assert values == pytest.approx(expected)
    assert rougeLsum(prediction, [REFERENCE]) == pytest.approx(expected[2]), "one line: Lsum equals L"


def test_only_newlines_end_a_sentence():
    prediction, reference = "c d. {0}a b.", "a b. {0}c d."
    assert rougeLsum(prediction.format("\n"), [reference.format("\n")]) == 1.0
    assert rougeLsum(prediction.format(""), [reference.format("")]) == 0.5
    assert rougeL(prediction.format("\n"), [reference.format("\n")]) == 0.5


def test_the_nltk_sentence_splitter_is_never_called(monkeypatch):
    import nltk

    def fail(*args, **kwargs):
        raise AssertionError("NLTK would download its data")

    monkeypatch.setattr(nltk, "sent_tokenize", fail)
    monkeypatch.setattr(nltk, "download", fail)
    assert rougeLsum("First. Second.", ["First. Second, later."]) == pytest.approx(f_measure(2, 2, 3))


def test_each_score_takes_its_own_best_reference():
    prediction, scrambled, ordered = "a b c d", "d c b a", "a b x y"
    references = [scrambled, ordered]
    assert rouge1(prediction, references) == rouge1(prediction, [scrambled]) == 1.0
    assert rouge2(prediction, references) == rouge2(prediction, [ordered]) == f_measure(1, 3, 3)
    for score in ALL:
        assert score(prediction, references) == max(score(prediction, [r]) for r in references)


@pytest.mark.parametrize("score", ALL)
def test_degenerate_texts(score):
    assert score("", [REFERENCE]) == 0.0
    assert score(" \n ", [REFERENCE]) == 0.0
    assert score("¡…!", [REFERENCE]) == 0.0
    assert score(REFERENCE, [""]) == 0.0
    assert score(REFERENCE, []) is None
    assert isinstance(score("", [REFERENCE]), float)


def test_the_four_scores_of_an_answer_are_computed_once(monkeypatch):
    calls = []
    scorer = scores._scorer()

    class Counting:
        def score_multi(self, references, prediction):
            calls.append(prediction)
            return scorer.score_multi(references, prediction)

    monkeypatch.setattr(scores, "_scorer", Counting)
    scores._fmeasures.cache_clear()
    for score in ALL:
        score("counted once", [REFERENCE])
    assert calls == ["counted once"]
