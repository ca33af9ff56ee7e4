"""Reading data files: every task's format, and messages that name file, line and field."""

import json
import os

import pytest
from runs import SUMMARIES, write

from fastmem_pl import FastMemDataModule, FastMemError
from fastmem_pl.data import TASKS, read_samples

SWAP = {"input": "who", "context": "It was A.", "answer": "A", "sub_context": "It was B.", "sub_answer": "B"}
TRAP = {
    "prompt": 'Write a quote that ends in the word "early": Better late than: ever or',
    "classes": "[' never.', ' early!']",
    "answer_index": 1,
}
HOTPOT = {
    "id": "h1",
    "question": "Who was it?!",
    "answer": "B",
    "context": {"title": ["t", "u"], "sentences": [["One.", " Two."], ["Three."]]},
}


@pytest.mark.parametrize(
    ("task", "record", "context", "question", "references", "originals"),
    [
        ("nqswap", SWAP, "It was B.", "who?", ("B",), ("A",)),
        ("nq", SWAP, "It was A.", "who?", ("A",), ()),
        ("memotrap", TRAP, 'Write a quote that ends in the word "early".',
         'Better late than: ever or\nCandidates: "never" or "early"', ("early",), ("never",)),
        ("hotpotqa", HOTPOT, "One.  Two.\nThree.", "Who was it?", ("B",), ()),
        ("qa", {"context": "c", "question": "q", "answers": ["a", "b"]}, "c", "q", ("a", "b"), ()),
        ("qa", {"context": "c", "question": "q", "answer": "a"}, "c", "q", ("a",), ()),
        ("qa", {"context": "c", "question": "q", "answers": {"text": ["a"]}}, "c", "q", ("a",), ()),
        *(
            ("qa", {"context": "c", "question": "q", **gold}, "c", "q", (), ())
            for gold in ({}, {"answers": None}, {"answers": []}, {"answers": ""}, {"answers": [""]}, {"answer": " "})
        ),
        ("mixed", {"task": "nqswap", **SWAP}, "It was B.", "who?", ("B",), ("A",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_tasks(tmp_path, suffix, task, record, context, question, references, originals):
    (sample,) = read_samples(write(tmp_path / f"data{suffix}", [record]), task)
    assert (sample.context, sample.question) == (context, question)
    assert (sample.references, sample.originals) == (references, originals)
    assert sample.id == record.get("id", "0")


@pytest.mark.parametrize(
    ("task", "records", "message"),
    [
        ("nqswap", [SWAP, {**SWAP, "sub_context": " "}], r"line 2: field 'sub_context' is empty"),
        ("nqswap", [{**SWAP, "input": 3}], r"line 1: field 'input' must be text, found int"),
        ("nqswap", [SWAP, {"input": "q", "answer": "a", "sub_answer": "b", "sub_contxt": "c"}],
         r"line 2: field 'sub_context' is missing; found: .*sub_contxt; did you mean 'sub_contxt'\?"),
        ("qa", [{"context": "c", "question": ""}], r"line 1: field 'question' is empty"),
        ("qa", [{"context": "c", "question": "q", "answers": 4}], r"line 1: field 'answers' must be text or a list"),
        ("qa", [{"context": "c", "question": "q", "answers": [4]}], r"line 1: field 'answers' must be .*list \[4\]"),
        ("qa", [{"context": "\t", "question": "q"}], r"line 1: field 'context' is empty"),
        ("qa", [{"context": "c", "qestion": "q"}], r"line 1: field 'question' is missing; .* mean 'qestion'\?"),
        ("nq", [{**SWAP, "answer": None}], r"line 1: field 'answer' must be text, found NoneType"),
        ("nq", [{**SWAP, "context": ""}], r"line 1: field 'context' is empty"),
        ("qa", ["text"], r"line 1: expected an object with named fields, found str"),
        ("memotrap", [{**TRAP, "prompt": "no colon"}], r"line 1: field 'prompt' has no ':'"),
        ("memotrap", [{**TRAP, "classes": "[oops"}], r"line 1: field 'classes' must be a list of two endings, found str"),
        ("memotrap", [{**TRAP, "classes": "-" * 100_000 + "1"}], r"line 1: field 'classes' must be a list of two"),
        ("memotrap", [{**TRAP, "answer_index": 1.0}], r"line 1: field 'answer_index' must be 0 or 1, found float"),
        ("memotrap", [{**TRAP, "answer_index": 4}], r"line 1: field 'answer_index' must be 0 or 1, found int 4"),
        ("hotpotqa", [{**HOTPOT, "context": "text"}], r"line 1: field 'context' must hold 'sentences'"),
        ("hotpotqa", [{**HOTPOT, "context": {"title": ["t"]}}], r"line 1: field 'context' must hold 'sentences'"),
        ("hotpotqa", [{**HOTPOT, "context": {"sentences": []}}], r"line 1: the context is empty"),
        ("hotpotqa", [{**HOTPOT, "context": {"sentences": [[" "]]}}], r"line 1: the context is empty"),
        ("hotpotqa", [{**HOTPOT, "question": " "}], r"line 1: field 'question' is empty"),
        ("cnndm", [SUMMARIES[0], {"article": ""}], r"line 2: field 'article' is empty"),
        ("cnndm", [{"article": 3}], r"line 1: field 'article' must be text, found int"),
        ("cnndm", [{"articel": "x"}], r"line 1: field 'article' is missing"),
        ("cnndm", [{"article": "x", "summary": 3}], r"line 1: field 'summary' must be text, found int"),
        ("mixed", [{**SWAP, "task": "nqswop"}], r"line 1: data\.task: 'nqswop' is unknown; .* 'nqswap'"),
    ],
)  # fmt: skip
def test_malformed_records(tmp_path, task, records, message):
    path = write(tmp_path / "data.jsonl", records)
    with pytest.raises(FastMemError, match=r"data\.jsonl, " + message):
        read_samples(path, task)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("task", "record", "field"),
    [
        ("nqswap", SWAP, "input"),
        ("nqswap", SWAP, "sub_context"),
        ("nqswap", SWAP, "sub_answer"),
        ("memotrap", TRAP, "classes"),
        ("hotpotqa", HOTPOT, "context"),
        ("hotpotqa", HOTPOT, "id"),
        ("qa", {"context": "c", "question": "q", "answers": {"text": ["a"]}}, "answers"),
        ("mixed", {"task": "nqswap", **SWAP}, "task"),
    ],
)
def test_halves_of_characters_are_named(tmp_path, suffix, task, record, field):
    first = json.dumps(record)
    value = json.dumps(record[field])
    # The last text of the field's value gets half of an emoji at its end.
    place = value.rindex('"')
    broken = first.replace(f'"{field}": {value}', f'"{field}": {value[:place]}\\ud83d{value[place:]}')
    path = tmp_path / f"data{suffix}"
    path.write_text(f"[{first},\n{broken}]" if suffix == ".json" else f"{first}\n{broken}\n")
    message = rf"data\{suffix}, line 2: field '{field}' holds half of a character \(\\ud83d, a lone surrogate"
    with pytest.raises(FastMemError, match=message):
        read_samples(path, task)


def test_halves_that_belong_together_and_fields_that_nothing_reads_are_no_fault(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(r'{"context": "c\ud83d\ude00", "question": "q", "note": "\ud83d"}')
    (sample,) = read_samples(path, "qa")
    assert sample.context == "c😀"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"context": "c",\n "question": }', r"line 1: not valid JSON: .* \(found on line 2\)"),
        ('[{"context": "c", "question": "q"},', r"line 1: the list does not end with '\]'"),
        ('{"passage": "c", "question": "q"}', r"'context' is missing; .* other names: --data\.fields"),
        ('[{"context": "c", "question": "q"}', r"line 1: expected ',' or '\]' after a record"),
        ('[{"context": "c", "question": "q"}\n{"context": "c"}]', r"line 2: expected ',' or"),
        ('[{"context": "c", "question": "q"}]\n{"x": 1}', r"line 2: there is more after the list's '\]'"),
        ('[\n{"context": "c", "question": "q"},\n{"question": "q"}]', r"line 3: field 'context' is missing"),
        ('{"context": "c", "question": "q"}\n{"context": "c", "quest\n', r"line 2: not valid JSON"),
        ('{"context": "\udce9"}', "is not UTF-8 text"),
        ("[" * 100_000, r"line 1: not valid JSON: maximum recursion depth"),
        ('{"context": "c", "question": "q", "id": ' + "9" * 5000 + "}", r"line 1: not valid JSON: .*digits"),
        ('{"context": "c", "question": "q", "id": {"a": 1}}', r"line 1: field 'id' must be text or a number"),
        ("3", r"line 1: expected an object with named fields, found int"),
        ("", "holds no records"),
        ("[]", "holds no records"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text, errors="surrogateescape")
    with pytest.raises(FastMemError, match=message):
        read_samples(tmp_path / "data.json", "qa")


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "nqswap.json", [SWAP])
    with pytest.raises(
        FastMemError,
        match=r"data\.path: cannot read .*No such file or directory; give .*did you mean 'nqswap\.json'\?",
    ):
        read_samples(tmp_path / "nqswop.json", "nqswap")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe.json", "it is a pipe or a device; give a file"),
        ("loop.json", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte"),
        ("folder", "Is a directory"),
    ],
)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, name, message):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FastMemError, match=message) as refused:
        read_samples(tmp_path / name, "qa")
    # A name is no near match of itself.
    assert f"did you mean '{name}'" not in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_or_folder_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "shut").mkdir()
    path = write(tmp_path / "shut" / "data.json", [SWAP])
    for shut in (path, path.parent):
        shut.chmod(0)
        with pytest.raises(FastMemError, match=r"data\.json: Permission denied"):
            read_samples(path, "nqswap")
        shut.chmod(0o700)


@pytest.mark.parametrize(
    ("task", "usual", "renamed"),
    [
        (
            "qa",
            {"context": "c", "question": "q", "answers": "a", "id": "k7"},
            {"context": "passage", "question": "q", "answers": "gold", "id": "key"},
        ),
        ("summary", SUMMARIES[0], {"article": "text", "summary": "gold"}),
    ],
)
def test_own_field_names(tmp_path, task, usual, renamed):
    own = {renamed[name]: value for name, value in usual.items()} | {"extra": "?"}
    found = read_samples(write(tmp_path / "own.jsonl", [own]), task, renamed)
    assert found == read_samples(write(tmp_path / "usual.jsonl", [usual]), task)
    assert found[0].references


def test_limit_does_not_read_further(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(SWAP) + "\n{broken")
    assert len(read_samples(path, "nqswap", limit=1)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, r"data\.limit: 0 is out of range"),
        ({"batch_size": 0}, r"data\.batch_size: 0 is out of range"),
        ({"max_batch_tokens": 0}, r"data\.max_batch_tokens: 0 is out of range"),
        ({"task": "nqswap", "fields": {"context": "c"}}, "only tasks qa and summary take names"),
        ({"task": "qa", "fields": {"contxt": "c"}}, "data.fields: 'contxt' is unknown; .* 'context'"),
    ],
)
def test_datamodule_arguments(arguments, message):
    with pytest.raises(FastMemError, match=message):
        FastMemDataModule(**arguments)


def test_packaged_demo_data():
    data = FastMemDataModule()
    data.setup()
    tasks = [sample.task for sample in data.samples]
    assert tasks.count("nqswap") >= 40
    assert tasks.count("memotrap") >= 10
    for sample in data.samples:
        if sample.task == "nqswap":
            assert sample.references[0] in sample.context
            assert sample.originals[0].lower() not in sample.context.lower()
    assert len({sample.question for sample in data.samples}) == len(data.samples)


def test_prompt_keeps_braces_of_the_data():
    text = TASKS["qa"].prompt_text("{question} {0}", "{context}?")
    assert text.endswith("Context: {question} {0}\nQuestion: {context}?")
