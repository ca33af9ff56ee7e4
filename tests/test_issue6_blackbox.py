"""Black-box checks of memories that are kept, asked and shipped, and of what notebooks do with them."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import pickle
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, make_model, make_tokenizer, snapshot
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_issue_blackbox import FASTMEM, files
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from fastmem_pl import (
    Backbone,
    FastMemError,
    MemorizationModule,
    MemorizationSettings,
    Memorizer,
    Memory,
    WindowSettings,
    answer,
    generator,
)
from fastmem_pl.backbone.families import find_anatomy
from fastmem_pl.cli import main
from fastmem_pl.export import to_checkpoint, to_lora

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = (
    "The tower stands in Rome. Zoë built it by the river in one winter, and nobody finds it strange at all."
)
OTHER = "Water boils at ninety degrees in this story; the people of the hills cross them to reach the market."
QUESTIONS = ["Where is the tower?", "Who built it?", "When?"]
STRONG: dict[str, Any] = {"steps": 4, "learning_rate": 2e-2}
SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}
# Trained weights of the tiny model: three matrices of 32 x 64 in a block.
WEIGHTS = 3 * 32 * 64


class Ran(NamedTuple):
    status: int
    out: str
    err: str


def arguments(command: str, positional: tuple[object, ...], options: dict[str, object]) -> list[str]:
    """A command line; an option of several values is repeated, ``True`` is a switch, ``None`` left out."""
    parts = [command, *map(str, positional)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                parts += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
    return parts


@pytest.fixture
def fastmem(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> Callable[..., Ran]:
    """Run a command on the tiny model in `tmp_path`; by default it must succeed."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *positional: object, expect: int | None = 0, **options: object) -> Ran:
        defaults = {"model": tiny_folder, "device": "cpu"}
        if command == "memorize":
            defaults |= STRONG
        capsys.readouterr()
        status = main(arguments(command, positional, {**defaults, **options}))
        ran = Ran(status, *capsys.readouterr())
        assert expect is None or status == expect, f"exit status {status}: {ran.err}"
        return ran

    return call


@pytest.fixture
def refused(fastmem, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused in one line, with nothing written; gives the line."""

    def call(command: str, *positional: object, **options: object) -> str:
        before = files(tmp_path)
        status, out, err = fastmem(command, *positional, expect=None, **options)
        assert status == 2, f"exit status {status}: {out}{err}"
        assert out == ""
        *said, line = err.splitlines()
        assert line.startswith("fastmem: error: "), err
        assert all(note.startswith("fastmem: ") for note in said), f"not one line: {err!r}"
        assert err.endswith("\n")
        assert files(tmp_path) == before, "something was written"
        return line

    return call


@pytest.fixture(scope="module")
def backbone(one_thread, tiny_folder: Path) -> Backbone:
    """The tiny model as the command loads it; not to be written to."""
    return Backbone.load(str(tiny_folder))


@pytest.fixture(scope="module")
def stranger(one_thread, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model with other weights."""
    folder = tmp_path_factory.mktemp("stranger")
    make_model(seed=7).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def memory(backbone: Backbone) -> Memory:
    """TEXT, memorized in this process."""
    return Memorizer(backbone, **STRONG).memorize_document(TEXT)


@pytest.fixture(scope="module")
def batch(backbone: Backbone) -> Memory:
    """Three memories that differ."""
    return Memorizer(backbone, **STRONG)([TEXT, OTHER, "Bob. Bob. Bob."])


@pytest.fixture(scope="module")
def kept(memory: Memory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TEXT's memory as an exact file; not to be written to."""
    path = tmp_path_factory.mktemp("kept") / "notes.fastmem"
    memory.save(path)
    return path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text(TEXT, "utf-8")
    return path


def prose(length: int, seed: int = 0) -> str:
    """Text of so many tokens (a byte each), which repeats nothing for long."""
    numbers = torch.randint(0, 27, (length,), generator=torch.Generator().manual_seed(seed))
    return "A" + "".join("abcdefghijklmnopqrstuvwxyz "[i] for i in numbers[2:]) + "."


class Window(NamedTuple):
    ids: list[int]
    first: int  # the first token that counts


def windows_of(memorizer: Memorizer, texts: list[str], size: int, overlap: int) -> list[Window]:
    found = []
    for text in texts:
        whole = memorizer.encode(text)
        begin, end = whole.header_length, whole.header_length + whole.context_tokens
        head, body, tail = whole.input_ids[:begin], whole.input_ids[begin:end], whole.input_ids[end:]
        for start in itertools.count(0, size - overlap):
            last = start + size >= len(body)
            piece = body[start : start + size]
            ids = head + piece + (tail if last else [])
            found.append(Window(ids, len(head) + (overlap if start else 0)))
            if last:
                break
    return found


@torch.no_grad()
def token_losses(model: Any, window: Window) -> torch.Tensor:
    """Cross-entropy of each token that counts, by plain transformers."""
    logits = model(input_ids=torch.tensor([window.ids])).logits[0, window.first - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(window.ids[window.first :]), reduction="none")


@torch.no_grad()
def logits_of(model: Any, *texts: str, tokenizer: Any = None) -> torch.Tensor:
    tokenizer = tokenizer or make_tokenizer()
    rows = [tokenizer(text).input_ids for text in texts]
    assert len({len(row) for row in rows}) == 1
    return model(input_ids=torch.tensor(rows)).logits


@torch.no_grad()
def merged(backbone: Backbone, memory: Memory, row: int = 0) -> Any:
    """A copy of the model whose weights hold one memory."""
    model = copy.deepcopy(backbone.model)
    anatomy, first = find_anatomy(model), backbone.num_blocks - memory.num_layers
    for layer, deltas in enumerate(memory.deltas):
        for name, projection in anatomy.projections(first + layer).items():
            projection.weight.add_(deltas[name][row])
    return model


def generated(model: Any, prompts: list[list[int]], pad: int = 256, **settings: Any) -> list[list[int]]:
    """New tokens of transformers' own generate, for prompts of any length."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # Random models tend to end at once, which would compare nothing.
    settings = {"max_new_tokens": 10, "do_sample": False, **settings}
    found = model.generate(input_ids=ids, attention_mask=mask, **settings)
    return [row[width:].tolist() for row in found]


def cut_at_end(rows: list[list[int]], ends: set[int]) -> list[list[int]]:
    """Rows up to their end token, which is kept; the filling after it is not."""
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def assert_deltas(one: Memory, other: Memory, tolerance: float = 0.0) -> None:
    assert len(one.deltas) == len(other.deltas)
    for ours, theirs in zip(one.deltas, other.deltas, strict=True):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            found = ours[name].float()
            assert found.shape == expected.shape, name
            assert expected.any(), "a memory of nothing proves nothing"
            error = (found - expected.float()).norm() / expected.float().norm()
            assert error <= tolerance, (name, float(error))


# --- fastmem memorize


def test_memorize_keeps_what_memorizer_makes(
    fastmem, notes: Path, backbone: Backbone, memory: Memory
) -> None:
    fastmem("memorize", notes, form="float32")
    assert sorted(p.name for p in notes.parent.iterdir()) == ["notes.fastmem", "notes.txt"]
    found = Memory.load(notes.with_suffix(".fastmem"), backbone)
    assert len(found) == 1
    assert_deltas(found, memory)
    assert found.curve == memory.curve
    assert_deltas(memory, Memorizer(backbone, **STRONG)(TEXT), 1e-6)


def test_memorize_says_what_it_did(fastmem, notes: Path, memory: Memory) -> None:
    out = fastmem("memorize", notes).out
    size = notes.with_suffix(".fastmem").stat().st_size
    tokens = len(TEXT.encode())
    assert "notes.fastmem" in out
    for pattern in (
        rf"\b({size:,}|{size}|{size / 1000:.1f}|{size / 1024:.1f})\b",
        rf"\b({tokens}|{tokens + 1}) tokens",
        r"\b4 (steps|updates)\b",
        rf"{memory.curve.cross_entropy[0]:.2f}\d* *(->|→|to) *\d+\.\d+",
        r"KL",
        r"\d (s|seconds)\b",
        r"\d.*relative error",
    ):
        assert re.search(pattern, out, re.IGNORECASE), (pattern, out)


def test_memorize_names_no_loss_where_there_is_none(fastmem, notes: Path) -> None:
    assert "relative error" not in fastmem("memorize", notes, form="float32").out


def test_quiet_says_nothing(fastmem, notes: Path) -> None:
    assert fastmem("memorize", notes, quiet=True).out == ""
    assert notes.with_suffix(".fastmem").stat().st_size > 0


def test_memorize_writes_where_it_is_told(fastmem, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    fastmem("memorize", notes, out="sub/other.name")
    assert sorted(files(tmp_path)) == ["notes.txt", "sub", "sub/other.name"]


def test_default_name_stands_in_the_current_folder(fastmem, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "my.notes.txt").write_text(TEXT)
    fastmem("memorize", "sub/my.notes.txt")
    assert (tmp_path / "my.notes.fastmem").is_file()


def test_memorize_reads_stdin(fastmem, tmp_path: Path, monkeypatch, memory: Memory) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode()), "utf-8"))
    fastmem("memorize", "-", form="float32")
    assert_deltas(Memory.load(tmp_path / "memory.fastmem"), memory)


def test_stdin_that_is_no_text_is_refused(refused, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00x"), "utf-8"))
    assert "UTF-8" in refused("memorize", "-")


def test_several_files_make_one_memory(fastmem, notes: Path, tmp_path: Path, backbone: Backbone) -> None:
    (tmp_path / "other.txt").write_text(OTHER)
    out = fastmem("memorize", notes, "other.txt", form="float32").out
    assert re.search(r"\b2 windows\b", out)
    found = Memory.load(tmp_path / "notes.fastmem", backbone)
    assert_deltas(found, Memorizer(backbone, **STRONG).memorize_document([TEXT, OTHER]))
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
def test_a_file_without_text_is_refused(refused, notes: Path, tmp_path: Path, content, words: str) -> None:
    path = tmp_path / "bad.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for others in ([], [notes]):
        line = refused("memorize", *others, path)
        assert "bad.txt" in line
        assert re.search(words, line, re.IGNORECASE), line


def test_an_existing_file_is_kept_unless_forced(
    fastmem, refused, notes: Path, tmp_path: Path, backbone: Backbone
) -> None:
    path = tmp_path / "notes.fastmem"
    path.write_text("precious")
    line = refused("memorize", notes)
    assert "exists" in line
    assert "--force" in line
    assert "notes.fastmem" in line
    (tmp_path / "blank.txt").write_text(" ")
    refused("memorize", "blank.txt", out=path, force=True)
    assert path.read_text() == "precious"
    fastmem("memorize", notes, force=True)
    assert len(Memory.load(path, backbone)) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"learning_rate": 0}, r"learning.rate"),
        ({"learning_rate": "nan"}, r"learning.rate"),
        ({"kl_coeff": -0.1}, r"kl.coeff"),
        ({"num_layers": 4}, r"num.layers"),
        ({"num_layers": 0}, r"num.layers"),
        ({"max_grad_norm": 0}, r"max.grad.norm"),
        ({"window": 0}, "window"),
        ({"window": -5}, "window"),
        ({"window": 40, "overlap": 40}, "overlap"),
        ({"overlap": -1}, "overlap"),
        ({"windows": "some"}, "(?=.*joint)(?=.*sequential)(?=.*cut)"),
        ({"form": "float64"}, "float32.*bfloat16.*int8"),
        ({"precision": "16-mixed"}, "16-mixed"),
        ({"device": "tpu"}, "tpu"),
        ({"config": "nothing-of-the-kind"}, "nothing-of-the-kind"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"out": "no/such/folder/x.fastmem"}, "no/such/folder"),
        ({"out": "."}, r"exists|folder|directory"),
        ({"out": ".", "force": True}, r"folder|directory"),
        ({"out": "sub", "force": True}, r"(?i)folder|directory"),
        ({"learnin_rate": 0.1}, r"learnin.rate.*learning.rate"),
        ({"step": 3}, r"--step\b.*--steps"),
        ({"window_": 3}, "window"),
    ],
    ids=str,
)
def test_memorize_refuses_what_it_cannot_do(refused, notes: Path, options: dict, words: str) -> None:
    (notes.parent / "sub").mkdir()
    assert re.search(words, refused("memorize", notes, **options))


def test_memorize_needs_a_file(refused) -> None:
    assert "FILE" in refused("memorize").upper()


@pytest.mark.parametrize("spelling", ["--learning_rate", "--learning-rate"])
def test_dashes_and_underscores_are_one(
    notes: Path, tiny_folder: Path, monkeypatch, capsys, memory: Memory, spelling: str
) -> None:
    monkeypatch.chdir(notes.parent)
    options = ["--steps=4", f"{spelling}=0.02", "--form", "float32", "--device=cpu"]
    assert main(["memorize", *options, "--model", str(tiny_folder), "notes.txt"]) == 0
    assert_deltas(Memory.load("notes.fastmem"), memory)


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
    (tmp_path / "mine.yaml").write_text("model:\n  steps: 3\n  learning_rate: 0.03\n  kl_coeff: 0.7\n")
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
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert sorted(p.name for p in notes.parent.iterdir()) == ["notes.fastmem", "notes.txt"]
    taken = len(Memory.load(notes.with_suffix(".fastmem"), backbone).curve.cross_entropy)
    assert 1 <= taken <= out.count(b"a step") + 2
    assert b"notes.fastmem" in out + err


@pytest.mark.parametrize("windows", [None, "sequential", "joint"])
def test_a_loss_that_is_no_number_leaves_nothing(refused, notes: Path, windows) -> None:
    assert "finite" in refused("memorize", notes, learning_rate=1e38, windows=windows, window=windows and 40)


# --- windows


@pytest.mark.parametrize("policy", ["joint", "sequential", "cut"])
def test_a_text_that_fits_is_memorized_as_ever(backbone, memory, policy: str) -> None:
    memorizer = Memorizer(backbone, **STRONG)
    for size in (None, len(TEXT.encode()), 1500):
        found = memorizer.memorize_document(TEXT, WindowSettings(policy=policy, window=size))
        assert_deltas(found, memorizer([TEXT]))
        assert found.curve.cross_entropy == memory.curve.cross_entropy


@pytest.mark.parametrize(
    ("length", "size", "overlap"),
    [(200, 100, 0), (200, 100, 20), (230, 64, 63), (131, 64, 8), (129, 128, 16), (300, 50, 25), (90, 30, 1)],
)
def test_joint_counts_every_token_once(backbone, length: int, size: int, overlap: int) -> None:
    text = prose(length)
    memorizer = Memorizer(backbone, steps=1, learning_rate=1e-2)
    windows = windows_of(memorizer, [text], size, overlap)
    losses = [token_losses(backbone.model, window) for window in windows]
    found = memorizer.memorize_document(text, WindowSettings("joint", size, overlap)).curve.cross_entropy
    assert found == pytest.approx([torch.cat(losses).mean().item()], rel=1e-5)


def test_default_overlap_is_an_eighth(backbone) -> None:
    memorizer = Memorizer(backbone, steps=1, learning_rate=1e-2)
    given = memorizer.memorize_document(prose(200), WindowSettings("joint", 64, 8))
    default = memorizer.memorize_document(prose(200), WindowSettings("joint", 64))
    other = memorizer.memorize_document(prose(200), WindowSettings("joint", 64, 7))
    assert default.curve == given.curve
    assert default.curve != other.curve


def plain_loop(backbone, groups: list[list[Window]], steps: int, learning_rate: float, kl_coeff: float):
    """Updates of a copy of the model's own weights, each on all windows of a group, group after group."""
    model = copy.deepcopy(backbone.model)
    trained = list(model.model.layers[-1].mlp.parameters())
    originals = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.requires_grad_(True)

    def log_probs(model: Any, group: list[Window]) -> torch.Tensor:
        logits = [model(input_ids=torch.tensor([w.ids])).logits[0, w.first - 1 : -1] for w in group]
        return torch.cat(logits).log_softmax(-1)

    curve = []
    for group in groups:
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
        labels = torch.tensor([token for w in group for token in w.ids[w.first :]])
        with torch.no_grad():
            reference = log_probs(backbone.model, group)
        for _ in range(steps):
            log_p = log_probs(model, group)
            cross_entropy = F.nll_loss(log_p, labels)
            kl = F.kl_div(log_p, reference, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            (cross_entropy + kl_coeff * kl).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            curve.append((cross_entropy.item(), kl.item()))
    return torch.tensor(curve), [p.detach() - o for p, o in zip(trained, originals, strict=True)]


def assert_is_plain_loop(found: Memory, curve: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    ours = torch.tensor([found.curve.cross_entropy, found.curve.kl]).T
    torch.testing.assert_close(ours, curve, rtol=1e-4, atol=2e-6)
    for name, expected in zip(("gate", "up", "down"), deltas, strict=True):
        assert (found.deltas[0][name][0] - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("policy", ["joint", "sequential"])
@pytest.mark.parametrize("texts", [prose(150), [prose(90), "Bob.", prose(70, 1)]], ids=["long", "several"])
def test_policies_are_loops_over_whole_models(backbone, texts, policy: str) -> None:
    settings = {"steps": 4, "learning_rate": 5e-3, "kl_coeff": 0.3}
    memorizer = Memorizer(backbone, **settings)
    windows = windows_of(memorizer, texts if isinstance(texts, list) else [texts], 64, 16)
    assert len(windows) > 2
    groups = [windows] if policy == "joint" else [[window] for window in windows]
    found = memorizer.memorize_document(texts, WindowSettings(policy, 64, 16))
    assert_is_plain_loop(found, *plain_loop(backbone, groups, **settings))


def test_cut_is_the_beginning_of_the_text(fastmem, tmp_path: Path, backbone) -> None:
    text = prose(150)
    whole = Memorizer(backbone, **STRONG).memorize_document(text, WindowSettings("cut", 64))
    assert_deltas(whole, Memorizer(backbone, **STRONG)([text[:64]]), 1e-6)
    (tmp_path / "long.txt").write_text(text)
    said = fastmem("memorize", "long.txt", windows="cut", window=64, form="float32")
    assert_deltas(Memory.load("long.fastmem"), whole)
    assert "86 tokens" in said.out + said.err, "nothing says what was left out"


def test_sequential_goes_on_from_the_memory_so_far(backbone) -> None:
    text = prose(150)
    found = Memorizer(backbone, **STRONG).memorize_document(text, WindowSettings("sequential", 64, 16))
    curve = found.curve
    assert len(curve.cross_entropy) == 3 * STRONG["steps"]
    # KL is against the base model, from which the memory of the first window has moved away.
    assert curve.kl[0] == pytest.approx(0, abs=1e-6)
    assert curve.kl[4] > 1e-3


@pytest.mark.parametrize("policy", ["joint", "sequential", "cut"])
def test_only_cut_forgets_the_end(backbone, policy: str) -> None:
    memorizer = Memorizer(backbone, **STRONG)
    one, other = (prose(120) + end for end in ("xyz", "abc"))
    windows = WindowSettings(policy, 64, 16)
    found, changed = (memorizer.memorize_document(text, windows) for text in (one, other))
    same = torch.equal(found.deltas[0]["down"], changed.deltas[0]["down"])
    assert same == (policy == "cut")


@pytest.mark.parametrize("policy", ["joint", "sequential"])
def test_all_parts_of_a_text_become_likelier(backbone, policy: str) -> None:
    memorizer = Memorizer(backbone, **STRONG)
    text = prose(250)
    found = memorizer.memorize_document(text, WindowSettings(policy, 64, 8))
    for window in windows_of(memorizer, [text], 64, 8):
        before = token_losses(backbone.model, window).mean()
        with found.attached(backbone):
            assert token_losses(backbone.model, window).mean() < before - 0.2


@pytest.mark.parametrize("policy", ["joint", "sequential", "cut"])
def test_the_command_takes_the_policy(fastmem, tmp_path: Path, backbone, policy: str) -> None:
    text = prose(200)
    (tmp_path / "long.txt").write_text(text)
    overlap = None if policy == "cut" else 10
    out = fastmem("memorize", "long.txt", windows=policy, window=64, overlap=overlap, form="float32").out
    expected = Memorizer(backbone, **STRONG).memorize_document(text, WindowSettings(policy, 64, 10))
    assert_deltas(Memory.load("long.fastmem"), expected)
    if policy != "cut":
        assert re.search(rf"\b4 windows\b.*{policy}", out)


def test_windows_default_to_the_context_limit(fastmem, tmp_path: Path, backbone) -> None:
    memorizer = Memorizer(backbone, steps=1, learning_rate=1e-2)
    limit = memorizer.context_limit
    text = prose(limit + 300)
    (tmp_path / "long.txt").write_text(text)
    out = fastmem("memorize", "long.txt", steps=1, learning_rate=1e-2).out
    assert re.search(r"\b2 windows\b", out)
    assert f"{len(text)}" in out.replace(",", "")
    given = memorizer.memorize_document(text, WindowSettings("joint", limit, limit // 8))
    assert Memory.load("long.fastmem").curve.cross_entropy == pytest.approx(
        given.curve.cross_entropy, rel=1e-5
    )


def test_max_context_tokens_bounds_windows(backbone) -> None:
    memorizer = Memorizer(backbone, **STRONG, max_context_tokens=64)
    given = Memorizer(backbone, **STRONG).memorize_document(prose(150), WindowSettings("joint", 64, 8))
    assert_deltas(memorizer.memorize_document(prose(150)), given, 1e-5)


@pytest.mark.parametrize("size", [4000, 2**40])
def test_a_window_above_the_limit_is_refused(backbone, refused, notes: Path, size: int) -> None:
    limit = Memorizer(backbone, **STRONG).context_limit
    assert str(limit) in refused("memorize", notes, window=size).replace(",", "")


@pytest.mark.parametrize(
    ("texts", "windows"),
    [
        ("", {}),
        (" \n", {}),
        ([], {}),
        (["Bob.", " "], {}),
        ("Bob.", {"policy": "some"}),
        ("Bob.", {"window": 0}),
        ("Bob.", {"window": 8, "overlap": 8}),
        ("Bob.", {"window": 8, "overlap": -1}),
        ("Bob.", {"window": 2.5}),
        ("Bob.", {"window": float("nan")}),
    ],
    ids=str,
)
def test_a_document_that_is_none_is_refused(backbone, texts, windows: dict) -> None:
    with pytest.raises(FastMemError):
        Memorizer(backbone, **STRONG).memorize_document(texts, WindowSettings(**windows))


def test_windows_of_two_layers(backbone, refused, notes: Path) -> None:
    memorizer = Memorizer(backbone, **STRONG, num_layers=2)
    found = memorizer.memorize_document(prose(150), WindowSettings("sequential", 64, 8))
    assert found.num_layers == 2
    assert all(layer["gate"].any() for layer in found.deltas)
    first = windows_of(memorizer, [prose(150)], 64, 8)[0]
    expected = token_losses(backbone.model, first).mean().item()
    assert found.curve.cross_entropy[0] == pytest.approx(expected, rel=1e-5)
    assert "sequential" in refused("memorize", notes, num_layers=2, window=40)


# --- files


def test_forms_take_the_bytes_of_their_numbers(fastmem, notes: Path) -> None:
    sizes = {}
    for form in SIZES:
        fastmem("memorize", notes, form=form, out=f"{form}.fastmem")
        sizes[form] = Path(f"{form}.fastmem").stat().st_size
    headers = {form: sizes[form] - WEIGHTS * each for form, each in SIZES.items()}
    assert 0 < headers["float32"] < 8000
    assert headers["bfloat16"] == pytest.approx(headers["float32"], abs=300)
    # int8 needs scales beside its numbers: a float a row at most.
    assert -300 < headers["int8"] - headers["float32"] < 160 * 4 + 800
    fastmem("memorize", notes)
    assert Path("notes.fastmem").stat().st_size == pytest.approx(sizes["bfloat16"], abs=50)


@pytest.mark.parametrize(("form", "least", "most"), [("bfloat16", 1e-4, 4e-3), ("int8", 1e-4, 2e-2)])
def test_forms_lose_what_they_state(
    fastmem, notes: Path, tmp_path: Path, memory: Memory, form: str, least: float, most: float
) -> None:
    out = fastmem("memorize", notes, form=form).out
    found = Memory.load("notes.fastmem")
    total = sum((found.deltas[0][n].float() - d).square().sum() for n, d in memory.deltas[0].items())
    error = (total / sum(d.square().sum() for d in memory.deltas[0].values())).sqrt().item()
    assert least < error < most
    stated = re.search(r"([\d.]+)% \(relative error", out)
    assert stated, out
    assert float(stated[1]) / 100 == pytest.approx(error, rel=0.1)
    if form == "bfloat16":
        for name, delta in memory.deltas[0].items():
            assert torch.equal(found.deltas[0][name].float(), delta.bfloat16().float())


@pytest.mark.parametrize("form", SIZES)
@pytest.mark.parametrize("row", [0, 2])
def test_a_saved_row_comes_back(batch: Memory, backbone, tmp_path: Path, form: str, row: int) -> None:
    batch.save(tmp_path / "m", row=row, form=form)
    found = Memory.load(tmp_path / "m", backbone)
    assert_deltas(found, batch.rows([row]), {"float32": 0.0, "bfloat16": 4e-3, "int8": 2e-2}[form])
    assert found.curves == [batch.curves[row]]
    assert found.texts == [batch.texts[row]] == [[TEXT, OTHER, "Bob. Bob. Bob."][row]]
    assert found.fingerprint == batch.fingerprint == backbone.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_two_layers_come_back(backbone, tmp_path: Path) -> None:
    memory = Memorizer(backbone, **STRONG, num_layers=2)([TEXT])
    memory.save(tmp_path / "m")
    found = Memory.load(tmp_path / "m", backbone.fingerprint())
    assert found.num_layers == 2
    assert_deltas(found, memory)


def test_no_text_leaves_no_text(fastmem, notes: Path) -> None:
    fastmem("memorize", notes, out="with.fastmem")
    fastmem("memorize", notes, out="without.fastmem", no_text=True)
    assert b"The tower stands" in Path("with.fastmem").read_bytes()
    assert b"tower" not in Path("without.fastmem").read_bytes()
    assert Memory.load("with.fastmem").texts == [TEXT]
    assert Memory.load("without.fastmem").texts == [None]
    assert_deltas(Memory.load("without.fastmem"), Memory.load("with.fastmem"))


def test_an_unknown_form_or_row_is_refused(memory: Memory, tmp_path: Path) -> None:
    with pytest.raises(FastMemError, match="float64"):
        memory.save(tmp_path / "m", form="float64")
    for row in (1, -2):
        with pytest.raises((FastMemError, IndexError)):
            memory.save(tmp_path / "m", row=row)
    assert not list(tmp_path.iterdir())


def assert_file_refused(path: Path, words: str = "") -> None:
    with pytest.raises(FastMemError, match=re.escape(path.name)) as caught:
        Memory.load(path)
    assert "\n" not in str(caught.value)
    assert re.search(words, str(caught.value)), caught.value


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("form", SIZES)
def test_any_changed_byte_is_refused(memory: Memory, tmp_path: Path, form: str) -> None:
    path = tmp_path / "m.fastmem"
    memory.save(path, form=form)
    content = path.read_bytes()
    end = header_end(content)
    places = [*range(10), *range(10, end, end // 60), end - 1, end, end + 1]
    places += [*range(end, len(content), (len(content) - end) // 40), len(content) - 1]
    for place in places:
        for bit in (1, 128):
            changed = bytearray(content)
            changed[place] ^= bit
            path.write_bytes(changed)
            assert_file_refused(path)
    path.write_bytes(content)
    assert len(Memory.load(path)) == 1


def test_a_file_cut_short_or_long_is_refused(kept: Path, tmp_path: Path) -> None:
    content = kept.read_bytes()
    end = header_end(content)
    path = tmp_path / "m.fastmem"
    for length in (
        0,
        1,
        7,
        8,
        9,
        100,
        end - 1,
        end,
        end + 1,
        len(content) // 2,
        len(content) - 4,
        len(content) - 1,
    ):
        path.write_bytes(content[:length])
        assert_file_refused(path)
    for more in (b"\0", b"\0" * 64, content):
        path.write_bytes(content + more)
        assert_file_refused(path)


@pytest.mark.parametrize("command", ["ask", "lora", "checkpoint", "memory"])
def test_commands_refuse_damaged_files(refused, kept: Path, tmp_path: Path, command: str) -> None:
    content = kept.read_bytes()
    tensor, header = bytearray(content), bytearray(content)
    tensor[-50] ^= 1
    header[content.index(b"Rome")] ^= 2
    path = tmp_path / "m.fastmem"
    for damaged in (tensor, header, content[: len(content) // 2], b""):
        path.write_bytes(damaged)
        line = refused("ask", path, "Who?") if command == "ask" else refused("export", path, to=command)
        assert "m.fastmem" in line
        assert "damaged" in line


def rewritten(kept: Path, path: Path, change: Callable[[dict, dict], None]) -> None:
    """A well-formed safetensors file like the memory's, but for a change."""
    tensors = load_file(kept)
    with safe_open(kept, "pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: next(iter(tensors.values())).mul_(1.01),
        lambda tensors, _: tensors.update({"more": torch.zeros(3)}),
        lambda tensors, _: tensors.pop(next(iter(tensors))),
        lambda tensors, _: tensors.update({"renamed": tensors.pop(next(iter(tensors)))}),
        lambda tensors, _: tensors.update({k: v.half() for k, v in tensors.items()}),
        lambda tensors, _: tensors.update({k: v.T.contiguous() for k, v in tensors.items()}),
        lambda tensors, _: tensors.clear(),
        lambda _, metadata: metadata.update(text="Another text."),
        lambda _, metadata: metadata.update({k: v.replace("Rome", "Oslo") for k, v in metadata.items()}),
        lambda _, metadata: metadata.update({k: re.sub(r"\d", "3", v) for k, v in metadata.items()}),
        lambda _, metadata: metadata.update(more="x"),
        lambda _, metadata: metadata.clear(),
        lambda _, metadata: metadata.pop(
            next(k for k, v in metadata.items() if re.search("[0-9a-f]{64}", v))
        ),
    ],
)
def test_a_rewritten_file_is_refused(kept: Path, tmp_path: Path, change) -> None:
    rewritten(kept, tmp_path / "m.fastmem", change)
    assert (tmp_path / "m.fastmem").read_bytes() != kept.read_bytes()
    assert_file_refused(tmp_path / "m.fastmem")


@pytest.mark.parametrize(
    ("version", "damage"), [("0", ""), ("1", ""), ("4", ""), ("2", ""), ("2", "tensor"), ("2", "text")]
)
def test_another_version_is_refused(kept: Path, tmp_path: Path, version: str, damage: str) -> None:
    content = kept.read_bytes()
    changed = re.sub(rb'"version":"."', b'"version":"%s"' % version.encode(), content)
    if damage == "tensor":
        changed = changed[:-50] + bytes([changed[-50] ^ 64]) + changed[-49:]
    elif damage == "text":
        changed = changed.replace(b"Rome", b"Oslo")
    assert changed != content
    (tmp_path / "m.fastmem").write_bytes(changed)
    assert_file_refused(tmp_path / "m.fastmem")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch-legacy", "zip"])
def test_nothing_in_a_file_is_executed(refused, tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.fastmem"
    payload = {"down": Payload(marker)}
    pickle.loads(pickle.dumps(payload))
    assert marker.exists(), "the payload would do nothing anyway"
    marker.unlink()
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=kind == "torch")
    assert_file_refused(path)
    assert "evil.fastmem" in refused("ask", path, "Who?")
    assert "evil.fastmem" in refused("export", path, to="lora")
    assert not marker.exists()


def test_no_pickle_is_needed(fastmem, notes: Path, monkeypatch) -> None:
    def forbidden(*_, **__):
        raise AssertionError("pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    fastmem("memorize", notes)
    assert fastmem("ask", "notes.fastmem", QUESTIONS[0], max_new_tokens=3).out


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "weights", "notes"])
def test_what_is_no_memory_is_refused(
    refused, tmp_path: Path, tiny_folder: Path, notes: Path, kind: str
) -> None:
    path = notes if kind == "notes" else tmp_path / "x.fastmem"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("Just a text. " * 50)
    elif kind == "weights":
        path.write_bytes((tiny_folder / "model.safetensors").read_bytes())
    assert path.name in refused("ask", path, "Who?")
    assert path.name in refused("export", path, to="lora")


@pytest.mark.parametrize("command", ["ask", "lora", "checkpoint"])
def test_another_model_is_refused_with_both_fingerprints(
    refused, kept: Path, stranger: Path, backbone, command: str
) -> None:
    other = Backbone.load(str(stranger)).fingerprint()
    if command == "ask":
        line = refused("ask", kept, "Who?", model=stranger)
    else:
        line = refused("export", kept, to=command, model=stranger, out="exported")
    assert other != backbone.fingerprint()
    assert other in line
    assert backbone.fingerprint() in line


def test_check_names_both_models(memory: Memory, kept: Path, stranger: Path, backbone) -> None:
    other = Backbone.load(str(stranger))
    pattern = rf"{backbone.fingerprint()}.*{other.fingerprint()}"
    memory.check(backbone)
    with pytest.raises(FastMemError, match=pattern):
        memory.check(other)
    for fingerprint in (other, other.fingerprint()):
        with pytest.raises(FastMemError, match=pattern):
            Memory.load(kept, fingerprint)
    with pytest.raises(FastMemError, match=pattern):
        answer(other, "Who?", None, memory)
    with pytest.raises(FastMemError), memory.attached(other):
        pass


def test_check_looks_at_shapes(memory: Memory, backbone) -> None:
    narrow = replace(memory, deltas=[{n: d[..., :16] for n, d in memory.deltas[0].items()}])
    swapped = replace(memory, deltas=[{n: d.mT for n, d in memory.deltas[0].items()}])
    deep = replace(memory, deltas=memory.deltas * 4)
    for wrong in (narrow, swapped, deep):
        with pytest.raises(FastMemError):
            wrong.check(backbone)


def test_a_failed_save_leaves_the_old_file(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "m.fastmem"
    memory.save(path)
    before = files(tmp_path)
    with pytest.raises(FastMemError):
        memory.save(path, form="nothing")
    with pytest.raises(FastMemError):
        memory.save(tmp_path / "gone" / "m.fastmem")
    assert files(tmp_path) == before


# --- fastmem ask


def expected_answers(backbone, kept: Path, questions, context: bool, with_memory: bool = True, **settings):
    settings = {"max_new_tokens": 12, **settings}
    if settings.get("decoder") == "dola":
        settings = {"dola_layers": "high", **settings}
    memory = Memory.load(kept) if with_memory else None
    return answer(backbone, questions, TEXT if context else None, memory, **settings)


MODES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"context": True}),
    ({"with_context": True}, {"context": True}),
    ({"without_context": True}, {"context": False}),
    ({"no_memory": True}, {"context": True, "with_memory": False}),
    ({"no_memory": True, "without_context": True}, {"context": False, "with_memory": False}),
    ({"decoder": "cd"}, {"context": True, "decoder": "cd"}),
    ({"decoder": "cd", "without_context": True}, {"context": False, "decoder": "cd"}),
    ({"decoder": "cd", "alpha": 2.5}, {"context": True, "decoder": "cd", "alpha": 2.5}),
    ({"decoder": "cad"}, {"context": True, "decoder": "cad"}),
    ({"decoder": "dola"}, {"context": True, "decoder": "dola"}),
    ({"decoder": "dola", "no_memory": True}, {"context": True, "decoder": "dola", "with_memory": False}),
    (
        {"temperature": 1.5, "seed": 3, "top_p": 0.9, "top_k": 40},
        {"context": True, "temperature": 1.5, "seed": 3, "top_p": 0.9, "top_k": 40},
    ),
    ({"repetition_penalty": 1.8}, {"context": True, "repetition_penalty": 1.8}),
    ({"answer_prefix": "The answer is:"}, {"context": True, "answer_prefix": "The answer is:"}),
    ({"stop": ["o", "z"]}, {"context": True, "stop": ("o", "z")}),
    ({"max_new_tokens": 1}, {"context": True, "max_new_tokens": 1}),
]


@pytest.mark.parametrize(("options", "settings"), MODES, ids=str)
def test_ask_is_answer(fastmem, kept: Path, backbone, options: dict, settings: dict) -> None:
    options = {"max_new_tokens": 12, **options}
    for question in QUESTIONS[:2]:
        found = fastmem("ask", kept, question, **options)
        assert found.out == expected_answers(backbone, kept, question, **settings)[0] + "\n"
    rows = fastmem("ask", kept, *QUESTIONS, json=True, **options).out.splitlines()
    expected = [expected_answers(backbone, kept, question, **settings)[0] for question in QUESTIONS]
    assert [json.loads(row)["answer"] for row in rows] == expected


def test_modes_differ_so_that_the_others_can_fail(kept: Path, backbone) -> None:
    found = {}
    for options, settings in MODES[2:13]:
        found[str(options)] = tuple(expected_answers(backbone, kept, QUESTIONS, **settings))
    assert len(set(found.values())) == len(found), found


def test_several_questions_are_told_apart(fastmem, kept: Path, backbone) -> None:
    out = fastmem("ask", kept, *QUESTIONS, max_new_tokens=12).out
    expected = expected_answers(backbone, kept, QUESTIONS, context=True)
    place = 0
    for question, text in zip(QUESTIONS, expected, strict=True):
        found = out.index(f"Q: {question}\n{text}\n", place)
        assert out[place:found].strip() == ""
        place = found + len(f"Q: {question}\n{text}\n")
    assert out[place:].strip() == ""


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_of_questions_is_answered_in_batches(
    fastmem, kept: Path, backbone, tmp_path: Path, kind: str
) -> None:
    questions = [f"What is {i}{' and why' * (i % 4)}?" for i in range(20)]
    lines = questions if kind == "txt" else [json.dumps({"question": q, "id": 3}) for q in questions]
    path = tmp_path / f"questions.{kind}"
    path.write_text("\n".join(["", *lines[:7], "  ", "", *lines[7:], "\n"]), "utf-8")
    rows = fastmem("ask", kept, questions=path, json=True, max_new_tokens=12).out.splitlines()
    expected = expected_answers(backbone, kept, questions, context=True)
    assert [json.loads(row) for row in rows] == [
        {"question": question, "answer": text, "decoder": "greedy", "context": True, "memory": True}
        for question, text in zip(questions, expected, strict=True)
    ]
    assert len(set(expected)) > 10
    out = fastmem("ask", kept, questions=path, max_new_tokens=12).out
    assert [line for line in out.split("\n") if line.startswith("Q: ")] == [f"Q: {q}" for q in questions]


@pytest.mark.parametrize(
    ("options", "decoder", "context", "with_memory"),
    [
        ({"decoder": "cd", "without_context": True}, "cd", False, True),
        ({"no_memory": True}, "greedy", True, False),
        ({"decoder": "cad"}, "cad", True, True),
    ],
    ids=str,
)
def test_json_says_how_it_was_answered(
    fastmem, kept: Path, options: dict, decoder: str, context: bool, with_memory: bool
) -> None:
    (row,) = fastmem("ask", kept, "Who «is» it?", json=True, max_new_tokens=4, **options).out.splitlines()
    found = json.loads(row)
    assert found.pop("answer")
    assert found == {
        "question": "Who «is» it?",
        "decoder": decoder,
        "context": context,
        "memory": with_memory,
    }


def test_questions_come_from_stdin(fastmem, kept: Path, backbone, monkeypatch) -> None:
    lines = f"{QUESTIONS[0]}\n\n  \n{QUESTIONS[1]}\r\n{QUESTIONS[2]}".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    rows = fastmem("ask", kept, json=True, max_new_tokens=12).out.splitlines()
    found = [(row["question"], row["answer"]) for row in map(json.loads, rows)]
    expected = expected_answers(backbone, kept, QUESTIONS, context=True)
    assert found == list(zip(QUESTIONS, expected, strict=True))


def test_tokens_come_as_they_are_made(kept: Path, backbone, tiny_folder: Path, monkeypatch) -> None:
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
    (expected,) = expected_answers(backbone, kept, QUESTIONS[0], context=True)
    assert recorder.getvalue() == expected + "\n"
    states = {state for state in recorder.states if state and len(state) < len(expected)}
    # Several tokens may make one letter here, but not all of them.
    assert len(states) >= 3
    assert all(expected.startswith(state) for state in states)


def test_a_sample_is_drawn_by_its_seed(fastmem, kept: Path) -> None:
    def ask(seed: int) -> str:
        return fastmem("ask", kept, QUESTIONS[0], temperature=2.0, seed=seed, max_new_tokens=12).out

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 2


def test_without_its_text_a_memory_is_asked_alone(fastmem, refused, notes: Path, backbone) -> None:
    fastmem("memorize", notes, no_text=True, form="float32")
    (row,) = fastmem("ask", "notes.fastmem", QUESTIONS[0], json=True, max_new_tokens=12).out.splitlines()
    (expected,) = answer(backbone, QUESTIONS[0], None, Memory.load("notes.fastmem"), max_new_tokens=12)
    assert json.loads(row)["answer"] == expected
    assert json.loads(row)["context"] is False
    assert "text" in refused("ask", "notes.fastmem", "Who?", with_context=True)
    assert "cad" in refused("ask", "notes.fastmem", "Who?", decoder="cad")


def test_a_text_that_does_not_fit_is_not_shown(fastmem, refused, tmp_path: Path, backbone) -> None:
    (tmp_path / "long.txt").write_text(prose(2300))
    fastmem("memorize", "long.txt", window=500, steps=1, form="float32")
    (row,) = fastmem("ask", "long.fastmem", QUESTIONS[0], json=True, max_new_tokens=12).out.splitlines()
    (expected,) = answer(backbone, QUESTIONS[0], None, Memory.load("long.fastmem"), max_new_tokens=12)
    assert json.loads(row)["answer"] == expected
    assert json.loads(row)["context"] is False


@pytest.mark.parametrize(("question", "max_new_tokens"), [("Who?", 4), (QUESTIONS[0], 60)])
def test_the_beginning_of_such_a_text_is_shown_on_demand(
    fastmem, tmp_path: Path, question: str, max_new_tokens: int
) -> None:
    (tmp_path / "long.txt").write_text(prose(2300))
    fastmem("memorize", "long.txt", window=500, steps=1)
    said = fastmem(
        "ask", "long.fastmem", question, with_context=True, json=True, max_new_tokens=max_new_tokens
    )
    assert json.loads(said.out)["context"] is True
    assert re.search(r"last \d+ tokens", said.err)


def test_ctrl_c_ends_an_answer(kept: Path, tiny_folder: Path, monkeypatch, capsys) -> None:
    class Interrupting(io.StringIO):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1
            if self.flushes == 3:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "stdout", Interrupting())
    options = ["--model", str(tiny_folder), "--max-new-tokens", "12", "--device", "cpu"]
    status = main(["ask", str(kept), QUESTIONS[0], *options])
    monkeypatch.undo()
    assert status == 130
    assert "Traceback" not in capsys.readouterr().err


def test_memories_of_a_run_are_asked_and_shipped(
    fastmem, tiny_folder: Path, tmp_path: Path, backbone
) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"context": TEXT, "question": QUESTIONS[0]}]))
    given = {"data.path": "data.json", "model.backbone": tiny_folder, "trainer.accelerator": "cpu"}
    given |= {
        "config": "base,qa",
        "run_dir": "run",
        **{f"model.{name}": value for name, value in STRONG.items()},
    }
    assert main(["fit", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]) == 0
    (path,) = Path("run/memories").iterdir()
    out = fastmem("ask", path, QUESTIONS[0], max_new_tokens=12, without_context=True).out
    (expected,) = answer(backbone, QUESTIONS[0], None, Memory.load(path, backbone), max_new_tokens=12)
    assert out == expected + "\n"
    (tmp_path / "text.txt").write_text(TEXT)
    fastmem("export", path, to="lora", out="lora", context="text.txt")
    assert report_of(Path("lora"))["kl"] <= 0.01


def test_several_texts_are_shown_together(fastmem, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(OTHER)
    fastmem("memorize", notes, "other.txt")
    alone = fastmem("ask", "notes.fastmem", QUESTIONS[0], without_context=True, max_new_tokens=12).out
    shown = fastmem("ask", "notes.fastmem", QUESTIONS[0], with_context=True, max_new_tokens=12).out
    assert shown != alone
    assert shown == fastmem("ask", "notes.fastmem", QUESTIONS[0], max_new_tokens=12).out
    assert (
        TEXT.encode() in Path("notes.fastmem").read_bytes()
        or OTHER.encode() in Path("notes.fastmem").read_bytes()
    )


@pytest.mark.parametrize(
    ("questions", "options", "words"),
    [
        (["Who?"], {"with_context": True, "without_context": True}, "without.context"),
        (["Who?"], {"decoder": "beam"}, "(?=.*greedy)(?=.*cd)(?=.*cad)(?=.*dola)"),
        (["Who?"], {"decoder": "cd", "no_memory": True}, "cd"),
        (["Who?"], {"decoder": "cad", "without_context": True}, "cad"),
        (["Who?"], {"max_new_tokens": 0}, r"max.new.tokens"),
        (["Who?"], {"max_new_tokens": 4000}, "4,?000|2,?048"),
        (["Who?"], {"temperature": -1}, "temperature"),
        (["Who?"], {"temperature": 1, "top_p": 0}, r"top.p"),
        (["Who?"], {"alpha": "nan"}, "alpha"),
        (["Who?"], {"alpha": -1}, "alpha"),
        (["Who?"], {"repetition_penalty": 0}, r"repetition.penalty"),
        ([""], {}, "question"),
        (["Who?", " \n"], {}, "question"),
        ([], {"questions": "missing.txt"}, "missing.txt"),
        ([], {"questions": "."}, "folder|directory"),
        ([], {"questions": "empty.txt"}, "empty.txt"),
        ([], {"questions": "latin.txt"}, "latin.txt.*UTF-8"),
        ([], {"questions": "broken.jsonl"}, "broken.jsonl.*(line )?2"),
        ([], {"questions": "nothing.jsonl"}, "nothing.jsonl.*question"),
        ([], {"questions": "number.jsonl"}, "number.jsonl.*(line )?1"),
        (["Who?"], {"max_new_token": 3}, r"max.new.token.*max.new.tokens"),
        (["Who?"], {"question": "x"}, "questions"),
        (["Who?"], {"config": "demo,nothing"}, "nothing"),
        (["Who?"], {"temprature": 1}, "temperature"),
        (["y" * 3000], {"without_context": True}, "2,?048|tokens"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_ask_refuses_what_it_cannot_answer(
    refused, kept: Path, tmp_path: Path, questions: list[str], options: dict, words: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9?\n")
    (tmp_path / "broken.jsonl").write_text('{"question": "Who?"}\n{"question": \n')
    (tmp_path / "nothing.jsonl").write_text('{"text": "Who?"}\n')
    (tmp_path / "number.jsonl").write_text('{"question": 3}\n')
    line = refused("ask", kept, *questions, **{"max_new_tokens": 4, **options})
    assert re.search(words, line, re.IGNORECASE), line


def test_ask_needs_a_memory(refused) -> None:
    assert "MEMORY" in refused("ask").upper()


def test_a_terminal_is_prompted(kept: Path, backbone, tiny_folder: Path) -> None:
    expected = expected_answers(backbone, kept, QUESTIONS[:2], context=True, max_new_tokens=6)
    ours, theirs = pty.openpty()
    options = ["--model", str(tiny_folder), "--max-new-tokens", "6", "--device", "cpu"]
    process = subprocess.Popen(
        [FASTMEM, "ask", str(kept), *options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""

    def read_until(done: Callable[[], bool], seconds: float) -> None:
        nonlocal shown
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the other side is closed
                    return

    def text() -> str:
        return shown.decode("utf-8", "replace").replace("\r\n", "\n")

    try:
        read_until(lambda: (len(shown) > 0 and b"> " in shown) or b"?" in shown or b": " in shown, 60)
        assert shown, "no prompt"
        # A terminal gets no control characters, which a random model says.
        expected = ["".join(c if c.isprintable() else "\ufffd" for c in answer_) for answer_ in expected]
        for question, wanted in zip(QUESTIONS[:2], expected, strict=True):
            os.write(ours, (question + "\n").encode())
            read_until(lambda wanted=wanted: wanted in text(), 60)
            assert wanted in text()
        # One that comes while no line is being read may be lost on the way.
        for _ in range(20):
            os.write(ours, b"\x04")
            read_until(lambda: process.poll() is not None, 2)
            if process.poll() is not None:
                break
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
    assert "Traceback" not in text()


# --- fastmem export: LoRA


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text("utf-8"))


def adapted(peft, model_folder: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter).eval()


@torch.no_grad()
def context_kl(backbone, memory: Memory, logits: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """KL of the exact memory to another model in nats a token of the memorized text."""
    encoded = Memorizer(backbone).encode(TEXT)
    ids = torch.tensor([encoded.input_ids])
    with memory.attached(backbone):
        exact = backbone.model(input_ids=ids).logits[0, encoded.header_length - 1 : -1].log_softmax(-1)
    other = logits(ids)[0, encoded.header_length - 1 : -1].log_softmax(-1)
    return F.kl_div(other, exact, reduction="batchmean", log_target=True).item()


def truncated(memory: Memory, rank: int) -> list[dict[str, torch.Tensor]]:
    """Deltas of the nearest matrices of a rank."""
    layers = []
    for layer in memory.deltas:
        layers.append({})
        for name, delta in layer.items():
            u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
            layers[-1][name] = ((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]).float()
    return layers


def test_lora_loads_with_peft_and_is_the_low_rank_memory(
    fastmem, peft, kept: Path, backbone, tiny_folder: Path, memory: Memory
) -> None:
    fastmem("export", kept, to="lora", rank=5, dtype="float32", out="lora")
    fastmem("export", kept, to="memory", form="low-rank", rank=5, out="low.fastmem")
    low = Memory.load("low.fastmem", backbone)
    assert_deltas(low, replace(memory, deltas=truncated(memory, 5)), 4e-3)
    model = adapted(peft, tiny_folder, Path("lora"))
    with low.attached(backbone):
        expected = logits_of(backbone.model, TEXT)
    found = logits_of(model, TEXT)
    base = logits_of(backbone.model, TEXT)
    assert (expected - base).abs().max() > 0.5
    assert (found - expected).norm() / (expected - base).norm() < 1e-2
    with replace(memory, deltas=truncated(memory, 5)).attached(backbone):
        torch.testing.assert_close(found, logits_of(backbone.model, TEXT), rtol=1e-3, atol=1e-3)
    prompt = [backbone.chat.prompt(question) for question in QUESTIONS]
    with low.attached(backbone):
        wanted = generated(backbone.model, prompt)
    assert generated(model, prompt) == wanted
    assert generated(backbone.model, prompt) != wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_rank_is_the_memory(
    fastmem, peft, kept: Path, backbone, tiny_folder: Path, memory, dtype
) -> None:
    fastmem("export", kept, to="lora", rank=32, dtype=dtype)
    folder = kept.parent / "notes-lora"
    try:
        model = adapted(peft, tiny_folder, folder)
        report, weights = report_of(folder), load_file(folder / "adapter_model.safetensors")
    finally:
        for path in folder.glob("*"):
            path.unlink()
        folder.rmdir()
    with memory.attached(backbone):
        expected = logits_of(backbone.model, TEXT)
    change = (expected - logits_of(backbone.model, TEXT)).norm()
    assert (logits_of(model, TEXT) - expected).norm() / change < {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    assert report["rank"] == 32
    assert report["relative_error"] < {"float32": 1e-5, "bfloat16": 1e-2}[dtype]


def test_lora_report_states_what_is_true(fastmem, kept: Path, backbone, memory: Memory) -> None:
    out = fastmem("export", kept, to="lora", rank=6, dtype="float32", out="lora").out
    report = report_of(Path("lora"))
    assert sorted(p.name for p in Path("lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "export.json",
    ]
    assert (report["to"], report["rank"], report["form"]) == ("lora", 6, "float32")
    assert report["bytes"] in (
        Path("lora/adapter_model.safetensors").stat().st_size,
        sum(p.stat().st_size for p in Path("lora").iterdir() if p.name != "export.json"),
        sum(p.stat().st_size for p in Path("lora").iterdir()),
    )
    assert report["fingerprint"] == backbone.fingerprint()
    low = truncated(memory, 6)[0]
    total = sum((low[n] - d).square().sum() for n, d in memory.deltas[0].items())
    error = (total / sum(d.square().sum() for d in memory.deltas[0].values())).sqrt().item()
    assert error > 0.01
    assert report["relative_error"] == pytest.approx(error, rel=1e-3)
    held = merged(backbone, replace(memory, deltas=[low]))
    kl = context_kl(backbone, memory, lambda ids: held(input_ids=ids).logits)
    assert report["kl"] == pytest.approx(kl, rel=0.02)
    assert report["kl"] > 0
    for word in ("rank", "6", "bytes", "relative error", "KL"):
        assert word.lower() in out.lower()
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 6
    assert config["task_type"] == "CAUSAL_LM"


def test_auto_takes_the_smallest_rank_that_is_near_enough(memory: Memory, backbone, tmp_path: Path) -> None:
    by_rank = {}
    for rank in range(1, 13):
        by_rank[rank] = to_lora(
            memory, backbone, tmp_path / str(rank), rank=rank, dtype="float32", context=TEXT
        ).kl
    limit = (by_rank[8] * by_rank[9]) ** 0.5
    expected = min(rank for rank, kl in by_rank.items() if kl <= limit)
    assert 2 < expected < 12
    report = to_lora(memory, backbone, tmp_path / "auto", max_kl=limit, dtype="float32", context=TEXT)
    assert report.rank == expected
    assert report.kl <= limit
    assert report.kl == pytest.approx(by_rank[expected], rel=0.05)
    found = report_of(tmp_path / "auto")
    tried = {one["rank"]: one["kl"] for one in found["tried"]}
    assert tried[expected] <= limit
    assert tried[expected - 1] > limit
    for rank in tried.keys() & by_rank.keys():
        assert tried[rank] == pytest.approx(by_rank[rank], rel=0.05)
    assert "tried" not in report_of(tmp_path / "3") or not report_of(tmp_path / "3")["tried"]


def test_a_stricter_limit_takes_more_rank(fastmem, kept: Path) -> None:
    ranks, errors, sizes = [], [], []
    for limit in (1.0, 0.1, 0.01, 1e-4):
        fastmem("export", kept, to="lora", max_kl=limit, dtype="float32", out=f"lora{limit}")
        report = report_of(Path(f"lora{limit}"))
        assert report["kl"] <= limit
        ranks.append(report["rank"])
        errors.append(report["relative_error"])
        sizes.append(report["bytes"])
    assert ranks == sorted(ranks)
    assert ranks[-1] > ranks[0]
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    fastmem("export", kept, to="lora", dtype="float32", out="default")
    assert report_of(Path("default"))["rank"] == ranks[2]


@pytest.mark.parametrize("rank", [0, -1, 33, "some", 1.5])
def test_a_rank_out_of_range_is_refused(refused, kept: Path, rank) -> None:
    assert "rank" in refused("export", kept, to="lora", rank=rank, out="lora")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "gguf"}, "lora.*checkpoint.*memory"),
        ({"to": None}, "--to"),
        ({"to": "lora", "max_kl": 0}, r"max.kl"),
        ({"to": "lora", "max_kl": -1}, r"max.kl"),
        ({"to": "lora", "max_kl": "nan"}, r"max.kl"),
        ({"to": "lora", "dtype": "int8"}, "float32.*bfloat16"),
        ({"to": "checkpoint", "dtype": "float8"}, "float32.*bfloat16"),
        ({"to": "memory", "form": "zip"}, "low-rank"),
        ({"to": "lora", "context": "missing.txt"}, "missing.txt"),
        ({"to": "lora", "context": "other.txt"}, "other|context|text"),
        ({"to": "lora", "out": "there"}, "there.*exists|exists.*there"),
        ({"to": "checkpoint", "out": "there"}, "there.*exists|exists.*there"),
        ({"to": "memory", "form": "int8", "out": "other.txt"}, "exists.*--force"),
        ({"to": "lora", "out": "no/such/lora"}, "no/such"),
        ({"to": "lora", "ranks": 3}, "--rank"),
    ],
    ids=str,
)
def test_export_refuses_what_it_cannot_do(
    refused, kept: Path, tmp_path: Path, options: dict, words: str
) -> None:
    (tmp_path / "other.txt").write_text(OTHER)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("x")
    line = refused("export", kept, **{"out": "made", **options})
    assert re.search(words, line), line


def test_force_replaces_an_export(fastmem, refused, kept: Path) -> None:
    fastmem("export", kept, to="lora", rank=2, out="lora")
    before = report_of(Path("lora"))
    assert "--force" in refused("export", kept, to="lora", rank=3, out="lora")
    fastmem("export", kept, to="lora", rank=3, out="lora", force=True)
    assert (before["rank"], report_of(Path("lora"))["rank"]) == (2, 3)


@pytest.mark.parametrize(("to", "out"), [("lora", "model"), ("checkpoint", "mine"), ("lora", ".")])
def test_force_replaces_exports_only(
    refused, kept: Path, backbone, tiny_folder: Path, tmp_path: Path, to: str, out: str
) -> None:
    # A folder that holds a model, or whatever else, is not this command's to delete.
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused("export", kept, to=to, out=out, force=True, model=tmp_path / "model")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_memory_without_text_needs_its_context(fastmem, refused, notes: Path, tmp_path: Path, kept) -> None:
    fastmem("memorize", notes, no_text=True, form="float32")
    (tmp_path / "other.txt").write_text(OTHER)
    assert "--context" in refused("export", "notes.fastmem", to="lora", out="lora")
    refused("export", "notes.fastmem", to="lora", out="lora", context="other.txt")
    fastmem("export", "notes.fastmem", to="lora", out="lora", context=notes)
    fastmem("export", kept, to="lora", out="from-text")
    ours, theirs = report_of(Path("lora")), report_of(Path("from-text"))
    for name in ("rank", "bytes", "relative_error", "kl"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


@pytest.mark.parametrize(
    ("family", "layers"), [("gemma2", 1), ("phi3", 1), ("gpt2", 1), ("gpt_neox", 1), ("qwen2", 2)]
)
def test_lora_of_families(peft, make_tiny, tmp_path: Path, family: str, layers: int) -> None:
    backbone = make_tiny(family)
    backbone.model.save_pretrained(tmp_path / "model")
    memory = Memorizer(backbone, **STRONG, num_layers=layers)([TEXT])
    report = to_lora(memory, backbone, tmp_path / "lora", rank=32, dtype="float32", context=TEXT)
    model = adapted(peft, tmp_path / "model", tmp_path / "lora")
    with memory.attached(backbone):
        expected = logits_of(backbone.model, TEXT)
    change = (expected - logits_of(backbone.model, TEXT)).norm()
    assert change > 1
    error = (logits_of(model, TEXT) - expected).norm() / change
    assert error < 1e-3
    assert report.relative_error < 1e-4
    assert (logits_of(model.merge_and_unload(), TEXT) - expected).norm() / change < 1e-3


# --- fastmem export: checkpoint and memory


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", 1), ("llama", 2), ("gemma2", 1), ("phi3", 1), ("gpt2", 1), ("gpt_neox", 1), ("gpt2", 3)],
)
def test_checkpoint_is_the_memory_for_plain_transformers(
    make_tiny, tmp_path: Path, family: str, layers: int
) -> None:
    backbone = make_tiny(family)
    memory = Memorizer(backbone, **STRONG, num_layers=layers)([TEXT])
    before = snapshot(backbone)
    report = to_checkpoint(memory, backbone, tmp_path / "out", context=TEXT)
    assert_untouched(backbone, before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with memory.attached(backbone):
        expected = logits_of(backbone.model, TEXT)
        prompts = [backbone.chat.prompt(question) for question in QUESTIONS]
        tokens = generated(backbone.model, prompts)
    assert (expected - logits_of(backbone.model, TEXT)).abs().max() > 0.05
    torch.testing.assert_close(logits_of(model, TEXT), expected, rtol=1e-4, atol=1e-4)
    assert generated(model, prompts) == tokens
    assert tokenizer(TEXT).input_ids == backbone.tokenizer(TEXT).input_ids
    assert tokenizer.chat_template == backbone.tokenizer.chat_template
    assert model.generation_config.eos_token_id == backbone.model.generation_config.eos_token_id
    assert report.kl == pytest.approx(0, abs=1e-6)
    assert report.relative_error < 1e-4
    names = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert names.isdisjoint({".bin", ".pt", ".pth", ".pkl", ".ckpt"})


def test_checkpoint_by_the_command(fastmem, kept: Path, backbone, tiny_folder: Path, stranger: Path) -> None:
    out = fastmem("export", kept, to="checkpoint", out="made").out
    assert "made" in out
    report = report_of(Path("made"))
    assert (report["to"], report["form"]) == ("checkpoint", "float32")
    assert report["fingerprint"] == backbone.fingerprint()
    weights = sum(p.stat().st_size for p in Path("made").glob("*.safetensors"))
    assert weights == pytest.approx((tiny_folder / "model.safetensors").stat().st_size, abs=1000)
    assert report["bytes"] >= weights
    base, ours = load_file(tiny_folder / "model.safetensors"), load_file("made/model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], ours[name])}
    assert base.keys() == ours.keys()
    assert changed == {f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    # What the command's own ask says of the merged model is what it says of the memory.
    merged_out = fastmem("ask", kept, QUESTIONS[0], max_new_tokens=12).out
    other = Backbone.load("made")
    assert answer(other, QUESTIONS[0], TEXT, max_new_tokens=12)[0] + "\n" == merged_out
    with pytest.raises(FastMemError, match=other.fingerprint()):
        Memory.load(kept, other)


def test_bfloat16_checkpoint_states_its_rounding(fastmem, kept: Path, backbone, memory: Memory) -> None:
    out = fastmem("export", kept, to="checkpoint", dtype="bfloat16", out="made").out
    report = report_of(Path("made"))
    model = AutoModelForCausalLM.from_pretrained("made", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert report["form"] == "bfloat16"
    assert 0 < report["relative_error"] < 1
    assert 0 < report["kl"] < 0.5
    assert "bfloat16" in out
    # Rounding is of the sum, so that base and delta cannot be rounded one by one.
    expected = merged(backbone, memory).model.layers[2].mlp.down_proj.weight.bfloat16()
    assert torch.equal(model.model.layers[2].mlp.down_proj.weight, expected)
    delta = memory.deltas[0]["down"][0]
    lost = expected.float() - backbone.model.model.layers[2].mlp.down_proj.weight - delta
    assert report["relative_error"] == pytest.approx((lost.norm() / delta.norm()).item(), rel=0.5)


def test_checkpoint_of_a_bfloat16_model_is_bfloat16(make_tiny, tmp_path: Path) -> None:
    backbone = make_tiny(precision="bf16-true")
    memory = Memorizer(backbone, **STRONG)([TEXT])
    to_checkpoint(memory, backbone, tmp_path / "out", context=TEXT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert report_of(tmp_path / "out")["form"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "suffix"),
    [
        ({"form": "float32"}, "float32"),
        ({"form": "bfloat16"}, "bfloat16"),
        ({"form": "int8"}, "int8"),
        ({"form": "low-rank", "rank": 4}, "low-rank"),
        ({"form": "low-rank"}, "low-rank"),
    ],
    ids=str,
)
def test_a_memory_in_another_form(
    fastmem, kept: Path, tmp_path: Path, backbone, memory: Memory, options: dict, suffix: str
) -> None:
    mine = tmp_path / "notes.fastmem"
    mine.write_bytes(kept.read_bytes())
    out = fastmem("export", mine, to="memory", **options).out
    path = tmp_path / f"notes-{suffix}.fastmem"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["notes.fastmem", path.name])
    assert f"{path.stat().st_size}" in out.replace(",", "")
    assert "KL" in out
    found = Memory.load(path, backbone)
    assert found.texts == [TEXT]
    assert found.curve == memory.curve
    kept_error = {"float32": 0.0, "bfloat16": 4e-3, "int8": 2e-2, "low-rank": 0.9}[suffix]
    assert_deltas(found, memory, kept_error)
    shown = fastmem("ask", path, QUESTIONS[0], max_new_tokens=12).out
    assert shown == answer(backbone, QUESTIONS[0], TEXT, found, max_new_tokens=12)[0] + "\n"
    if "rank" in options:
        assert path.stat().st_size < kept.stat().st_size / 2
        assert all(torch.linalg.matrix_rank(d[0].float(), rtol=1e-3) == 4 for d in found.deltas[0].values())
    # A damaged one is refused, whatever its form.
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    assert_file_refused(path, "damaged")


def test_exports_stand_beside_the_memory(fastmem, kept: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "my.notes.fastmem").write_bytes(kept.read_bytes())
    fastmem("export", "sub/my.notes.fastmem", to="lora", rank=2)
    fastmem("export", "sub/my.notes.fastmem", to="checkpoint")
    assert {p.name for p in folder.iterdir()} == {"my.notes.fastmem", "my.notes-lora", "my.notes-checkpoint"}
    assert {p.name for p in tmp_path.iterdir()} == {"sub"}


@pytest.mark.parametrize("write", [to_lora, to_checkpoint])
def test_an_export_that_fails_leaves_nothing(
    memory, backbone, stranger, tmp_path: Path, write, monkeypatch
) -> None:
    with pytest.raises(FastMemError):
        write(memory, Backbone.load(str(stranger)), tmp_path / "out", context=TEXT)
    with pytest.raises(FastMemError):
        write(memory, backbone, tmp_path / "out", context=TEXT, dtype="float8")
    with pytest.raises(FastMemError):
        write(memory, backbone, tmp_path / "out", context=OTHER)
    assert not list(tmp_path.iterdir())


def test_an_export_of_several_rows_is_refused(batch: Memory, backbone, tmp_path: Path) -> None:
    for write in (to_lora, to_checkpoint):
        with pytest.raises(FastMemError, match="3"):
            write(batch, backbone, tmp_path / "out", context=TEXT)
    assert not list(tmp_path.iterdir())


# --- transformers' own model with a memory


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", 1),
        ("llama", 2),
        ("gemma2", 1),
        ("gemma3_text", 2),
        ("phi3", 1),
        ("gpt2", 1),
        ("gpt_neox", 2),
        ("olmo2", 3),
    ],
)
def test_an_attached_memory_is_a_merged_model(make_tiny, family: str, layers: int) -> None:
    backbone = make_tiny(family)
    memory = Memorizer(backbone, **STRONG, num_layers=layers)([TEXT, OTHER])
    before, base = snapshot(backbone), logits_of(backbone.model, TEXT)
    for row in range(2):
        with memory.rows([row]).attached(backbone.model):
            found = logits_of(backbone.model, TEXT)
            assert_untouched(backbone, before)
        assert (found - base).abs().max() > 0.05
        expected = logits_of(merged(backbone, memory, row), TEXT)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(backbone.model, TEXT), base)


def test_every_sequence_has_its_own_row(backbone, batch: Memory) -> None:
    texts = [text[:40] for text in (TEXT, OTHER, TEXT)]
    texts = [texts[0].replace("ë", "e"), texts[1], texts[2].replace("ë", "e")]
    with batch.attached(backbone):
        found = logits_of(backbone.model, *texts)
    for row, text in enumerate(texts):
        torch.testing.assert_close(
            found[row], logits_of(merged(backbone, batch, row), text)[0], rtol=1e-4, atol=1e-4
        )
    with batch.rows([2]).attached(backbone):
        shared = logits_of(backbone.model, *texts)
    torch.testing.assert_close(shared[2], found[2], rtol=1e-4, atol=1e-4)
    assert (shared[0] - found[0]).abs().max() > 0.1


@pytest.mark.parametrize("sequences", [1, 2, 4, 5])
def test_rows_that_serve_no_sequence_are_refused(backbone, batch: Memory, sequences: int) -> None:
    base = logits_of(backbone.model, TEXT)
    with batch.attached(backbone), pytest.raises(FastMemError, match=rf"3.*{sequences}|{sequences}.*3"):
        logits_of(backbone.model, *[TEXT] * sequences)
    assert torch.equal(logits_of(backbone.model, TEXT), base)


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str
)
def test_generate_uses_every_row(backbone, batch: Memory, settings: dict) -> None:
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS]
    with batch.attached(backbone):
        found = generated(backbone.model, prompts, **settings)
    each = settings.get("num_return_sequences", 1)
    ends = backbone.stop_ids
    for row, prompt in enumerate(prompts):
        expected = generated(merged(backbone, batch, row), [prompt], **settings)
        assert cut_at_end(found[row * each : (row + 1) * each], ends) == cut_at_end(expected, ends)
    assert found != generated(backbone.model, prompts, **settings)


def test_one_row_serves_all_beams(backbone, memory: Memory) -> None:
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS]
    with memory.attached(backbone):
        found = generated(backbone.model, prompts, num_beams=3)
    assert found == generated(merged(backbone, memory), prompts, num_beams=3)


class AttachAt(LogitsProcessor):
    """Adds a memory to the generate call that it runs in."""

    def __init__(self, memory: Memory, model: Any, step: int, until: int = 10**9) -> None:
        self.context, self.step, self.until, self.calls = memory.attached(model), step, until, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == self.step:
            self.context.__enter__()
        if self.calls == self.until:
            self.context.__exit__(None, None, None)
        return scores


class AttachWhen(StoppingCriteria):
    def __init__(self, processor: AttachAt) -> None:
        self.processor = processor

    def __call__(self, input_ids, scores, **_):
        self.processor(input_ids, scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.no_grad()
def greedy_with(models: list[Any], prompt: list[int], end: set[int]) -> list[int]:
    """One token of each model in turn, computed on the whole sequence."""
    ids: list[int] = []
    for model in models:
        ids.append(int(model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        if ids[-1] in end:
            break
    return ids


@pytest.mark.parametrize("where", ["processor", "criterion"])
@pytest.mark.parametrize(("step", "until"), [(1, 10**9), (4, 10**9), (2, 6)])
def test_a_memory_joins_a_running_generate(
    backbone, batch: Memory, where: str, step: int, until: int
) -> None:
    memory = batch.rows([0])
    prompt = backbone.chat.prompt(QUESTIONS[0])
    tuned, base = merged(backbone, memory), backbone.model
    # The last FFN feeds no attention, so that the keys and values of the base model stay right.
    models = [tuned if step < place <= until else base for place in range(1, 11)]
    expected = greedy_with(models, prompt, set())
    attach = AttachAt(memory, backbone.model, step, until)
    given = (
        {"logits_processor": [attach]}
        if where == "processor"
        else {"stopping_criteria": [AttachWhen(attach)]}
    )
    before = snapshot(backbone)
    try:
        found = generated(backbone.model, [prompt], eos_token_id=None, **given)
    finally:
        if until > 100:
            attach.context.__exit__(None, None, None)
    assert found == [expected]
    assert expected != greedy_with([base] * 10, prompt, set())
    assert_untouched(backbone, before)
    assert generated(backbone.model, [prompt]) == [greedy_with([base] * 10, prompt, backbone.stop_ids)]


def test_an_exception_takes_the_memory_off(backbone, memory: Memory) -> None:
    base = logits_of(backbone.model, TEXT)
    before = snapshot(backbone)
    attributes = {name: set(vars(module)) for name, module in backbone.model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules())

    def fail() -> None:
        assert not torch.equal(logits_of(backbone.model, TEXT), base)
        raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled"), memory.attached(backbone.model):
        fail()
    assert torch.equal(logits_of(backbone.model, TEXT), base)
    assert_untouched(backbone, before)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules())
    assert attributes == {name: set(vars(module)) for name, module in backbone.model.named_modules()}


def test_generate_that_fails_takes_the_memory_off(backbone, memory: Memory) -> None:
    class Fail(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("pulled the plug")

    prompt = backbone.chat.prompt(QUESTIONS[0])
    expected = generated(backbone.model, [prompt])
    for settings in ({}, {"custom_generate": generator(backbone, memory)}):
        with pytest.raises(RuntimeError, match="pulled"), memory.attached(backbone):
            generated(backbone.model, [prompt], logits_processor=[Fail()], **settings)
        assert generated(backbone.model, [prompt]) == expected


def test_attaching_again_and_again_changes_nothing(backbone, memory: Memory, batch: Memory) -> None:
    results = []
    for one in (memory, batch.rows([1]), memory):
        with one.attached(backbone):
            results.append(logits_of(backbone.model, TEXT))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_a_loaded_memory_of_any_form_attaches(backbone, memory: Memory, tmp_path: Path) -> None:
    with memory.attached(backbone):
        expected = logits_of(backbone.model, TEXT)
    change = (expected - logits_of(backbone.model, TEXT)).norm()
    for form, limit in (("float32", 1e-6), ("bfloat16", 2e-2), ("int8", 5e-2)):
        memory.save(tmp_path / form, form=form)
        with Memory.load(tmp_path / form, backbone).attached(backbone):
            found = logits_of(backbone.model, TEXT)
        assert (found - expected).norm() / change < limit


# --- custom_generate


def contrasted(backbone, tuned, prompt: list[int], tokens: int, alpha: float = 0.5) -> list[int]:
    ids: list[int] = []
    with torch.no_grad():
        while len(ids) < tokens and (not ids or ids[-1] not in backbone.stop_ids):
            inputs = torch.tensor([prompt + ids])
            scores = (1 + alpha) * tuned(input_ids=inputs).logits - alpha * backbone.model(
                input_ids=inputs
            ).logits
            ids.append(int(scores[0, -1].argmax()))
    return ids


def test_a_model_of_ones_own_takes_a_memory(
    backbone, memory: Memory, tiny_folder: Path, stranger: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with memory.attached(plain), memory.attached(backbone):
        found, expected = logits_of(plain, TEXT), logits_of(backbone.model, TEXT)
    assert torch.equal(found, expected)
    assert not torch.equal(logits_of(plain, TEXT), found)
    other = AutoModelForCausalLM.from_pretrained(stranger)
    base = logits_of(other, TEXT)
    for wrong in (other, make_model(hidden_size=64), make_model("gpt2")):
        with pytest.raises(FastMemError, match=memory.fingerprint), memory.attached(wrong):
            pass
    assert torch.equal(logits_of(other, TEXT), base)


def test_a_bfloat16_model_takes_a_memory(backbone, memory: Memory, tiny_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    base = logits_of(plain, TEXT).float()
    with memory.attached(plain):
        found = logits_of(plain, TEXT)
    with memory.attached(backbone):
        change = logits_of(backbone.model, TEXT) - base
    assert found.dtype == torch.bfloat16
    assert (found.float() - base - change).norm() / change.norm() < 0.1
    assert torch.equal(logits_of(plain, TEXT).float(), base)


def test_a_memory_within_a_memory_leaves_no_trace(backbone, batch: Memory) -> None:
    base = logits_of(backbone.model, TEXT)
    with batch.rows([0]).attached(backbone):
        outer = logits_of(backbone.model, TEXT)
        try:
            with batch.rows([1]).attached(backbone):
                # Either is fine, but to go on with the outer one unsaid is not.
                assert not torch.equal(logits_of(backbone.model, TEXT), outer)
        except FastMemError:
            pass
        assert torch.equal(logits_of(backbone.model, TEXT), outer)
    assert torch.equal(logits_of(backbone.model, TEXT), base)


@pytest.mark.parametrize("decoder", ["greedy", "cd"])
@pytest.mark.parametrize("layers", [1, 2])
def test_custom_generate_decodes_as_fastmem_does(backbone, decoder: str, layers: int) -> None:
    memory = Memorizer(backbone, **STRONG, num_layers=layers)([TEXT, OTHER, "Bob."])
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS]
    found = generated(backbone.model, prompts, custom_generate=generator(backbone, memory, decoder))
    ends = backbone.stop_ids
    for row, prompt in enumerate(prompts):
        tuned = merged(backbone, memory, row)
        alpha = 0.5 if decoder == "cd" else 0.0
        assert cut_at_end([found[row]], ends) == [contrasted(backbone, tuned, prompt, 10, alpha)]
    texts = [backbone.tokenizer.decode(row, skip_special_tokens=True) for row in cut_at_end(found, ends)]
    expected = answer(backbone, QUESTIONS, None, memory, decoder, max_new_tokens=10)
    assert [text.strip() for text in texts] == [text.strip() for text in expected]
    assert found != generated(backbone.model, prompts)


def test_custom_generate_takes_dola_and_its_settings(backbone, memory: Memory) -> None:
    prompt = backbone.chat.prompt(QUESTIONS[0])
    # FastMem's dola has this penalty of its own accord; in a generate call it is generate's to say.
    custom = generator(backbone, memory, "dola")
    (found,) = generated(backbone.model, [prompt], custom_generate=custom, repetition_penalty=1.2)
    (expected,) = answer(backbone, QUESTIONS[0], None, memory, "dola", max_new_tokens=10)
    (row,) = cut_at_end([found], backbone.stop_ids)
    assert backbone.tokenizer.decode(row, skip_special_tokens=True).strip() == expected.strip()
    strong = generator(backbone, memory, "cd", alpha=3.0)
    (found,) = generated(backbone.model, [prompt], custom_generate=strong)
    expected = contrasted(backbone, merged(backbone, memory), prompt, 10, 3.0)
    assert cut_at_end([found], backbone.stop_ids) == [expected]


class Tokens(BaseStreamer):
    def __init__(self) -> None:
        self.seen, self.ended = [], False

    def put(self, value) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("decoder", ["greedy", "cd"])
def test_custom_generate_streams(backbone, memory: Memory, decoder: str) -> None:
    # Given to generate itself it would see the prompt only: transformers hands it to no callable.
    prompt, streamer = backbone.chat.prompt(QUESTIONS[0]), Tokens()
    custom = generator(backbone, memory, decoder, streamer=streamer)
    (found,) = generated(backbone.model, [prompt], custom_generate=custom)
    assert streamer.seen == [prompt, *([token] for token in found)]
    assert streamer.ended
    text = TextIteratorStreamer(backbone.tokenizer, skip_prompt=True, timeout=5)
    custom = generator(backbone, memory, decoder, streamer=text)
    assert generated(backbone.model, [prompt], custom_generate=custom) == [found]
    assert "".join(text) == backbone.tokenizer.decode(found)


class StopAfter(StoppingCriteria):
    def __init__(self, tokens: int) -> None:
        self.tokens, self.calls = tokens, 0

    def __call__(self, input_ids, scores, **_):
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= self.tokens)


class Ban(LogitsProcessor):
    """Forbids what would have been said."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


@pytest.mark.parametrize("decoder", ["greedy", "cd", "dola"])
def test_custom_generate_honours_criteria_and_processors(backbone, memory: Memory, decoder: str) -> None:
    prompt, custom = backbone.chat.prompt(QUESTIONS[0]), generator(backbone, memory, decoder)
    (free,) = generated(backbone.model, [prompt], custom_generate=custom)
    assert len(free) >= 5
    (stopped,) = generated(backbone.model, [prompt], custom_generate=custom, stopping_criteria=[StopAfter(3)])
    assert stopped == free[:3]
    (short,) = generated(backbone.model, [prompt], custom_generate=custom, max_new_tokens=2)
    assert short == free[:2]
    (banned,) = generated(backbone.model, [prompt], custom_generate=custom, logits_processor=[Ban(free)])
    assert banned
    assert set(banned).isdisjoint(free)
    (suppressed,) = generated(backbone.model, [prompt], custom_generate=custom, suppress_tokens=free)
    assert suppressed == banned
    (ended,) = generated(backbone.model, [prompt], custom_generate=custom, eos_token_id=free[1])
    assert ended == free[: free.index(free[1]) + 1]


def test_custom_generate_samples(backbone, memory: Memory) -> None:
    prompt, custom = backbone.chat.prompt(QUESTIONS[0]), generator(backbone, memory)

    def draw(seed: int, **settings: Any) -> list[int]:
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, **settings}
        return generated(backbone.model, [prompt], custom_generate=custom, **settings)[0]

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(6)}) > 2
    (greedy,) = generated(backbone.model, [prompt], custom_generate=custom)
    assert draw(3, top_k=1) == greedy


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 2}, "beam"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores|return_dict"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits|return_dict"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup|assist"),
        ({"guidance_scale": 2.0}, "guidance"),
    ],
    ids=str,
)
def test_custom_generate_refuses_by_name(backbone, memory: Memory, settings: dict, words: str) -> None:
    prompt = backbone.chat.prompt(QUESTIONS[0])
    with pytest.raises(FastMemError, match=words):
        generated(backbone.model, [prompt], custom_generate=generator(backbone, memory), **settings)


def test_generator_refuses_what_it_cannot_use(backbone, memory: Memory, batch, stranger: Path) -> None:
    with pytest.raises(FastMemError):
        generator(Backbone.load(str(stranger)), memory)
    for decoder in ("cad", "beam"):
        with pytest.raises(FastMemError, match=decoder):
            generator(backbone, memory, decoder)
    with pytest.raises(FastMemError, match="alfa"):
        generator(backbone, memory, "cd", alfa=1)
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS[:2]]
    with pytest.raises(FastMemError, match="3"):
        generated(backbone.model, prompts, custom_generate=generator(backbone, batch))


def test_one_row_serves_a_batch_of_prompts(backbone, memory: Memory) -> None:
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS]
    custom = generator(backbone, memory)
    together = cut_at_end(generated(backbone.model, prompts, custom_generate=custom), backbone.stop_ids)
    alone = [generated(backbone.model, [prompt], custom_generate=custom)[0] for prompt in prompts]
    assert together == cut_at_end(alone, backbone.stop_ids)


# --- notebooks: Fabric, own loops, batches of memories, curves


def test_a_fabric_of_ones_own(tiny_folder: Path, backbone, memory: Memory) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    mine = Backbone.load(str(tiny_folder), fabric=fabric)
    assert mine.fingerprint() == backbone.fingerprint()
    found = Memorizer(mine, **STRONG, fabric=fabric)([TEXT, OTHER])
    assert_deltas(found, Memorizer(backbone, **STRONG)([TEXT, OTHER]), 1e-6)
    assert answer(mine, QUESTIONS[0], None, found.rows([0])) == answer(backbone, QUESTIONS[0], None, memory)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_fabric_says_the_precision(tiny_folder: Path, precision: str, memory: Memory) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    mine = Backbone.load(str(tiny_folder), fabric=fabric)
    assert mine.precision == precision
    weights = {p.dtype for p in mine.model.parameters()}
    assert (torch.bfloat16 in weights) == (precision == "bf16-true")
    found = Memorizer(mine, **STRONG, fabric=fabric)([TEXT])
    assert found.curve.cross_entropy == pytest.approx(memory.curve.cross_entropy, rel=0.05)
    assert found.curve.cross_entropy[-1] < found.curve.cross_entropy[0] - 1


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "64-true"])
def test_a_precision_that_memories_lack_is_refused(tiny_folder: Path, backbone, precision: str) -> None:
    # Asked for 16-mixed on a CPU, Fabric takes another one by itself.
    plugins = MixedPrecision("16-mixed", "cuda") if precision == "16-mixed" else None
    fabric = Fabric(accelerator="cpu", precision=None if plugins else precision, plugins=plugins)
    for use in (
        lambda: Backbone.load(str(tiny_folder), fabric=fabric),
        lambda: Memorizer(backbone, **STRONG, fabric=fabric)([TEXT]),
    ):
        with pytest.raises(FastMemError, match=precision):
            use()


def test_many_processes_are_refused(tiny_folder: Path, backbone) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    with pytest.raises(FastMemError, match=r"device|process"):
        Memorizer(backbone, **STRONG, fabric=fabric)([TEXT])


def test_losses_make_ones_own_loop(backbone, contexts: list[str]) -> None:
    settings = MemorizationSettings(**STRONG, kl_coeff=0.3)
    memorizer = Memorizer(backbone, settings)
    expected = memorizer(contexts)
    module = MemorizationModule(backbone, len(contexts), settings, dense_gradients=True)
    prepared = memorizer.prepare([memorizer.encode(context) for context in contexts])
    optimizer = module.configure_optimizers()
    curves: list[list[list[float]]] = [[], []]
    for _ in range(settings.steps):
        losses = module.losses(prepared)
        assert losses.total.shape == losses.cross_entropy.shape == losses.kl.shape == (len(contexts),)
        assert losses.total.requires_grad
        torch.testing.assert_close(losses.total, losses.cross_entropy + 0.3 * losses.kl, rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        losses.total.sum().backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        curves[0].append(losses.cross_entropy.tolist())
        curves[1].append(losses.kl.tolist())
    for row, curve in enumerate(expected.curves):
        assert [values[row] for values in curves[0]] == pytest.approx(curve.cross_entropy, rel=1e-4)
        assert [values[row] for values in curves[1]] == pytest.approx(curve.kl, rel=1e-3, abs=1e-5)
    assert_deltas(module.memory(), expected, 2e-3)


@pytest.mark.parametrize("whose", ["mine", "the module's"])
def test_ones_own_loss_moves_a_memory(backbone, memory: Memory, whose: str) -> None:
    settings = MemorizationSettings(**STRONG)
    memorizer = Memorizer(backbone, settings)
    module = MemorizationModule(backbone, 1, settings, dense_gradients=True)
    prepared = memorizer.prepare([memorizer.encode(TEXT)])
    mine = torch.optim.SGD(module.parameters(), lr=0.5)
    optimizer = mine if whose == "mine" else module.configure_optimizers()
    values = []
    for _ in range(4):
        loss = (module.losses(prepared).total - 5.0).square().sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)
        if optimizer is not mine:
            module.configure_gradient_clipping(optimizer)
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[1] < values[0]
    # What the last losses say is what a plain model with these deltas says.
    found = module.losses(prepared).cross_entropy.item()
    with replace(memory, deltas=module.memory().deltas).attached(backbone):
        window = windows_of(memorizer, [TEXT], 1000, 0)[0]
        assert found == pytest.approx(token_losses(backbone.model, window).mean().item(), rel=1e-4)


def test_memories_are_served_in_one_batch(backbone, batch: Memory) -> None:
    together = answer(backbone, QUESTIONS, None, batch, max_new_tokens=10)
    for row, question in enumerate(QUESTIONS):
        alone = answer(backbone, question, None, batch.rows([row]), max_new_tokens=10)
        assert alone == [together[row]]
    again = Memory.stack([batch.rows([i]) for i in (2, 0, 1)])
    assert len(again) == 3
    turned = answer(backbone, [QUESTIONS[i] for i in (2, 0, 1)], None, again, max_new_tokens=10)
    assert turned == [together[i] for i in (2, 0, 1)]
    assert together != answer(backbone, QUESTIONS, max_new_tokens=10)
    assert again.texts == [batch.texts[i] for i in (2, 0, 1)]


def test_stack_refuses_what_does_not_belong_together(
    backbone, memory: Memory, stranger: Path, kept: Path
) -> None:
    other = Memorizer(Backbone.load(str(stranger)), **STRONG)([TEXT])
    deep = Memorizer(backbone, **STRONG, num_layers=2)([TEXT])
    for wrong in ([memory, other], [memory, deep], []):
        with pytest.raises(FastMemError):
            Memory.stack(wrong)
    joined = Memory.stack([memory, Memory.load(kept)])
    assert len(joined) == 2
    assert torch.equal(joined.deltas[0]["up"][0], joined.deltas[0]["up"][1])


def test_curve_is_that_of_a_single_memory(memory: Memory, batch: Memory) -> None:
    assert memory.curve == memory.curves[0]
    assert len(memory.curve.cross_entropy) == STRONG["steps"]
    with pytest.raises(FastMemError, match=r"3|curves"):
        _ = batch.curve
    assert len(batch) == len(batch.curves) == 3


@pytest.mark.parametrize("rows", [1, 3])
def test_plot_shows_the_curves(batch: Memory, tmp_path: Path, rows: int) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figure = batch.rows(list(range(rows))).plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    lines = [line.get_ydata() for axes in figure.axes for line in axes.lines]
    for curve in batch.curves[:rows]:
        for values in (curve.cross_entropy, curve.kl):
            assert any(len(found) == 4 and list(found) == pytest.approx(values) for found in lines)
    assert any(axes.get_xlabel() for axes in figure.axes)
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    # A notebook shows what is returned; a figure that pyplot keeps would be shown twice, and leak.
    assert pyplot.get_fignums() == before


def test_repr_is_short(memory: Memory, batch: Memory) -> None:
    for one in (memory, batch):
        text = repr(one)
        assert "tensor" not in text
        assert len(text) < 500
        assert one.fingerprint in text or str(len(one)) in text


# --- help


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "memorize",
            ["--windows", "joint", "sequential", "cut", "--overlap", "--form", "--force", "--no-text"],
        ),
        ("ask", ["--questions", "--with-context", "--without-context", "--decoder", "--json", "--no-memory"]),
        ("export", ["--to", "lora", "checkpoint", "--rank", "auto", "--max-kl", "--context", "low-rank"]),
    ],
)
def test_help_names_the_options(capsys, command: str, words: list[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    for word in words:
        assert word in out
    assert max(map(len, out.splitlines())) <= 120
    assert main(["--help"]) == 0
    assert re.search(rf"^  {command}\b", capsys.readouterr().out, re.MULTILINE)


# --- the demo model


@pytest.mark.demo
def test_demo_memories_give_identical_tokens(demo: Backbone, tmp_path: Path) -> None:
    text = "The museum of Lindt was founded by Ada Birch in 1741. It keeps nine thousand blue lanterns."
    questions = ["Who founded the museum of Lindt?", "How many lanterns does it keep?"]
    memory = Memorizer(demo, steps=5, learning_rate=3e-4)([text])
    memory.save(tmp_path / "m.fastmem")
    to_checkpoint(memory, demo, tmp_path / "merged", context=text)
    loaded = Memory.load(tmp_path / "m.fastmem", demo)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompts = [demo.chat.prompt(question) for question in questions]
    settings = {"pad": demo.pad_id, "max_new_tokens": 12}
    found = {}
    found["merged"] = generated(plain, prompts, **settings)
    for name, one in (("made", memory), ("loaded", loaded)):
        with one.attached(demo):
            found[f"attached, {name}"] = generated(demo.model, prompts, **settings)
        found[f"custom, {name}"] = generated(
            demo.model, prompts, custom_generate=generator(demo, one), **settings
        )
    base = generated(demo.model, prompts, **settings)
    cut = {name: cut_at_end(rows, demo.stop_ids) for name, rows in found.items()}
    assert all(rows == cut["merged"] for rows in cut.values()), cut
    assert cut_at_end(base, demo.stop_ids) != cut["merged"], "the memory changes nothing"
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut["merged"]]
    for one in (memory, loaded):
        assert [a.strip() for a in answer(demo, questions, None, one, max_new_tokens=12)] == texts


@pytest.mark.demo
def test_demo_adapter_gives_the_answers_of_the_low_rank_memory(peft, demo: Backbone, tmp_path: Path) -> None:
    text = "The museum of Lindt was founded by Ada Birch in 1741. It keeps nine thousand blue lanterns."
    memory = Memorizer(demo, steps=5, learning_rate=3e-4)([text])
    report = to_lora(memory, demo, tmp_path / "lora", rank="auto", max_kl=0.05, dtype="float32", context=text)
    low = replace(memory, deltas=truncated(memory, report.rank))
    prompts = [demo.chat.prompt(q) for q in ("Who founded the museum of Lindt?", "When was it founded?")]
    settings = {"pad": demo.pad_id, "max_new_tokens": 10}
    with low.attached(demo):
        expected = generated(demo.model, prompts, **settings)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(demo.model), tmp_path / "lora").eval()
    assert generated(model, prompts, **settings) == expected
    assert report.kl <= 0.05
    assert report.bytes < sum(d.numel() for d in memory.deltas[0].values()) * 4


@pytest.mark.demo
def test_demo_is_the_model_of_memorize_and_ask(demo: Backbone, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = "The museum of Lindt was founded by Ada Birch in 1741."
    Path("notes.txt").write_text(text)
    assert main(["memorize", "notes.txt", "--device", "cpu", "--form", "float32"]) == 0
    loaded = Memory.load("notes.fastmem", demo)
    assert (loaded.settings["steps"], loaded.settings["learning_rate"]) == (10, 3e-4)
    capsys.readouterr()
    assert (
        main(["ask", "notes.fastmem", "Who founded the museum?", "--device", "cpu", "--max-new-tokens", "8"])
        == 0
    )
    out = capsys.readouterr().out
    found = answer(
        demo, "Who founded the museum?", text, loaded, max_new_tokens=8, answer_prefix="The answer is:"
    )
    plain = answer(demo, "Who founded the museum?", text, loaded, max_new_tokens=8)
    assert out in (found[0] + "\n", plain[0] + "\n")
