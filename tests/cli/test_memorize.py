"""`fastmem memorize`: a text becomes a memory file."""

import io
import re
import signal
import sys
from collections.abc import Iterator
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


def test_memorize_keeps_what_memorizer_makes(notes, tiny_folder, monkeypatch, backbone, memory):
    monkeypatch.chdir(notes.parent)
    options = [
        "--steps=4",
        "--learning_rate=0.02",
        "--form",
        "float32",
        "--device=cpu",
        "--model",
        str(tiny_folder),
    ]
    assert main(["memorize", *options, "notes.txt"]) == 0
    assert sorted(p.name for p in notes.parent.iterdir()) == ["notes.fastmem", "notes.txt"]
    found = Memory.load(notes.with_suffix(".fastmem"), backbone)
    assert len(found) == 1
    assert_deltas(found, memory)
    assert found.curve == memory.curve


def test_memorize_says_what_it_did(fastmem, notes, memory):
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


def test_where_the_file_goes(fastmem, notes, tmp_path):
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


def test_memorize_reads_stdin(fastmem, refused_command, tmp_path, monkeypatch, backbone):
    monkeypatch.setattr(sys, "stdin", stdin(b"\xff\xfe\x00x"))
    assert "UTF-8" in refused_command("memorize", "-")
    text = "First line.\nSecond «line», with\ttabs.\n\n  Indented.\n"
    monkeypatch.setattr(sys, "stdin", stdin(text.encode()))
    fastmem("memorize", "-", form="float32")
    found = Memory.load(tmp_path / "memory.fastmem")
    assert found.texts == [text]
    assert_deltas(found, Memorizer(backbone, **STRONG)([text]), 1e-6)


def test_several_files_make_one_memory(fastmem, notes, tmp_path, backbone):
    (tmp_path / "other.txt").write_text(OTHER)
    out = fastmem("memorize", notes, "other.txt", form="float32").out
    assert re.search(r"\b2 windows\b", out)
    found = Memory.load(tmp_path / "notes.fastmem", backbone)
    assert_deltas(found, memorize_document(Memorizer(backbone, **STRONG), [TEXT, OTHER]))
    assert not (tmp_path / "other.fastmem").exists()
    # Both are shown to the model.
    shown = fastmem("ask", "notes.fastmem", QUESTIONS[0], max_new_tokens=12).out
    both = f"{TEXT}\n\n{OTHER}"
    assert shown == answer(backbone, QUESTIONS[0], both, found, max_new_tokens=12)[0] + "\n"


def test_a_file_without_text_is_refused(refused_command, notes, tmp_path):
    contents = {"empty": b"", "blank": b" \n\t\r\n ", "latin": b"caf\xe9 au lait"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    words = {"empty": "empty", "blank": "empty", "latin": "UTF-8", "gone": "No such"}
    for name, wanted in (words | {"folder": "folder|directory"}).items():
        for others in ([], [notes]):
            assert re.search(rf"(?=.*\b{name}\b).*({wanted})", refused_command("memorize", *others, name))


def test_an_existing_file_is_kept_unless_forced(fastmem, refused_command, notes, tmp_path, backbone):
    path = tmp_path / "notes.fastmem"
    path.write_text("precious")
    line = refused_command("memorize", notes)
    assert [word for word in ("notes.fastmem", "exists", "--force") if word not in line] == []
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
def test_memorize_refuses_what_it_cannot_do(refused_command, notes, options, words):
    (notes.parent / "sub").mkdir()
    assert re.search(words, refused_command("memorize", notes, **options))


@pytest.mark.parametrize(
    "options",
    [
        *({"kl_coeff": 5.0}, {"weight_decay": 4.0}, {"num_layers": 2}, {"kl_target": 0.01}, {"steps": 2}),
        {"max_grad_norm": 0.01, "weight_decay": 0.0},
    ],
    ids=str,
)
def test_settings_of_memorizing_take_effect(fastmem, notes, backbone, memory, options):
    fastmem("memorize", notes, form="float32", **options)
    found = Memory.load("notes.fastmem", backbone)
    assert_deltas(found, Memorizer(backbone, **{**STRONG, **options})(TEXT), 1e-6)
    if "num_layers" not in options:
        # Adam takes out the gradient's size, so a clipped step is nearly the same step.
        changed = max((found.deltas[0][n] - memory.deltas[0][n]).abs().max() for n in memory.deltas[0])
        assert changed > 1e-7


def test_a_config_of_ones_own_applies(fastmem, notes, tmp_path, backbone):
    (tmp_path / "mine.yaml").write_text("model: {memorize: {steps: 3, learning_rate: 0.03, kl_coeff: 0.7}}")
    fastmem("memorize", notes, config="base,mine.yaml", steps=None, learning_rate=None, form="float32")
    expected = Memorizer(backbone, steps=3, learning_rate=0.03, kl_coeff=0.7)(TEXT)
    assert_deltas(Memory.load("notes.fastmem", backbone), expected, 1e-6)
    fastmem("memorize", notes, steps=None, learning_rate=None, out="base.fastmem")
    settings = Memory.load("base.fastmem").settings
    assert (settings["steps"], settings["learning_rate"], settings["kl_coeff"]) == (10, 1e-5, 0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_memorize_and_ask_in_bfloat16(fastmem, notes, precision, memory):
    fastmem("memorize", notes, precision=precision, form="float32")
    found = Memory.load("notes.fastmem")
    assert found.curve.cross_entropy[0] == pytest.approx(memory.curve.cross_entropy[0], rel=0.02)
    assert found.curve.cross_entropy[-1] < found.curve.cross_entropy[0] - 1
    out = fastmem("ask", "notes.fastmem", QUESTIONS[0], precision=precision, max_new_tokens=4).out
    assert out.endswith("\n")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_the_steps_taken(fastmem, notes, tmp_path, monkeypatch, backbone):
    step = MemorizationModule.configure_gradient_clipping
    calls = []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(MemorizationModule, "configure_gradient_clipping", interrupted)
    said = fastmem("memorize", notes, steps=500, form="float32", expect=130)
    monkeypatch.undo()
    assert "Traceback" not in said.err
    assert "notes.fastmem" in said.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.fastmem", "notes.txt"]
    # The update in progress is finished.
    found = Memory.load(tmp_path / "notes.fastmem", backbone)
    assert len(calls) == len(found.curve.cross_entropy) == found.settings["steps"] == 3
    assert_deltas(found, Memorizer(backbone, steps=3, learning_rate=2e-2)(TEXT), 1e-5)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_before_a_step_leaves_nothing(fastmem, notes, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    fastmem("memorize", notes, expect=130)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("windows", [None, "sequential", "joint"])
def test_a_loss_that_is_no_number_leaves_nothing(refused_command, notes, windows):
    options = {"learning_rate": 1e38, "windows": windows, "window": windows and 40}
    assert "finite" in refused_command("memorize", notes, **options)


@pytest.mark.parametrize("policy", ["joint", "sequential", "cut"])
def test_the_command_takes_the_policy(fastmem, tmp_path, backbone, policy):
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


@pytest.mark.demo
def test_demo_is_the_model_of_memorize_and_ask(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Backbone, "load", lambda source, *_, **__: demo if source == "demo" else None)
    text = "The museum of Lindt was founded by Ada Birch in 1741."
    Path("notes.txt").write_text(text)
    assert main(["memorize", "notes.txt", "--device", "cpu", "--form", "float32"]) == 0
    loaded = Memory.load("notes.fastmem", demo)
    assert (loaded.settings["steps"], loaded.settings["learning_rate"]) == (10, 3e-4)
    capsys.readouterr()
    assert main(["ask", "notes.fastmem", "Who founded it?", "--device", "cpu", "--max-new-tokens", "6"]) == 0
    (expected,) = answer(demo, "Who founded it?", text, loaded, max_new_tokens=6)
    assert capsys.readouterr().out == expected + "\n"
