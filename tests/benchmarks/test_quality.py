"""benchmarks/quality.py: equal budgets, validation and test apart, and what the page says of the numbers."""

import json
import sys
from pathlib import Path

import pytest
from runs import NQ

from fastmem_pl.decoding import DECODERS, METHODS, DecodingSettings, decoders_using
from fastmem_pl.memory import MemorizationSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quality


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_budget_of_settings_that_it_has(method):
    points = quality.grid(method, (1e-4, 3e-5, 3e-4))
    assert len(points) == (1 if method in ("zero-shot", "one-shot") else quality.BUDGET)
    assert len({tuple(point.items()) for point in points}) == len(points)
    for point in points:
        memorize = {name: value for name, value in point.items() if name in quality.MEMORIZE}
        assert METHODS[method].memory or not memorize
        MemorizationSettings(**memorize)
        decode = {name: value for name, value in point.items() if name not in memorize}
        DecodingSettings(**decode)
        for name in decode:
            assert name == "repetition_penalty" or METHODS[method].decoder in decoders_using(name)
    # Where settings tie, the papers' are taken.
    own = getattr(DECODERS[METHODS[method].decoder], "defaults", {})
    for name, value in points[0].items():
        if name in own:
            assert value == own[name]


def test_no_record_is_on_both_sides(tmp_path):
    records = [{**NQ[0], "input": f"who {number}"} for number in range(8)]
    path = tmp_path / "nqswap.json"
    path.write_text(json.dumps([*records[:3], records[0], *records[3:]]))
    validation, test = quality.split(path, "nqswap", 3, 5)
    assert [len(validation), len(test)] == [3, 5]
    assert len({sample.question for sample in validation + test}) == 8
    assert [sample.index for sample in validation + test] == list(range(8))
    with pytest.raises(SystemExit, match=r"8 different records, wanted: 3 \+ 6"):
        quality.split(path, "nqswap", 3, 6)


def test_holm_is_step_down():
    assert quality.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert quality.holm({"a": 0.9, "b": 0.6}) == {"b": 1.0, "a": 1.0}
    assert quality.holm({}) == {}


def row(method, accuracy, p_best, p="", task="nqswap"):
    about = dict.fromkeys(("validation", "precision", "batch_size", "device", "torch", "transformers"), "1")
    scores = {name: f"{accuracy}" for name in quality.SCORES}
    scores |= {f"{name}_error": "0.02" for name in quality.SCORES}
    tests = {"gained": "3", "lost": "1", "p_holm": p, "p_holm_best": p_best}
    setup = {"model": "demo", "task": task, "method": method, "settings": "alpha 0.5", "samples": "300"}
    return {**setup, **scores, **tests, **about, "commit": "c", "date": "d"}


def test_the_page_follows_the_table(tmp_path):
    rows = [
        row("zero-shot", 0.26, "0.001"),
        row("cad", 0.39, "0.8", "0.0002"),
        row("fastmem", 0.4, "", "0.01"),
    ]
    rows += [row("zero-shot", 0.5, "", task="qa"), row("cad", 0.2, "0.01", "0.01", task="qa")]
    quality.update(tmp_path / "quality.csv", rows)
    quality.update(tmp_path / "quality.csv", rows[3:])
    found = quality.read_csv(tmp_path / "quality.csv")
    assert found == rows, "a task that is run again takes the place of its rows"
    text = "\n".join(quality.page(found, "chart.svg"))
    assert "| cad | 39.0 ± 2.0 |" in text
    assert "| 3 | 1 | < 0.001 | alpha 0.5 |" in text
    assert "| demo | nqswap | fastmem | cad | cad (a second prompt) |" in text
    assert "| demo | qa | zero-shot | none | zero-shot (nothing beside the prompt) |" in text
    charts = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in charts:
        quality.draw(found, path)
    assert charts[0].read_text() == charts[1].read_text()
    assert "fastmem" in charts[0].read_text()
