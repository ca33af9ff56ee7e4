"""`fastmem export`: a memory file becomes an adapter, a checkpoint, or a smaller file."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import OTHER, QUESTIONS, TEXT, assert_deltas
from safetensors.torch import load_file

from fastmem_pl import Backbone, FastMemError, Memory, answer
from fastmem_pl.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def report_of(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "export.json").read_text("utf-8"))


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
        *[({"to": "lora", "rank": rank}, "rank") for rank in (0, -1, 33, "some", 1.5)],
    ],
    ids=str,
)
def test_export_refuses_what_it_cannot_do(
    refused_command, kept: Path, tmp_path: Path, options: dict, words: str
) -> None:
    (tmp_path / "other.txt").write_text(OTHER)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("x")
    line = refused_command("export", kept, **{"out": "made", **options})
    assert re.search(words, line), line


def test_force_replaces_an_export(fastmem, refused_command, kept: Path) -> None:
    fastmem("export", kept, to="lora", rank=2, out="lora")
    before = report_of("lora")
    assert "--force" in refused_command("export", kept, to="lora", rank=3, out="lora")
    fastmem("export", kept, to="lora", rank=3, out="lora", force=True)
    assert (before["rank"], report_of("lora")["rank"]) == (2, 3)


@pytest.mark.parametrize(("to", "out"), [("lora", "model"), ("checkpoint", "mine"), ("lora", ".")])
def test_force_replaces_exports_only(
    refused_command, kept: Path, backbone, tiny_folder: Path, tmp_path: Path, to: str, out: str
) -> None:
    # A folder that holds a model, or whatever else, is not this command's to delete.
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused_command("export", kept, to=to, out=out, force=True, model=tmp_path / "model")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_memory_without_text_needs_its_context(
    fastmem, refused_command, notes: Path, tmp_path: Path, kept
) -> None:
    fastmem("memorize", notes, no_text=True, form="float32")
    (tmp_path / "other.txt").write_text(OTHER)
    assert "--context" in refused_command("export", "notes.fastmem", to="lora", out="lora")
    refused_command("export", "notes.fastmem", to="lora", out="lora", context="other.txt")
    fastmem("export", "notes.fastmem", to="lora", out="lora", context=notes)
    fastmem("export", kept, to="lora", out="from-text")
    ours, theirs = report_of("lora"), report_of("from-text")
    for name in ("rank", "bytes", "relative_error", "kl"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def test_checkpoint_by_the_command(fastmem, kept: Path, backbone, tiny_folder: Path, stranger: Path) -> None:
    out = fastmem("export", kept, to="checkpoint", out="made").out
    assert "made" in out
    report = report_of("made")
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


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"form": "float32"}, 0.0),
        ({"form": "bfloat16"}, 4e-3),
        ({"form": "int8"}, 2e-2),
        ({"form": "low-rank", "rank": 4}, 0.9),
        ({"form": "low-rank"}, 0.9),
    ],
    ids=str,
)
def test_a_memory_in_another_form(
    fastmem, kept: Path, tmp_path: Path, backbone, memory: Memory, options: dict, most: float
) -> None:
    mine = tmp_path / "notes.fastmem"
    mine.write_bytes(kept.read_bytes())
    out = fastmem("export", mine, to="memory", **options).out
    path = tmp_path / f"notes-{options['form']}.fastmem"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["notes.fastmem", path.name])
    assert f"{path.stat().st_size}" in out.replace(",", "")
    assert "KL" in out
    found = Memory.load(path, backbone)
    assert found.texts == [TEXT]
    assert found.curve == memory.curve
    assert_deltas(found, memory, most)
    shown = fastmem("ask", path, QUESTIONS[0], max_new_tokens=12).out
    assert shown == answer(backbone, QUESTIONS[0], TEXT, found, max_new_tokens=12)[0] + "\n"
    if "rank" in options:
        assert path.stat().st_size < kept.stat().st_size / 2
        assert all(torch.linalg.matrix_rank(d[0].float(), rtol=1e-3) == 4 for d in found.deltas[0].values())
    # A damaged one is refused_command, whatever its form.
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    with pytest.raises(FastMemError, match=rf"{path.name} is damaged"):
        Memory.load(path)


def test_exports_stand_beside_the_memory(fastmem, kept: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "my.notes.fastmem").write_bytes(kept.read_bytes())
    fastmem("export", "sub/my.notes.fastmem", to="lora", rank=2)
    fastmem("export", "sub/my.notes.fastmem", to="checkpoint")
    assert {p.name for p in folder.iterdir()} == {"my.notes.fastmem", "my.notes-lora", "my.notes-checkpoint"}
    assert {p.name for p in tmp_path.iterdir()} == {"sub"}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return buffer.getvalue()


def saved(payload: object, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


KINDS: dict[str, Callable[[bytes, dict, Path], bytes]] = {
    "pickle": lambda whole, payload, model: pickle.dumps(payload),
    "torch": lambda whole, payload, model: saved(payload, new=True),
    "torch-legacy": lambda whole, payload, model: saved(payload, new=False),
    "zip": lambda whole, payload, model: zipped(pickle.dumps(payload)),
    "text": lambda whole, payload, model: b"Just a text. " * 50,
    "weights": lambda whole, payload, model: (model / "model.safetensors").read_bytes(),
    "damaged: tensor": lambda whole, payload, model: whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:],
    "damaged: header": lambda whole, payload, model: whole.replace(b"Rome", b"Oslo"),
    "damaged: short": lambda whole, payload, model: whole[: len(whole) // 2],
    "damaged: empty": lambda whole, payload, model: b"",
}


@pytest.mark.parametrize("kind", [*KINDS, "missing", "folder"])
def test_what_is_no_memory_is_refused_and_not_executed(
    refused_command, kept, tiny_folder, tmp_path, kind: str
) -> None:
    path, payload = tmp_path / "evil.fastmem", {"down": Payload(tmp_path / "marker")}
    pickle.loads(pickle.dumps(payload))
    assert payload["down"].marker.exists(), "the payload would do nothing anyway"
    payload["down"].marker.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(KINDS[kind](kept.read_bytes(), payload, tiny_folder))
    lines = [
        refused_command("ask", path, "Who?"),
        *(refused_command("export", path, to=to) for to in ("lora", "memory")),
    ]
    for line in lines:
        assert "evil.fastmem" in line
        assert "damaged" in line or not kind.startswith("damaged")
    with pytest.raises(FastMemError, match=path.name):
        Memory.load(path)
    assert not payload["down"].marker.exists()


def test_no_pickle_is_needed(fastmem, notes: Path, monkeypatch) -> None:
    def forbidden(*_, **__):
        raise AssertionError("pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    fastmem("memorize", notes)
    assert fastmem("ask", "notes.fastmem", QUESTIONS[0], max_new_tokens=3).out


def test_another_model_is_refused_with_both_fingerprints(refused_command, kept, stranger, backbone) -> None:
    lines = [refused_command("ask", kept, "Who?", model=stranger)]
    lines += [
        refused_command("export", kept, to=to, model=stranger, out="x") for to in ("lora", "checkpoint")
    ]
    for line in lines:
        assert Backbone.load(str(stranger)).fingerprint() in line
        assert backbone.fingerprint() in line


def test_help_names_the_options(capsys) -> None:
    windows = ["--windows", "joint", "sequential", "cut", "--overlap", "--form", "--force", "--no-text"]
    shown = ["--questions", "--with-context", "--without-context", "--decoder", "--json", "--no-memory"]
    ship = ["--to", "lora", "checkpoint", "--rank", "auto", "--max-kl", "--context", "low-rank"]
    for command, words in {"memorize": windows, "ask": shown, "export": ship}.items():
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words), (command, out)
        assert max(map(len, out.splitlines())) <= 120
        assert main(["--help"]) == 0
        assert re.search(rf"^  {command}\b", capsys.readouterr().out, re.MULTILINE)
