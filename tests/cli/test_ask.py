"""`fastmem ask`: questions to a memory file."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from memories import QUESTIONS, TEXT, prose

from fastmem_pl import Memory, answer
from fastmem_pl.cli import main
from fastmem_pl.decoding.conversation import Conversation

pytestmark = pytest.mark.usefixtures("one_thread")


def expected_answers(backbone, kept: Path, questions, **options: Any) -> list[str]:
    """What ``answer`` says with what the options of the command mean."""
    settings = {"max_new_tokens": 12, **options}
    settings |= {"dola_layers": "high"} if options.get("decoder") == "dola" else {}
    settings.pop("with_context", None)
    context = None if settings.pop("without_context", False) else TEXT
    memory = None if settings.pop("no_memory", False) else Memory.load(kept)
    settings |= {"stop": tuple(settings["stop"])} if "stop" in settings else {}
    return answer(backbone, questions, context, memory, **settings)


MODES: list[dict[str, Any]] = [
    {},
    {"with_context": True},
    {"without_context": True},
    {"no_memory": True},
    {"no_memory": True, "without_context": True},
    {"decoder": "cd"},
    {"decoder": "cd", "without_context": True},
    {"decoder": "cd", "alpha": 2.5},
    {"decoder": "cad"},
    {"decoder": "dola"},
    {"decoder": "dola", "no_memory": True},
    {"temperature": 1.5, "seed": 3, "top_p": 0.9, "top_k": 40},
    {"repetition_penalty": 1.8},
    {"answer_prefix": "The answer is:"},
    {"stop": ["o", "z"]},
    {"max_new_tokens": 1},
]


@pytest.fixture(scope="module")
def answers_by_mode(kept: Path, backbone) -> list[list[str]]:
    return [expected_answers(backbone, kept, QUESTIONS[:2], **options) for options in MODES]


@pytest.mark.parametrize("mode", range(len(MODES)), ids=[str(mode) for mode in MODES])
def test_ask_is_answer(fastmem, kept, answers_by_mode, mode):
    options = {"max_new_tokens": 12, **MODES[mode]}
    out = fastmem("ask", kept, *QUESTIONS[:2], json=True, **options).out
    stated = {"decoder": options.get("decoder", "greedy"), "context": "without_context" not in options}
    stated |= {"memory": "no_memory" not in options}
    answers = zip(QUESTIONS[:2], answers_by_mode[mode], strict=True)
    expected = [{"question": question, "answer": text, **stated} for question, text in answers]
    assert [json.loads(line) for line in out.splitlines()] == expected


def test_modes_differ_so_that_the_others_can_fail(kept, backbone):
    found = [tuple(expected_answers(backbone, kept, QUESTIONS, **options)) for options in MODES[2:13]]
    assert len(set(found)) == len(found), found


def test_questions_are_told_apart(fastmem, kept, tmp_path, answers_by_mode):
    answers = list(zip(QUESTIONS[:2], answers_by_mode[0], strict=True))
    assert fastmem("ask", kept, QUESTIONS[0], max_new_tokens=12).out == f"{answers[0][1]}\n"
    shown = "".join(f"Q: {question}\n{text}\n\n" for question, text in answers)
    assert fastmem("ask", kept, *QUESTIONS[:2], max_new_tokens=12).out == shown
    (tmp_path / "two.txt").write_text("\n".join(QUESTIONS[:2]))
    assert fastmem("ask", kept, questions="two.txt", max_new_tokens=12).out == shown


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_of_questions_is_answered_in_batches(fastmem, kept, backbone, tmp_path, monkeypatch, end):
    # On a CPU they go one by one where a text is shown.
    monkeypatch.setattr(Conversation, "reads_once", False)
    questions = [f"What is {i}{' and why' * (i % 4)}?" for i in range(19)]
    # Only a newline ends one.
    questions.append("which\u2028color\x85has\x0bthe\x1cdoor?")
    expected = expected_answers(backbone, kept, questions, max_new_tokens=6)
    assert len(set(expected)) > 10
    answers = list(zip(questions, expected, strict=True))
    objects = [json.dumps({"question": q, "id": 3}, ensure_ascii=False) for q in questions]
    lines = {"txt": questions, "jsonl": [*objects[:12], *questions[12:]]}
    for kind, own in lines.items():
        path = tmp_path / f"questions.{kind}"
        path.write_bytes(end.join(["", *own[:7], "  ", "", *own[7:], end]).encode())
    rows = fastmem("ask", kept, questions="questions.jsonl", json=True, max_new_tokens=6).out.split("\n")[:-1]
    stated = {"decoder": "greedy", "context": True, "memory": True}
    assert [json.loads(row) for row in rows] == [{"question": q, "answer": a, **stated} for q, a in answers]
    out = fastmem("ask", kept, questions="questions.txt", max_new_tokens=6).out
    assert out == "".join(f"Q: {question}\n{text}\n\n" for question, text in answers)


def test_questions_come_from_stdin(fastmem, kept, backbone, monkeypatch):
    lines = f"{QUESTIONS[0]}\n\n  \n{QUESTIONS[1]}\r\n{QUESTIONS[2]}".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    rows = fastmem("ask", kept, json=True, max_new_tokens=12).out.splitlines()
    found = [(row["question"], row["answer"]) for row in map(json.loads, rows)]
    expected = expected_answers(backbone, kept, QUESTIONS)
    assert found == list(zip(QUESTIONS, expected, strict=True))


def test_tokens_come_as_they_are_made(kept, backbone, tiny_folder, monkeypatch):
    class Recorder(io.StringIO):
        states: list[str]

        def flush(self) -> None:
            self.states.append(self.getvalue())

    recorder = Recorder()
    recorder.states = []
    monkeypatch.setattr(sys, "stdout", recorder)
    options = ["--model", str(tiny_folder), "--max-new-tokens", "12", "--device", "cpu"]
    assert main(["ask", str(kept), QUESTIONS[0], *options]) == 0
    monkeypatch.undo()
    (expected,) = expected_answers(backbone, kept, QUESTIONS[0])
    assert recorder.getvalue() == expected + "\n"
    states = {state for state in recorder.states if state and len(state) < len(expected)}
    # Several tokens may make one letter here, but not all of them.
    assert len(states) >= 3
    assert all(expected.startswith(state) for state in states)


def test_a_sample_is_drawn_by_its_seed(fastmem, kept):
    def ask(seed: int) -> str:
        return fastmem("ask", kept, QUESTIONS[0], temperature=2.0, seed=seed, max_new_tokens=12).out

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 2


def test_without_its_text_a_memory_is_asked_alone(fastmem, refused_command, notes, backbone):
    fastmem("memorize", notes, no_text=True, form="float32")
    (row,) = fastmem("ask", "notes.fastmem", QUESTIONS[0], json=True, max_new_tokens=12).out.splitlines()
    (expected,) = answer(backbone, QUESTIONS[0], None, Memory.load("notes.fastmem"), max_new_tokens=12)
    assert json.loads(row)["answer"] == expected
    assert json.loads(row)["context"] is False
    assert "text" in refused_command("ask", "notes.fastmem", "Who?", with_context=True)
    assert "cad" in refused_command("ask", "notes.fastmem", "Who?", decoder="cad")


def test_a_text_that_does_not_fit_is_not_shown(fastmem, tmp_path, backbone):
    (tmp_path / "long.txt").write_text(prose(2300))
    fastmem("memorize", "long.txt", window=500, steps=1, form="float32")
    long_file = "long.fastmem"
    (row,) = fastmem("ask", long_file, QUESTIONS[0], json=True, max_new_tokens=12).out.splitlines()
    (expected,) = answer(backbone, QUESTIONS[0], None, Memory.load(long_file), max_new_tokens=12)
    assert (json.loads(row)["answer"], json.loads(row)["context"]) == (expected, False)
    # Its beginning is on demand, cut by more where question and answer take more.
    cut = []
    for question, most in (("Who?", 4), (QUESTIONS[0], 60)):
        said = fastmem("ask", long_file, question, with_context=True, json=True, max_new_tokens=most)
        assert json.loads(said.out)["context"] is True
        cut.append(int(re.search(r"last (\d+) tokens", said.err)[1]))
    assert cut[1] == cut[0] + 60 - 4 + len(QUESTIONS[0]) - len("Who?")


def test_ctrl_c_ends_an_answer(fastmem, kept, monkeypatch):
    class Interrupting(io.StringIO):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1
            if self.flushes == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Interrupting())
    assert "Traceback" not in fastmem("ask", kept, QUESTIONS[0], max_new_tokens=12, expect=130).err


def test_memories_of_a_run_are_asked_and_shipped(fastmem, tiny_folder, tmp_path, backbone):
    (tmp_path / "data.json").write_text(json.dumps([{"context": TEXT, "question": QUESTIONS[0]}]))
    options = ["--config", "base,qa", "--run_dir", "run", "--data.path", "data.json"]
    options += ["--model.backbone.source", str(tiny_folder), "--trainer.accelerator", "cpu"]
    options += ["--model.memorize.steps", "4", "--model.memorize.learning_rate", "0.02"]
    assert main(["fit", *options]) == 0
    (path,) = Path("run/memories").iterdir()
    out = fastmem("ask", path, QUESTIONS[0], max_new_tokens=12, without_context=True).out
    (expected,) = answer(backbone, QUESTIONS[0], None, Memory.load(path, backbone), max_new_tokens=12)
    assert out == expected + "\n"
    (tmp_path / "text.txt").write_text(TEXT)
    fastmem("export", path, to="lora", out="lora", context="text.txt")
    assert json.loads(Path("lora/export.json").read_text())["kl"] <= 0.01


@pytest.mark.parametrize(
    ("questions", "options", "words"),
    [
        *[
            (["Who?"], options, words)
            for options, words in (
                ({"with_context": True, "without_context": True}, "without.context"),
                ({"decoder": "beam"}, "(?=.*greedy)(?=.*cd)(?=.*cad)(?=.*dola)"),
                ({"decoder": "cd", "no_memory": True}, "cd"),
                ({"decoder": "cad", "without_context": True}, "cad"),
                ({"max_new_tokens": 0}, r"max.new.tokens"),
                ({"max_new_tokens": 4000}, "4,?000|2,?048"),
                ({"temperature": -1}, "temperature"),
                ({"temperature": 1, "top_p": 0}, r"top.p"),
                *(({"alpha": alpha}, "alpha") for alpha in ("nan", -1)),
                ({"repetition_penalty": 0}, r"repetition.penalty"),
                ({"max_new_token": 3}, r"max.new.token.*max.new.tokens"),
                ({"question": "x"}, "questions"),
                ({"config": "demo,nothing"}, "nothing"),
                ({"temprature": 1}, "temperature"),
            )
        ],
        *[
            ([], {"questions": name}, words)
            for name, words in (
                ("missing.txt", "missing.txt"),
                (".", "folder|directory"),
                ("empty.txt", "empty.txt"),
                ("latin.txt", "latin.txt.*UTF-8"),
                ("broken.jsonl", "broken.jsonl.*(line )?2"),
                ("nothing.jsonl", "nothing.jsonl.*question"),
                ("number.jsonl", "number.jsonl.*(line )?1"),
                ("deep.jsonl", "deep.jsonl, line 1: .*recursion"),
                ("half.jsonl", r"half\.jsonl, line 2: field 'question' holds half of a character \(\\ud83d"),
            )
        ],
        *(([*before, blank], {}, "question") for before, blank in (([], ""), (["Who?"], " \n"))),
        (["y" * 3000], {"without_context": True}, "2,?048|tokens"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_ask_refuses_what_it_cannot_answer(refused_command, kept, tmp_path, questions, options, words):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9?\n")
    (tmp_path / "broken.jsonl").write_text('{"question": "Who?"}\n{"question": \n')
    (tmp_path / "nothing.jsonl").write_text('{"text": "Who?"}\n')
    (tmp_path / "number.jsonl").write_text('{"question": 3}\n')
    (tmp_path / "deep.jsonl").write_text('{"question": ' + "[" * 100_000)
    (tmp_path / "half.jsonl").write_text('{"question": "fine?"}\n{"question": "which \\ud83d?"}\n')
    line = refused_command("ask", kept, *questions, **{"max_new_tokens": 4, **options})
    assert re.search(words, line, re.IGNORECASE), line


def test_an_empty_answer_is_explained(fastmem, kept, monkeypatch):
    monkeypatch.setattr(Conversation, "stream", lambda self, question: iter(["", " "]))
    assert "the answer is empty" in fastmem("ask", kept, QUESTIONS[0]).err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_prompted(kept, backbone, tiny_folder, monkeypatch, capsys):
    expected = expected_answers(backbone, kept, QUESTIONS[:2], max_new_tokens=6)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join([*QUESTIONS[:2], "", "not asked?"])))
    monkeypatch.setattr(sys, "stdout", screen)
    options = ["--model", str(tiny_folder), "--max-new-tokens", "6", "--device", "cpu"]
    assert main(["ask", str(kept), *options]) == 0
    monkeypatch.undo()
    # A terminal gets no control characters, which a random model says.
    shown = ["".join(c if c.isprintable() else "\ufffd" for c in text) for text in expected]
    assert screen.getvalue() == f"> {shown[0]}\n> {shown[1]}\n> "
    assert "an empty line or Ctrl-D ends" in capsys.readouterr().err
