"""Cells of the tables: values, tests, the paper's numbers, the best of a column."""

import pytest
import yaml

from fastmem_pl.cli.configs import config_paths
from fastmem_pl.metrics import SCORES
from fastmem_pl.report.collect import collect
from fastmem_pl.report.document import markdown, result_tables
from fastmem_pl.report.paper import published
from fastmem_pl.report.table import dataset_table, overview, result

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


def paper_settings(*configs):
    """Settings of a run with these configs, as ``run.json`` has them."""
    from fastmem_pl.run.predict import FastMemModule

    settings = {}
    for path in config_paths([",".join(("base", *configs))]):
        with open(path) as file:
            settings |= yaml.safe_load(file).get("model", {})
    return FastMemModule(**{**settings, "backbone": LLAMA}).identity(True)


def test_values_and_tests_of_a_cell(make_run, two_methods):
    comparison = collect([make_run("run", two_methods)])
    zero_shot, fastmem = comparison.variants
    found = result(comparison, fastmem, 0, "accuracy")
    assert found.estimate.value == pytest.approx(11 / 12)
    # The odd ones are gained, the first is lost.
    assert (found.against.gained, found.against.lost, found.against.test) == (6, 1, "exact McNemar")
    assert result(comparison, fastmem, 0, "f1").against.test == "paired bootstrap"
    assert result(comparison, zero_shot, 0, "accuracy").against is None
    assert result(comparison, zero_shot, 0, "rougeL") is None


def test_the_table_of_a_data_set(make_run, two_methods):
    comparison = collect([make_run("run", two_methods)])
    table = dataset_table(comparison, 0)
    assert table.header == ["method", "accuracy", "F1", "words", "s/sample"]
    zero_shot, fastmem = table.rows
    assert [cell.text for cell in zero_shot][:2] == ["zero-shot", "50.0% ± 15.1"]
    assert [cell.best for cell in fastmem] == [False, True, True, False, False]
    assert fastmem[1].note == "+6 −1, p = 0.125"
    assert fastmem[2].note.startswith("+25.0, p ")
    assert fastmem[4].text == "0.75"


def test_a_low_score_may_be_the_best_and_a_tie_has_none(make_run, record):
    records = [
        record(index, method, {"format_failure": float(method == "zero-shot"), "accuracy": 1.0})
        for index in range(3)
        for method in ("zero-shot", "fastmem")
    ]
    rows = dataset_table(collect([make_run("run", records)]), 0).rows
    assert [row[2].best for row in rows] == [False, True]
    assert [row[1].best for row in rows] == [False, False]
    assert rows[1][1].note == ""


def test_a_score_that_some_samples_lack_says_of_how_many_it_is(make_run, two_methods):
    for record in two_methods:
        if record["index"] >= 8:
            del record["scores"]["f1"]
    rows = dataset_table(collect([make_run("run", two_methods)]), 0).rows
    assert rows[0][2].note == "n = 8"
    assert rows[1][2].note.startswith("n = 8; +")
    assert rows[0][1].note == ""


def test_the_overview_puts_data_sets_side_by_side(make_run, two_methods):
    runs = [make_run("a", two_methods), make_run("b", two_methods[:8], data="other.jsonl")]
    comparison = collect(runs)
    assert overview(collect(runs[:1])) is None
    assert overview(comparison).header == ["method", "qa (a): accuracy", "qa (b): accuracy"]
    assert len(result_tables(comparison)) == 3


def test_only_pairs_are_compared(make_run, two_methods, record):
    plain = [r for r in two_methods if r["method"] == "zero-shot"][:5]
    memory = [r for r in two_methods if r["method"] == "fastmem"]
    runs = [
        make_run("base", plain, methods=["zero-shot"]),
        make_run("memory", memory, methods=["fastmem"]),
    ]
    comparison = collect(runs)
    fastmem = next(v for v in comparison.variants if v.method == "fastmem")
    assert result(comparison, fastmem, 0, "accuracy").against.n == 5


@pytest.mark.parametrize(
    ("configs", "task", "method", "value"),
    [
        (["nqswap", "fastmem"], "nqswap", "fastmem", 0.715),
        (["nqswap", "zero-shot"], "nqswap", "zero-shot", 0.591),
        (["memotrap", "all-methods"], "memotrap", "fastmem+dola", 0.893),
        (["hotpotqa", "cad"], "hotpotqa", "cad", 0.642),
    ],
)
def test_the_papers_values_stand_beside_its_settings(make_run, two_methods, configs, task, method, value):
    run = make_run(
        "run", two_methods, task=task, **{**paper_settings(*configs), "methods": ["zero-shot", "fastmem"]}
    )
    assert published(collect([run], contexts=False).runs[0], task, method, "accuracy") == value


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 3e-5},
        {"kl_coeff": 1.0},
        {"steps": 20},
        {"num_layers": 2},
        {"max_new_tokens": 32},
        {"temperature": 0.7},
        {"quantization": "bnb-4bit"},
        {"system_prompt": "Be brief."},
        {"backbone": "meta-llama/Meta-Llama-3-70B-Instruct"},
    ],
)
def test_they_do_not_stand_beside_others(make_run, two_methods, changed):
    settings = {**paper_settings("nqswap", "fastmem"), "methods": ["zero-shot", "fastmem"], **changed}
    run = collect([make_run("run", two_methods, task="nqswap", **settings)], contexts=False).runs[0]
    assert published(run, "nqswap", "fastmem", "accuracy") is None


def test_settings_of_memorizing_do_not_matter_to_zero_shot(make_run, two_methods):
    settings = {**paper_settings("nqswap"), "methods": ["zero-shot", "fastmem"], "learning_rate": 3e-4}
    run = collect([make_run("run", two_methods, task="nqswap", **settings)], contexts=False).runs[0]
    assert published(run, "nqswap", "zero-shot", "accuracy") == 0.591
    assert published(run, "nqswap", "fastmem", "accuracy") is None


def test_a_part_of_the_data_has_no_published_value(make_run, two_methods):
    settings = {**paper_settings("nqswap"), "methods": ["zero-shot", "fastmem"]}
    run = collect([make_run("run", two_methods, task="nqswap", limit=12, **settings)], contexts=False).runs[0]
    assert published(run, "nqswap", "zero-shot", "accuracy") is None


def test_every_published_value_is_of_a_known_score_task_and_method():
    from fastmem_pl.data import TASKS
    from fastmem_pl.decoding import METHODS
    from fastmem_pl.report.paper import _table

    for tasks in _table().values():
        for task, scores in tasks.items():
            assert task in TASKS
            for score, methods in scores.items():
                assert score in SCORES
                assert all(method in METHODS and 0 <= value <= 1 for method, value in methods.items())


def test_markdown_keeps_its_tables(make_run, two_methods):
    for record in two_methods:
        record["task"] = "a|b\n<b>*x*"
    run = make_run("r|un", two_methods)
    (run / "config.yaml").unlink()
    text = markdown(collect([run]), "A `title`")
    for block in text.split("\n\n"):
        rows = [line.replace("\\|", "") for line in block.splitlines()]
        if rows[0].startswith("|"):
            assert len({row.count("|") for row in rows}) == 1, block
            assert all(row.startswith("| ") and row.endswith(" |") for row in rows)
    assert "<b>" not in text
    assert "a\\|b" in text
    assert "r\\|un" in text
