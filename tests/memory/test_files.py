"""Memory files: what they may hold, and that what they say is checked before anything believes it."""

import json

import pytest
import torch
from safetensors import safe_open

from fastmem_pl import FastMemError, Memorizer, Memory, memorize_document
from fastmem_pl.memory import files

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "The tower of Velm was built in 1312."


@pytest.fixture
def kept(tiny, tmp_path):
    path = tmp_path / "m.fastmem"
    memorize_document(Memorizer(tiny, steps=2, learning_rate=1e-2), TEXT).save(path)
    return path


def rewritten(path, header=None, tensors=None):
    """The file again, valid but for what is changed; its digest included."""
    with safe_open(path, framework="pt") as file:
        stated, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del stated["digest"]
    files.write(path, {**held, **(tensors or {})} if tensors != {} else {}, {**stated, **(header or {})})
    return path


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"backbone": "evil\x1b[2J\nfastmem: all is well"}, "its backbone is no short line"),
        ({"backbone": "x" * 400}, "its backbone is no short line"),
        ({"status": "ok\nrun: curl"}, "its status is no short line"),
        ({"fingerprint": "\x1b[31m"}, "its fingerprint is none"),
        ({"form": "pickle"}, "unknown form 'pickle'"),
        ({"settings": "[]"}, "its settings are no mapping"),
        ({"settings": "{"}, "its settings are no JSON"),
        ({"settings": "[" * 100_000}, "its settings are no JSON"),
        ({"settings": '{"max_context_tokens": "a"}'}, "its setting 'max_context_tokens' does not fit"),
        ({"settings": '{"learning_rate": NaN}'}, "its settings do not fit, model.learning_rate: nan is out of"),
        ({"settings": '{"learning_rate": true}'}, "its setting 'learning_rate' does not fit"),
        ({"settings": '{"kl_target": 1%s}' % (400 * "0")}, "its settings do not fit"),
        ({"settings": '{"setting_of_another_program": 1}'}, "setting_of_another_program"),
        ({"settings": '{"steps": 1}'}, "its settings lack"),
        ({"curve": '{"cross_entropy": ["x"], "kl": [], "grad_norm": []}'}, "its curve is none"),
        ({"curve": "{}"}, "its curve is none"),
        ({"windows": '{"policy": "joint", "lengths": "abc"}'}, "its windows are none"),
    ],
)
def test_a_header_that_no_memory_has(kept, header, words):
    with pytest.raises(FastMemError, match=words) as refused:
        Memory.load(rewritten(kept, header))
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("form", "tensors", "words"),
    [
        ("float32", {"0.up": torch.zeros(64, 32, dtype=torch.int8)}, "no matrix of float32 numbers"),
        ("float32", {"0.up": torch.zeros(64)}, "no matrix of float32 numbers"),
        ("float32", {"0.up": torch.full((64, 32), torch.inf)}, "not finite"),
        ("float32", {"0.side": torch.zeros(2, 2)}, "holds other tensors"),
        ("float32", {"2.up": torch.zeros(64, 32)}, "holds other tensors"),
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
def test_tensors_that_no_memory_has(tiny, kept, form, tensors, words):
    if form != "float32":
        memory = Memory.load(kept)
        factors = [
            {name: (torch.zeros(d.shape[1], 2), torch.zeros(2, d.shape[2])) for name, d in layer.items()}
            for layer in memory.deltas
        ]
        memory.save(kept, form=form, factors=factors)
    with pytest.raises(FastMemError, match=words):
        Memory.load(rewritten(kept, tensors=tensors))


def test_shapes_of_another_model_are_refused_before_a_tensor_is_read(tiny, make_tiny, kept, monkeypatch):
    wide = make_tiny("llama", intermediate_size=96)
    rewritten(kept, {"fingerprint": wide.fingerprint()})
    monkeypatch.setattr(files, "unpack", None)
    with pytest.raises(
        FastMemError, match=r"does not fit this model: its deltas are .*\(64, 32\).*\(96, 32\)"
    ):
        Memory.load(kept, wide)


def test_the_digest_is_of_everything(kept):
    with safe_open(kept, framework="pt") as file:
        stated, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    right = stated["digest"]
    assert files.digest(held, stated) == right
    for name in stated:
        if name != "digest":
            assert files.digest(held, {**stated, name: stated[name] + " "}) != right, name
    for name, tensor in held.items():
        changed = tensor.clone()
        changed[-1, -1] += 1e-6
        assert files.digest({**held, name: changed}, stated) != right, name
        assert files.digest({**held, name: tensor.T.contiguous().reshape(tensor.shape)}, stated) != right


def test_a_row_keeps_its_own_settings_text_and_hash(tiny, tmp_path):
    contexts = ["One.", "Another one."]
    rates = (1e-2, 2e-2)
    single = [
        Memorizer(tiny, steps=2, learning_rate=rate)(text) for rate, text in zip(rates, contexts, strict=True)
    ]
    both = Memory.stack(single)
    assert both.settings["learning_rate"] == list(rates)
    assert both.settings["steps"] == 2
    both.save(tmp_path / "second.fastmem", row=1)
    loaded = Memory.load(tmp_path / "second.fastmem", tiny)
    assert loaded.settings["learning_rate"] == rates[1]
    assert loaded.texts == [contexts[1]]
    assert loaded.context_hashes == single[1].context_hashes != single[0].context_hashes
    assert both.rows([1, 1]).settings["learning_rate"] == rates[1]
    assert both.rows([1, 0]).settings["learning_rate"] == [rates[1], rates[0]]
    assert json.loads(files.read_header(tmp_path / "second.fastmem")["settings"])["learning_rate"] == rates[1]


def test_a_plot_shows_itself(tiny):
    figure = Memorizer(tiny, steps=3)(TEXT).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert [len(line.get_ydata()) for axes in figure.axes for line in axes.lines] == [3, 3]
