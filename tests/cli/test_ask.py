"""Files of questions for `fastmem ask`."""

import json

import pytest

from fastmem_pl import FastMemError
from fastmem_pl.cli.ask import _read_questions

QUESTION = "which\u2028color\x85has\x0bthe\x1cdoor?"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_question_ends_at_the_newline_only(tmp_path, end):
    path = tmp_path / "questions.txt"
    lines = [QUESTION, json.dumps({"question": QUESTION}, ensure_ascii=False), "", "last?"]
    path.write_bytes(end.join(lines).encode())
    assert _read_questions(str(path)) == [QUESTION, QUESTION, "last?"]


def test_half_of_a_character_is_named(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "fine?"}\n{"question": "which \\ud83d?"}\n')
    message = r"questions\.jsonl, line 2: field 'question' holds half of a character \(\\ud83d"
    with pytest.raises(FastMemError, match=message):
        _read_questions(str(path))
