"""Fused RMS norms: recognized by what they compute."""

import copy

import pytest
import torch
from torch import nn

from fastmem_pl.backbone.norms import fused, with_fused_norms

RMS = {"llama": 2, "qwen2": 2, "qwen3": 4, "mistral": 2, "gemma2": 4, "gemma3_text": 6, "phi3": 2, "olmo2": 4}


@pytest.mark.parametrize(("family", "count"), [*RMS.items(), ("gpt2", 0), ("gpt_neox", 0)])
def test_norms_of_every_family(make_tiny, family, count):
    block = make_tiny(family).anatomy.blocks[0]
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 1.5)
    norms = {name: fused(module) for name, module in block.named_modules()}
    found = {name: norm for name, norm in norms.items() if norm is not None}
    assert len(found) == count
    for name, norm in found.items():
        original = block.get_submodule(name)
        for scale in (1.0, 1e-3):
            x = scale * torch.randn(2, 3, norm.weight.numel())
            torch.testing.assert_close(norm(x), original(x), rtol=1e-5, atol=1e-6)


class Squared(nn.Module):
    """Another function of the same layout."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return self.weight * x * x


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.Linear(8, 8), Squared()])
def test_others_stay(norm):
    assert fused(norm) is None


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_as_exact_as_the_models_own(make_tiny, family):
    original = make_tiny(family, "bf16-true").anatomy.blocks[0].input_layernorm
    with torch.no_grad():
        original.weight.normal_(0.0, 0.05)
    exact = copy.deepcopy(original).double()
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    errors = [(norm(x).double() - exact(x.double())).norm() for norm in (fused(original), original)]
    assert errors[0] <= 1.01 * errors[1]
    with torch.no_grad():
        original.weight.add_(70.0)
    # Two steps of bfloat16; one was measured.
    torch.testing.assert_close(fused(original)(x), original(x), rtol=0.016, atol=0.01)


def test_found_whatever_the_default_type_is(make_tiny):
    block = make_tiny("llama", "bf16-true").anatomy.blocks[0]
    # A bf16-true trainer makes bfloat16 the default.
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fused(block.input_layernorm) is not None
    finally:
        torch.set_default_dtype(torch.float32)
    # Nothing is gained on a CPU.
    assert with_fused_norms(block) is block
