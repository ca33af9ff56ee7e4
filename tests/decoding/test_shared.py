"""Many memories on one prompt: the same answers as with a prompt of its own for each."""

import pytest
import torch

from fastmem_pl import MemorizationSettings, Memorizer
from fastmem_pl.decoding import Decoding, DecodingSettings, Prefill
from fastmem_pl.decoding.prefill import SequenceState
from fastmem_pl.memory import ContextReader

RATES = (1e-5, 3e-3, 1e-2, 1e-2, 3e-2)


def memories(backbone, context, num_layers=1):
    """Rows of different strength on one context; two of them alike."""
    settings = MemorizationSettings(steps=8, num_layers=num_layers)
    rows = [MemorizationSettings(steps=8, num_layers=num_layers, learning_rate=rate) for rate in RATES]
    memorizer = Memorizer(backbone, settings)
    (_, memory), *_ = ContextReader(memorizer, memorizer.encode(context)).snapshots(rows, [8])
    return memory


def early_layers(backbone, decoder, settings):
    from fastmem_pl.decoding import DECODERS

    return DECODERS[decoder](settings, backbone).early_layers


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize(
    ("decoder", "given", "num_layers"),
    [
        ("greedy", {}, 1),
        ("greedy", {}, 2),
        ("greedy", {"temperature": 1.0, "repetition_penalty": 1.3}, 1),
        ("cd", {"alpha": 0.7}, 1),
        ("cad", {"alpha": 0.7}, 1),
        ("dola", {}, 1),
    ],
)
def test_shared_prompt_is_a_prompt_each(make_tiny, contexts, family, decoder, given, num_layers):
    backbone = make_tiny(family, seed=1)
    memory = memories(backbone, contexts[2], num_layers)
    settings = DecodingSettings(max_new_tokens=12, **given)
    early = early_layers(backbone, decoder, settings)
    prompt, bare = backbone.chat.prompt("Who did what, and where?"), backbone.chat.prompt("Who?")

    def prefills(tokens, count):
        one = Prefill(backbone, [tokens] * count, num_layers, early)
        return one if count > 1 else one.expand(len(RATES))

    def run(count):
        without = prefills(bare, count) if decoder == "cad" else None
        keys = list(range(len(RATES)))
        shared = prefills(prompt, count)
        return Decoding(shared, decoder, settings, memory.deltas, without, keys=keys).run()

    found, expected = run(1), run(len(RATES))
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert [a.details for a in found] == [a.details for a in expected]
    assert len({tuple(a.token_ids) for a in found}) > 1, "all rows said the same"


def test_the_trunk_runs_once_for_rows_that_agree(make_tiny, contexts, monkeypatch):
    tiny = make_tiny(seed=1)
    memory = memories(tiny, contexts[2]).rows([0, 0, 0, 4, 4])
    batches = []
    run_trunk = type(tiny).run_trunk
    monkeypatch.setattr(
        type(tiny),
        "run_trunk",
        lambda self, k, ids, *rest: batches.append(len(ids)) or run_trunk(self, k, ids, *rest),
    )
    prefill = Prefill(tiny, [tiny.chat.prompt("Who did what, and where?")]).expand(5)
    answers = Decoding(prefill, "greedy", DecodingSettings(max_new_tokens=12), memory.deltas).run()
    assert len({tuple(a.token_ids) for a in answers}) == 2, "the memories do not differ"
    assert set(batches) == {1, 2}


def test_rows_that_end_leave_the_others_as_they_were(make_tiny, contexts, monkeypatch):
    backbone = make_tiny(seed=1)
    memory = memories(backbone, contexts[2])
    prompt = backbone.chat.prompt("Who did what, and where?")
    settings = DecodingSettings(max_new_tokens=40)
    one = Prefill(backbone, [prompt])
    first = Decoding(one.expand(5), "greedy", settings, memory.deltas).run()
    # Two texts that end most rows soon, and not all.
    ending = [answer.text[2:4] for answer in first if len(answer.text) > 6][:2]
    settings = DecodingSettings(max_new_tokens=40, stop=tuple(ending))
    dropped = []
    rows = SequenceState.rows
    monkeypatch.setattr(
        SequenceState, "rows", lambda self, index: dropped.append(len(index)) or rows(self, index)
    )
    found = Decoding(one.expand(5), "greedy", settings, memory.deltas).run()
    expected = Decoding(Prefill(backbone, [prompt] * 5), "greedy", settings, memory.deltas).run()
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert dropped, "no row left"
    assert len({len(a.token_ids) for a in found}) > 1


def test_the_prefill_stays_as_it_was(tiny, contexts):
    memory = memories(tiny, contexts[2])
    one = Prefill(tiny, [tiny.chat.prompt("Who?")])
    before = [
        (layer.keys.clone(), layer.values.clone()) for layer in one.cache.layers if layer.is_initialized
    ]
    settings = DecodingSettings(max_new_tokens=6)
    runs = [Decoding(one.expand(5), "greedy", settings, memory.deltas).run() for _ in range(2)]
    after = [(layer.keys, layer.values) for layer in one.cache.layers if layer.is_initialized]
    assert before
    for pair, other in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
    assert [a.token_ids for a in runs[0]] == [a.token_ids for a in runs[1]]
