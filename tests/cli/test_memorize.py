"""`fastmem memorize`: a text becomes a memory file."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from memories import OTHER, QUESTIONS, STRONG, TEXT, assert_deltas, files, prose

from fastmem_pl import (
    Backbone,
    MemorizationModule,
    Memorizer,
    Memory,
    WindowSettings,
    answer,
    memorize_document,
)
from fastmem_pl.cli import main
from fastmem_pl.memory import read_header

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rate", ["--learning_rate", "--learning-rate"])
def test_memorize_keeps_what_memorizer_makes(
    notes: Path, tiny_folder: Path, monkeypatch, backbone: Backbone, memory: Memory, rate: str
) -> None:
    monkeypatch.chdir(notes.parent)
    options = ["--steps=4", f"{rate}=0.02", "--form", "float32", "--device=cpu", "--model", str(tiny_folder)]
    assert main(["memorize", *options, "notes.txt"]) == 0
    assert sorted(p.name for p in notes.parent.iterdir()) == ["notes.fastmem", "notes.txt"]
    found = Memory.load(notes.with_suffix(".fastmem"), backbone)
    assert len(found) == 1
    assert_deltas(found, memory)
    assert found.curve == memory.curve


def test_memorize_says_what_it_did(fastmem, notes: Path, memory: Memory) -> None:
    for form, least, most in (("bfloat16", 1e-4, 4e-3), ("int8", 1e-4, 2e-2)):
        out = fastmem("memorize", notes, form=form, out=f"{form}.fastmem").out
        size = Path(f"{form}.fastmem").stat().st_size
        for pattern in (
            rf"\b{form}\.fastmem\b",
            rf"\b({size:,}|{size})\b",
            rf"\b({len(TEXT.encode())}|{len(TEXT.encode()) + 1}) tokens",
            r"\b4 (steps|updates)\b",
            rf"{memory.curve.cross_entropy[0]:.2f}\d* *(->|→|to) *\d+\.\d+",
            r"KL",
            r"\d (s|seconds)\b",
        ):
            assert re.search(pattern, out, re.IGNORECASE), (pattern, out)
        # The stated loss is the loss.
        found = Memory.load(f"{form}.fastmem").deltas[0]
        lost = sum((found[n].float() - d).square().sum() for n, d in memory.deltas[0].items())
        error = (lost / sum(d.square().sum() for d in memory.deltas[0].values())).sqrt().item()
        assert least < error < most
        stated = re.search(r"([\d.]+)% \(relative error", out)
        assert float(stated[1]) / 100 == pytest.approx(error, rel=0.1)
    assert "relative error" not in fastmem("memorize", notes, form="float32").out
    assert fastmem("memorize", notes, quiet=True, out="quiet.fastmem").out == ""
    assert read_header("quiet.fastmem")["form"] == "bfloat16"


def test_where_the_file_goes(fastmem, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "my.notes.txt").write_text(TEXT)
    fastmem("memorize", notes, out="sub/other.name")
    # By default beside the user, not beside the text.
    fastmem("memorize", "sub/my.notes.txt")
    assert sorted(files(tmp_path)) == [
        "my.notes.fastmem", "notes.txt", "sub", "sub/my.notes.txt", "sub/other.name"
    ]  # fmt: skip


def stdin(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), "utf-8")


def test_memorize_reads_stdin(fastmem, refused_command, tmp_path: Path, monkeypatch, memory: Memory) -> None:
    monkeypatch.setattr(sys, "stdin", stdin(b"\xff\xfe\x00x"))
    assert "UTF-8" in refused_command("memorize", "-")
    monkeypatch.setattr(sys, "stdin", stdin(TEXT.encode()))
    fastmem("memorize", "-", form="float32")
    assert_deltas(Memory.load(tmp_path / "memory.fastmem"), memory)


def test_several_files_make_one_memory(fastmem, notes: Path, tmp_path: Path, backbone: Backbone) -> None:
    (tmp_path / "other.txt").write_text(OTHER)
    out = fastmem("memorize", notes, "other.txt", form="float32").out
    assert re.search(r"\b2 windows\b", out)
    found = Memory.load(tmp_path / "notes.fastmem", backbone)
    assert_deltas(found, memorize_document(Memorizer(backbone, **STRONG), [TEXT, OTHER]))
    assert not (tmp_path / "other.fastmem").exists()


def test_lines_of_a_text_stay_as_they_are(fastmem, tmp_path: Path, backbone: Backbone) -> None:
    text = "First line.\nSecond «line», with\ttabs.\n\n  Indented.\n"
    (tmp_path / "lines.txt").write_text(text, "utf-8")
    fastmem("memorize", "lines.txt", form="float32")
    found = Memory.load(tmp_path / "lines.fastmem")
    assert_deltas(found, Memorizer(backbone, **STRONG)([text]), 1e-6)
    assert found.texts == [text]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b" \n\t\r\n ", "empty"),
        (b"caf\xe9 au lait", "UTF-8"),
        (None, "no such file"),
        ("folder", "folder|directory"),
    ],
    ids=["empty", "blank", "latin-1", "missing", "folder"],
)
def test_a_file_without_text_is_refused(
    refused_command, notes: Path, tmp_path: Path, content, words: str
) -> None:
    path = tmp_path / "bad.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for others in ([], [notes]):
        line = refused_command("memorize", *others, path)
        assert "bad.txt" in line
        assert re.search(words, line, re.IGNORECASE), line


def test_an_existing_file_is_kept_unless_forced(
    fastmem, refused_command, notes: Path, tmp_path: Path, backbone: Backbone
) -> None:
    path = tmp_path / "notes.fastmem"
    path.write_text("precious")
    line = refused_command("memorize", notes)
    assert "exists" in line
    assert "--force" in line
    assert "notes.fastmem" in line
    (tmp_path / "blank.txt").write_text(" ")
    refused_command("memorize", "blank.txt", out=path, force=True)
    assert path.read_text() == "precious"
    fastmem("memorize", notes, force=True)
    assert len(Memory.load(path, backbone)) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"steps": value}, "steps") for value in (-1, "many")),
        *(({"learning_rate": value}, r"learning.rate") for value in (0, "nan")),
        *(({"num_layers": value}, r"num.layers") for value in (4, 0)),
        *(({"window": value}, "window") for value in (0, -5, 4000, 2**40)),
        ({"kl_coeff": -0.1}, r"kl.coeff"),
        ({"max_grad_norm": 0}, r"max.grad.norm"),
        ({"window": 40, "overlap": 40}, "overlap"),
        ({"overlap": -1}, "overlap"),
        ({"num_layers": 2, "window": 40}, "sequential"),
        ({"windows": "some"}, "(?=.*joint)(?=.*sequential)(?=.*cut)"),
        ({"form": "float64"}, "float32.*bfloat16.*int8"),
        ({"precision": "16-mixed"}, "16-mixed"),
        ({"device": "tpu"}, "tpu"),
        ({"config": "nothing-of-the-kind"}, "nothing-of-the-kind"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"out": "no/such/folder/x.fastmem"}, "no/such/folder"),
        ({"out": "."}, r"exists|folder|directory"),
        *(({"out": value, "force": True}, r"folder|directory") for value in (".", "sub")),
        ({"learnin_rate": 0.1}, r"learnin.rate.*learning.rate"),
        ({"step": 3}, r"--step\b.*--steps"),
        ({"window_": 3}, "window"),
    ],
    ids=str,
)
def test_memorize_refuses_what_it_cannot_do(refused_command, notes: Path, options: dict, words: str) -> None:
    (notes.parent / "sub").mkdir()
    assert re.search(words, refused_command("memorize", notes, **options))


def test_memorize_needs_a_file(refused_command) -> None:
    assert "FILE" in refused_command("memorize").upper()


@pytest.mark.parametrize(
    "options",
    [
        {"kl_coeff": 5.0},
        {"weight_decay": 4.0},
        {"num_layers": 2},
        {"max_grad_norm": 0.01, "weight_decay": 0.0},
        {"kl_target": 0.01},
        {"steps": 2},
    ],
    ids=str,
)
def test_settings_of_memorizing_take_effect(
    fastmem, notes: Path, backbone: Backbone, memory: Memory, options: dict
) -> None:
    fastmem("memorize", notes, form="float32", **options)
    found = Memory.load("notes.fastmem", backbone)
    assert_deltas(found, Memorizer(backbone, **{**STRONG, **options})(TEXT), 1e-6)
    if "num_layers" not in options:
        # Adam takes out the gradient's size, so a clipped step is nearly the same step.
        changed = max((found.deltas[0][n] - memory.deltas[0][n]).abs().max() for n in memory.deltas[0])
        assert changed > 1e-7


def test_a_config_of_ones_own_applies(fastmem, notes: Path, tmp_path: Path, backbone: Backbone) -> None:
    (tmp_path / "mine.yaml").write_text("model: {memorize: {steps: 3, learning_rate: 0.03, kl_coeff: 0.7}}")
    fastmem("memorize", notes, config="base,mine.yaml", steps=None, learning_rate=None, form="float32")
    expected = Memorizer(backbone, steps=3, learning_rate=0.03, kl_coeff=0.7)(TEXT)
    assert_deltas(Memory.load("notes.fastmem", backbone), expected, 1e-6)


def test_the_base_config_is_that_of_other_models(fastmem, notes: Path) -> None:
    fastmem("memorize", notes, steps=None, learning_rate=None)
    settings = Memory.load("notes.fastmem").settings
    assert (settings["steps"], settings["learning_rate"], settings["kl_coeff"]) == (10, 1e-5, 0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_memorize_and_ask_in_bfloat16(fastmem, notes: Path, precision: str, memory: Memory) -> None:
    fastmem("memorize", notes, precision=precision, form="float32")
    found = Memory.load("notes.fastmem")
    assert found.curve.cross_entropy[0] == pytest.approx(memory.curve.cross_entropy[0], rel=0.02)
    assert found.curve.cross_entropy[-1] < found.curve.cross_entropy[0] - 1
    out = fastmem("ask", "notes.fastmem", QUESTIONS[0], precision=precision, max_new_tokens=4).out
    assert out.endswith("\n")


def test_ctrl_c_keeps_the_steps_taken(fastmem, notes: Path, tmp_path: Path, monkeypatch, backbone) -> None:
    step = MemorizationModule.configure_gradient_clipping
    calls = []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(MemorizationModule, "configure_gradient_clipping", interrupted)
    fastmem("memorize", notes, steps=500, form="float32", expect=130)
    monkeypatch.undo()
    assert len(calls) < 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.fastmem", "notes.txt"]
    found = Memory.load(tmp_path / "notes.fastmem", backbone)
    taken = len(found.curve.cross_entropy)
    assert 1 <= taken <= 4
    closest = min(
        float((found.deltas[0]["down"] - expected.deltas[0]["down"]).norm())
        for steps in range(max(taken - 1, 1), taken + 2)
        for expected in [Memorizer(backbone, steps=steps, learning_rate=2e-2)(TEXT)]
    )
    assert closest < 1e-5


def test_ctrl_c_before_a_step_leaves_nothing(fastmem, notes: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Backbone, "load", interrupted)
    fastmem("memorize", notes, expect=130)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


SAY_STEPS = """
import sys
from fastmem_pl import MemorizationModule
from fastmem_pl.cli import main

step = MemorizationModule.configure_gradient_clipping

def told(*arguments):
    print("a step", flush=True)
    return step(*arguments)

MemorizationModule.configure_gradient_clipping = told
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_of_a_process(notes: Path, tiny_folder: Path, backbone) -> None:
    options = ["--model", tiny_folder, "--device", "cpu", "--steps", 10**6]
    process = subprocess.Popen(
        [sys.executable, "-c", SAY_STEPS, "memorize", "notes.txt", *map(str, options)],
        cwd=notes.parent,
        # Unread lines stay in the pipe, to be counted.
        bufsize=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        # The second begins when the first is done: before that there is nothing to keep.
        for _ in range(2):
            while b"a step" not in (line := process.stdout.readline()):
                assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert sorted(p.name for p in notes.parent.iterdir()) == ["notes.fastmem", "notes.txt"]
    taken = len(Memory.load(notes.with_suffix(".fastmem"), backbone).curve.cross_entropy)
    assert 1 <= taken <= out.count(b"a step") + 2
    assert b"notes.fastmem" in out + err


@pytest.mark.parametrize("windows", [None, "sequential", "joint"])
def test_a_loss_that_is_no_number_leaves_nothing(refused_command, notes: Path, windows) -> None:
    assert "finite" in refused_command(
        "memorize", notes, learning_rate=1e38, windows=windows, window=windows and 40
    )


@pytest.mark.parametrize("policy", ["joint", "sequential", "cut"])
def test_the_command_takes_the_policy(fastmem, tmp_path: Path, backbone, policy: str) -> None:
    text = prose(200)
    (tmp_path / "long.txt").write_text(text)
    overlap = None if policy == "cut" else 10
    said = fastmem("memorize", "long.txt", windows=policy, window=64, overlap=overlap, form="float32")
    expected = memorize_document(Memorizer(backbone, **STRONG), text, WindowSettings(policy, 64, 10))
    assert_deltas(Memory.load("long.fastmem"), expected)
    if policy == "cut":
        assert "136 tokens" in said.out + said.err, "nothing says what was left out"
    else:
        assert re.search(rf"\b4 windows\b.*{policy}", said.out)


def test_windows_default_to_the_context_limit(fastmem, tmp_path: Path, backbone) -> None:
    memorizer = Memorizer(backbone, steps=1, learning_rate=1e-2)
    limit = memorizer.context_limit
    text = prose(limit + 300)
    (tmp_path / "long.txt").write_text(text)
    out = fastmem("memorize", "long.txt", steps=1, learning_rate=1e-2).out
    assert re.search(r"\b2 windows\b", out)
    assert f"{len(text)}" in out.replace(",", "")
    given = memorize_document(memorizer, text, WindowSettings("joint", limit, limit // 8))
    assert Memory.load("long.fastmem").curve.cross_entropy == pytest.approx(
        given.curve.cross_entropy, rel=1e-5
    )


def test_no_text_leaves_no_text(fastmem, notes: Path) -> None:
    for name, text in (("with.fastmem", TEXT), ("without.fastmem", None)):
        fastmem("memorize", notes, out=name, no_text=not text or None)
        assert (b"The tower stands" in Path(name).read_bytes()) == bool(text)
        assert Memory.load(name).texts == [text]
    assert_deltas(Memory.load("without.fastmem"), Memory.load("with.fastmem"))


@pytest.mark.demo
def test_demo_is_the_model_of_memorize_and_ask(demo: Backbone, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = "The museum of Lindt was founded by Ada Birch in 1741."
    Path("notes.txt").write_text(text)
    assert main(["memorize", "notes.txt", "--device", "cpu", "--form", "float32"]) == 0
    loaded = Memory.load("notes.fastmem", demo)
    assert (loaded.settings["steps"], loaded.settings["learning_rate"]) == (10, 3e-4)
    capsys.readouterr()
    options = ["--device", "cpu", "--max-new-tokens", "8"]
    assert main(["ask", "notes.fastmem", "Who founded the museum?", *options]) == 0
    prefixes = ("The answer is:", "")
    asked = [
        answer(demo, "Who founded the museum?", text, loaded, max_new_tokens=8, answer_prefix=prefix)
        for prefix in prefixes
    ]
    assert capsys.readouterr().out in [found + "\n" for (found,) in asked]
