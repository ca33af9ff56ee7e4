"""Every decoder against its formula on whole models, for every family, and what a decoder keeps."""

from itertools import pairwise

import pytest
from conftest import FAMILY_CONFIGS, assert_untouched, snapshot
from decodes import BARE, DECODER_NAMES, PROMPTS, STRONG, assert_generate, expected_tokens, start, token_ids

from fastmem_pl import DecodingSettings, FastMemError, Memorizer
from fastmem_pl.decoding import DECODERS, Decoder, Prefill
from fastmem_pl.decoding.decoders import candidate_layers
from fastmem_pl.run.published import UnlimitedDoLa

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_formula_on_whole_models(make_tiny, contexts, family):
    backbone = make_tiny(family)
    memory = Memorizer(backbone, **STRONG)(contexts[:3])
    before = snapshot(backbone)
    prompts, bare = ([backbone.chat.prompt(text) for text in texts] for texts in (PROMPTS, BARE))
    for decoder in DECODER_NAMES:
        found = token_ids(backbone, decoder, memory)
        for row, prompt in enumerate(prompts):
            assert found[row] == expected_tokens(backbone, decoder, memory, row, prompt, bare[row])
    assert_generate(backbone, prompts, token_ids(backbone))
    assert_untouched(backbone, before)


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
    assert len({len(found.token_ids) for found in together}) > 1, "a test that could not fail"
    for row, found in enumerate(together):
        strengths = found.details["strengths"]
        assert len(strengths) == len(found.token_ids)
        assert all(0 < strength <= 2 for strength in strengths)
        assert any(a != b for a, b in pairwise(strengths))
        one = ([PROMPTS[row]], [BARE[row]])
        (alone,) = start(tiny, "adaptive", memory.rows([row]), *one, stop=stops, **common).run()
        assert alone.token_ids == found.token_ids
        assert alone.details["strengths"] == pytest.approx(strengths, rel=1e-4)


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
        (found,) = start(backbone, "dola", used, prompts, num_layers=2, dola_layers=layers).run()
        counts = found.details["dola_layers"]
        assert [int(number) for number in counts] == list(early)
        assert set(early) <= numbers
        assert isinstance(layers, str) or set(early) == numbers
        # The embeddings hardly ever differ most here; each of the blocks does now and then.
        assert all(counts[number] for number in counts if number != "0")
        assert sum(counts.values()) == len(found.token_ids)


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
    ("setting", "value", "message"),
    [
        ("max_new_tokens", 0, "out of range; allowed: at least 1"),
        *((name, -1.0, "out of range; allowed: 0 or above") for name in ("alpha", "temperature")),
        ("temperature", float("nan"), "out of range; allowed: 0 or above"),
        ("seed", -1, "out of range; allowed: 0 or above"),
        *(("top_p", value, "out of range; allowed: above 0, at most 1") for value in (0.0, 1.1)),
        *(("relative_top", value, "out of range; allowed: above 0, at most 1") for value in (0.0, 2.0)),
        ("top_k", -2, "out of range; allowed: 0 (all) or above"),
        ("repetition_penalty", 0.0, "out of range; allowed: above 0, or null"),
        *(("stop", value, "out of range; allowed: texts, none empty") for value in (("",), "abc")),
        ("dola_layers", "hihg", "unknown; allowed: a list of layers, auto, high, low; did you mean 'high'?"),
    ],
)
def test_settings_out_of_range(setting, value, message):
    with pytest.raises(FastMemError) as refused:
        DecodingSettings(**{setting: value})
    assert str(refused.value) == f"model.decode.{setting}: {value!r} is {message}"
