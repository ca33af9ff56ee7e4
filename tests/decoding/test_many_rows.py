"""Rows that end one after another, and caches that are full to the last position, as transformers has them."""

import random

import pytest
import torch
from conftest import assert_untouched, snapshot
from decodes import assert_generate, start, token_ids
from memories import assert_deltas, cut_at_end

from fastmem_pl import Memorizer, Memory, answer

pytestmark = pytest.mark.usefixtures("one_thread")
STRONG = {"steps": 3, "learning_rate": 0.01}


def random_prompts(lengths):
    numbers = random.Random(1)
    return [[numbers.randrange(256) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt2"])
def test_many_end_tokens_end_rows_as_generate_does(make_tiny, family):
    backbone = make_tiny(family)
    prompts = random_prompts((3, 30, 12, 7, 50, 4, 21, 5, 16, 9))
    full = token_ids(backbone, prompts=prompts, max_new_tokens=40)
    known = sorted({token for ids in full for token in ids})

    def lengths(ends):
        return [len(ids) for ids in cut_at_end(full, ends)]

    # Ids that end these rows in as many different places as can be.
    candidates = [random.Random(seed).sample(known, 1 + seed % 4) for seed in range(300)]
    ends = max(candidates, key=lambda ids: len(set(lengths(ids))) + (max(lengths(ids)) == 40))
    backbone.model.generation_config.eos_token_id = [*ends, backbone.tokenizer.eos_token_id]
    found = token_ids(backbone, prompts=prompts, max_new_tokens=40)
    assert len({len(ids) for ids in found}) >= 4, "a test that could not fail"
    assert_generate(backbone, prompts, found, 40)


def test_all_rows_end_at_once(tiny, contexts):
    prompts = [tiny.chat.prompt(text) for text in contexts]
    full = start(tiny, prompts=prompts, max_new_tokens=20).run()
    everything = (*map(chr, range(1, 128)), "\ufffd")
    ended = start(tiny, prompts=prompts, max_new_tokens=20, stop=everything).run()
    for found, whole in zip(ended, full, strict=True):
        assert (found.text, found.token_ids) == ("", whole.token_ids[: len(found.token_ids)])
        assert len(found.token_ids) < 20
    assert token_ids(tiny, prompts=prompts, max_new_tokens=1) == [g.token_ids[:1] for g in full]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_answers_up_to_the_models_last_position(make_tiny, family):
    """Caches of a fixed size: at, below and above multiples of 64, and up to the limit of the model."""
    backbone = make_tiny(family, max_position_embeddings=160)
    for length in (1, 24, 25, 88, 89, 120):
        prompts = random_prompts((length, 1 + length // 3))
        assert_generate(backbone, prompts, token_ids(backbone, prompts=prompts, max_new_tokens=40), 40)


@pytest.mark.parametrize(("precision", "num_layers"), [("32-true", 2), ("bf16-true", 1), ("bf16-mixed", 2)])
def test_memories_of_either_type(make_tiny, contexts, tmp_path, precision, num_layers):
    backbone = make_tiny(precision=precision)
    before = snapshot(backbone)
    memory = Memorizer(backbone, num_layers=num_layers, **STRONG)(contexts)
    short = memory.to(torch.bfloat16)
    assert {d.dtype for layer in short.deltas for d in layer.values()} == {torch.bfloat16}
    assert {d.dtype for layer in memory.deltas for d in layer.values()} == {torch.float32}
    rounded = short.to(torch.float32)
    for row in range(4):
        short.save(tmp_path / f"{row}", row, torch.bfloat16)
    loaded = Memory.stack([Memory.load(tmp_path / f"{row}") for row in range(4)])
    mixed = Memory.stack([rounded.rows([0]), *(short.rows([i]) for i in (1, 2)), rounded.rows([3])])
    # Where products run in bfloat16, storing it loses nothing.
    same = [short, loaded, mixed, *([memory] if precision != "32-true" else [])]
    questions = ["Who?", "Where is it?", "x", "Why, and since when?"]
    for decoder in ("greedy", "cad"):
        settings = {"decoder": decoder, "max_new_tokens": 10}
        expected = answer(backbone, questions, contexts, rounded, **settings)
        for other in same:
            assert answer(backbone, questions, contexts, other, **settings) == expected
    assert_untouched(backbone, before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_optimizers_state_changes_nothing_on_a_cpu(make_tiny, contexts, precision):
    """Auto takes bfloat16 only where the kernel runs."""
    backbone = make_tiny(precision=precision)
    auto = Memorizer(backbone, **STRONG)(contexts)
    full = Memorizer(backbone, optimizer_state="float32", **STRONG)(contexts)
    assert [c.as_dict() for c in auto.curves] == [c.as_dict() for c in full.curves]
    assert {d.dtype for memory in (auto, full) for d in memory.deltas[0].values()} == {torch.float32}
    assert_deltas(auto, full)
