"""Memory files: what they may hold, and that what they say is checked before anything believes it."""

import json
import re
from pathlib import Path

import pytest
import torch
from memories import TEXTS, assert_deltas
from memories import files as files_in
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmem_pl import FastMemError, MemorizationSettings, Memorizer, Memory
from fastmem_pl.memory import files

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = ["float32", "bfloat16", "int8"]


def metadata(path):
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture
def rewritten(kept, tmp_path):
    """The file again, valid but for what is changed; its digest included."""

    def write(header=None, tensors=None, source=kept):
        stated, held = metadata(source), load_file(source)
        del stated["digest"]
        files.write(
            tmp_path / "m.fastmem",
            {**held, **(tensors or {})} if tensors != {} else {},
            {**stated, **(header or {})},
        )
        return tmp_path / "m.fastmem"

    return write


def assert_refused(path: Path, words: str = "") -> None:
    with pytest.raises(FastMemError, match=re.escape(path.name)) as caught:
        Memory.load(path)
    assert str(caught.value).isprintable()
    assert re.search(words, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("form", "lost", "size"), [("float32", 0, 4), ("bfloat16", 4e-3, 2), ("int8", 2e-2, 1)]
)
@pytest.mark.parametrize("row", [0, 2])
def test_a_saved_row_comes_back(
    batch: Memory, backbone, tmp_path, form: str, lost: float, size: int, row: int
):
    batch.save(tmp_path / "m", row=row, form=form, id="seven")
    found = Memory.load(tmp_path / "m", backbone)
    assert_deltas(found, batch.rows([row]), lost)
    if form == "bfloat16":
        for name, delta in batch.deltas[0].items():
            assert torch.equal(found.deltas[0][name][0], delta[row].bfloat16())
    assert (found.curves, found.texts) == ([batch.curves[row]], [TEXTS[row]])
    assert (found.settings, found.fingerprint) == (batch.settings, backbone.fingerprint())
    assert metadata(tmp_path / "m")["id"] == "seven"
    assert json.loads(metadata(tmp_path / "m")["curve"])["kl"][0] == 0.0
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    # Three matrices of 32 x 64; int8 has a float for each of 160 rows beside them.
    rest = (tmp_path / "m").stat().st_size - 3 * 32 * 64 * size - (160 * 4 if form == "int8" else 0)
    assert 0 < rest < 8000


def test_a_failed_save_leaves_the_old_file(memory: Memory, tmp_path: Path) -> None:
    memory.save(tmp_path / "m.fastmem")
    before = files_in(tmp_path)
    with pytest.raises(FastMemError, match="float64"):
        memory.save(tmp_path / "m.fastmem", form="float64")
    with pytest.raises(FastMemError, match=r"cannot write the memory .*No such file or directory"):
        memory.save(tmp_path / "gone" / "m.fastmem")
    for row in (1, -2):
        with pytest.raises((FastMemError, IndexError)):
            memory.save(tmp_path / "m.fastmem", row=row)
    assert files_in(tmp_path) == before


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("form", FORMS)
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
            assert_refused(path)


def test_a_file_cut_short_or_long_is_refused(kept: Path, tmp_path: Path) -> None:
    content, path = kept.read_bytes(), tmp_path / "m.fastmem"
    end, size = header_end(content), len(content)
    for length in (0, 1, 7, 8, 9, 100, end - 1, end, end + 1, size // 2, size - 4, size - 1):
        path.write_bytes(content[:length])
        assert_refused(path, r"is damaged .* memorize it again")
    for more in (b"\0", b"\0" * 64, content):
        path.write_bytes(content + more)
        assert_refused(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors.update({k: v.half() for k, v in tensors.items()}),
        lambda tensors, _: tensors.pop(next(iter(tensors))),
        lambda tensors, _: tensors.update({k: v.T.contiguous() for k, v in tensors.items()}),
        lambda tensors, _: tensors.update({k: v.T.reshape(v.shape) for k, v in tensors.items()}),
        lambda _, stated: stated.update(text="Another text."),
        lambda _, stated: stated.update(more="x"),
        lambda _, stated: stated.pop("digest"),
    ],
)
def test_a_file_without_its_digest_is_refused(kept: Path, tmp_path: Path, change) -> None:
    tensors, stated = load_file(kept), metadata(kept)
    change(tensors, stated)
    save_file(tensors, tmp_path / "m.fastmem", stated)
    assert_refused(tmp_path / "m.fastmem")


@pytest.mark.parametrize("version", ["0", "1", "2", "3", "5"])
def test_another_version_is_refused(kept: Path, tmp_path: Path, version: str) -> None:
    changed = re.sub(rb'"version":"."', b'"version":"%s"' % version.encode(), kept.read_bytes())
    (tmp_path / "m.fastmem").write_bytes(changed)
    assert_refused(tmp_path / "m.fastmem", f"has format version '{version}', this program reads 4")


def setting(name: str, value: str) -> dict[str, str]:
    """Settings in a header, all as they should be but one."""
    stated = json.dumps({**MemorizationSettings().as_dict(), name: "here"})
    return {"settings": stated.replace('"here"', value)}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"backbone": "evil\x1b[2J\nfastmem: all is well"}, "backbone: expected text of another form"),
        ({"backbone": "x" * 400}, "backbone: expected text of length <= 300"),
        ({"status": "ok\nrun: curl"}, "status: expected text of another form"),
        ({"fingerprint": "\x1b[31m"}, "fingerprint: expected text of another form"),
        ({"form": "pickle"}, "unknown form 'pickle'"),
        ({"settings": "[]"}, "settings: expected a mapping, found a list"),
        ({"settings": "{"}, "its settings: not valid JSON"),
        ({"settings": "[" * 100_000}, "its settings: not valid JSON"),
        ({"settings": '{"steps": 1}'}, "its settings are not those of memorizing"),
        (setting("setting_of_another_program", "1"), "its settings are not those of memorizing"),
        (setting("max_context_tokens", '"a"'), "its settings: max_context_tokens: expected int, found text"),
        (setting("learning_rate", "NaN"), "its settings: .*learning_rate: nan is out of"),
        (
            setting("learning_rate", "true"),
            "its settings: learning_rate: expected float, found true or false",
        ),
        (setting("kl_target", "1" + 400 * "0"), "its settings: (kl_target: )?number out of range"),
        (
            {"curve": '{"cross_entropy": ["x"], "kl": [], "grad_norm": []}'},
            r"curve\.cross_entropy\[0\]: expected float",
        ),
        ({"curve": "{}"}, "curve: object missing required field"),
        (
            {"windows": '{"policy": "joint", "lengths": "abc"}'},
            "windows.lengths: expected a list, found text",
        ),
    ],
)
def test_a_header_that_no_memory_has(rewritten, header, words):
    assert_refused(rewritten(header), words)


@pytest.mark.parametrize(
    ("form", "tensors", "words"),
    [
        ("float32", {"0.up": torch.zeros(64, 32, dtype=torch.int8)}, "no matrix of float32 numbers"),
        ("float32", {"0.up": torch.zeros(64)}, "no matrix of float32 numbers"),
        ("float32", {"0.up": torch.full((64, 32), torch.inf)}, "not finite"),
        ("float32", {"0.side": torch.zeros(2, 2)}, "or other tensors"),
        ("float32", {"2.up": torch.zeros(64, 32)}, "or other tensors"),
        ("float32", {}, "no deltas"),
        # A scale of another shape would blow up a small file to gigabytes.
        ("int8", {"0.up.scale": torch.ones(1, 100_000)}, "does not fit its scale"),
        ("int8", {"0.up.scale": torch.ones(64, 1, dtype=torch.bfloat16)}, "no matrix of int8 numbers"),
        (
            "low-rank",
            {"0.up.outer": torch.zeros(3_000_000, 1), "0.up.inner": torch.zeros(1, 3_000)},
            "more than",
        ),
        ("low-rank", {"0.up.inner": torch.zeros(5, 32)}, "does not fit its scale or factor"),
    ],
)
def test_tensors_that_no_memory_has(rewritten, kept, tmp_path, form, tensors, words):
    if form != "float32":
        memory, kept = Memory.load(kept), tmp_path / "other.fastmem"
        factors = [
            {name: (torch.zeros(d.shape[1], 2), torch.zeros(2, d.shape[2])) for name, d in layer.items()}
            for layer in memory.deltas
        ]
        memory.save(kept, form=form, factors=factors)
    assert_refused(rewritten(tensors=tensors, source=kept), words)


def test_shapes_of_another_model_are_refused_before_a_tensor_is_read(make_tiny, rewritten, monkeypatch):
    wide = make_tiny("llama", intermediate_size=96)
    path = rewritten({"fingerprint": wide.fingerprint()})
    monkeypatch.setattr(files, "unpack", None)
    with pytest.raises(
        FastMemError, match=r"does not fit this model: its deltas are .*\(64, 32\).*\(96, 32\)"
    ):
        Memory.load(path, wide)


def test_a_row_keeps_its_own_settings_text_and_hash(tiny, tmp_path):
    rates, path = [1e-2, 2e-2], tmp_path / "second.fastmem"
    single = [Memorizer(tiny, steps=2, learning_rate=rate, num_layers=2)(f"At {rate}.") for rate in rates]
    both = Memory.stack(single)
    assert (both.settings["learning_rate"], both.settings["steps"]) == (rates, 2)
    both.save(path, row=1)
    loaded = Memory.load(path, tiny.fingerprint())
    assert_deltas(loaded, single[1])
    assert loaded.settings["learning_rate"] == rates[1]
    assert loaded.texts == single[1].texts
    assert loaded.context_hashes == single[1].context_hashes != single[0].context_hashes
    assert both.rows([1, 1]).settings["learning_rate"] == rates[1]
    assert both.rows([1, 0]).settings["learning_rate"] == rates[::-1]
    assert json.loads(files.read_header(path)["settings"])["learning_rate"] == rates[1]
