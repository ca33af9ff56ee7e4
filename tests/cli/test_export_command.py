"""`fastmem export`: a memory file becomes an adapter, a checkpoint, or a smaller file."""

import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import OTHER, QUESTIONS, TEXT, assert_deltas
from safetensors.torch import load_file

from fastmem_pl import Backbone, FastMemError, Memory, answer

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
def test_export_refuses_what_it_cannot_do(refused_command, kept, tmp_path, options, words):
    (tmp_path / "other.txt").write_text(OTHER)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("x")
    line = refused_command("export", kept, **{"out": "made", **options})
    assert re.search(words, line), line


@pytest.mark.parametrize("to", ["lora", "checkpoint"])
def test_force_replaces_exports_only(fastmem, refused_command, kept, tiny_folder, tmp_path, to):
    """A folder that holds a model, or whatever else, is not this command's to delete."""
    fastmem("export", kept, to=to, out="lora")
    assert "--force" in refused_command("export", kept, to=to, out="lora")
    fastmem("export", kept, to="lora", rank=3, out="lora", force=True)
    assert (report_of("lora")["to"], report_of("lora")["rank"]) == ("lora", 3)
    shutil.copytree(tiny_folder, tmp_path / "model")
    for name in ("mine/thesis.txt", "nested/src/a.c", "other/export.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("[]")
    shutil.copy("lora/export.json", "nested")
    own = {"model": "chat_template.jinja", "mine": "thesis.txt", "nested": "src", "other": "export.json"}
    for out, foreign in own.items():
        line = refused_command("export", kept, to=to, out=out, force=True)
        assert f"{out} holds {foreign}, which fastmem export did not write" in line
    assert "the folder you are in" in refused_command("export", kept, to=to, out=".", force=True)


def test_a_memory_without_text_needs_its_context(fastmem, refused_command, notes, tmp_path, kept):
    fastmem("memorize", notes, no_text=True, form="float32")
    assert b"The tower stands" not in Path("notes.fastmem").read_bytes()
    (tmp_path / "other.txt").write_text(OTHER)
    assert "--context" in refused_command("export", "notes.fastmem", to="lora", out="lora")
    refused_command("export", "notes.fastmem", to="lora", out="lora", context="other.txt")
    fastmem("export", "notes.fastmem", to="lora", out="lora", context=notes)
    fastmem("export", kept, to="lora", out="from-text")
    ours, theirs = report_of("lora"), report_of("from-text")
    for name in ("rank", "bytes", "relative_error", "kl"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def test_checkpoint_by_the_command(fastmem, refused_command, kept, backbone, tiny_folder, stranger):
    assert "made" in fastmem("export", kept, to="checkpoint", out="made").out
    report = report_of("made")
    assert (report["to"], report["form"]) == ("checkpoint", "float32")
    assert report["fingerprint"] == backbone.fingerprint()
    base, ours = load_file(tiny_folder / "model.safetensors"), load_file("made/model.safetensors")
    assert report["bytes"] >= sum(tensor.nbytes for tensor in ours.values())
    changed = {name for name in base if not torch.equal(base[name], ours[name])}
    assert base.keys() == ours.keys()
    assert changed == {f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    # What the command's own ask says of the merged model is what it says of the memory.
    other, shown = Backbone.load("made"), fastmem("ask", kept, QUESTIONS[0], max_new_tokens=12).out
    assert answer(other, QUESTIONS[0], TEXT, max_new_tokens=12)[0] + "\n" == shown
    # Of that model, as of any other, the memory is not.
    for line in (
        refused_command("ask", kept, "Who?", model="made"),
        refused_command("export", kept, to="lora", model="made", out="x"),
    ):
        assert re.search(f"{backbone.fingerprint()}.*{other.fingerprint()}", line)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        *(({"form": form}, most) for form, most in (("float32", 0.0), ("bfloat16", 4e-3), ("int8", 2e-2))),
        *(({"form": "low-rank", "rank": rank}, 0.9) for rank in (4, None)),
    ],
    ids=str,
)
def test_a_memory_in_another_form(fastmem, kept, tmp_path, backbone, memory, options, most):
    (tmp_path / "sub").mkdir()
    mine = tmp_path / "sub" / "my.notes.fastmem"
    mine.write_bytes(kept.read_bytes())
    out = fastmem("export", mine, to="memory", **options).out
    # Beside the memory, not beside the user.
    path = tmp_path / "sub" / f"my.notes-{options['form']}.fastmem"
    assert {p.name for p in tmp_path.rglob("*")} == {"sub", mine.name, path.name}
    assert f"{path.stat().st_size}" in out.replace(",", "")
    assert "KL" in out
    found = Memory.load(path, backbone)
    assert (found.texts, found.curve) == ([TEXT], memory.curve)
    assert_deltas(found, memory, most)
    shown = fastmem("ask", path, QUESTIONS[0], max_new_tokens=12).out
    assert shown == answer(backbone, QUESTIONS[0], TEXT, found, max_new_tokens=12)[0] + "\n"
    if options.get("rank"):
        assert path.stat().st_size < kept.stat().st_size / 2
        assert all(torch.linalg.matrix_rank(d[0].float(), rtol=1e-3) == 4 for d in found.deltas[0].values())
    # A damaged one is refused, whatever its form.
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    with pytest.raises(FastMemError, match=rf"{path.name} is damaged"):
        Memory.load(path)


def test_exports_stand_beside_the_memory(fastmem, kept, tmp_path):
    (tmp_path / "my.notes.fastmem").write_bytes(kept.read_bytes())
    fastmem("export", "my.notes.fastmem", to="lora", rank=2)
    fastmem("export", "my.notes.fastmem", to="checkpoint")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"my.notes.fastmem", "my.notes-lora", "my.notes-checkpoint"}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def saved(payload: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, **options)
    return buffer.getvalue()


KINDS: dict[str, Callable[[bytes, dict, Path], bytes]] = {
    "pickle": lambda whole, payload, model: pickle.dumps(payload),
    "torch": lambda whole, payload, model: saved(payload),
    "torch-legacy": lambda whole, payload, model: saved(payload, _use_new_zipfile_serialization=False),
    "text": lambda whole, payload, model: b"Just a text. " * 50,
    "weights": lambda whole, payload, model: (model / "model.safetensors").read_bytes(),
    "damaged: header": lambda whole, payload, model: whole.replace(b"Rome", b"Oslo"),
    "damaged: empty": lambda whole, payload, model: b"",
}


@pytest.mark.parametrize("kind", [*KINDS, "missing", "folder"])
def test_what_is_no_memory_is_refused_and_not_executed(refused_command, kept, tiny_folder, tmp_path, kind):
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
