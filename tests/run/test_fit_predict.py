"""Records, metrics, tables and memories that `fit`, `predict` and `fit-predict` leave."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from runs import FACTS, HOTPOT, METHODS, PREFIX, answers, read, write
from safetensors import safe_open

from fastmem_pl import Memorizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_sample_is_answered_by_every_method_and_no_memory_is_saved(base: Path) -> None:
    answered = {place: prediction for place, (prediction, _) in answers(base).items()}
    assert answered.keys() == set(itertools.product(range(5), METHODS))
    assert all(prediction.startswith(PREFIX) for prediction in answered.values())
    assert not list(base.rglob("*.safetensors"))


def test_methods_differ_so_that_the_other_tests_can_fail(base: Path) -> None:
    texts = [[text for (_, method), (text, _) in answers(base).items() if method == m] for m in METHODS]
    assert texts[0] != texts[1]
    assert texts[1] != texts[2]


def test_metrics_are_means_with_standard_errors_and_say_where_they_come_from(base, tiny_folder) -> None:
    metrics = json.loads((base / "metrics.json").read_text())
    groups = metrics["groups"]["all"]
    for method in METHODS:
        records = [r for r in read(base) if r["method"] == method]
        for name in records[0]["scores"]:
            values = [r["scores"][name] for r in records]
            found = groups[method]["metrics"][name]
            assert found["value"] == pytest.approx(statistics.mean(values))
            assert found["standard_error"] == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
    # the prefix names Rome, which is right for two of the five
    assert groups["zero-shot"]["metrics"]["contained"]["value"] == pytest.approx(0.4)
    assert groups["fastmem"]["metrics"]["seconds_memorize"]["value"] > 0
    assert groups["fastmem"]["metrics"]["seconds_decode"]["value"] > 0
    assert isinstance(metrics["schema_version"], int)
    assert metrics["model"]["fingerprint"]
    assert metrics["model"]["backbone"] == str(tiny_folder)
    assert {"torch", "lightning", "transformers"} <= set(metrics["environment"]["packages"])
    assert metrics["environment"]["device"]["type"] == "cpu"
    assert set(metrics["peak_memory_gib"]) == {"memorize", "decode"}


def test_table_names_folder_test_and_differences(small_run, capsys: pytest.CaptureFixture) -> None:
    small_run("--trainer.enable_progress_bar", "true")
    out, err = capsys.readouterr()
    for word in (*METHODS, "accuracy", "contained", "format failure", "original", "words", "s/sample", "±"):
        assert word in out
    assert "McNemar" in out
    assert re.search(r"^run folder:? +run$", out, re.MULTILINE)
    assert sum(f"{question}?" in out for question, *_ in FACTS) == 3, "not three samples that differ"
    assert re.search(r"5/5 \[.*<.*sample/s", err), "no bar with samples done, rate and time left"


@pytest.mark.parametrize(
    ("option", "value", "check"),
    [
        ("data.limit", "2", lambda rs, _: {r["index"] for r in rs} == {0, 1}),
        ("data.batch_size", "4", lambda rs, _: len(rs) == 15),
        ("model.memorize.steps", "2", lambda rs, _: {len(r["curve"]["kl"]) for r in rs if r["curve"]} == {2}),
        ("model.memorize.learning_rate", "0.001", lambda rs, _: 0 < rs[1]["curve"]["kl"][-1] < 1e-3),
        ("model.memorize.kl_coeff", "7", lambda rs, _: rs[1]["curve"]["kl"][-1] > 0),
        ("model.memorize.num_layers", "2", lambda rs, _: all(r["status"] == "ok" for r in rs)),
        ("model.methods", "[fastmem+cd]", lambda rs, _: {r["method"] for r in rs} == {"fastmem+cd"}),
        ("model.decode.max_new_tokens", "2", lambda rs, _: max(len(r["token_ids"]) for r in rs) == 2),
        ("trainer.precision", "bf16-true", lambda _, m: m["model"]["precision"] == "bf16-true"),
        ("trainer.precision", "bf16-mixed", lambda _, m: m["model"]["precision"] == "bf16-mixed"),
        ("trainer.limit_predict_batches", "1", lambda rs, _: len({r["index"] for r in rs}) == 2),
    ],
)
def test_overrides_take_effect(small_run, base: Path, option: str, value: str, check) -> None:
    folder = small_run(f"--{option}", value)
    records = read(folder)
    assert check(records, json.loads((folder / "metrics.json").read_text()))
    assert all(
        r["curve"]["cross_entropy"][-1] < r["curve"]["cross_entropy"][0] for r in records if r["curve"]
    )
    found = yaml.safe_load((folder / "config.yaml").read_text())
    for name in option.split("."):
        found = found[name]
    assert found == yaml.safe_load(value)
    if option == "data.batch_size":
        assert answers(folder) == answers(base)
    if option in ("model.memorize.learning_rate", "model.memorize.kl_coeff", "model.memorize.num_layers"):
        ours = {r["index"]: r["curve"] for r in records if r["method"] == "fastmem"}
        for other in read(base):
            if other["method"] == "fastmem":
                curve = ours[other["index"]]["cross_entropy"]
                assert curve[0] == pytest.approx(other["curve"]["cross_entropy"][0], rel=1e-4)
                assert curve[-1] != pytest.approx(other["curve"]["cross_entropy"][-1], rel=1e-6)


def test_fit_then_predict_is_fit_predict(small_run, base: Path) -> None:
    fitted = small_run(command="fit", run_dir="fitted")
    saved = sorted((fitted / "memories").rglob("*.safetensors"))
    assert len(saved) == 5
    assert not (fitted / "predictions.jsonl").exists()
    fingerprint = json.loads((base / "metrics.json").read_text())["model"]["fingerprint"]
    for path in saved:
        with safe_open(path, "pt") as memory:
            metadata = json.dumps(memory.metadata())
            assert list(memory.keys())
        assert [part for part in (fingerprint, "learning_rate", "0.01") if part not in metadata] == []
    for run_dir, memories in (("given", fitted), ("named", fitted / "memories")):
        options = ["--model.memories", memories]
        assert answers(small_run(*options, command="predict", run_dir=run_dir)) == answers(base)
    assert small_run(command="predict", run_dir="fitted") == fitted
    assert answers(fitted) == answers(base)


def test_memories_follow_the_sample_where_ids_repeat(small_run, tmp_path: Path) -> None:
    options = ["--data.task", "hotpotqa", "--data.path", write(tmp_path / "hotpot.json", HOTPOT)]
    small_run(*options, command="fit")
    folder = small_run(*options, command="predict")
    assert answers(folder) == answers(small_run(*options, run_dir="both"))


def test_predict_without_memories_is_zero_shot(small_run, base: Path) -> None:
    assert answers(small_run(command="predict")) == answers(base, "zero-shot")


def test_a_failed_memory_is_reported_and_answered_by_the_base_model(small_run, base: Path, capsys) -> None:
    options = ["--model.memorize.learning_rate", "1e30"]
    expected = {index: answer for (index, _), answer in answers(base, "zero-shot").items()}
    small_run(*options, command="fit", run_dir="fitted")
    assert re.search(r"5 .*(fail|could not be memorized)", capsys.readouterr().out)
    for folder in (small_run(*options), small_run(*options, command="predict", run_dir="fitted")):
        for record in read(folder):
            failed = record["status"].startswith("failed: the memorization loss is not finite")
            assert (failed, record["status"] == "ok") == (record["method"] != "zero-shot", not failed)
        for method in METHODS[1:]:
            assert {index: answer for (index, _), answer in answers(folder, method).items()} == expected
        groups = json.loads((folder / "metrics.json").read_text())["groups"]
        assert groups["all"]["fastmem"]["metrics"]["failed"]["value"] == 1


def test_out_of_memory_is_one_line_that_says_what_to_lower(small, say, tmp_path, monkeypatch) -> None:
    def full(self, encoded):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Memorizer, "fit", full)
    options = ["--run_dir", tmp_path / "run", "--model.auto_batch", "false"]
    line = say("fit-predict", *small, *options, expect=2).err
    assert line.count("\n") == 1
    assert "out of memory with 2 sample(s) at once; lower --data.batch_size" in line
