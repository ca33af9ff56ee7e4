"""Loading from folders and GGUF files; what cannot be loaded is named in one line."""

import pytest
import torch

from fastmem_pl import Backbone, FastMemError
from fastmem_pl.backbone import loading


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("bf16-true", torch.bfloat16)])
def test_folder(tiny_folder, tiny, precision, dtype):
    backbone = Backbone.load(str(tiny_folder), precision)
    assert backbone.fingerprint() == tiny.fingerprint()
    assert backbone.model.dtype is dtype
    assert backbone.model.model.rotary_emb.inv_freq.dtype is torch.float32


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such folder: /no/such/folder"),
        ("./model.gguf", "no such GGUF file: ./model.gguf"),
        ("dem", "'dem' is unknown; allowed: 'demo', a Hub id, .* did you mean 'demo'"),
    ],
)
def test_missing_models(source, message):
    with pytest.raises(FastMemError, match=message):
        Backbone.load(source)


def test_folder_with_only_a_gguf_names_it(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"x")
    with pytest.raises(FastMemError, match=r"holds no config\.json; name the file: .*m\.gguf"):
        Backbone.load(str(tmp_path))


def test_damaged_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"not a model")
    with pytest.raises(FastMemError, match="cannot read the GGUF file"):
        Backbone.load(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").iterdir())


def test_remote_code_is_off_by_default(tiny_folder, monkeypatch):
    asked = []

    class Auto:
        @staticmethod
        def from_pretrained(*args, trust_remote_code, **kwargs):
            asked.append(trust_remote_code)
            raise OSError("stop here")

    monkeypatch.setattr("transformers.AutoTokenizer", Auto)
    for wanted in (False, True):
        with pytest.raises(FastMemError, match=r"cannot load .*: stop here"):
            loading.load_model(str(tiny_folder), **({"trust_remote_code": True} if wanted else {}))
    assert asked == [False, True]


@pytest.mark.demo
def test_demo_tokenizer_is_repaired(demo):
    # The GGUF's tokenizer lacks the digit splitter and most control tokens.
    assert demo.tokenizer("1,000").input_ids == [33, 28, 32, 32, 32]
    assert demo.tokenizer("<|endoftext|>").input_ids == [0]
    assert demo.context_length == 8192
    pieces = demo.chat.pieces
    assert pieces.user_header == "<|im_start|>user\n"
    assert pieces.assistant_header == "<|im_start|>assistant\n"


@pytest.mark.demo
def test_second_load_takes_the_converted_copy(demo, monkeypatch):
    def fail(*args):
        raise AssertionError("converted again")

    monkeypatch.setattr(loading, "_convert", fail)
    assert Backbone.load("demo").fingerprint() == demo.fingerprint()
