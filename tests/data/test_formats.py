"""What data files may hold, as a run of the command reads them, and how a malformed one is refused."""

import json

import pytest
from runs import METHODS, QA, TASKS, answers, read, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_takes_a_prefix(small_run, tmp_path, task):
    records, references = TASKS[task]
    data = write(tmp_path / "data.json", records)
    prefix = f"The answer is: {references[0][0]}, as"
    options = ["--data.task", task, "--data.path", data, "--model.methods", "[zero-shot]"]
    found = read(small_run(*options, "--data.answer_prefix", prefix))
    assert [r["references"] for r in found] == references
    assert all(r["prediction"].startswith(prefix) for r in found)
    assert found[0]["scores"]["contained"] == 1
    bare = read(small_run(*options, "--data.answer_prefix", "", run_dir="bare"))
    assert bare[0]["scores"]["contained"] == 0
    assert found[0]["n_prompt_tokens"] == bare[0]["n_prompt_tokens"] + len(prefix.encode())


def test_prefix_is_scored_in_accuracy_and_format(small_run):
    given = ["--data.answer_prefix", "The answer is: Rome.\n\n", "--model.methods", "[zero-shot]"]
    first, second, *_ = (record["scores"] for record in read(small_run(*given)))
    assert (first["format_failure"], first["accuracy"], second["accuracy"]) == (0, 1, 0)


@pytest.mark.parametrize("gold", [{"gold": ["red"]}, {}])
def test_qa_with_the_users_own_field_names(small_run, tmp_path, capsys, gold):
    record = {"passage": "The cat is red.", "q": "What colour?", "extra": 1} | gold
    data = write(tmp_path / "mine.jsonl", [record, record])
    fields = "{context: passage, question: q, answers: gold}"
    options = ["--data.task", "qa", "--data.path", data, "--data.answer_prefix", "It is red and"]
    for found in read(small_run(*options, "--data.fields", fields)):
        assert found["references"] == gold.get("gold", [])
        if gold:
            assert found["scores"]["contained"] == 1
        else:
            assert not {"accuracy", "contained", "exact_match", "f1"} & set(found["scores"])
    assert "zero-shot" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["nqswap", "hotpotqa", "memotrap"])
def test_real_data_files(small_run, shared, task):
    options = ["--data.task", task, "--data.path", shared / "data" / f"{task}.json", "--data.limit", "2"]
    assert len(answers(small_run(*options))) == 2 * len(METHODS)


def test_blank_lines_crlf_and_a_bom_are_no_fault(small_run, tmp_path):
    lines = [json.dumps(record) for record in QA]
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    options = ["--data.task", "qa", "--data.path", "mine.jsonl", "--model.methods", "[zero-shot]"]
    assert len(answers(small_run(*options))) == len(QA)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        (
            "a.jsonl",
            '{"context": "a", "question": "b"}\n{"context": "a"}\n',
            ("line 2", "'question' is missing"),
        ),
        ("a.json", '[\n{"context": "a", "question": "b"},\n{"context": "a"}\n]', ("line 3", "'question' is")),
        ("a.json", '[\n{"context": "a", "question": "b"},\n{"context": "a" "question": "b"}]', ("line 3",)),
        ("a.json", "", ("no records",)),
        ("a.jsonl", '{"context": "\udce9t\udce9", "question": "b"}\n', ("UTF-8",)),
    ],
)
def test_a_broken_file_is_refused(refused_small, tmp_path, name, text, parts):
    (tmp_path / name).write_text(text, errors="surrogateescape")
    line = refused_small("--data.task", "qa", "--data.path", name)
    assert [part for part in (name, *parts) if part not in line] == []
