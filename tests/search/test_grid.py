"""Points of a grid give what separate runs give, whatever they share; and grids that are refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import assert_untouched, snapshot
from runs import SUMMARIES, write
from search_runs import (
    LENGTHS,
    SMALL,
    Searches,
    assert_like,
    assert_same_answers,
    at,
    keyed,
    name_of,
    points_of,
)

from fastmem_pl import Backbone
from fastmem_pl.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

# Nothing in order, so that what is sorted on the way must be put back.
GRID = {"learning_rate": [1e-2, 4e-3], "steps": [12, 2, 5], "kl_coeff": [1.0, 0.03]}
CHECKED = [
    {"learning_rate": 1e-2, "steps": 12, "kl_coeff": 0.03},
    {"learning_rate": 1e-2, "steps": 2, "kl_coeff": 1.0},
    {"learning_rate": 4e-3, "steps": 5, "kl_coeff": 1.0},
]
CASES = [
    ("llama", "fastmem", {}),
    ("llama", "fastmem+cd", {}),
    ("gemma2", "fastmem", {}),
    ("gemma2", "fastmem+cd", {"num_layers": 2}),
    ("gpt2", "fastmem", {"num_layers": 2, "kl_target": 0.05, "kl_gain": 0.5}),
    ("llama", "fastmem+cd", {"kl_target": 0.05, "kl_gain": 0.5, "max_grad_norm": 0.05}),
    ("llama", "fastmem", {"weight_decay": 5.0, "max_context_tokens": 60}),
    ("llama", "fastmem", {"num_layers": 2, "published_quirks": ["norm-every-layer", "round-weights"]}),
    ("llama", "fastmem+cad", {"alpha": 1.5}),
    ("llama", "fastmem+dola", {}),
    ("qwen3", "fastmem", {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 5}),
]


@pytest.mark.parametrize(("family", "method", "settings"), CASES, ids=str)
def test_grid_points_equal_separate_fit_predict_runs(searches, family, method, settings) -> None:
    records = searches.records(GRID, family, search__method=method, **settings)
    assert set(keyed(records)) == {
        (index, name) for index in (0, 5, 10) for name in (None, *map(name_of, points_of(GRID)))
    }
    assert all(isinstance(record["point"]["steps"], int) for record in records if record["point"])
    # All steps of the checked points are there, in rows of other learning rates.
    for point in CHECKED if (family, method) == ("llama", "fastmem") and not settings else CHECKED[:1]:
        expected = searches.fit_predict(point, method, family, **settings)
        found = at(records, point)
        assert sorted(found) == [0, 5, 10]
        assert_like(found, expected[method])
        assert_like(at(records, None), expected["zero-shot"])


def test_rows_move_and_differ_so_that_other_tests_can_fail(searches: Searches) -> None:
    for family in ("llama", "gemma2"):
        records = searches.records(GRID, family, search__method="fastmem")
        zero_shot = at(records, None)
        answers = Counter(tuple(r["token_ids"]) for r in records if r["index"] == 5)
        assert len(answers) > 2, f"{family}: the points are answered alike"
        for index, record in at(records, CHECKED[0]).items():
            assert record["token_ids"] != zero_shot[index]["token_ids"]
            assert record["curve"]["cross_entropy"][-1] < record["curve"]["cross_entropy"][0] - 0.5
        curves = {json.dumps(r["curve"]) for r in records if r["index"] == 5 and r["point"]}
        assert len(curves) == 12


def test_fewer_steps_are_a_prefix_of_more(searches: Searches) -> None:
    records = searches.records(GRID, search__method="fastmem")
    for point in points_of(GRID):
        longest = at(records, {**point, "steps": 12})
        for index, record in at(records, point).items():
            assert set(record["curve"]) == {"cross_entropy", "kl", "grad_norm"}
            for name, values in record["curve"].items():
                assert len(values) == point["steps"]
                assert values == longest[index]["curve"][name][: point["steps"]]


@pytest.mark.parametrize(
    ("method", "axes", "settings"),
    [
        ("fastmem", {"temperature": [0.0, 1.3], "repetition_penalty": [1.5, 1.0]}, {"seed": 3}),
        ("fastmem", {"top_k": [3, 0], "top_p": [1.0, 0.6]}, {"temperature": 1.5, "seed": 4}),
        ("fastmem+dola", {"relative_top": [0.9, 0.01]}, {}),
        ("fastmem+adacad", {"alpha": [1.0, 9.0], "alpha_min": [0.0, 2.0]}, {}),
        ("fastmem+coiecd", {"entropy_bound": [0.9, 0.05], "relative_top": [0.0, 1.0]}, {}),
        ("fastmem+cad", {"alpha": [0.2, 2.0]}, {"num_layers": 2}),
        ("fastmem+cd", {"steps": [6, 3], "alpha": [1.0, 0, 0.5]}, {}),
    ],
    ids=str,
)
def test_other_decoder_settings_are_axes_too(searches, method, axes, settings) -> None:
    grid = {"learning_rate": [1e-2], "steps": [4], "kl_coeff": [0.1], **axes}
    # An axis alpha asks for fastmem+cd by itself.
    asked = {} if method == "fastmem+cd" else {"search__method": method}
    records, points = searches.records(grid, **asked, **settings), points_of(grid)
    assert {name_of(r["point"]) for r in records} == {None, *map(name_of, points)}
    assert len(records) == 3 * (len(points) + 1)
    for point in points[1:3]:
        expected = searches.fit_predict(point, method, **settings)
        assert_like(at(records, point), expected[method])
    answers = {tuple(at(records, point)[5]["token_ids"]) for point in points}
    assert len(answers) > 1, "a test that could not fail"


@pytest.mark.parametrize(
    ("settings", "indices"),
    [({"search__every": 4}, [0, 4, 8]), ({"search__every": 100}, [0]), ({"data__limit": 10}, [0, 5])],
    ids=str,
)
def test_every_picks_samples(searches: Searches, settings: dict, indices: list[int]) -> None:
    records = searches.records({"learning_rate": [1e-2], "steps": [1], "kl_coeff": [0.1]}, **settings)
    assert sorted(r["index"] for r in records) == sorted(indices * 2)


def test_axes_left_out_have_the_models_value(searches: Searches) -> None:
    records = searches.records({"steps": [1, 3]}, learning_rate=0.004, kl_coeff=0.7)
    points = [{"learning_rate": 0.004, "steps": steps, "kl_coeff": 0.7} for steps in (1, 3)]
    assert {name_of(r["point"]) for r in records} == {None, *map(name_of, points)}
    assert_like(at(records, points[1]), searches.fit_predict(points[1], "fastmem")["fastmem"])


@pytest.fixture
def loaded(monkeypatch) -> list[tuple[Backbone, dict[str, torch.Tensor], list[int]]]:
    """The models that commands load, with their weights then and the positions of passes over texts."""
    found, load = [], Backbone.load

    def noted(*args, **kwargs) -> Backbone:
        backbone, seen = load(*args, **kwargs), []

        def count(_, given: tuple, named: dict) -> None:
            rows, tokens, _ = (given[0] if given else named["hidden_states"]).shape
            seen.append(rows * tokens if tokens > 1 else 0)

        backbone.model.model.layers[0].register_forward_pre_hook(count, with_kwargs=True)
        found.append((backbone, snapshot(backbone), seen))
        return backbone

    monkeypatch.setattr(Backbone, "load", staticmethod(noted))
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_the_model_is_loaded_once_and_not_written_to(searches: Searches, loaded: list, layers: int) -> None:
    grid = {**SMALL, "learning_rate": [1e-2, 1e30]}
    searches.search(grid, search__method="fastmem+cd", num_layers=layers)
    ((backbone, before, _),) = loaded
    assert_untouched(backbone, before)


def test_a_search_reads_contexts_and_prompts_as_often_as_one_run(searches: Searches, loaded: list) -> None:
    """The trunk's pass and the prompt's are shared by all points."""
    searches.search(GRID, search__every=1, search__method="fastmem+cd", data__batch_size=12)
    given = {**CHECKED[1], "methods": ["zero-shot", "fastmem+cd"], "data__batch_size": 12}
    assert main(["fit-predict", *searches.arguments(**given), "--run_dir", str(searches.fresh())]) == 0
    searched, single = (sum(seen) for _, _, seen in loaded)
    assert single > sum(LENGTHS)
    assert searched <= 1.5 * single, "12 points cost more than one run's passes"


@pytest.mark.parametrize(("family", "settings"), [("gemma2", {}), ("llama", {"num_layers": 2})], ids=str)
def test_rows_that_fail_do_not_disturb_others(searches: Searches, family: str, settings: dict) -> None:
    sound = {"learning_rate": [1e-3, 1e-2], "steps": [1, 4], "kl_coeff": [0.1]}
    mixed = {**sound, "learning_rate": [1e30, 1e-3, 1e38, 1e-2]}
    expected = keyed(searches.records(sound, family, **settings))
    found = keyed(searches.records(mixed, family, **settings))
    assert_same_answers([found[key] for key in expected], [*expected.values()])
    assert all(found[key]["status"] == "ok" for key in expected)
    zero_shot = at([*found.values()], None)
    for steps in (1, 4):
        point = {"learning_rate": 1e30, "steps": steps, "kl_coeff": 0.1}
        separate = searches.fit_predict(point, "fastmem", family, **settings)["fastmem"]
        for index, record in at([*found.values()], point).items():
            assert record["status"] != "ok"
            assert separate[index]["status"] != "ok"
            assert record["token_ids"] == zero_shot[index]["token_ids"] == separate[index]["token_ids"]
            # What overflows first depends on the order of products; the first step does not.
            for name, values in record["curve"].items():
                assert len(values) == steps
                assert values[0] == pytest.approx(separate[index]["curve"][name][0], rel=1e-4, abs=1e-6)


def test_a_row_that_fails_late_is_sound_before(searches: Searches) -> None:
    """With such a decay, weights grow a hundredfold a step and overflow at the eighth."""
    grid = {"learning_rate": [1e-9, 1e-2], "steps": [9, 1, 3, 6], "kl_coeff": [0.1]}
    records = searches.records(grid, weight_decay=1e4)
    last = {"learning_rate": 1e-2, "steps": 9, "kl_coeff": 0.1}
    assert {name_of(r["point"]) for r in records if r["status"] != "ok"} == {name_of(last)}
    for point in ({**last, "steps": 6}, last):
        expected = searches.fit_predict(point, "fastmem", weight_decay=1e4)["fastmem"]
        found = at(records, point)
        assert [r["status"] == "ok" for r in found.values()] == [expected[i]["status"] == "ok" for i in found]
        assert_same_answers([*found.values()], [{**expected[i], "point": point} for i in found])


# Grid and options, and what the line says.
BAD = """
{} | search.grid
{learning_rate: [], steps: [2]} | search.grid | learning_rate
{learning_rat: [1e-5]} | search.grid | learning_rat | did you mean 'learning_rate'
{steps: [2, 4, 2]} | search.grid | steps | 2
{kl_coeff: [null]} | search.grid
{steps: [true]} | search.grid
{learning_rate: [fast]} | search.grid | fast
[1, 2] | search.grid
{learning_rate: [1e-5, -1]} | learning_rate | -1 | above 0
{learning_rate: [.inf]} | learning_rate | inf
{learning_rate: [.nan]} | learning_rate | nan
{kl_coeff: [0.1, -0.5]} | kl_coeff | -0.5 | at least 0
{steps: [2, 0]} | steps | 0 | 1
{steps: [2.5]} | steps | 2.5
{alpha: [-1]} --search.method fastmem+cd | alpha | -1
{temperature: [-0.5]} | temperature | -0.5
{repetition_penalty: [0]} | repetition_penalty | 0
{top_p: [0.9]} | search.grid.top_p | --model.decode.temperature
{top_p: [1.5]} --model.decode.temperature 1 | top_p | 1.5
{top_p: [0]} --model.decode.temperature 1 | top_p | 0
{top_k: [-1]} --model.decode.temperature 1 | top_k | -1
{relative_top: [2]} --search.method fastmem+dola | relative_top | 2
{alpha: [0.5, 1]} --search.method fastmem+dola | alpha | fastmem+dola | one of: cd, cad, adacad, adacd, coiecd
{alpha_min: [0.1]} --search.method fastmem+cd | alpha_min | fastmem+cd | one of: adacad, adacd
{renyi_order: [0.4]} --search.method fastmem+adacad | renyi_order | one of: cocoa
{entropy_bound: [0.5, 0]} --search.method fastmem+coiecd | entropy_bound | 0 | above 0, at most 1
{steps: [2]} --search.objective acuracy | acuracy | did you mean 'accuracy'
{steps: [2]} --search.objective rougeL | rougeL | nqswap | accuracy
{steps: [2]} --search.objective accuracy --data.task summary --data.path articles.jsonl | accuracy | summary | rougeL
{steps: [2]} --search.objective factkb --data.task summary --data.path articles.jsonl | factkb | factkb_model
{steps: [2]} --search.every 0 | search.every | 0 | at least 1
{steps: [2]} --search.every often | search.every | often
{steps: [2]} --search.method zero-shot | search.method | zero-shot
{steps: [2]} --search.method fastmen | fastmen | did you mean 'fastmem'
{steps: [2]} --search.objectve f1 | --search.objectve | --search.objective
{steps: [2]} --data.path none.json | data.path | none.json
{steps: [2]} --trainer.profile phases | trainer.profile
{steps: [2]} --model.backbone.tp_plan auto | model.backbone.tp_plan
{steps: [2]} --model.memorize.num_layers 9 | model.memorize.num_layers | 9
{steps: [2]} --model.backbone.source ./nope | model.backbone | nope
{steps: [2]} --model.memorize.max_context_tokens 8 --model.strict true | max_context_tokens
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_a_bad_search_is_refused_in_one_line(searches, tmp_path, monkeypatch, refused, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("articles.jsonl"), SUMMARIES)
    Path("none.json").write_text("[]")
    given, *parts = case.split(" | ")
    grid, *further = re.split(" (?=--)", given)
    named = " ".join(further).split()
    line = refused("search", *searches.arguments(), "--search.grid", grid, "--run_dir", "run", *named)
    assert [part for part in parts if part not in line] == []
