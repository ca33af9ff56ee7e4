"""What a batch takes of the memory, and how many samples that allows."""

import psutil
import pytest
import torch
from conftest import make_module

from fastmem_pl import MemorizationSettings
from fastmem_pl.backbone import usable_bytes
from fastmem_pl.memory import footprint_of


def test_cost_and_samples_are_inverse(tiny):
    footprint = footprint_of(tiny, MemorizationSettings())
    for samples, tokens in ((1, 10), (7, 300), (64, 5)):
        cost = footprint.cost(samples, tokens)
        assert footprint.samples_in(cost, tokens) == samples
        assert footprint.samples_in(cost - 1, tokens) == samples - 1


def test_state_is_counted_from_the_trained_weights(tiny):
    one, two = (footprint_of(tiny, MemorizationSettings(num_layers=k)) for k in (1, 2))
    weights = 3 * 32 * 64
    # Float32 delta, gradient and two moments; beside them a copy for the products.
    assert one.per_sample == weights * 20
    assert two.per_sample == 2 * one.per_sample


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3"])
def test_every_layout_can_be_counted(make_tiny, family):
    footprint = footprint_of(make_tiny(family), MemorizationSettings())
    assert 0 < footprint.per_token < footprint.cost(1, 1)


def test_free_memory_bounds_automatic_batches(tiny, monkeypatch):
    module = make_module()
    module.load_backbone("32-true", torch.device("cpu"), tiny)
    footprint = footprint_of(tiny, MemorizationSettings())
    # Room for question, instruction and answer comes on top of the context.
    allowed = footprint.cost(3, 100 + 128 + module.decoding.max_new_tokens)
    monkeypatch.setattr("fastmem_pl.run.batching.usable_bytes", lambda device: allowed)
    answer = module.longest_answer
    limits = module.budget.limits(answer)
    assert (limits.most(100), limits.most(10_000)) == (3, 1)
    assert 3 < limits.most(1) <= 16
    monkeypatch.setattr("fastmem_pl.run.batching.usable_bytes", lambda device: 1 << 50)
    assert module.budget.limits(answer).most(100) == 16
    assert module.budget.limits(answer, None, 250).most(100) == 2
    assert module.budget.limits(answer, 50).most(100_000) == 50
    fixed = make_module(auto_batch=False)
    fixed.load_backbone("32-true", torch.device("cpu"), tiny)
    assert fixed.budget.limits(100).most(10**9) == 8


def test_usable_is_part_of_what_is_there():
    cpu = torch.device("cpu")
    assert 0 < usable_bytes(cpu) < usable_bytes(cpu, 0.95) < psutil.virtual_memory().total
