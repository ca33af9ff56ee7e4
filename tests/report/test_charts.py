"""Charts: which there are, their numbers, and that the page can colour them."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fastmem_pl.report.charts import make_charts
from fastmem_pl.report.collect import collect


def charts_of(*runs):
    return {chart.id: chart for chart in make_charts(collect(runs))}


@pytest.fixture
def charts(make_run, two_methods):
    def make(records=two_methods, name="run", **settings):
        return charts_of(make_run(name, records, **settings))

    return make


def set_losses(records, first):
    for record in records:
        if record["curve"]:
            record["curve"]["cross_entropy"][0] = first + record["index"] / 10


def rows(chart):
    return [[cell.text for cell in row] for row in chart.table.rows]


def test_there_are_charts_for_what_was_measured(charts, two_methods):
    for record in two_methods:
        record["scores"] |= {"format_failure": float(record["index"] == 0), "original": 1.0}
    curves, scores = {"curve-cross_entropy", "curve-kl"}, {"format_failure", "original"}
    assert set(charts()) == curves | scores | {"length-0", "seconds", "memory"}
    for record in two_methods:
        record["scores"]["format_failure"] = 0.0
    assert "format_failure" not in charts(name="zeros"), "a score that is always zero"


def test_without_memories_there_are_no_curves(only):
    assert [*charts_of(only("zero-shot", complete=False))] == ["length-0", "seconds"]


def test_curves_have_quantiles_over_samples(charts, two_methods):
    for record in two_methods:
        if record["curve"]:
            record["curve"]["cross_entropy"] = [float(record["index"]), 1.0]
    table = rows(charts()["curve-cross_entropy"])
    assert table[0] == ["qa, step 0", "1.1000", "2.7500", "5.5000", "8.2500", "9.9000"]
    assert table[1][1:] == ["1.0000"] * 5


def test_a_sample_whose_loss_was_not_finite_is_left_out(charts, two_methods):
    two_methods[1]["curve"]["cross_entropy"] = [None, None]
    two_methods[1]["status"] = "loss not finite"
    assert "nan" not in str(rows(charts()["curve-cross_entropy"]))


def test_bins_hold_every_sample_once(charts):
    table = rows(charts()["length-0"])
    for method in ("zero-shot", "fastmem"):
        own = [int(row[3]) for row in table if row[0] == method]
        assert (sum(own), len(own)) == (12, 3)
    # Zero-shot has the even ones: two of the first four.
    assert table[0][:3] == ["zero-shot", "20–23.67", "50.0 ± 28.9"]


def test_every_model_has_bins_of_its_own(make_run, two_methods, record):
    other = [
        record(r["index"], r["method"], r["scores"], n_context_tokens=500 + r["index"]) for r in two_methods
    ]
    set_losses(two_methods, 1.0)
    set_losses(other, 5.0)
    found = charts_of(
        make_run("a", two_methods, backbone="org/small", fingerprint="1" * 16),
        make_run("b", other, backbone="org/large", fingerprint="2" * 16),
    )
    assert {row[0] for row in rows(found["length-0"])} == {"zero-shot · small", "fastmem · small"}
    assert rows(found["length-0"])[0][1] == "20–23.67"
    assert rows(found["length-0-1"])[0][1] == "500–503.7"
    assert found["length-0-1"].title == "Accuracy by context length, large"
    # Zero-shot memorizes nothing: the samples' perplexity is that of the base model.
    assert {row[0] for row in rows(found["perplexity-0"])} == {"zero-shot · small", "fastmem · small"}
    assert rows(found["perplexity-0"])[0][1].startswith("2.718–")
    assert rows(found["perplexity-0-1"])[0][1].startswith("148.4–")


def test_seconds_are_told_by_data_set(make_run, two_methods, record):
    slow = [
        record(r["index"], r["method"], r["scores"], seconds={"memorize": 0.0, "decode": 2.25})
        for r in two_methods
    ]
    found = charts_of(make_run("a", two_methods), make_run("b", slow, data="other.jsonl"))
    methods = ["qa (a): zero-shot", "qa (a): fastmem", "qa (b): zero-shot", "qa (b): fastmem"]
    seconds = {
        "memorize": ["0.000", "0.500", "0.000", "0.000"],
        "decode": ["0.250", "0.250", "2.250", "2.250"],
    }
    assert rows(found["seconds"]) == [
        [phase, *row] for phase, own in seconds.items() for row in zip(methods, own, strict=True)
    ]


def test_a_phase_that_a_run_has_not_is_not_of_zero_gib(make_run, two_methods, only):
    runs = [make_run("a", two_methods), only("zero-shot", "b")]
    metrics = json.loads((runs[1] / "metrics.json").read_text())
    del metrics["peak_memory_gib"]["memorize"]
    (runs[1] / "metrics.json").write_text(json.dumps(metrics))
    assert rows(charts_of(*runs)["memory"]) == [
        ["a", "memorize", "2.00"],
        ["a", "decode", "1.50"],
        ["b", "decode", "1.50"],
    ]


def test_names_of_runs_are_no_formulas_and_none_is_left_out(make_run, two_methods):
    names = [r"odd$\foo$", "_under", "$a$"]
    found = charts_of(*(make_run(name, two_methods) for name in names))
    svg = ElementTree.fromstring(found["memory"].svg)
    texts = [(element.text or "").strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert set(names) <= set(texts)


def test_one_length_makes_no_chart(charts, two_methods):
    for record in two_methods:
        record["n_context_tokens"] = 20
    assert "length-0" not in charts()


def test_layers_of_dola_are_shares_of_tokens(charts, two_methods):
    for record in two_methods:
        if record["method"] == "zero-shot":
            record |= {"method": "dola", "dola_layers": {"16": 1, "18": 3, "20": 0}}
    found = charts(methods=["dola", "fastmem"])
    assert rows(found["layers-0"]) == [["dola", "16", "25.0"], ["dola", "18", "75.0"], ["dola", "20", "0.0"]]


def test_strengths_have_mean_and_quantiles_by_token(charts, two_methods):
    for record in two_methods:
        if record["method"] == "fastmem":
            # Answers end early, and a step may have chosen nothing.
            tail = [0.5] if record["index"] < 5 else [None] if record["index"] < 8 else []
            record |= {"method": "fastmem+adacd", "strengths": [record["index"] / 10, *tail]}
    found = charts(methods=["zero-shot", "fastmem+adacd"])
    first, second = rows(found["strength-0"])
    quantiles = ["0.1100", "0.2750", "0.5500", "0.8250", "0.9900"]
    assert first == ["fastmem+adacd", "1", "0.5500", *quantiles, "12"]
    assert second == ["fastmem+adacd", "2", *["0.5000"] * 6, "5"]
    for record in two_methods:
        if record["index"] > 2:
            record.pop("strengths", None)
    few = rows(charts(name="few", methods=["zero-shot", "fastmem+adacd"])["strength-0"])
    assert [row[-1] for row in few] == ["3", "3"]


def test_pictures_take_the_colours_of_the_page_and_repeat_themselves(charts):
    first = charts()
    again = charts(name="again/run")
    for name, chart in first.items():
        ElementTree.fromstring(chart.svg)
        assert not re.search(r"#[0-9a-fA-F]{6}\b", chart.svg), name
        assert "var(--ink)" in chart.svg
        assert chart.svg == again[name].svg
        # Text stays text, which can be read out and searched.
        assert "<text" in chart.svg
