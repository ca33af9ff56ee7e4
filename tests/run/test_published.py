"""Quirks of the published code: what each of them changes in a module, and what it leaves alone.

Golden traces hold them to the published code (tests/test_golden.py); rounding and DoLa are checked beside the
sound ones (tests/memory/test_invariants.py, tests/decoding/test_decoders.py).
"""

import json

import pytest
import torch
from conftest import make_module, make_tokenizer
from tokenizers.processors import TemplateProcessing

from fastmem_pl import Backbone, ContextSample, FastMemError, Memory
from fastmem_pl.run.identity import model_identity, settings_of
from fastmem_pl.run.published import QUIRKS

TEXT = "a <|im_end|> b"


@pytest.fixture
def with_bos(tiny):
    """The tiny model with a tokenizer that adds a bos by itself."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return Backbone(tiny.model, tokenizer)


def loaded(backbone, *quirks, **settings):
    module = make_module(methods=["fastmem"], steps=3, published_quirks=list(quirks), **settings)
    module.load_backbone("32-true", backbone.device, backbone)
    return module


def encoded(module, task="qa"):
    return module.encoder(ContextSample(0, "0", task, TEXT, "Who?", ("x",)))


def test_contexts_go_through_a_round_trip(with_bos):
    start, end = with_bos.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    both = loaded(with_bos, "context-round-trip", "parse-special-tokens")
    plain = encoded(loaded(with_bos)).context.input_ids
    found = encoded(both).context
    assert found.input_ids.count(start) == plain.count(start) + 1
    assert found.input_ids.count(end) == plain.count(end) + 1
    assert found.context_tokens == 6
    # Articles go through it twice.
    assert encoded(both, "xsum").context.input_ids.count(start) == plain.count(start) + 2
    parsed = encoded(loaded(with_bos, "parse-special-tokens")).context.input_ids
    assert parsed.count(start) == plain.count(start)


def test_both_quirks_of_memorizing_at_once(tiny, contexts):
    """The norm counts from the second step on (test_prompts.py), and weights are rounded all the same."""
    curves = []
    for quirks in (["norm-every-layer"], ["norm-every-layer", "round-weights"]):
        module = loaded(tiny, *quirks, num_layers=2, learning_rate=1e-2)
        memory = module.memorizer.fit([module.memorizer.encode(contexts[0])])
        curves.append(memory.curves[0].cross_entropy)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    base = module.backbone.tail(2).ffns[1].base_weights["up"]
    delta = memory.deltas[1]["up"]
    assert torch.equal((base + delta) - base, delta)


@pytest.mark.parametrize("quirk", QUIRKS)
def test_memory_files_say_what_they_were_made_under(tiny, contexts, tmp_path, quirk):
    module = loaded(tiny, quirk)
    module.mode, module.memories = "fit", tmp_path
    module.predict_step([ContextSample(0, "0", "qa", contexts[0], "Who?", ("x",))])
    path = tmp_path / "000000.safetensors"
    memory = Memory.load(path)
    named = [] if quirk == "dola-unlimited" else [quirk]
    assert memory.settings.get("published_quirks", ()) == tuple(named)
    assert memory.rows([0, 0]).settings == memory.settings
    memory.save(tmp_path / "again.safetensors")
    assert Memory.load(tmp_path / "again.safetensors").settings == memory.settings
    assert model_identity(module, True)["published_quirks"] == named
    assert [*named, *model_identity(module, True)["answer_quirks"]] == [quirk]
    assert json.loads(json.dumps(settings_of(module)))["published_quirks"] == [quirk]


def test_names_are_a_list():
    with pytest.raises(FastMemError, match=r"model\.published_quirks: give a list, such as"):
        make_module(published_quirks="round-weights")
