"""The trunk/tail split equals the model itself, for every family."""

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILY_CONFIGS, make_model, make_tokenizer
from torch import nn

from fastmem_pl import Backbone, FastMemError
from fastmem_pl.backbone import FixedCache

FAMILIES = sorted(FAMILY_CONFIGS)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_tail_of_trunk_is_the_model(make_tiny, family, num_layers):
    backbone = make_tiny(family)
    ids = torch.randint(0, 250, (2, 40))
    expected = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    inputs = backbone.run_trunk(num_layers, ids)
    tail = backbone.tail(num_layers)
    with backbone.numerics():
        found = tail.finish_logits(tail.raw_logits(tail.hidden(inputs, tail.base(inputs))))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_trunk_is_the_full_forward_and_a_fixed_cache_the_growing_one(make_tiny, family):
    backbone = make_tiny(family)
    ids = torch.randint(0, 250, (2, 30))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    full = backbone.run_trunk(1, ids, mask, places)
    cache, position = backbone.new_cache(), torch.tensor([25])
    backbone.run_trunk(1, ids[:, :25], mask[:, :25], places[:, :25], cache)
    fixed = FixedCache.continuing(cache, 64, position, 25)
    fixed_mask = F.pad(mask, (0, 64 - 30), value=1)
    for start, end in ((25, 26), (26, 27), (27, 30)):
        token, place = ids[:, start:end], places[:, start:end]
        grown = backbone.run_trunk(1, token, mask[:, :end], place, cache)
        torch.testing.assert_close(grown.residual, full.residual[:, start:end], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grown.ffn_input, full.ffn_input[:, start:end], rtol=1e-4, atol=1e-4)
        if end == start + 1:
            found = backbone.run_trunk(1, token, fixed_mask, place, fixed)
            position += 1
            torch.testing.assert_close(found.residual, grown.residual, rtol=5e-5, atol=5e-5)
            torch.testing.assert_close(found.ffn_input, grown.ffn_input, rtol=5e-5, atol=5e-5)


def test_a_model_whose_logits_differ_is_refused(monkeypatch):
    model = make_model()
    head = model.lm_head
    # As a model family that scales its logits would.
    monkeypatch.setattr(model, "lm_head", nn.Sequential(head, nn.Threshold(0.0, 0.0)))
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    with pytest.raises(FastMemError, match=r"LlamaForCausalLM changes the output of its LM head"):
        Backbone(model, make_tokenizer())


def test_trunk_must_keep_a_block_of_every_attention_type(make_tiny):
    with pytest.raises(FastMemError, match="leaves no full_attention block in the trunk"):
        make_tiny("gemma3_text").tail(3)


@pytest.mark.parametrize("num_layers", [0, 4])
def test_num_layers_out_of_range(tiny, num_layers):
    with pytest.raises(FastMemError, match=r"model\.memorize\.num_layers: .* allowed: 1 to 3"):
        tiny.tail(num_layers)


def test_fingerprint_is_of_the_weights_not_their_type(make_tiny):
    assert make_tiny().fingerprint() == make_tiny(precision="bf16-true").fingerprint()
    assert make_tiny().fingerprint() != make_tiny(seed=1).fingerprint()


@pytest.mark.parametrize(("given", "found"), [(32, "32-true"), ("bf16", "bf16-mixed")])
def test_precision_spellings(given, found):
    assert Backbone(make_model(), make_tokenizer(), given).precision == found


def test_unknown_precision():
    with pytest.raises(FastMemError, match=r"trainer\.precision: '16-mixed' is unknown; allowed"):
        Backbone(make_model(), make_tokenizer(), "16-mixed")
