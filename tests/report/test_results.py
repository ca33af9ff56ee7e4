"""Cells of the tables: values, tests, the paper's numbers, the best of a column."""

from pathlib import Path

import pytest
import yaml
from conftest import make_module
from report_runs import cells_of

from fastmem_pl.cli.configs import config_paths
from fastmem_pl.data import TASKS
from fastmem_pl.decoding import METHODS
from fastmem_pl.metrics import SCORES, paired
from fastmem_pl.report.collect import collect
from fastmem_pl.report.document import dataset_table, markdown, overview, result_tables
from fastmem_pl.report.paper import PUBLISHED, published
from fastmem_pl.report.runs import flat_settings
from fastmem_pl.run.identity import model_identity

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


def paper_settings(*configs):
    """Settings of a run with these configs, as ``run.json`` has them."""
    settings = {}
    for path in config_paths([",".join(("base", *configs))]):
        settings |= flat_settings(yaml.safe_load(Path(path).read_text()).get("model", {}))
    flat = flat_settings(model_identity(make_module(**{**settings, "backbone": LLAMA}), True))
    return flat | {"backbone": flat.pop("source"), "methods": ["zero-shot", "fastmem"]}


def test_values_and_tests_of_a_cell(make_run, two_methods):
    results = collect([make_run("run", two_methods)]).results
    found = results[0, "fastmem", "accuracy"]
    assert found.estimate.value == pytest.approx(11 / 12)
    # The odd ones are gained, the first is lost.
    assert (found.against.gained, found.against.lost, found.against.test) == (6, 1, "exact McNemar")
    zero_shot, fastmem = ([0.25 * (i % 3) for i in range(12)], [0.5] * 12)
    assert results[0, "fastmem", "f1"].against == paired(zero_shot, fastmem, binary=False)
    assert results[0, "zero-shot", "accuracy"].against is None
    assert (0, "zero-shot", "rougeL") not in results


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
    failures = {"zero-shot": 1.0, "fastmem": 0.0}
    scores = {method: {"format_failure": value, "accuracy": 1.0} for method, value in failures.items()}
    records = [record(index, method, scores[method]) for index in range(3) for method in scores]
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
    assert len(result_tables(collect(runs[:1]))) == 1
    assert overview(comparison).header == ["method", "qa (a): accuracy", "qa (b): accuracy"]
    assert len(result_tables(comparison)) == 3


def test_zero_shot_of_another_run_is_paired_by_sample(only):
    comparison = collect([only("zero-shot", count=5), only("fastmem")])
    found = comparison.results[0, "fastmem · fastmem", "accuracy"]
    assert (found.estimate.n, found.against.n, found.against.gained, found.against.lost) == (12, 5, 2, 1)


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
    run = make_run("run", two_methods, task=task, **paper_settings(*configs))
    assert published(collect([run], contexts=False).runs[0], task, method, "accuracy") == value


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 3e-5},
        {"kl_coeff": 1.0},
        {"steps": 20},
        {"num_layers": 2},
        {"weight_decay": 0.1},
        {"kl_target": 0.1},
        {"max_new_tokens": 32},
        {"temperature": 0.7},
        {"repetition_penalty": 1.3},
        {"quantization": "bnb-4bit"},
        {"system_prompt": "Be brief."},
        {"template": False},
        {"max_context_tokens": 500},
        {"backbone": "meta-llama/Meta-Llama-3-70B-Instruct"},
        {"of_data": {"answer_prefix": "The answer is:"}},
        {"of_data": {"limit": 12}},
        {"of_data": {"fields": {"question": "q"}}},
    ],
    ids=str,
)
def test_they_do_not_stand_beside_others(make_run, two_methods, changed):
    settings = paper_settings("nqswap", "fastmem") | changed
    run = collect([make_run("run", two_methods, task="nqswap", **settings)], contexts=False).runs[0]
    assert published(run, "nqswap", "fastmem", "accuracy") is None
    assert published(run, "nq_icl", "fastmem", "accuracy") is None


def test_a_setting_matters_to_the_methods_that_look_at_it(make_run, two_methods):
    settings = paper_settings("nqswap", "all-methods")
    values = {}
    for name, changed in (("plain", {}), ("rate", {"learning_rate": 3e-4}), ("alpha", {"alpha": 2.0})):
        run = make_run(name, two_methods, task="nqswap", **settings | changed)
        found = collect([run], contexts=False).runs[0]
        methods = ("zero-shot", "fastmem", "fastmem+cd")
        values[name] = [published(found, "nqswap", method, "accuracy") for method in methods]
    assert values["rate"] == [0.591, None, None]
    assert values["alpha"] == [0.591, 0.715, None]


def test_the_papers_value_is_shown(make_run, two_methods):
    for record in two_methods:
        record["task"] = "nqswap"
    run = make_run("run", two_methods, task="nqswap", **paper_settings("nqswap", "fastmem"))
    rows = dataset_table(collect([run], contexts=False), 0).rows
    assert [row[1].note for row in rows] == ["paper 59.1%", "+6 −1, p = 0.125; paper 71.5%"]


def test_every_published_value_is_of_a_known_score_task_and_method():
    for tasks in yaml.safe_load(PUBLISHED.read_text()).values():
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
    assert cells_of(text)
    assert all(line.startswith("| ") and line.endswith(" |") for line in text.splitlines() if line[:1] == "|")
    assert "<b>" not in text
    assert "a\\|b" in text
    assert "r\\|un" in text
