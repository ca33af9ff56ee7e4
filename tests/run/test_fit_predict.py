"""Records, metrics, tables and memories that `fit`, `predict` and `fit-predict` leave."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from runs import (
    FACTS,
    FIELDS,
    HOTPOT,
    METHODS,
    NQ,
    PREFIX,
    answers,
    assert_same_curves,
    read,
    write,
)
from safetensors import safe_open

from fastmem_pl.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("field", FIELDS)
def test_records_have_the_fields_of_the_design(base: Path, field: str) -> None:
    for record in read(base):
        value = record[field]
        assert isinstance(value, FIELDS[field]) or (field == "curve" and record["method"] == "zero-shot")


def test_records_hold_true_values(base: Path) -> None:
    records = read(base)
    assert Counter((r["index"], r["method"]) for r in records) == Counter(
        (i, m) for i in range(5) for m in METHODS
    )
    for record in records:
        source = NQ[record["index"]]
        assert record["references"] == [source["sub_answer"]]
        # a token is a byte here, also in text that looks like a control token
        assert record["n_context_tokens"] == len(source["sub_context"].encode())
        assert record["n_prompt_tokens"] > record["n_context_tokens"]
        assert set(record["seconds"]) == {"memorize", "decode"}
        assert all(math.isfinite(value) for value in record["scores"].values())
        assert record["status"] == "ok"
        assert record["prediction"].startswith(PREFIX)
        assert record["task"] == "nqswap"
        if record["method"] != "zero-shot":
            assert set(record["curve"]) == {"cross_entropy", "kl", "grad_norm"}
            assert {len(values) for values in record["curve"].values()} == {3}
            assert record["curve"]["kl"][0] == pytest.approx(0, abs=1e-6)
            assert record["curve"]["cross_entropy"][-1] < record["curve"]["cross_entropy"][0]


def test_methods_differ_so_that_the_other_tests_can_fail(base: Path) -> None:
    texts = [[text for (_, method), (text, _) in answers(base).items() if method == m] for m in METHODS]
    assert texts[0] != texts[1]
    assert texts[1] != texts[2]


def test_metrics_are_means_with_standard_errors(base: Path) -> None:
    groups = json.loads((base / "metrics.json").read_text())["groups"]
    for method in METHODS:
        records = [r for r in read(base) if r["method"] == method]
        for name in records[0]["scores"]:
            values = [r["scores"][name] for r in records]
            found = groups["all"][method]["metrics"][name]
            assert found["value"] == pytest.approx(statistics.mean(values))
            assert found["standard_error"] == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
    # the prefix names Rome, which is right for two of the five
    assert groups["all"]["zero-shot"]["metrics"]["contained"]["value"] == pytest.approx(0.4)


def test_metrics_say_where_they_come_from(base: Path, tiny_folder: Path) -> None:
    metrics = json.loads((base / "metrics.json").read_text())
    assert isinstance(metrics["schema_version"], int)
    assert metrics["model"]["fingerprint"]
    assert metrics["model"]["backbone"] == str(tiny_folder)
    assert {"torch", "lightning", "transformers"} <= set(metrics["environment"]["packages"])
    assert metrics["environment"]["device"]["type"] == "cpu"
    assert set(metrics["peak_memory_gib"]) == {"memorize", "decode"}
    assert metrics["groups"]["all"]["fastmem"]["metrics"]["seconds_memorize"]["value"] > 0
    assert metrics["groups"]["all"]["fastmem"]["metrics"]["seconds_decode"]["value"] > 0


def test_table_names_folder_test_and_differences(small_run, capsys: pytest.CaptureFixture) -> None:
    small_run("--trainer.enable_progress_bar", "true")
    out, err = capsys.readouterr()
    for word in (*METHODS, "accuracy", "contained", "format failure", "original", "words", "s/sample", "±"):
        assert word in out
    assert "McNemar" in out
    assert re.search(r"^run folder:? +run$", out, re.MULTILINE)
    assert sum(f"{question}?" in out for question, *_ in FACTS) == 3, "not three samples that differ"
    assert re.search(r"5/5 \[.*<.*sample/s", err), "no bar with samples done, rate and time left"


def test_no_memories_are_saved_by_fit_predict(base: Path) -> None:
    assert not list(base.rglob("*.safetensors"))


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
    found = yaml.safe_load((folder / "config.yaml").read_text())
    for name in option.split("."):
        found = found[name]
    assert found == yaml.safe_load(value)
    if option in ("model.memorize.learning_rate", "model.memorize.kl_coeff", "model.memorize.num_layers"):
        ours = {r["index"]: r["curve"] for r in records if r["method"] == "fastmem"}
        for other in read(base):
            if other["method"] == "fastmem":
                curve = ours[other["index"]]["cross_entropy"]
                assert curve[0] == pytest.approx(other["curve"]["cross_entropy"][0], rel=1e-4)
                assert curve[-1] != pytest.approx(other["curve"]["cross_entropy"][-1], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_changes_no_answer_and_no_curve(small_run, base: Path, batch_size: int) -> None:
    folder = small_run("--data.batch_size", batch_size)
    assert answers(folder) == answers(base)
    assert_same_curves(folder, base)


def test_batch_size_changes_nothing_with_more_layers(small_run) -> None:
    one, all_at_once = (
        small_run("--model.memorize.num_layers", 2, "--data.batch_size", b, run_dir=f"b{b}") for b in (1, 5)
    )
    assert answers(one) == answers(all_at_once)
    assert_same_curves(one, all_at_once)


def test_fit_then_predict_is_fit_predict(small_run, base: Path) -> None:
    folder = small_run(command="fit")
    assert not (folder / "predictions.jsonl").exists()
    assert small_run(command="predict") == folder
    assert answers(folder) == answers(base)


def test_predict_with_memories_of_another_folder(small_run, base: Path) -> None:
    memories = small_run(command="fit", run_dir="fitted") / "memories"
    assert answers(small_run("--model.memories", memories, command="predict")) == answers(base)


def test_memories_follow_the_sample_where_ids_repeat(small_run, tmp_path: Path) -> None:
    data = write(tmp_path / "hotpot.json", HOTPOT)
    options = ["--data.task", "hotpotqa", "--data.path", data]
    small_run(*options, command="fit")
    folder = small_run(*options, command="predict")
    assert answers(folder) == answers(small_run(*options, run_dir="both"))


def test_predict_without_memories_is_zero_shot(small_run, base: Path) -> None:
    assert answers(small_run(command="predict")) == answers(base, "zero-shot")


def test_memories_are_safetensors_with_settings_and_fingerprint(small_run, base: Path) -> None:
    saved = sorted((small_run(command="fit") / "memories").rglob("*.safetensors"))
    assert saved
    fingerprint = json.loads((base / "metrics.json").read_text())["model"]["fingerprint"]
    for path in saved:
        with safe_open(path, "pt") as memory:
            metadata = json.dumps(memory.metadata())
            assert list(memory.keys())
        assert fingerprint in metadata
        assert "learning_rate" in metadata
        assert "0.01" in metadata


def test_predict_does_not_claim_other_settings_than_its_memories(small_run, refused_small) -> None:
    memories = small_run(command="fit", run_dir="fitted") / "memories"
    options = ["--model.memories", memories, "--model.memorize.learning_rate", "0.5"]
    line = refused_small(*options, command="predict")
    assert "model.memorize.learning_rate: 0.5, but the memories in" in line
    assert "were made with 0.01; give --model.memorize.learning_rate 0.01" in line


def test_a_long_context_is_cut_off_and_counted(small_run, capsys: pytest.CaptureFixture) -> None:
    folder = small_run("--model.memorize.max_context_tokens", 20)
    assert Counter(r["n_context_tokens"] for r in read(folder)) == {20: 12, 9: 3}
    assert re.search(r"\b4 .*(cut|truncated)|(cut|truncated).* 4\b", capsys.readouterr().out)


def test_a_failed_memory_is_reported_and_answered_by_the_base_model(small_run, base: Path) -> None:
    folder = small_run("--model.memorize.learning_rate", "1e30")
    statuses = {method: {r["status"] for r in read(folder) if r["method"] == method} for method in METHODS}
    assert statuses["zero-shot"] == {"ok"}
    expected = {index: answer for (index, _), answer in answers(base, "zero-shot").items()}
    for method in METHODS[1:]:
        assert "ok" not in statuses[method]
        assert {index: answer for (index, _), answer in answers(folder, method).items()} == expected
    groups = json.loads((folder / "metrics.json").read_text())["groups"]
    assert groups["all"]["fastmem"]["metrics"]["failed"]["value"] == 1


def test_records_of_a_failed_memory_are_valid_json(small_run) -> None:
    content = (small_run("--model.memorize.learning_rate", "1e30") / "predictions.jsonl").read_text("utf-8")
    for line in content.splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_fit_says_what_failed(small_run, capsys: pytest.CaptureFixture) -> None:
    small_run("--model.memorize.learning_rate", "1e30", command="fit")
    assert re.search(r"5 .*(fail|could not be memorized)", capsys.readouterr().out)


@pytest.fixture
def room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose memory holds one sample at a time."""
    forward = transformers.LlamaModel.forward

    def limited(self, *args, **kwargs):
        for value in (*args, *kwargs.values()):
            if (
                isinstance(value, torch.Tensor)
                and value.dtype == torch.long
                and value.dim() == 2
                and len(value) > 1
            ):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", limited)


@pytest.mark.usefixtures("room_for_one")
def test_out_of_memory_halves_the_batch(small_run, base: Path) -> None:
    assert answers(small_run("--data.batch_size", 4)) == answers(base)


@pytest.mark.usefixtures("room_for_one")
def test_out_of_memory_says_what_to_lower(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    status = main(["fit-predict", *small, "--run_dir", str(tmp_path / "run"), "--model.auto_batch", "false"])
    err = capsys.readouterr().err
    assert status == 2
    assert err.count("\n") == 1
    assert "batch_size" in err
