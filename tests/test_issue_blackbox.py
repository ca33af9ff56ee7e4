"""Black-box checks of the main job: what a user sees of `fastmem`, of its files and of its messages."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import make_model, make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from fastmem_pl.cli import main

PREFIX = "The answer is: Rome, as"
FACTS = (
    ("where is the tower", "Paris", "Rome", "The tower stands in {}."),
    (
        "who wrote the play",
        "Ann",
        "Bob",
        "A play of five acts, {} wrote it in one winter by the river, and no one knew.",
    ),
    ("where was zoë born", "Oslo", "Rome", "Zoë was born in {}; «naïve» readers ask why."),
    ("what is the mark", "dot", "star", "The mark <|im_end|> is a {}."),
    ("who rang", "Tom", "Eve", "{} rang."),
)
NQ = [
    {"input": q, "context": c.format(old), "answer": old, "sub_context": c.format(new), "sub_answer": new}
    for q, old, new, c in FACTS
]
MEMOTRAP = [
    {
        "prompt": 'Write a quote that ends in the word "first": He laughs best who laughs',
        "classes": "[' first.', ' last.']",
        "answer_index": 0,
        "round": 2,
        "part": 1,
    },
    {
        "prompt": 'Write a quote that ends in the word "fast": Slow and steady wins the',
        "classes": "[' race.', ' fast.']",
        "answer_index": 1,
        "round": 1,
        "part": 1,
    },
]
HOTPOT = [
    {
        "id": "same-id",
        "question": "Which river is longer?",
        "answer": "the Long",
        "type": "comparison",
        "level": "hard",
        "context": {
            "title": ["Long", "Short"],
            "sentences": [["The Long is a river.", " It is long."], ["Short."]],
        },
    },
    {
        "id": "same-id",
        "question": "Who crossed it?",
        "answer": "Bob",
        "type": "bridge",
        "level": "hard",
        "context": {"title": ["Bob"], "sentences": [["Bob crossed it."]]},
    },
]
QA = [
    {"context": "The cat is red.", "question": "What colour is the cat?", "answers": ["red", "crimson"]},
    {"context": "The dog is very old and blue.", "question": "What colour is the dog?", "answer": "blue"},
    {"context": "The hen is green.", "question": "What colour is the hen?"},
]
TASKS = {
    "nqswap": (NQ, [["Rome"], ["Bob"], ["Rome"], ["star"], ["Eve"]]),
    "nq": (NQ, [["Paris"], ["Ann"], ["Oslo"], ["dot"], ["Tom"]]),
    "memotrap": (MEMOTRAP, [["first"], ["fast"]]),
    "hotpotqa": (HOTPOT, [["the Long"], ["Bob"]]),
    "qa": (QA, [["red", "crimson"], ["blue"], []]),
}
FASTMEM = str(Path(sys.executable).with_name("fastmem"))
METHODS = ["zero-shot", "fastmem", "fastmem+cd"]
FIELDS = {
    "index": int,
    "id": str,
    "task": str,
    "method": str,
    "prediction": str,
    "token_ids": list,
    "references": list,
    "scores": dict,
    "curve": dict,
    "n_context_tokens": int,
    "n_prompt_tokens": int,
    "seconds": dict,
    "status": str,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: threads only wait for each other."""
    transformers.utils.logging.disable_progress_bar()  # as the installed command does
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    transformers.utils.logging.enable_progress_bar()


def write(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    else:
        path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


def read(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text("utf-8").splitlines()]


def answers(run_dir: Path, *methods: str) -> dict[tuple[int, str], tuple[str, list[int]]]:
    """Answer of every sample and method; fails when one is there twice."""
    records = [record for record in read(run_dir) if not methods or record["method"] in methods]
    found = {(r["index"], r["method"]): (r["prediction"], r["token_ids"]) for r in records}
    assert len(found) == len(records), "a sample is answered twice"
    return found


def files(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def assert_same_curves(ours: Path, theirs: Path) -> None:
    other = {(r["index"], r["method"]): r["curve"] for r in read(theirs)}
    for record in read(ours):
        curve, expected = record["curve"], other[record["index"], record["method"]]
        assert (curve is None) == (expected is None)
        for name in curve or ():
            assert curve[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (record["index"], name)


@pytest.fixture(scope="module")
def small(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a small run, without the folder."""
    data = write(tmp_path_factory.mktemp("data") / "nq.json", NQ)
    options = {
        "model.backbone": tiny_folder,
        "model.memorize.steps": 3,
        "model.memorize.learning_rate": 0.01,
        "model.decode.max_new_tokens": 6,
        "data.task": "nqswap",
        "data.path": data,
        "data.batch_size": 2,
        "data.answer_prefix": PREFIX,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def base(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of one finished `fit-predict`; not to be written to."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert main(["fit-predict", *small, "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command with the small options and others after them, in `tmp_path`; it must succeed."""
    monkeypatch.chdir(tmp_path)

    def call(*options: object, command: str = "fit-predict", run_dir: str = "run") -> Path:
        assert main([command, *small, "--run_dir", run_dir, *map(str, options)]) == 0
        return tmp_path / run_dir

    return call


@pytest.fixture
def refused(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run a command that must be refused in one line, with nothing written; gives the line."""
    monkeypatch.chdir(tmp_path)

    def call(*options: object, command: str = "fit-predict") -> str:
        before = files(tmp_path)
        capsys.readouterr()
        status = main([command, *small, "--run_dir", "run", *map(str, options)])
        out, err = capsys.readouterr()
        assert status == 2, f"exit status {status}: {err}"
        assert out == ""
        assert err.count("\n") == 1, f"not one line: {err!r}"
        assert err.endswith("\n")
        assert files(tmp_path) == before, "something was written"
        return err

    return call


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


def test_table_names_folder_test_and_differences(run, capsys: pytest.CaptureFixture) -> None:
    run("--trainer.enable_progress_bar", "true")
    out, err = capsys.readouterr()
    for word in (*METHODS, "accuracy", "contained", "format failure", "original", "words", "s/sample", "±"):
        assert word in out
    assert "McNemar" in out
    assert re.search(r"^run folder:? +run$", out, re.MULTILINE)
    assert sum(f"{question}?" in out for question, *_ in FACTS) == 3, "not three samples that differ"
    assert re.search(r"5/5 \[.*<.*sample/s", err), "no bar with samples done, rate and time left"


def test_no_memories_are_saved_by_fit_predict(base: Path) -> None:
    assert not list(base.rglob("*.safetensors"))


def test_config_of_a_run_folder_reruns(run, base: Path, tmp_path: Path) -> None:
    assert main(["fit-predict", "--config", str(base / "config.yaml"), "--run_dir", "again"]) == 0
    assert answers(tmp_path / "again") == answers(base)


def test_config_of_a_run_folder_goes_on_in_it(run) -> None:
    folder = run()
    before = (folder / "predictions.jsonl").read_bytes()
    assert main(["fit-predict", "--config", str(folder / "config.yaml")]) == 0
    assert (folder / "predictions.jsonl").read_bytes() == before


def test_print_config_round_trips(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def printed(*options: str) -> str:
        status = main(["fit-predict", *options, "--print_config"])
        assert status == 0
        return capsys.readouterr().out

    first = printed(*small, "--model.memorize.kl_coeff", "0.25", "--run_dir", str(tmp_path / "run"))
    (tmp_path / "saved.yaml").write_text(first)
    assert printed("--config", str(tmp_path / "saved.yaml")) == first
    settings = yaml.safe_load(first)
    assert settings["model"]["kl_coeff"] == 0.25
    assert settings["data"]["answer_prefix"] == PREFIX
    assert not (tmp_path / "run").exists()


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
def test_overrides_take_effect(run, base: Path, option: str, value: str, check) -> None:
    folder = run(f"--{option}", value)
    records = read(folder)
    assert check(records, json.loads((folder / "metrics.json").read_text()))
    section, name = option.split(".")
    assert yaml.safe_load((folder / "config.yaml").read_text())[section][name] == yaml.safe_load(value)
    if option in ("model.memorize.learning_rate", "model.memorize.kl_coeff", "model.memorize.num_layers"):
        ours = {r["index"]: r["curve"] for r in records if r["method"] == "fastmem"}
        for other in read(base):
            if other["method"] == "fastmem":
                curve = ours[other["index"]]["cross_entropy"]
                assert curve[0] == pytest.approx(other["curve"]["cross_entropy"][0], rel=1e-4)
                assert curve[-1] != pytest.approx(other["curve"]["cross_entropy"][-1], rel=1e-6)


@pytest.mark.parametrize("task", ["nqswap", "nq", "memotrap", "hotpotqa", "qa"])
@pytest.mark.parametrize("spelling", ["smollm2,{}", "configs/model/smollm2.yaml,configs/task/{}.yaml"])
def test_packaged_configs(capsys: pytest.CaptureFixture, monkeypatch, task: str, spelling: str) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    name = spelling.format(task)
    assert main(["fit-predict", "--config", name, "--data.path", "some.json", "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["data"]["task"] == task
    assert settings["data"]["path"] == "some.json"
    assert settings["model"]["backbone"] == "demo"


def test_demo_config_has_the_promised_samples_and_default_folder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--model.backbone",
        str(tiny_folder),
        "--model.methods",
        "[zero-shot]",
        "--model.decode.max_new_tokens",
        "4",
    ]
    assert main(["fit-predict", "--config", "demo", *options, "--trainer.accelerator", "cpu"]) == 0
    tasks = Counter(r["task"] for r in read(tmp_path / "runs" / "demo"))
    assert tasks["nqswap"] >= 40
    assert tasks["memotrap"] >= 10


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_its_format_and_takes_a_prefix(run, tmp_path: Path, task: str, suffix: str) -> None:
    records, references = TASKS[task]
    data = write(tmp_path / f"data{suffix}", records)
    prefix = f"The answer is: {references[0][0]}, as"
    options = ["--data.task", task, "--data.path", data, "--model.methods", "[zero-shot]"]
    found = read(run(*options, "--data.answer_prefix", prefix))
    assert [r["references"] for r in found] == references
    assert all(r["prediction"].startswith(prefix) for r in found)
    assert found[0]["scores"]["contained"] == 1
    bare = read(run(*options, "--data.answer_prefix", "", run_dir="bare"))
    assert bare[0]["scores"]["contained"] == 0
    assert found[0]["n_prompt_tokens"] == bare[0]["n_prompt_tokens"] + len(prefix.encode())


def test_prefix_is_scored_in_accuracy_and_format(run) -> None:
    exact = read(run("--data.answer_prefix", "The answer is: Rome.\n\n", "--model.methods", "[zero-shot]"))
    assert exact[0]["scores"]["format_failure"] == 0
    assert exact[0]["scores"]["accuracy"] == 1
    assert exact[1]["scores"]["accuracy"] == 0


@pytest.mark.parametrize("gold", [{"gold": ["red"]}, {"gold": "red"}, {}, {"gold": None}, {"gold": []}])
def test_qa_with_the_users_own_field_names(run, tmp_path: Path, capsys: pytest.CaptureFixture, gold) -> None:
    record = {"passage": "The cat is red.", "q": "What colour?", "extra": 1} | gold
    data = write(tmp_path / "mine.jsonl", [record, record])
    fields = "{context: passage, question: q, answers: gold}"
    options = ["--data.task", "qa", "--data.path", data, "--data.answer_prefix", "It is red and"]
    for found in read(run(*options, "--data.fields", fields)):
        assert found["references"] == (["red"] if gold.get("gold") else [])
        if gold.get("gold"):
            assert found["scores"]["contained"] == 1
        else:
            assert not {"accuracy", "contained", "exact_match", "f1"} & set(found["scores"])
    assert "zero-shot" in capsys.readouterr().out


@pytest.mark.parametrize("gold", ["", [""], " "])
def test_an_empty_answer_is_refused_or_not_scored(small: list[str], tmp_path: Path, gold) -> None:
    data = write(tmp_path / "mine.json", [QA[0] | {"answers": gold}])
    options = ["--data.task", "qa", "--data.path", str(data), "--run_dir", str(tmp_path / "run")]
    if main(["fit-predict", *small, *options]) == 0:
        assert not any(r["scores"].get("contained") for r in read(tmp_path / "run"))


@pytest.mark.parametrize("task", ["nqswap", "hotpotqa", "memotrap"])
def test_real_data_files(run, shared: Path, task: str) -> None:
    options = ["--data.task", task, "--data.path", shared / "data" / f"{task}.json", "--data.limit", "2"]
    assert len(answers(run(*options))) == 2 * len(METHODS)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_changes_no_answer_and_no_curve(run, base: Path, batch_size: int) -> None:
    folder = run("--data.batch_size", batch_size)
    assert answers(folder) == answers(base)
    assert_same_curves(folder, base)


def test_batch_size_changes_nothing_with_more_layers(run) -> None:
    one, all_at_once = (
        run("--model.memorize.num_layers", 2, "--data.batch_size", b, run_dir=f"b{b}") for b in (1, 5)
    )
    assert answers(one) == answers(all_at_once)
    assert_same_curves(one, all_at_once)


def test_fit_then_predict_is_fit_predict(run, base: Path) -> None:
    folder = run(command="fit")
    assert not (folder / "predictions.jsonl").exists()
    assert run(command="predict") == folder
    assert answers(folder) == answers(base)


def test_predict_with_memories_of_another_folder(run, base: Path) -> None:
    memories = run(command="fit", run_dir="fitted") / "memories"
    assert answers(run("--model.memories", memories, command="predict")) == answers(base)


def test_memories_follow_the_sample_where_ids_repeat(run, tmp_path: Path) -> None:
    data = write(tmp_path / "hotpot.json", HOTPOT)
    options = ["--data.task", "hotpotqa", "--data.path", data]
    run(*options, command="fit")
    folder = run(*options, command="predict")
    assert answers(folder) == answers(run(*options, run_dir="both"))


def test_predict_without_memories_is_zero_shot(run, base: Path) -> None:
    assert answers(run(command="predict")) == answers(base, "zero-shot")


def test_memories_are_safetensors_with_settings_and_fingerprint(run, base: Path) -> None:
    saved = sorted((run(command="fit") / "memories").rglob("*.safetensors"))
    assert saved
    fingerprint = json.loads((base / "metrics.json").read_text())["model"]["fingerprint"]
    for path in saved:
        with safe_open(path, "pt") as memory:
            metadata = json.dumps(memory.metadata())
            assert list(memory.keys())
        assert fingerprint in metadata
        assert "learning_rate" in metadata
        assert "0.01" in metadata


def test_the_same_command_does_nothing_twice(run) -> None:
    before = files(run())["predictions.jsonl"]
    assert files(run())["predictions.jsonl"] == before
    fitted = files(run(command="fit", run_dir="fitted") / "memories")
    assert files(run(command="fit", run_dir="fitted") / "memories") == fitted


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.memorize.steps", "4"),
        ("model.memorize.learning_rate", "0.02"),
        ("model.memorize.kl_coeff", "0.2"),
        ("model.memorize.num_layers", "2"),
        ("model.methods", "[zero-shot]"),
        ("model.decode.max_new_tokens", "7"),
        ("data.limit", "1"),
        ("data.answer_prefix", "It is"),
        ("data.task", "nq"),
        ("trainer.precision", "bf16-true"),
    ],
)
def test_a_folder_of_other_settings_is_refused(run, refused, option: str, value: str) -> None:
    run("--model.methods", "[zero-shot,fastmem]", "--data.limit", "2")
    line = refused("--model.methods", "[zero-shot,fastmem]", "--data.limit", "2", f"--{option}", value)
    assert option in line
    assert "run" in line


def save_model(folder: Path, seed: int) -> Path:
    make_model(seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_of_other_data_is_refused(run, refused, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.json", NQ[:2])
    run("--data.path", data)
    write(data, NQ[1:3])
    assert "data" in refused("--data.path", data)


def test_a_folder_of_other_weights_is_refused(run, refused, tmp_path: Path) -> None:
    options = ["--model.backbone", save_model(tmp_path / "model", seed=0)]
    predictions = run(*options) / "predictions.jsonl"
    predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:6]))
    save_model(tmp_path / "model", seed=1)
    assert "model" in refused(*options)


def test_a_config_of_the_users_own_is_not_overwritten(run, refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: 1\n")
    assert "run_dir" in refused()


@pytest.mark.parametrize("change", ["model", "context", "more samples"])
def test_memories_that_do_not_fit_are_refused(run, refused, tmp_path: Path, change: str) -> None:
    options = {
        "model": ["--model.backbone", save_model(tmp_path / "other", seed=1)],
        "context": ["--data.task", "nq"],
        "more samples": ["--data.limit", "5"],
    }[change]
    memories = run("--data.limit", "3", command="fit", run_dir="fitted") / "memories"
    line = refused("--data.limit", "3", "--model.memories", memories, *options, command="predict")
    assert "memories" in line


def test_predict_does_not_claim_other_settings_than_its_memories(
    run, small: list[str], tmp_path: Path
) -> None:
    memories = str(run(command="fit", run_dir="fitted") / "memories")
    options = ["--run_dir", "run", "--model.memories", memories, "--model.memorize.learning_rate", "0.5"]
    if main(["predict", *small, *options]) == 0:
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert metrics["settings"]["model"]["learning_rate"] == 0.01


def test_fit_makes_a_damaged_memory_again(run) -> None:
    memory = min((run(command="fit") / "memories").rglob("*.safetensors"))
    whole = memory.read_bytes()
    expected = {name: tensor.clone() for name, tensor in load_file(memory).items()}  # not mapped
    memory.write_bytes(whole[: len(whole) // 2])
    run(command="fit")
    # Made again in a batch of its own: equal up to rounding, not to the byte.
    for name, tensor in load_file(memory).items():
        assert (tensor - expected[name]).norm() < 1e-3 * expected[name].norm()


def cut_in_a_line(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def cut_in_a_character(content: bytes) -> bytes:
    return content[: next(i for i in range(len(content) // 2, len(content)) if content[i] >= 0xC2) + 1]


def cut_before_the_last_newline(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:7])[:-1]


def cut_between_methods_of_a_sample(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:8])


def cut_to_nothing(_: bytes) -> bytes:
    return b""


def whole_samples(content: bytes) -> list[bytes]:
    """Records of the samples that every method has answered."""
    lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    return lines[: len(lines) - len(lines) % len(METHODS)]


@pytest.mark.parametrize(
    "cut",
    [
        cut_in_a_line,
        cut_in_a_character,
        cut_before_the_last_newline,
        cut_between_methods_of_a_sample,
        cut_to_nothing,
    ],
)
def test_a_half_written_file_is_repaired(run, base: Path, cut) -> None:
    predictions = run() / "predictions.jsonl"
    kept = cut(predictions.read_bytes())
    predictions.write_bytes(kept)
    (predictions.parent / "metrics.json").unlink()
    assert answers(run()) == answers(base)
    assert predictions.read_bytes().startswith(b"".join(whole_samples(kept))), "a whole sample was made again"
    assert (predictions.parent / "metrics.json").exists()


def test_a_killed_run_goes_on(run, small: list[str], tmp_path: Path) -> None:
    data = write(tmp_path / "many.jsonl", NQ * 4)
    options = [
        "--data.path",
        str(data),
        "--model.decode.max_new_tokens",
        "24",
        "--model.memorize.steps",
        "15",
    ]
    command = [FASTMEM, "fit-predict", *small, "--run_dir", "run", *options]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    predictions, deadline = tmp_path / "run" / "predictions.jsonl", time.monotonic() + 60
    while not predictions.exists() or predictions.read_bytes().count(b"\n") < 7:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = predictions.read_bytes()
    assert written.count(b"\n") < 20 * len(METHODS)
    folder = run(*options)
    assert set(answers(folder)) == {(i, m) for i in range(20) for m in METHODS}
    assert set(whole_samples(written)) <= set(predictions.read_bytes().splitlines(keepends=True))
    assert answers(folder) == answers(run(*options, run_dir="whole"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            "--data.task nqswp",
            ("data.task", "'nqswp'", "hotpotqa", "memotrap", "qa", "did you mean 'nqswap'"),
        ),
        (
            "--model.methods [zero-shto]",
            ("model.methods", "'zero-shto'", "fastmem+cd", "did you mean 'zero-shot'"),
        ),
        ("--model.methods []", ("model.methods", "zero-shot", "fastmem")),
        ("--model.stesp 3", ("--model.stesp", "--model.memorize.steps")),
        ("--modle.steps 3", ("--modle.steps", "--model.memorize.steps")),
        ("--rundir x", ("--rundir", "--run_dir")),
        ("--trainer.acceleratr cpu", ("--trainer.acceleratr", "--trainer.accelerator")),
        (
            "--trainer.precision bf16-tru",
            ("trainer.precision", "bf16-tru", "32-true", "did you mean 'bf16-true'"),
        ),
        ("--trainer.accelerator cpuu", ("trainer.accelerator", "cpuu", "cpu")),
        ("--trainer.strategy ddpp", ("trainer.strategy", "ddpp")),
        ("--model.memorize.steps abc", ("model.memorize.steps", "abc", "int")),
        ("--model.memorize.steps -1", ("model.memorize.steps", "-1", "at least 0")),
        ("--model.memorize.learning_rate 0", ("model.memorize.learning_rate", "0", "above 0")),
        ("--model.memorize.learning_rate .nan", ("model.memorize.learning_rate", "nan")),
        ("--model.memorize.learning_rate .inf", ("model.memorize.learning_rate", "inf")),
        ("--model.memorize.kl_coeff -1", ("model.memorize.kl_coeff", "-1", "at least 0")),
        ("--model.memorize.num_layers 9", ("model.memorize.num_layers", "9", "3")),
        ("--model.decode.max_new_tokens 0", ("model.decode.max_new_tokens", "0", "at least 1")),
        ("--data.batch_size 0", ("data.batch_size", "0", "at least 1")),
        ("--data.limit -1", ("data.limit", "-1", "at least 1")),
        ("--data.path nope.json", ("data.path", "nope.json")),
        ("--model.backbone nope.gguf", ("model.backbone", "nope.gguf")),
        ("--model.backbone ./nope", ("model.backbone", "nope")),
        ("--model.memorize.max_context_tokens 8 --model.strict true", ("max_context_tokens", "25", "8")),
        ("--config dmeo", ("--config", "dmeo", "smollm2", "did you mean 'demo'")),
        ("--data.task qa --data.fields {contxt:input}", ("data.fields", "contxt", "context")),
        ("--data.fields {context:input}", ("data.fields", "qa")),
    ],
)
def test_a_bad_option_is_refused_in_one_line(refused, options: str, parts: tuple[str, ...]) -> None:
    line = refused(*(option.replace(":", ": ") for option in options.split()))
    assert [part for part in parts if part not in line] == []


def test_a_missing_file_names_its_neighbour(refused, tmp_path: Path) -> None:
    write(tmp_path / "questions.jsonl", QA)
    line = refused("--data.task", "qa", "--data.path", "question.jsonl")
    assert "question.jsonl" in line
    assert "did you mean 'questions.jsonl'" in line


def test_a_bad_command_is_refused(refused) -> None:
    line = refused(command="fit-predcit")
    assert "fit-predcit" in line
    assert "did you mean 'fit-predict'" in line


def test_a_bad_key_in_a_config_file_is_refused(refused, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  learning_rat: 1.0e-4\n")
    line = refused("--config", "mine.yaml")
    assert "learning_rat" in line
    assert "did you mean" in line


def without(record: dict, key: str) -> dict:
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("task", "bad", "parts"),
    [
        ("nqswap", without(NQ[1], "sub_context"), ("sub_context",)),
        ("nqswap", without(NQ[1], "sub_answer") | {"sub_answr": "x"}, ("sub_answer", "sub_answr")),
        ("nqswap", NQ[1] | {"sub_context": 4711}, ("sub_context", "4711")),
        ("nqswap", NQ[1] | {"sub_context": "  \n"}, ("sub_context", "empty")),
        ("nqswap", NQ[1] | {"input": ""}, ("input", "empty")),
        ("nqswap", NQ[1] | {"sub_answer": None}, ("sub_answer",)),
        ("nq", without(NQ[1], "answer"), ("answer",)),
        ("nq", NQ[1] | {"context": ""}, ("context", "empty")),
        ("memotrap", MEMOTRAP[1] | {"answer_index": 4711}, ("answer_index", "4711")),
        ("memotrap", MEMOTRAP[1] | {"classes": "[' race.'"}, ("classes",)),
        ("memotrap", MEMOTRAP[1] | {"prompt": "no colon"}, ("prompt",)),
        ("hotpotqa", HOTPOT[1] | {"context": {"title": ["Bob"]}}, ("context", "sentences")),
        ("hotpotqa", HOTPOT[1] | {"context": {"title": [], "sentences": []}}, ("context", "empty")),
        ("hotpotqa", HOTPOT[1] | {"context": {"title": ["Bob"], "sentences": [[" "]]}}, ("context", "empty")),
        ("hotpotqa", HOTPOT[1] | {"question": " "}, ("question", "empty")),
        ("qa", QA[1] | {"context": ""}, ("context", "empty")),
        ("qa", QA[1] | {"question": "\t"}, ("question", "empty")),
        ("qa", without(QA[1], "question") | {"qestion": "x"}, ("question", "qestion")),
        ("qa", QA[1] | {"answers": [4711]}, ("answers", "4711")),
        ("qa", ["not", "an", "object"], ("object",)),
    ],
)
def test_a_malformed_record_is_refused_by_file_line_and_field(
    refused, tmp_path: Path, task: str, bad: dict, parts: tuple[str, ...]
) -> None:
    good = TASKS[task][0][0]
    write(tmp_path / "mine.jsonl", [good, bad, good])
    line = refused("--data.task", task, "--data.path", "mine.jsonl")
    assert [part for part in ("mine.jsonl", "line 2", *parts) if part not in line] == []


def test_a_malformed_record_of_a_json_list_is_found_too(refused, tmp_path: Path) -> None:
    lines = ",\n".join(json.dumps(record) for record in (NQ[0], without(NQ[1], "input"), NQ[2]))
    (tmp_path / "mine.json").write_text(f"[\n{lines}\n]\n")
    line = refused("--data.path", "mine.json")
    assert "mine.json" in line
    assert "line 3" in line
    assert "input" in line


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"context": "a", "question": "b"}\n{"context": "a", "quest\n', ("a.jsonl", "line 2")),
        (
            "a.json",
            b'[\n{"context": "a", "question": "b"},\n{"context": "a" "question": "b"}]',
            ("a.json", "line 3"),
        ),
        ("a.json", b"", ("a.json",)),
        ("a.json", b"[]", ("a.json",)),
        ("a.json", b"3", ("a.json",)),
        ("a.jsonl", b'{"context": "\xe9t\xe9", "question": "b"}\n', ("a.jsonl", "UTF-8")),
    ],
)
def test_a_broken_file_is_refused(
    refused, tmp_path: Path, name: str, content: bytes, parts: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    line = refused("--data.task", "qa", "--data.path", name)
    assert [part for part in parts if part not in line] == []


def test_blank_lines_crlf_and_a_bom_are_no_fault(run, tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in QA]
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    options = ["--data.task", "qa", "--data.path", "mine.jsonl", "--model.methods", "[zero-shot]"]
    assert len(answers(run(*options))) == len(QA)


def test_a_long_context_is_cut_off_and_counted(run, capsys: pytest.CaptureFixture) -> None:
    folder = run("--model.memorize.max_context_tokens", 20)
    assert Counter(r["n_context_tokens"] for r in read(folder)) == {20: 12, 9: 3}
    assert re.search(r"\b4 .*(cut|truncated)|(cut|truncated).* 4\b", capsys.readouterr().out)


@pytest.mark.parametrize("family", ["mixtral", "mamba", "bert"])
def test_a_model_that_does_not_fit_is_refused_by_name(refused, tmp_path: Path, family: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = (
        {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
        if family == "mixtral"
        else {}
    )
    decoder = {"is_decoder": True} if family == "bert" else {}
    config = transformers.AutoConfig.for_model(family, vocab_size=259, **sizes, **experts, **decoder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    line = refused("--model.backbone", tmp_path / "model")
    assert "model.backbone" in line
    assert family in line.lower()


def test_a_failed_memory_is_reported_and_answered_by_the_base_model(run, base: Path) -> None:
    folder = run("--model.memorize.learning_rate", "1e30")
    statuses = {method: {r["status"] for r in read(folder) if r["method"] == method} for method in METHODS}
    assert statuses["zero-shot"] == {"ok"}
    expected = {index: answer for (index, _), answer in answers(base, "zero-shot").items()}
    for method in METHODS[1:]:
        assert "ok" not in statuses[method]
        assert {index: answer for (index, _), answer in answers(folder, method).items()} == expected
    groups = json.loads((folder / "metrics.json").read_text())["groups"]
    assert groups["all"]["fastmem"]["metrics"]["failed"]["value"] == 1


def test_records_of_a_failed_memory_are_valid_json(run) -> None:
    content = (run("--model.memorize.learning_rate", "1e30") / "predictions.jsonl").read_text("utf-8")
    for line in content.splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_fit_says_what_failed(run, capsys: pytest.CaptureFixture) -> None:
    run("--model.memorize.learning_rate", "1e30", command="fit")
    assert re.search(r"5 .*(fail|could not be memorized)", capsys.readouterr().out)


def test_a_model_with_damaged_weights_is_refused(refused, tmp_path: Path) -> None:
    (save_model(tmp_path / "model", seed=0) / "model.safetensors").write_bytes(b"junk")
    assert "model.backbone" in refused("--model.backbone", "model")


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
def test_out_of_memory_halves_the_batch(run, base: Path) -> None:
    assert answers(run("--data.batch_size", 4)) == answers(base)


@pytest.mark.usefixtures("room_for_one")
def test_out_of_memory_says_what_to_lower(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    status = main(["fit-predict", *small, "--run_dir", str(tmp_path / "run"), "--model.auto_batch", "false"])
    err = capsys.readouterr().err
    assert status == 2
    assert err.count("\n") == 1
    assert "batch_size" in err


@pytest.mark.parametrize("options", [["--data.task", "nqswp"], ["--model.memorize.num_layers", "9"]])
def test_the_installed_command_says_one_line_too(
    small: list[str], tmp_path: Path, options: list[str]
) -> None:
    command = [FASTMEM, "fit-predict", *small, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"fastmem: error: .*\n", done.stderr)
    assert files(tmp_path) == {}
