"""Fused RMS norms: recognized by what they compute."""

import pytest
import torch
from torch import nn

from fastmem_pl.backbone.norms import fused, with_fused_norms

RMS = {"llama": 2, "qwen2": 2, "qwen3": 4, "mistral": 2, "gemma2": 4, "gemma3_text": 6, "phi3": 2, "olmo2": 4}
OTHER = {"gpt2": 0, "gpt_neox": 0}


@pytest.mark.parametrize("family", [*RMS, *OTHER])
def test_norms_of_every_family(make_tiny, family):
    block = make_tiny(family).anatomy.blocks[0]
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 1.5)
    norms = {name: fused(module) for name, module in block.named_modules()}
    found = {name: norm for name, norm in norms.items() if norm is not None}
    assert len(found) == {**RMS, **OTHER}[family]
    for name, norm in found.items():
        original = block.get_submodule(name)
        for scale in (1.0, 1e-3):
            x = scale * torch.randn(2, 3, norm.weight.numel())
            torch.testing.assert_close(norm(x), original(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.Linear(8, 8), nn.RMSNorm(8)]
)
def test_others_stay(norm):
    assert fused(norm) is None or isinstance(norm, nn.RMSNorm)


def test_another_function_of_the_same_layout_is_not_taken_for_one():
    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * x * x

    assert fused(Squared()) is None


def test_nothing_changes_on_a_cpu(tiny):
    block = tiny.anatomy.blocks[0]
    assert with_fused_norms(block) is block
