"""Means, paired gains, order and warnings of a ranking, against values worked out by hand or by numpy."""

import json
import random
import re

import numpy as np
import pytest
from search_runs import points_of

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.search import rank

RATES = [1e-6, 1e-5, 1e-4]
AXES = {"learning_rate": RATES, "steps": [4], "kl_coeff": [0.1]}


def point(rate=1e-5, steps=4, kl=0.1, **others):
    return {"learning_rate": rate, "steps": steps, "kl_coeff": kl, **others}


def answers(at, values, name="accuracy", status="ok", seconds=(0.4, 0.1), words=3, start=0):
    """One record a value, on samples 0, 5, 10 ... as ``search.every: 5`` takes them."""
    return [
        {
            "index": 5 * (start + i),
            "method": "fastmem" if at else "zero-shot",
            "point": at,
            "scores": {name: value},
            "output_words": words,
            "seconds": dict(zip(("memorize", "decode"), seconds, strict=True)),
            "status": status,
        }
        for i, value in enumerate(values)
    ]


def compared(rates, before=(0.0,) * 4):
    """Zero-shot, and answers by learning rate."""
    return sum((answers(point(rate), values) for rate, values in rates.items()), answers(None, before))


def ranked(records, objective="accuracy", axes=AXES, ranges=None):
    return rank(records, objective, points_of(axes), ranges)


def warning(ranking, word):
    found = [line for line in ranking.warnings if word in line]
    assert len(found) == 1, ranking.warnings
    return found[0]


def rates(ranking):
    return [entry.point["learning_rate"] for entry in ranking.points]


def test_means_errors_and_paired_gains():
    before, after = [0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 0, 1]
    records = answers(None, before, seconds=(0.0, 0.25), words=8) + answers(point(), after)
    random.Random(1).shuffle(records)
    ranking = ranked(records)
    best, differences = ranking.best, np.subtract(after, before)
    assert (best.n, best.point, best.failed) == (6, point(), 0)
    assert best.value == pytest.approx(4 / 6)
    assert best.standard_error == pytest.approx(np.std(after, ddof=1) / np.sqrt(6))
    assert best.gain == pytest.approx(2 / 6)
    assert best.gain_error == pytest.approx(np.std(differences, ddof=1) / np.sqrt(6))
    assert best.seconds == pytest.approx(0.5)
    assert best.scores == pytest.approx({"accuracy": 4 / 6, "output_words": 3})
    zero = ranking.baseline
    assert (zero.n, zero.seconds, zero.scores["output_words"]) == (6, 0.25, 8)
    assert zero.value == pytest.approx(2 / 6)
    assert zero.standard_error == pytest.approx(np.std(before, ddof=1) / np.sqrt(6))


def test_scores_and_samples_that_one_side_lacks_do_not_count():
    records = answers(None, [0.0] * 3) + answers(point(), [1.0] * 3)
    records[4]["scores"]["original"] = 1.0
    records[5]["scores"]["original"] = 0.0
    assert ranked(records).best.scores["original"] == 0.5
    for record in (records[0], records[3]):
        record["scores"] = {"contained": 1.0}
    ranking = ranked(records)
    assert (ranking.baseline.n, ranking.best.n) == (2, 2)
    best = ranked(answers(None, [0.0, 1.0]) + answers(point(), [0.0, 1.0, 1.0, 1.0])).best
    assert (best.n, best.value, best.gain) == (2, 0.5, 0.0)


def test_points_are_ordered_by_value():
    records = compared({1e-6: [1, 0, 0, 0], 1e-5: [1, 1, 1, 0], 1e-4: [1, 1, 0, 0]})
    assert rates(ranked(records)) == [1e-5, 1e-4, 1e-6]


@pytest.mark.parametrize("name", ["format_failure", "original"])
def test_lower_is_better_turns_order_and_gain_around(name):
    records = answers(None, [1, 1, 1, 0], name)
    records += answers(point(1e-6), [1, 1, 1, 1], name) + answers(point(1e-5), [0, 0, 0, 0], name)
    ranking = ranked(records, name)
    assert rates(ranking) == [1e-5, 1e-6]
    assert ranking.best.gain == -0.75
    assert not any("does not show a gain" in line for line in ranking.warnings)
    worse = ranked(records[:8], name)
    assert worse.best.gain == 0.25
    assert "+25.0% ± 25.0" in warning(worse, "does not show a gain")


def test_ties_go_to_steps_then_rate_then_kl_then_the_other_axes():
    order = [
        point(1e-5, 2, 0.3, alpha=0.3),
        point(1e-5, 2, 0.3, alpha=0.5),
        point(1e-5, 2, 0.1, alpha=0.3),
        point(1e-4, 2, 0.3, alpha=0.3),
        point(1e-6, 4, 0.3, alpha=0.3),
    ]
    axes = {"alpha": [0.3, 0.5], "learning_rate": RATES, "kl_coeff": [0.1, 0.3], "steps": [4, 2]}
    for seed in range(5):
        shuffled = random.Random(seed).sample(order, len(order))
        records = answers(None, [0.0, 0.0]) + [r for p in shuffled for r in answers(p, [1.0, 0.0])]
        ranking = ranked(records, axes=axes)
        assert [entry.point for entry in ranking.points] == order
        assert warning(ranking, "tie").startswith("4 more points tie with the best")


def test_the_same_scores_summed_in_another_order_tie():
    values = [0.1, 0.2, 0.3]
    assert sum(values) != sum(reversed(values))
    ranking = ranked(compared({1e-5: values, 1e-6: values[::-1]}, [0.0] * 3))
    assert ranking.best.point["learning_rate"] == 1e-6
    assert warning(ranking, "with the best")


def test_axes_hold_the_values_that_occur_ascending_and_points_of_another_grid_are_left_out():
    records = compared({1e-4: [0.5] * 2, 1e-6: [0.0] * 2}, [0.0] * 2)
    records += answers(point(steps=8), [1.0] * 2) + answers(point(alpha=0.5), [1.0] * 2)
    axes = {"learning_rate": [1e-4, 1e-5, 1e-6], "steps": [4, 9], "kl_coeff": [0.1]}
    ranking = ranked(records, axes=axes)
    assert [entry.point for entry in ranking.points] == [point(1e-4), point(1e-6)]
    assert ranking.best.value == 0.5
    assert ranking.axes == {"learning_rate": [1e-6, 1e-4], "steps": [4], "kl_coeff": [0.1]}


@pytest.mark.parametrize(
    "records",
    [
        [],
        answers(None, [1.0]),
        answers(point(), [1.0]),
        answers(None, [1.0]) + answers(point(), [1.0], start=1),
        answers(None, [1.0]) + answers(point(steps=99), [1.0]),
        answers(None, [1.0], "f1") + answers(point(), [1.0], "f1"),
    ],
    ids=["nothing", "zero-shot only", "no zero-shot", "no common sample", "other grid", "other score"],
)
def test_nothing_to_rank_is_told_in_one_line(records):
    with pytest.raises(FastMemError, match=r"search\.objective: .*'accuracy'") as caught:
        ranked(records)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("axis", "values", "best", "expected"),
    [
        ("learning_rate", [1e-5, 3e-5], 3e-5, "3e-05, is at the upper end.* beyond 3e-05: search larger"),
        ("learning_rate", [1e-5, 3e-5], 1e-5, "1e-05, is at the lower end.* beyond 1e-05: search smaller"),
        ("learning_rate", [1e-6, 1e-5, 3e-5], 1e-5, None),
        ("learning_rate", [1e-5], 1e-5, None),
        ("steps", [2, 4], 2, "2, is at the lower end"),
        ("steps", [1, 4], 1, None),
        ("kl_coeff", [0.0, 0.1], 0.0, None),
        ("alpha", [0, 0.5], 0, None),
        ("temperature", [0.0, 1.0], 0.0, None),
        ("top_p", [0.9, 1.0], 1.0, None),
        ("top_k", [0, 40], 0, None),
        ("relative_top", [0.1, 1.0], 1.0, None),
        ("relative_top", [0.0, 0.1], 0.0, None),
        ("relative_top", [0.1, 0.5], 0.5, "0.5, is at the upper end"),
        ("repetition_penalty", [1.0, 1.2], 1.0, "1, is at the lower end"),
    ],
)
def test_the_edge_of_the_grid(axis, values, best, expected):
    axes = {**AXES, "learning_rate": [1e-5], axis: values}
    records = answers(None, [0.0] * 4)
    for value in values:
        at = {**point(), axis: value}
        records += answers(at, [1.0, 1.0, 1.0, 0.0] if value == best else [0.0] * 4)
    lines = ranked(records, axes=axes).warnings
    if expected is None:
        assert lines == []
    else:
        assert len(lines) == 1
        assert re.match(f"the best {axis}, {expected}", lines[0])


def test_the_edge_of_a_range():
    ranges = {"learning_rate": (1e-6, 1e-2, True), "alpha": (0.0, 1.0, False), "steps": (1, 50, True)}

    def lines(**at):
        at["kl_coeff"] = 0.1
        records = answers(None, [0.0] * 3) + answers(at, [1.0] * 3)
        return rank(records, "accuracy", [at], ranges).warnings

    assert lines(learning_rate=1e-4, alpha=0.5, steps=7) == []
    # Three decades above the lowest is the middle of a logarithmic scale, and near the lowest of another.
    (line,) = lines(learning_rate=1.1e-6, alpha=0.001, steps=1)
    assert re.match(
        "the best learning_rate, 1.1e-06, is at the lower end.* beyond 1e-06: search smaller", line
    )
    assert len(lines(learning_rate=9.5e-3, alpha=0.99, steps=50)) == 3


def test_an_end_of_the_grid_that_ties_with_others_is_no_evidence():
    axes = {**AXES, "learning_rate": [1e-6, 1e-5, 3e-5]}
    records = compared({1e-6: [1, 1, 1, 0], 1e-5: [1, 1, 1, 0], 3e-5: [0.0] * 4})
    (line,) = ranked(records, axes=axes).warnings
    assert line.startswith("1 more point ties with the best")


@pytest.mark.parametrize(
    ("after", "text"),
    [
        # One gain in four: 0.25 with a standard error of 0.25, so no more than one.
        ([1, 0, 0, 0], "+25.0% ± 25.0 on 4 samples"),
        ([0, 0, 0, 0], "+0.0% ± 0.0 on 4 samples"),
        ([1, 1, 0, 0], None),
    ],
)
def test_a_gain_within_one_standard_error_is_none(after, text):
    lines = ranked(answers(None, [0.0] * 4) + answers(point(), after)).warnings
    assert len(lines) == (text is not None)
    for line in lines:
        assert line.startswith("the search does not show a gain")
        assert text in line
        assert "lower search.every" in line


@pytest.mark.parametrize(("after", "gains"), [(1.0, True), (0.0, False)])
def test_a_single_sample_has_no_errors_and_says_so(after, gains):
    ranking = ranked(answers(None, [0.0]) + answers(point(), [after]))
    best = ranking.best
    assert (best.standard_error, best.gain_error, ranking.baseline.standard_error) == (None, None, None)
    assert "lower search.every" in warning(ranking, "single sample")
    assert any("does not show a gain" in line for line in ranking.warnings) != gains


def test_unfinished_points_come_last_and_do_not_tie():
    ranking = ranked(compared({1e-5: [1.0] * 3, 1e-6: [1, 0, 0, 0], 1e-4: [1, 0, 0, 0]}))
    assert [(p.point["learning_rate"], p.n) for p in ranking.points] == [(1e-6, 4), (1e-4, 4), (1e-5, 3)]
    assert warning(ranking, "before the last sample").startswith("1 of 3 points")
    assert warning(ranking, "with the best").startswith("1 more point ties")


def test_points_with_failed_answers_come_after_those_without_and_before_unfinished_ones():
    records = compared({1e-4: [1.0] * 4, 1e-5: [1, 0, 0, 0], 1e-6: [1.0] * 3, 3e-5: [1, 1, 1, 0]})
    for record in (*records[4:6], records[15]):
        record["status"] = "loss is not finite"
    axes = {**AXES, "learning_rate": [1e-6, 1e-5, 3e-5, 1e-4]}
    ranking = ranked(records, axes=axes)
    assert rates(ranking) == [1e-5, 1e-4, 3e-5, 1e-6]
    assert [entry.failed for entry in ranking.points] == [0, 2, 1, 0]
    assert [entry.n for entry in ranking.points] == [4, 4, 4, 3]
    line = warning(ranking, "not finite")
    assert "in 2 of 4 points" in line
    assert "gave 3 answers" in line


def test_as_dict_is_json_without_nan():
    ranking = ranked(answers(None, [0.0]) + answers(point(), [1.0]))
    plain = ranking.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["best"] == plain["points"][0]
    assert plain["best"]["point"] == point()
    assert plain["best"]["gain_error"] is None
    assert (plain["objective"], plain["baseline"]["value"]) == ("accuracy", 0.0)
    assert plain["warnings"] == ranking.warnings
