"""What data files may hold, as a run of the command reads them, and how a malformed one is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from runs import HOTPOT, MEMOTRAP, METHODS, NQ, QA, TASKS, answers, read, write

from fastmem_pl.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_its_format_and_takes_a_prefix(
    small_run, tmp_path: Path, task: str, suffix: str
) -> None:
    records, references = TASKS[task]
    data = write(tmp_path / f"data{suffix}", records)
    prefix = f"The answer is: {references[0][0]}, as"
    options = ["--data.task", task, "--data.path", data, "--model.methods", "[zero-shot]"]
    found = read(small_run(*options, "--data.answer_prefix", prefix))
    assert [r["references"] for r in found] == references
    assert all(r["prediction"].startswith(prefix) for r in found)
    assert found[0]["scores"]["contained"] == 1
    bare = read(small_run(*options, "--data.answer_prefix", "", run_dir="bare"))
    assert bare[0]["scores"]["contained"] == 0
    assert found[0]["n_prompt_tokens"] == bare[0]["n_prompt_tokens"] + len(prefix.encode())


def test_prefix_is_scored_in_accuracy_and_format(small_run) -> None:
    exact = read(
        small_run("--data.answer_prefix", "The answer is: Rome.\n\n", "--model.methods", "[zero-shot]")
    )
    assert exact[0]["scores"]["format_failure"] == 0
    assert exact[0]["scores"]["accuracy"] == 1
    assert exact[1]["scores"]["accuracy"] == 0


@pytest.mark.parametrize("gold", [{"gold": ["red"]}, {"gold": "red"}, {}, {"gold": None}, {"gold": []}])
def test_qa_with_the_users_own_field_names(
    small_run, tmp_path: Path, capsys: pytest.CaptureFixture, gold
) -> None:
    record = {"passage": "The cat is red.", "q": "What colour?", "extra": 1} | gold
    data = write(tmp_path / "mine.jsonl", [record, record])
    fields = "{context: passage, question: q, answers: gold}"
    options = ["--data.task", "qa", "--data.path", data, "--data.answer_prefix", "It is red and"]
    for found in read(small_run(*options, "--data.fields", fields)):
        assert found["references"] == (["red"] if gold.get("gold") else [])
        if gold.get("gold"):
            assert found["scores"]["contained"] == 1
        else:
            assert not {"accuracy", "contained", "exact_match", "f1"} & set(found["scores"])
    assert "zero-shot" in capsys.readouterr().out


@pytest.mark.parametrize("gold", ["", [""], " "])
def test_an_empty_answer_is_not_scored(small: list[str], tmp_path: Path, gold) -> None:
    data = write(tmp_path / "mine.json", [QA[0] | {"answers": gold}])
    options = ["--data.task", "qa", "--data.path", str(data), "--run_dir", str(tmp_path / "run")]
    assert main(["fit-predict", *small, *options]) == 0
    records = read(tmp_path / "run")
    assert len(records) == len(METHODS)
    for record in records:
        assert record["references"] == []
        assert not {"accuracy", "contained", "exact_match", "f1"} & set(record["scores"])


@pytest.mark.parametrize("task", ["nqswap", "hotpotqa", "memotrap"])
def test_real_data_files(small_run, shared: Path, task: str) -> None:
    options = ["--data.task", task, "--data.path", shared / "data" / f"{task}.json", "--data.limit", "2"]
    assert len(answers(small_run(*options))) == 2 * len(METHODS)


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


def test_blank_lines_crlf_and_a_bom_are_no_fault(small_run, tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in QA]
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    options = ["--data.task", "qa", "--data.path", "mine.jsonl", "--model.methods", "[zero-shot]"]
    assert len(answers(small_run(*options))) == len(QA)


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
    refused_small, tmp_path: Path, task: str, bad: dict, parts: tuple[str, ...]
) -> None:
    good = TASKS[task][0][0]
    write(tmp_path / "mine.jsonl", [good, bad, good])
    line = refused_small("--data.task", task, "--data.path", "mine.jsonl")
    assert [part for part in ("mine.jsonl", "line 2", *parts) if part not in line] == []


def test_a_malformed_record_of_a_json_list_is_found_too(refused_small, tmp_path: Path) -> None:
    lines = ",\n".join(json.dumps(record) for record in (NQ[0], without(NQ[1], "input"), NQ[2]))
    (tmp_path / "mine.json").write_text(f"[\n{lines}\n]\n")
    line = refused_small("--data.path", "mine.json")
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
    refused_small, tmp_path: Path, name: str, content: bytes, parts: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    line = refused_small("--data.task", "qa", "--data.path", name)
    assert [part for part in parts if part not in line] == []
