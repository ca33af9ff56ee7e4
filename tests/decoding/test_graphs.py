"""States kept from decode to decode, and rows that leave the batch: the same answers as one by one.

Recording a step needs a GPU (test_cuda.py); here, recorded steps are stood in for by the steps themselves.
"""

import math

import pytest
import torch
from decodes import DECODER_NAMES, PROMPTS, STRONG, start

from fastmem_pl import Memorizer
from fastmem_pl.decoding import GraphPool, graphs, loop

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3}
TEXTS = [*PROMPTS, "Why not?"]


@pytest.fixture
def recorded(monkeypatch):
    """Count recordings of steps, which run as they are."""
    steps = []
    monkeypatch.setattr(graphs, "_record", lambda step: steps.append(step) or step)
    return steps


def ids(generated):
    return [(g.token_ids, g.details) for g in generated]


def assert_alike(found, expected):
    """The same tokens and details; strengths up to rounding."""
    for (tokens, details), (expected_tokens, expected_details) in zip(found, expected, strict=True):
        assert tokens == expected_tokens
        strengths, expected_strengths = (
            [math.nan if value is None else value for value in one.pop("strengths", [])]
            for one in (details, expected_details)
        )
        assert strengths == pytest.approx(expected_strengths, rel=1e-3, abs=1e-6, nan_ok=True)
        assert details == expected_details


def begin(backbone, texts, decoder="greedy", memory=None, pool=None, **settings):
    decoding = start(backbone, decoder, memory, texts, ["Why?"] * len(texts), **settings)
    decoding._graphs = pool
    return decoding


def answers(*args, **settings):
    return ids(begin(*args, **settings).run())


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("settings", [{}, SAMPLED])
@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_a_kept_state_forgets_the_batch_before(tiny, contexts, recorded, decoder, settings, num_layers):
    memorizer = Memorizer(tiny, num_layers=num_layers, **STRONG)
    one, other = memorizer(contexts[:2]), memorizer(contexts[2:])
    before = [{n: t.clone() for n, t in layer.items()} for layer in one.deltas]
    pool = GraphPool()
    for texts, memory in ((TEXTS[:2], one), (TEXTS[2:], other), (TEXTS[1:3], one)):
        kept = answers(tiny, texts, decoder, memory, pool, **settings)
        assert_alike(kept, answers(tiny, texts, decoder, memory, **settings))
    # Batches with the long prompt share a state, the one of short prompts has its own.
    assert len(recorded) == 2
    for layer, expected in zip(one.deltas, before, strict=True):
        for name in layer:
            assert torch.equal(layer[name], expected[name]), "the caller's memory was written to"


@pytest.mark.parametrize("decoder", ["cd", "dola"])
def test_under_inference_mode(tiny, contexts, recorded, decoder):
    memory, pool = Memorizer(tiny, **STRONG)(contexts[:2]), GraphPool()
    expected = answers(tiny, TEXTS[:2], decoder, memory, **SAMPLED)
    for guard in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with guard():
            assert answers(tiny, TEXTS[:2], decoder, memory, pool, **SAMPLED) == expected


def test_methods_share_a_pool(tiny, contexts, recorded):
    memory, pool = Memorizer(tiny, **STRONG)(contexts[:2]), GraphPool()
    for _ in range(2):
        for decoder, used in (("greedy", None), ("greedy", memory), ("cd", memory)):
            found = answers(tiny, TEXTS[:2], decoder, used, pool)
            assert found == answers(tiny, TEXTS[:2], decoder, used)
    assert len(recorded) == 3


def test_two_decodes_at_once_do_not_share(tiny, contexts, recorded):
    memorizer = Memorizer(tiny, **STRONG)
    memories = [memorizer(contexts[:2]), memorizer(contexts[2:])]
    expected = [answers(tiny, TEXTS[:2], "cd", memory) for memory in memories]
    pool = GraphPool()
    decodings = [begin(tiny, TEXTS[:2], "cd", memory, pool) for memory in memories]
    for _ in range(8):
        for decoding in decodings:
            decoding.step()
    assert [ids(decoding.results()) for decoding in decodings] == expected
    # One that was given up does not keep the pool for itself.
    recordings = len(recorded)
    del decodings, decoding
    assert answers(tiny, TEXTS[:2], "cd", memories[1], pool) == expected[1]
    assert len(recorded) == recordings


def test_another_batch_size_drops_the_states(tiny, recorded):
    pool = GraphPool()
    for texts in (TEXTS, TEXTS[:1], TEXTS):
        answers(tiny, texts, pool=pool)
    assert len(recorded) == 3
    assert len(pool._idle) == 1


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("settings", [{}, SAMPLED])
@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_rows_that_ended_leave_and_change_nothing(tiny, contexts, monkeypatch, decoder, settings, num_layers):
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(contexts)
    settings = {**settings, "max_new_tokens": 40}
    whole = begin(tiny, TEXTS, decoder, memory, keys=range(4), **settings).run()
    # A letter that ends two or three of the answers early and lets the others go on.
    stops = [c for c in "abcdefghijklmnopqrstuvwxyz0123456789 " if 2 <= sum(c in g.text for g in whole) <= 3]
    assert stops, "no stop text ends some answers and not others"
    settings["stop"] = (stops[0],)
    copies = []
    rows = loop.DecodeState.rows
    monkeypatch.setattr(
        loop.DecodeState, "rows", lambda self, index: copies.append(len(index)) or rows(self, index)
    )
    found = answers(tiny, TEXTS, decoder, memory, keys=range(4), **settings)
    assert copies, "no rows left"
    assert all(size <= 2 for size in copies)
    for row, text in enumerate(TEXTS):
        alone = answers(tiny, [text], decoder, memory.rows([row]), keys=[row], **settings)
        assert_alike(alone, [found[row]])
