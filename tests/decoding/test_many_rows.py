"""Rows that end one after another, and caches that are full to the last position, as transformers has them."""

import random

import pytest
import torch
from conftest import assert_untouched, snapshot

from fastmem_pl import DecodingSettings, Memorizer, Memory, answer
from fastmem_pl.decoding import Decoding, Prefill

pytestmark = pytest.mark.usefixtures("one_thread")
STRONG = {"steps": 3, "learning_rate": 0.01}


def generate(backbone, prompt, tokens):
    """Greedy decoding of transformers itself."""
    ids = torch.tensor([prompt])
    ends = backbone.model.generation_config.eos_token_id
    found = backbone.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=ends,
    )
    return found[0, len(prompt) :].tolist()


def random_prompts(lengths):
    numbers = random.Random(1)
    return [[numbers.randrange(256) for _ in range(length)] for length in lengths]


def decode(backbone, prompts, decoder="greedy", memory=None, num_layers=1, **settings):
    prefill = Prefill(backbone, prompts, num_layers)
    deltas = memory.deltas if memory else None
    return Decoding(prefill, decoder, DecodingSettings(**settings), deltas).run()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt2"])
def test_many_end_tokens_end_rows_as_generate_does(make_tiny, family):
    backbone = make_tiny(family)
    prompts = random_prompts((3, 30, 12, 7, 50, 4, 21, 5, 16, 9))
    full = [g.token_ids for g in decode(backbone, prompts, max_new_tokens=40)]
    known = sorted({token for ids in full for token in ids})

    def lengths(ends):
        return [next((i for i, token in enumerate(ids) if token in ends), 39) + 1 for ids in full]

    # Ids that end these rows in as many different places as can be.
    candidates = [random.Random(seed).sample(known, 1 + seed % 4) for seed in range(300)]
    ends = max(candidates, key=lambda ids: len(set(lengths(ids))) + (max(lengths(ids)) == 40))
    backbone.model.generation_config.eos_token_id = [*ends, backbone.tokenizer.eos_token_id]
    found = [g.token_ids for g in decode(backbone, prompts, max_new_tokens=40)]
    assert len({len(ids) for ids in found}) >= 4, "a test that could not fail"
    assert found == [generate(backbone, prompt, 40) for prompt in prompts]


@pytest.mark.parametrize(("decoder", "num_layers"), [("greedy", 1), ("cd", 2)])
def test_one_long_row_among_many_short_ones(tiny, decoder, num_layers):
    """Rows that leave one after another, down to the last, take neither memory nor cache with them."""
    texts = [f"{'abcdefghijklmnopqrstuvwxyz'[i:] * 2} {i}." for i in range(16)]
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(texts)
    prompts = [tiny.chat.prompt(text) for text in texts]
    settings = {"num_layers": num_layers, "max_new_tokens": 60}
    full = [g.text for g in decode(tiny, prompts, decoder, memory, **settings)]

    def cut(text, stops):
        return text[: min((text.find(stop) for stop in stops if stop in text), default=None)]

    pairs = sorted(
        {text[i : i + 2] for text in full for i in range(len(text) - 1) if text[i : i + 2].isascii()}
    )
    candidates = [tuple(random.Random(seed).sample(pairs, 1 + seed % 6)) for seed in range(400)]
    stops = max(candidates, key=lambda stops: len({len(cut(text, stops)) for text in full}))
    found = decode(tiny, prompts, decoder, memory, stop=stops, **settings)
    assert [g.text for g in found] == [cut(text, stops) for text in full]
    for row in (0, 5, 10, 15):
        (single,) = decode(tiny, [prompts[row]], decoder, memory.rows([row]), stop=stops, **settings)
        assert single == found[row]
    lengths = [len(g.token_ids) for g in found]
    assert len(set(lengths)) >= 5, "a test that could not fail"
    assert max(lengths) - min(lengths) >= 30, "a test that could not fail"


def test_all_rows_end_at_once(tiny, contexts):
    prompts = [tiny.chat.prompt(text) for text in contexts]
    full = decode(tiny, prompts, max_new_tokens=20)
    everything = (*map(chr, range(1, 128)), "\ufffd")
    for found, whole in zip(decode(tiny, prompts, max_new_tokens=20, stop=everything), full, strict=True):
        assert (found.text, found.token_ids) == ("", whole.token_ids[: len(found.token_ids)])
        assert len(found.token_ids) < 20
    one = decode(tiny, prompts, max_new_tokens=1)
    assert [g.token_ids for g in one] == [g.token_ids[:1] for g in full]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_answers_up_to_the_models_last_position(make_tiny, family):
    """Caches of a fixed size: at, below and above multiples of 64, and up to the limit of the model."""
    backbone = make_tiny(family, max_position_embeddings=160)
    for length in (1, 24, 25, 88, 89, 120):
        prompts = random_prompts((length, 1 + length // 3))
        found = [g.token_ids for g in decode(backbone, prompts, max_new_tokens=40)]
        assert found == [generate(backbone, prompt, 40) for prompt in prompts], length


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
    for ours, other in zip(auto.deltas, full.deltas, strict=True):
        for name in ours:
            assert ours[name].dtype == other[name].dtype == torch.float32
            assert torch.equal(ours[name], other[name])
