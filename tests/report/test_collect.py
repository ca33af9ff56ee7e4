"""Run folders put side by side: systems, data sets, baselines, damaged and unfinished folders."""

import json
import math

import pytest

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.report.browser import browser_data
from fastmem_pl.report.collect import collect
from fastmem_pl.report.document import html
from fastmem_pl.report.runs import perplexity


def labels(comparison):
    return [variant.label for variant in comparison.variants]


def test_one_run(make_run, two_methods):
    found = collect([make_run("run", two_methods)])
    assert labels(found) == ["zero-shot", "fastmem"]
    assert [d.label for d in found.datasets] == ["qa"]
    assert [len(v.records[0]) for v in found.variants] == [12, 12]
    assert found.runs[0].samples[3].context.startswith("The tower of town 3")
    assert found.runs[0].notices == []


def test_runs_over_different_data_are_one_system(make_run, two_methods):
    runs = [make_run("a", two_methods), make_run("b", two_methods, data="other.jsonl")]
    found = collect(runs)
    assert labels(found) == ["zero-shot", "fastmem"]
    assert [d.label for d in found.datasets] == ["qa (a)", "qa (b)"]


def test_runs_over_the_same_data_are_told_apart(make_run, two_methods):
    found = collect([make_run("x/lr1", two_methods), make_run("x/lr3", two_methods)])
    assert labels(found) == ["zero-shot · lr1", "fastmem · lr1", "zero-shot · lr3", "fastmem · lr3"]
    assert len(found.datasets) == 1


def test_folders_of_one_name_get_longer_labels(make_run, two_methods):
    found = collect([make_run("x/run", two_methods), make_run("y/run", two_methods)])
    assert labels(found)[0] == "zero-shot · x/run"


def test_different_models_name_themselves(make_run, two_methods):
    runs = [
        make_run("a", two_methods, backbone="org/small", fingerprint="1" * 16),
        make_run("b", two_methods, backbone="org/large", fingerprint="2" * 16, quantization="bnb-4bit"),
    ]
    assert labels(collect(runs))[1::2] == ["fastmem · small", "fastmem · large (bnb-4bit)"]


def test_zero_shot_of_another_run_of_the_same_model_is_the_baseline(make_run, two_methods):
    only = [r for r in two_methods if r["method"] == "fastmem"]
    plain = [r for r in two_methods if r["method"] == "zero-shot"]
    memory, base = (
        make_run("memory", only, methods=["fastmem"]),
        make_run("base", plain, methods=["zero-shot"]),
    )
    found = collect([memory, base])
    fastmem = next(v for v in found.variants if v.method == "fastmem")
    assert set(found.baseline(fastmem, 0)) == set(range(12))
    assert found.baseline(fastmem, 0)[0]["method"] == "zero-shot"


def test_zero_shot_of_another_model_is_no_baseline(make_run, two_methods):
    only = [r for r in two_methods if r["method"] == "fastmem"]
    plain = [r for r in two_methods if r["method"] == "zero-shot"]
    runs = [
        make_run("memory", only, methods=["fastmem"], fingerprint="1" * 16),
        make_run("base", plain, methods=["zero-shot"], fingerprint="2" * 16),
    ]
    found = collect(runs)
    assert found.baseline(next(v for v in found.variants if v.method == "fastmem"), 0) == {}


def test_a_mixed_file_has_all_samples_as_well(make_run, two_methods):
    for record in two_methods:
        record["task"] = "memotrap" if record["index"] < 4 else "qa"
    found = collect([make_run("run", two_methods, task="mixed")], contexts=False)
    assert [(d.label, len(found.variants[0].records[i])) for i, d in enumerate(found.datasets)] == [
        ("memotrap", 4),
        ("qa", 8),
        ("all", 12),
    ]
    assert found.order == [2, 0, 1]
    assert found.tasks == [0, 1]


def test_all_samples_are_those_of_one_file(make_run, two_methods):
    mixed = [{**r, "task": "memotrap" if r["index"] < 4 else "nqswap"} for r in two_methods]
    runs = [make_run("a", mixed, task="mixed"), make_run("b", two_methods, data="other.jsonl")]
    found = collect(runs, contexts=False)
    assert [found.datasets[place].label for place in found.order] == ["all (a)", "memotrap", "nqswap", "qa"]


def test_samples_name_their_data_set_in_the_browser(make_run, two_methods):
    for record in two_methods:
        record["task"] = "memotrap" if record["index"] < 4 else "qa"
    runs = [
        make_run("a", two_methods, task="mixed"),
        make_run("b", two_methods[:4], data="other.jsonl", task="mixed"),
    ]
    data = browser_data(collect(runs, contexts=False))
    names = [data["datasets"][sample["dataset"]] for sample in data["samples"]]
    assert data["datasets"] == ["memotrap (a)", "qa", "memotrap (b)"]
    assert names == ["memotrap (a)"] * 4 + ["qa"] * 8 + ["memotrap (b)"] * 2
    assert data["variants"][1]["baselines"] == [0, 0, 0]


def test_the_browser_has_a_baseline_for_each_data_set(make_run, two_methods):
    memory = [r for r in two_methods if r["method"] == "fastmem"]
    plain = [r for r in two_methods if r["method"] == "zero-shot"]
    runs = [
        make_run("a", two_methods),
        make_run("b", memory, ["fastmem"], data="other.jsonl"),
        make_run("c", plain, ["zero-shot"], data="other.jsonl"),
    ]
    found = collect(runs)
    data = browser_data(found)
    labels_ = [variant["label"] for variant in data["variants"]]
    fastmem = next(v for v in data["variants"] if v["label"].startswith("fastmem"))
    compared = [labels_[number] for number in fastmem["baselines"]]
    assert len(set(compared)) == 2
    assert all(label.startswith("zero-shot") for label in compared)


def test_the_browser_shows_the_context_of_the_task_that_was_asked(make_run, two_methods, tmp_path):
    rows = [
        {"input": f"who {i}", "sub_context": f"New {i}.", "context": f"Old {i}."}
        | {"sub_answer": f"Ada{i}", "answer": "Bob"}
        for i in range(12)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = []
    for task in ("nqswap", "nq"):
        for record in two_methods:
            record["task"] = task
        runs.append(make_run(task, two_methods, task=task))
    data = browser_data(collect(runs))
    contexts = {
        data["datasets"][s["dataset"]]: "".join(text for text, _ in s["context"]) for s in data["samples"]
    }
    assert contexts == {"nqswap": "New 11.", "nq": "Old 11."}


def test_other_fields_of_a_file_are_other_samples(make_run, two_methods):
    memory = [r for r in two_methods if r["method"] == "fastmem"]
    plain = [r for r in two_methods if r["method"] == "zero-shot"]
    runs = [make_run("memory", memory, ["fastmem"]), make_run("base", plain, ["zero-shot"])]
    manifest = json.loads((runs[1] / "run.json").read_text())
    manifest["identity"]["data"]["fields"] = {"question": "context"}
    (runs[1] / "run.json").write_text(json.dumps(manifest))
    found = collect(runs)
    assert [dataset.label for dataset in found.datasets] == ["qa (memory)", "qa (base)"]
    assert all(found.baseline(variant, 0) == {} for variant in found.variants)


def test_models_measure_a_context_each_for_itself(make_run, two_methods, record):
    other = [record(r["index"], r["method"], r["scores"], n_context_tokens=1500) for r in two_methods]
    runs = [
        make_run("a", two_methods, backbone="org/small", fingerprint="1" * 16),
        make_run("b", other, backbone="org/large", fingerprint="2" * 16),
    ]
    assert browser_data(collect(runs[:1]))["samples"][0]["measures"] == [
        *("20 context tokens", "perplexity 20.1")
    ]
    assert browser_data(collect(runs))["samples"][0]["measures"] == [
        *("20 context tokens (small)", "perplexity 20.1 (small)"),
        *("1,500 context tokens (large)", "perplexity 20.1 (large)"),
    ]


def test_settings_that_cannot_be_read_are_no_obstacle(make_run, two_methods):
    run = make_run("run", two_methods)
    (run / "config.yaml").write_bytes(b"data: \xff\xfe")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "environment": None}))
    found = collect([run])
    assert "contexts and prompts are missing" in found.runs[0].notices[0]
    assert "12 samples, 2 methods, 1 run" in html(found, "title")


def test_samples_and_methods_are_counted_once(make_run, two_methods):
    runs = [make_run("a", two_methods), make_run("b", two_methods, seed=1)]
    assert "12 samples, 2 methods, 2 runs" in html(collect(runs), "title")


def test_an_unfinished_run_is_shown_as_far_as_it_went(make_run, two_methods, record):
    half = [*two_methods[:6], record(9, "zero-shot", {"accuracy": 1.0})]
    run = make_run("run", half, complete=False)
    with open(run / "predictions.jsonl", "a") as file:
        file.write('{"index": 10, "meth')
    found = collect([run])
    # Sample 9 lacks one of the methods.
    assert sorted(found.variants[0].records[0]) == [0, 1, 2]
    assert found.runs[0].notices == ["run: the run is not complete; 3 samples so far"]


def test_answers_of_other_processes_count(make_run, two_methods):
    run = make_run("run", two_methods[:6], complete=False)
    (run / "parts").mkdir()
    (run / "parts" / "host-1-0abc.jsonl").write_text("".join(json.dumps(r) + "\n" for r in two_methods[6:10]))
    assert sorted(collect([run]).variants[0].records[0]) == [0, 1, 2, 3, 4]


def test_failed_and_cut_samples_are_counted(make_run, two_methods):
    two_methods[1]["status"] = "loss not finite"
    two_methods[3]["n_truncated_tokens"] = 7
    notices = collect([make_run("run", two_methods)]).runs[0].notices
    assert [n.split(": ")[1][:9] for n in notices] == ["1 sample ", "1 sample "]


def test_moved_data_is_found_above_the_run(make_run, two_methods, tmp_path, monkeypatch):
    run = make_run("runs/run", two_methods)
    (run / "config.yaml").write_text("data:\n  path: data.jsonl\n")
    monkeypatch.chdir("/")
    assert len(collect([run]).runs[0].samples) == 12


def test_changed_data_is_not_shown(make_run, two_methods, tmp_path):
    run = make_run("run", two_methods)
    kept = (tmp_path / "data.jsonl").rename(tmp_path / "kept.jsonl")
    (tmp_path / "data.jsonl").write_text(kept.read_text().replace("tower", "castle"))
    found = collect([run]).runs[0]
    assert found.samples == {}
    assert "--data FILE" in found.notices[0]
    assert len(collect([run], kept).runs[0].samples) == 12
    with pytest.raises(FastMemError, match=r"--data: .*data\.jsonl is not the data of"):
        collect([run], tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", r"run\.json is damaged"),
        ("run.json", '{"identity": 3}', r"run\.json is damaged"),
        ("metrics.json", "[1]", r"metrics\.json is damaged"),
        ("predictions.jsonl", "x\n{}\n", r"predictions\.jsonl, line 1: not a record"),
        ("predictions.jsonl", "", "no answers yet"),
    ],
)
def test_damaged_files_are_named(make_run, two_methods, file, content, message):
    run = make_run("run", two_methods)
    (run / file).write_text(content)
    with pytest.raises(FastMemError, match=message):
        collect([run])


def test_what_is_no_run(make_run, two_methods, tmp_path):
    run = make_run("run", two_methods)
    with pytest.raises(FastMemError, match="no such run folder"):
        collect([tmp_path / "nothing"])
    with pytest.raises(FastMemError, match="no run folder"):
        collect([tmp_path])
    with pytest.raises(FastMemError, match="given twice"):
        collect([run, run.parent / "." / "run"])
    (run / "search.json").write_text("{}")
    with pytest.raises(FastMemError, match=r"is a search; its report is .*search\.md"):
        collect([run])


def test_saved_memories_are_no_answers(make_run):
    run = make_run("run", [], methods=[])
    (run / "memories").mkdir()
    with pytest.raises(FastMemError, match="memories, not answers"):
        collect([run])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scores", None),
        ("scores", {"accuracy": "yes"}),
        ("scores", {"accuracy": None}),
        ("seconds", {"decode": None}),
        ("curve", {"cross_entropy": [1.0], "kl": 3}),
        ("curve", {"cross_entropy": [1.0], "kl": ["a"]}),
        ("curve", {"cross_entropy": [1.0]}),
        ("curve", {"cross_entropy": [1.0], "kl": []}),
        ("curve", {"cross_entropy": [1.0], "kl": [None]}),
        ("prediction", 3),
    ],
)
def test_a_damaged_record_is_refused(make_run, two_methods, field, value):
    two_methods[1][field] = value
    with pytest.raises(FastMemError, match=rf"predictions\.jsonl is damaged: '{field}' of sample 0"):
        collect([make_run("run", two_methods)])


@pytest.mark.parametrize("other", [{"system_prompt": "Be brief."}, {"max_new_tokens": 3}, {"seed": 1}])
def test_zero_shot_under_other_settings_is_no_baseline(make_run, two_methods, other):
    only = [r for r in two_methods if r["method"] == "fastmem"]
    plain = [r for r in two_methods if r["method"] == "zero-shot"]
    runs = [make_run("m", only, methods=["fastmem"]), make_run("b", plain, methods=["zero-shot"], **other)]
    found = collect(runs)
    assert found.baseline(next(v for v in found.variants if v.method == "fastmem"), 0) == {}


def test_perplexity_is_of_the_first_step(record):
    assert perplexity(record(0, "fastmem", {})) == pytest.approx(math.exp(3.0))
    assert perplexity(record(0, "zero-shot", {})) is None
    # A failed sample's loss may be anything.
    assert perplexity({"curve": {"cross_entropy": [1e6]}}) < math.inf
