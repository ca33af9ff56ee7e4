"""Every decoder against its formula on whole models, for every family, and what a decoder keeps."""

from itertools import pairwise

import pytest
import torch
from conftest import FAMILY_CONFIGS, assert_untouched, snapshot
from decodes import BARE, DECODER_NAMES, PROMPTS, SAMPLED, STRONG, expected_tokens, start, token_ids

from fastmem_pl import DecodingSettings, FastMemError, Memorizer
from fastmem_pl.decoding import DECODERS, Decoder, Prefill
from fastmem_pl.decoding.decoders import candidate_layers, contrast_layers
from fastmem_pl.run.published import UnlimitedDoLa

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_formula(backbone, decoder, memory, num_layers=1):
    prompts, bare = ([backbone.chat.prompt(text) for text in texts] for texts in (PROMPTS, BARE))
    found = token_ids(backbone, decoder, memory, num_layers=num_layers)
    for row, prompt in enumerate(prompts):
        assert found[row] == expected_tokens(backbone, decoder, memory, row, prompt, bare[row])


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_formula_on_whole_models(make_tiny, contexts, family):
    backbone = make_tiny(family)
    memory = Memorizer(backbone, **STRONG)(contexts[:3])
    before = snapshot(backbone)
    for decoder in DECODER_NAMES:
        assert_formula(backbone, decoder, memory)
    assert_formula(backbone, "greedy", None)
    assert_untouched(backbone, before)


@pytest.mark.parametrize("decoder", DECODER_NAMES)
@pytest.mark.parametrize("with_memory", [True, False])
def test_formula_with_two_trained_layers_and_without_memory(tiny, contexts, decoder, with_memory):
    memory = Memorizer(tiny, num_layers=2, **STRONG)(contexts[:3]) if with_memory else None
    assert_formula(tiny, decoder, memory, num_layers=2)


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("decoder", DECODER_NAMES)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_batch_is_one_by_one(tiny, contexts, decoder, settings, num_layers):
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(contexts[:3])
    together = start(tiny, decoder, memory, **settings).run()
    for row in range(3):
        one = ([PROMPTS[row]], [BARE[row]])
        assert start(tiny, decoder, memory.rows([row]), *one, **settings).run() == [together[row]]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_alpha_zero_is_no_contrast(make_tiny, contexts, precision, num_layers):
    backbone = make_tiny(precision=precision)
    memory = Memorizer(backbone, num_layers=num_layers, **STRONG)(contexts[:3])
    for settings in ({}, {"temperature": 1.0}):
        plain = token_ids(backbone, "greedy", memory, **settings)
        for decoder in ("cd", "cad"):
            assert token_ids(backbone, decoder, memory, alpha=0.0, **settings) == plain
            assert token_ids(backbone, decoder, memory, alpha=2.0, **settings) != plain


def test_contrast_without_memory_is_the_base(tiny):
    assert token_ids(tiny, "cd") == token_ids(tiny, "greedy")


class Adaptive(Decoder):
    """A strength for every row and step, kept as it is."""

    needs_without_context = True

    def scores(self, logits):
        gap = logits.model - logits.without_context
        self.note = gap.abs().mean(-1).clamp(max=self.settings.alpha)
        return logits.model + self.note[:, None] * gap

    def details(self, notes):
        return {"strengths": notes}


def test_a_decoder_of_ones_own_keeps_floats_by_step(tiny, contexts, monkeypatch):
    monkeypatch.setitem(DECODERS, "adaptive", Adaptive)
    memory, common = Memorizer(tiny, **STRONG)(contexts[:3]), {"alpha": 2.0, "max_new_tokens": 30}
    free = start(tiny, "adaptive", memory, **common).run()
    stops = (free[0].text[2:4], free[1].text[6:8])
    together = start(tiny, "adaptive", memory, stop=stops, **common).run()
    assert len({len(generated.token_ids) for generated in together}) > 1, "a test that could not fail"
    for row, generated in enumerate(together):
        strengths = generated.details["strengths"]
        assert len(strengths) == len(generated.token_ids)
        assert all(0 < strength <= 2 for strength in strengths)
        assert any(a != b for a, b in pairwise(strengths))
        one = ([PROMPTS[row]], [BARE[row]])
        (alone,) = start(tiny, "adaptive", memory.rows([row]), *one, stop=stops, **common).run()
        assert alone.token_ids == generated.token_ids
        assert alone.details["strengths"] == pytest.approx(strengths, rel=1e-4)


def test_repetition_penalty_is_that_of_transformers(tiny):
    found = token_ids(tiny, repetition_penalty=1.7, max_new_tokens=12)
    for text, tokens in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([tiny.chat.prompt(text)])
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
        expected = tiny.model.generate(input_ids=ids, repetition_penalty=1.7, **settings)
        assert tokens == expected[0, ids.shape[1] :].tolist()
    assert found != token_ids(tiny, max_new_tokens=12)


PENALTIES = ({}, {"repetition_penalty": 1.2}, {"repetition_penalty": 1.0})


def test_dola_has_its_own_penalty_and_the_published_one_none(make_tiny):
    tiny = make_tiny()
    tiny.model.lm_head.weight.data[tiny.stop_ids[0]] = 0  # it hardly ends by itself
    own, alike, none = (token_ids(tiny, "dola", max_new_tokens=30, **p) for p in PENALTIES)
    assert own == alike != none
    published = token_ids(tiny, UnlimitedDoLa)
    assert [row[:30] for row in published] == none
    assert [len(row) for row in published] == [399] * 3
    with pytest.raises(FastMemError, match="dola as published applies none"):
        start(tiny, UnlimitedDoLa, repetition_penalty=1.2)


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("auto", {4, 5, 6, 7}),
        ("high", {4, 5, 6, 7}),
        ("low", {0, 1, 2, 3}),
        ((3, 5), {3, 5}),
        ((0.25, 0.5), {2, 4}),
        ((7,), {7}),
    ],
)
def test_dola_counts_the_layers_that_it_chose(make_tiny, contexts, layers, numbers):
    """Also above the first trained block, where hidden states depend on the memory."""
    backbone = make_tiny(num_hidden_layers=8)
    memory = Memorizer(backbone, num_layers=2, **STRONG)(contexts[0])
    settings = DecodingSettings(dola_layers=layers)
    early = DECODERS["dola"](settings, backbone).early_layers
    prompts = Prefill(backbone, [backbone.chat.prompt("Who?")], 2, early)
    for used in (memory, None):
        (generated,) = start(backbone, "dola", used, prompts, num_layers=2, dola_layers=layers).run()
        counts = generated.details["dola_layers"]
        assert [int(number) for number in counts] == list(early)
        assert set(early) <= numbers
        assert isinstance(layers, str) or set(early) == numbers
        assert sum(counts.values()) == len(generated.token_ids)


def test_most_different_layer_is_chosen_by_row():
    mature = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    early = torch.stack([mature, mature.roll(1, 0)])
    early[0, 1], early[1, 1] = early[1, 1].clone(), early[0, 1].clone()
    _, chosen = contrast_layers(mature, early, 0.1)
    assert chosen.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("wanted", "blocks", "tied", "expected"),
    [
        ("high", 32, False, tuple(range(16, 32, 2))),
        ("high", 30, True, tuple(range(14, 30, 2))),
        ("low", 32, False, tuple(range(0, 16, 2))),
        ("low", 30, True, tuple(range(2, 14, 2))),
        ("auto", 80, False, tuple(range(60, 80, 2))),
        ("auto", 3, True, (0, 2)),
        ("low", 1, True, (0,)),
        ((0.25, 0.5, 7), 8, False, (2, 4, 7)),
    ],
)
def test_candidate_layers(wanted, blocks, tied, expected):
    assert candidate_layers(wanted, blocks, tied) == expected


@pytest.mark.parametrize("wanted", [(8,), (-1,), (2.5,), (), (float("nan"),), (float("inf"),)])
def test_layers_that_are_none(wanted):
    with pytest.raises(FastMemError, match=r"model\.decode\.dola_layers: .*allowed: "):
        candidate_layers(wanted, 8, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"model\.decode\.max_new_tokens: 0 is out of range; allowed: at least 1"),
        ({"alpha": -1.0}, r"model\.decode\.alpha: -1.0 is out of range; allowed: 0 or above"),
        ({"temperature": -1.0}, r"model\.decode\.temperature: -1.0 is out of range; allowed: 0 or above"),
        (
            {"temperature": float("nan")},
            r"model\.decode\.temperature: nan is out of range; allowed: 0 or above",
        ),
        ({"top_p": 0.0}, r"model\.decode\.top_p: 0.0 is out of range; allowed: above 0, at most 1"),
        ({"top_p": 1.1}, r"model\.decode\.top_p: 1.1 is out of range; allowed: above 0, at most 1"),
        ({"top_k": -2}, r"model\.decode\.top_k: -2 is out of range; allowed: 0 \(all\) or above"),
        (
            {"repetition_penalty": 0.0},
            r"model\.decode\.repetition_penalty: 0.0 is out of range; allowed: above 0",
        ),
        ({"relative_top": 0.0}, r"model\.decode\.relative_top: 0.0 is out of range; allowed: above 0"),
        ({"relative_top": 2.0}, r"model\.decode\.relative_top: 2.0 is out of range; allowed: .*at most 1"),
        ({"seed": -1}, r"model\.decode\.seed: -1 is out of range; allowed: 0 or above"),
        ({"stop": ("",)}, r"model\.decode\.stop: \('',\) is out of range; allowed: texts, none empty"),
        ({"stop": "abc"}, r"model\.decode\.stop: 'abc' is out of range"),
        ({"dola_layers": "hihg"}, r"model\.decode\.dola_layers: 'hihg' is unknown; .* did you mean 'high'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(FastMemError, match=message):
        DecodingSettings(**settings)
