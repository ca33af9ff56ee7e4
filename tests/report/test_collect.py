"""Run folders put side by side: systems, data sets, baselines, damaged and unfinished folders."""

import json
import math

import pytest

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.report.browser import browser_data
from fastmem_pl.report.collect import collect
from fastmem_pl.report.document import html
from fastmem_pl.report.runs import perplexity


def counts(comparison):
    """Answers by data set, of the first method."""
    first = [next(iter(groups.values())) for groups in comparison.groups]
    return {dataset.label: len(rows) for dataset, rows in zip(comparison.datasets, first, strict=True)}


def mixed(records, rest="qa"):
    """Records of a file of two tasks: the first four samples are proverbs."""
    return [{**record, "task": "memotrap" if record["index"] < 4 else rest} for record in records]


def baseline_of_fastmem(comparison, dataset=0):
    fastmem = next(variant for variant in comparison.groups[dataset] if variant.startswith("fastmem"))
    return comparison.baseline(dataset, fastmem)


def test_one_run(make_run, two_methods):
    found = collect([make_run("run", two_methods)])
    assert found.variants == ["zero-shot", "fastmem"]
    assert counts(found) == {"qa": 12}
    assert found.runs[0].samples[3].context.startswith("The tower of town 3")
    assert found.runs[0].notices == []


@pytest.mark.parametrize(
    ("first", "second", "variants", "datasets"),
    [
        # One system over two data files.
        ({}, {"data": "other.jsonl"}, ["zero-shot", "fastmem"], ["qa (x/a)", "qa (y/a)"]),
        # The same data twice: names of folders tell runs apart, as many parts of them as it takes.
        (
            *({"learning_rate": 1e-4}, {}),
            ["zero-shot · x/a", "fastmem · x/a", "zero-shot · y/a", "fastmem · y/a"],
            ["qa"],
        ),
        # Models name themselves.
        (
            {"backbone": "org/small", "fingerprint": "1" * 16},
            {"backbone": "org/large", "fingerprint": "2" * 16, "quantization": "bnb-4bit"},
            [
                *("zero-shot · small", "fastmem · small"),
                *("zero-shot · large (bnb-4bit)", "fastmem · large (bnb-4bit)"),
            ],
            ["qa"],
        ),
    ],
)
def test_systems_and_data_sets(make_run, two_methods, first, second, variants, datasets):
    found = collect([make_run("x/a", two_methods, **first), make_run("y/a", two_methods, **second)])
    assert found.variants == variants
    assert [dataset.label for dataset in found.datasets] == datasets


@pytest.mark.parametrize("order", [1, -1])
def test_zero_shot_of_another_run_of_the_same_model_is_the_baseline(only, order):
    found = collect([only("fastmem"), only("zero-shot")][::order])
    assert "12 samples, 2 methods, 2 runs" in html(found, "title")
    assert baseline_of_fastmem(found) == "zero-shot · zero-shot"
    assert found.baseline(0, "zero-shot · zero-shot") is None


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "2" * 16},
        {"system_prompt": "Be brief."},
        {"max_new_tokens": 3},
        {"seed": 1},
        {"of_data": {"answer_prefix": "The answer is: maybe"}},
        {"of_data": {"file_hash": "0123456789abcdef"}},
        {"of_data": {"task": "nq"}},
        {"of_data": {"fields": {"question": "context"}}},
    ],
    ids=str,
)
def test_zero_shot_of_something_else_is_no_baseline(only, other):
    assert baseline_of_fastmem(collect([only("fastmem"), only("zero-shot", **other)], contexts=False)) is None


def test_other_fields_of_a_file_are_other_samples(only):
    found = collect([only("fastmem"), only("zero-shot", of_data={"fields": {"question": "context"}})])
    assert [dataset.label for dataset in found.datasets] == ["qa (fastmem)", "qa (zero-shot)"]


def test_a_mixed_file_has_all_samples_as_well(make_run, two_methods):
    found = collect([make_run("run", mixed(two_methods), task="mixed")], contexts=False)
    assert counts(found) == {"memotrap": 4, "qa": 8, "all": 12}
    assert found.tasks == [1, 2]


def test_all_samples_are_those_of_one_file(make_run, two_methods):
    first = make_run("a", mixed(two_methods, "nqswap"), task="mixed")
    runs = [first, make_run("b", two_methods, data="other.jsonl")]
    found = collect(runs, contexts=False)
    assert [dataset.label for dataset in found.datasets] == ["all (a)", "memotrap", "nqswap", "qa"]


def test_two_tasks_of_one_file_are_two_data_sets(make_run, two_methods):
    row = {"input": "who", "sub_context": "New.", "context": "Old.", "sub_answer": "Ada", "answer": "Bob"}
    records = {task: [{**r, "task": task} for r in two_methods] for task in ("nqswap", "nq")}
    found = collect([make_run(task, records[task], task=task, rows=12 * [row]) for task in records])
    assert counts(found) == {"nqswap": 12, "nq": 12}
    # The browser shows the context of the task that was asked.
    data = browser_data(found)
    for sample in data["samples"]:
        context = "".join(text for text, _ in sample["context"])
        assert context == {"nqswap": "New.", "nq": "Old."}[data["datasets"][sample["dataset"]]]
    assert len(data["samples"]) == 24


def test_samples_name_their_data_set_in_the_browser(make_run, two_methods):
    records = mixed(two_methods)
    second = make_run("b", records[:4], data="other.jsonl", task="mixed")
    data = browser_data(collect([make_run("a", records, task="mixed"), second], contexts=False))
    names = [data["datasets"][sample["dataset"]] for sample in data["samples"]]
    assert data["datasets"] == ["memotrap (a)", "qa", "memotrap (b)"]
    assert names == ["memotrap (a)"] * 4 + ["qa"] * 8 + ["memotrap (b)"] * 2
    assert data["variants"][1]["baselines"] == [0, 0, 0]
    assert data["variants"][0]["baselines"] == [None] * 3


def test_the_browser_has_a_baseline_for_each_data_set(make_run, two_methods, only):
    runs = [make_run("a", two_methods), only("fastmem", data="b.jsonl"), only("zero-shot", data="b.jsonl")]
    data = browser_data(collect(runs))
    labels = [variant["label"] for variant in data["variants"]]
    fastmem = next(v for v in data["variants"] if v["label"].startswith("fastmem"))
    compared = [labels[number] for number in fastmem["baselines"]]
    assert len(set(compared)) == 2
    assert all(label.startswith("zero-shot") for label in compared)


def test_models_measure_a_context_each_for_itself(make_run, two_methods, record):
    other = [record(r["index"], r["method"], r["scores"], n_context_tokens=1500) for r in two_methods]
    runs = [
        make_run("a", two_methods, backbone="org/small", fingerprint="1" * 16),
        make_run("b", other, backbone="org/large", fingerprint="2" * 16),
    ]
    alone, both = (browser_data(collect(found))["samples"][0]["measures"] for found in (runs[:1], runs))
    assert alone == ["20 context tokens", "perplexity 20.1"]
    assert both[:2] == ["20 context tokens (small)", "perplexity 20.1 (small)"]
    assert both[2:] == ["1,500 context tokens (large)", "perplexity 20.1 (large)"]


def test_settings_that_cannot_be_read_are_no_obstacle(make_run, two_methods):
    run = make_run("run", two_methods)
    (run / "config.yaml").write_bytes(b"data: \xff\xfe")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "environment": None}))
    found = collect([run])
    assert "contexts and prompts are missing" in found.runs[0].notices[0]
    assert "12 samples, 2 methods, 1 run" in html(found, "title")


@pytest.mark.parametrize("left", ["whole", "half a line", "half a sample", "parts", "only parts"])
def test_a_stopped_run_is_shown_as_far_as_it_went(make_run, two_methods, left):
    lines = ["".join(json.dumps(record) + "\n" for record in two_methods[i : i + 2]) for i in range(0, 24, 2)]
    run = make_run("run", two_methods, complete=False)
    more = {"half a line": lines[6][:70], "half a sample": lines[6].splitlines(keepends=True)[0]}
    (run / "predictions.jsonl").write_text("".join(lines[:6]) + more.get(left, ""))
    if "parts" in left:
        (run / "parts").mkdir()
        (run / "parts" / "rank1-0123abcd.jsonl").write_text("".join(lines[6:9]) + lines[9][:30])
    if left == "only parts":
        (run / "predictions.jsonl").unlink()
    done = {"parts": 9, "only parts": 3}.get(left, 6)
    found = collect([run])
    assert counts(found) == {"qa": done}
    assert found.runs[0].notices == [f"run: the run is not complete; {done} samples so far"]


def test_failed_and_cut_samples_are_counted(make_run, two_methods):
    two_methods[1]["status"] = "loss not finite"
    two_methods[3]["n_truncated_tokens"] = 7
    notices = collect([make_run("run", two_methods)]).runs[0].notices
    assert [n.split(": ")[1][:9] for n in notices] == ["1 sample ", "1 sample "]


def test_moved_data_is_found_above_the_run(make_run, two_methods, monkeypatch):
    run = make_run("runs/run", two_methods)
    (run / "config.yaml").write_text("data:\n  path: data.jsonl\n")
    monkeypatch.chdir("/")
    assert len(collect([run]).runs[0].samples) == 12


@pytest.mark.parametrize("change", ["other contexts", "no JSON", "a folder", "gone"])
def test_changed_data_is_not_shown(make_run, two_methods, tmp_path, change):
    run = make_run("run", two_methods)
    data = tmp_path / "data.jsonl"
    kept = data.rename(tmp_path / "kept.jsonl")
    if change == "a folder":
        data.mkdir()
    elif change != "gone":
        data.write_text("no json" if change == "no JSON" else kept.read_text().replace("tower", "castle"))
    found = collect([run]).runs[0]
    assert found.samples == {}
    assert "--data FILE" in found.notices[0]
    assert len(collect([run], kept).runs[0].samples) == 12
    if data.is_file():
        with pytest.raises(FastMemError, match=r"--data: .*data\.jsonl is not the data of"):
            collect([run], data)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        *(
            ("run.json", text, r"run\.json: .*; the file is damaged")
            for text in ("{", "", "[]", "{}", '{"identity": "x"}')
        ),
        *(
            ("metrics.json", text, r"metrics\.json: (not valid JSON|expected)")
            for text in ('{"a": ', "", "[1]")
        ),
        *(
            ("predictions.jsonl", f"{text}\n{{}}\n", r"predictions\.jsonl, line 1: not a record")
            for text in (
                *("x", "[1]", "{}", "\udcff\udcfe", '{"index": "five", "method": "fastmem"}'),
                '{"index": 5, "method": ["fastmem"]}',
            )
        ),
        ("predictions.jsonl", "", "no answers yet"),
        ("predictions.jsonl", '{"index": 1, "met', "no answers yet"),
        ("predictions.jsonl", None, "no answers yet"),
    ],
)
def test_damaged_files_are_named(make_run, two_methods, file, content, message):
    run = make_run("run", two_methods)
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content, errors="surrogateescape")
    with pytest.raises(FastMemError, match=message):
        collect([run])


def test_what_is_no_run(make_run, two_methods, tmp_path):
    run = make_run("run", two_methods)
    for folders, message in (
        ([tmp_path / "nothing"], "no such run folder"),
        ([tmp_path / "data.jsonl"], "no such run folder"),
        ([tmp_path], "no run folder"),
        ([run, run.parent / "." / "run"], "given twice"),
    ):
        with pytest.raises(FastMemError, match=message):
            collect(folders)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scores", None),
        ("scores", "high"),
        ("scores", {"accuracy": "yes"}),
        ("scores", {"accuracy": None}),
        ("scores", {"accuracy": math.nan}),
        ("seconds", "long"),
        ("seconds", {"decode": None}),
        ("curve", [1, "a"]),
        ("curve", {"cross_entropy": [1.0], "kl": 3}),
        ("curve", {"cross_entropy": [1.0], "kl": ["a"]}),
        ("curve", {"cross_entropy": [1.0]}),
        ("curve", {"cross_entropy": [1.0], "kl": []}),
        ("curve", {"cross_entropy": [1.0], "kl": [None]}),
        ("prediction", 3),
        ("prediction", None),
    ],
)
def test_a_damaged_record_is_refused(make_run, two_methods, field, value):
    two_methods[1][field] = value
    with pytest.raises(
        FastMemError,
        match=rf"predictions\.jsonl, line 2: not a record: ({field}|its {field}|a number of it)",
    ):
        collect([make_run("run", two_methods)])


def test_perplexity_is_of_the_first_step(record):
    assert perplexity(record(0, "fastmem", {})) == pytest.approx(math.exp(3.0))
    assert perplexity(record(0, "zero-shot", {})) is None
    # A failed sample's loss may be anything.
    assert perplexity({"curve": {"cross_entropy": [1e6]}}) < math.inf
