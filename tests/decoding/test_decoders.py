"""Every decoder against its formula on whole models, for every family, and what a decoder keeps."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import FAMILY_CONFIGS, assert_untouched, snapshot
from decodes import (
    ADAPTIVE,
    BARE,
    DECODER_NAMES,
    PROMPTS,
    STRONG,
    assert_generate,
    expected_tokens,
    plain_adaptive,
    start,
    token_ids,
)

from fastmem_pl import DecodingSettings, FastMemError, Memorizer
from fastmem_pl.decoding import DECODERS, Decoder, Prefill, StepLogits
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
        for decoder, strong in (("cd", 2.0), ("cad", 2.0), ("adacad", 9.0), ("adacd", 99.0)):
            assert token_ids(backbone, decoder, memory, alpha=0.0, **settings) == plain
            assert token_ids(backbone, decoder, memory, alpha=strong, **settings) != plain


@pytest.mark.parametrize("decoder", [name for name in DECODER_NAMES if name != "greedy"])
def test_only_plausible_tokens(tiny, contexts, decoder):
    """The share of the highest probability that a token must have is a setting of every contrast."""
    memory = Memorizer(tiny, **STRONG)(contexts[:3])
    prompts, bare = ([tiny.chat.prompt(text) for text in texts] for texts in (PROMPTS, BARE))
    alpha = None if decoder == "ck-plug" else 5.0
    plain, answers = token_ids(tiny, "greedy", memory), []
    for top in (0.8, 1.0):
        found = token_ids(tiny, decoder, memory, relative_top=top, alpha=alpha)
        for row, prompt in enumerate(prompts):
            settings = {"relative_top": top, "alpha": alpha}
            assert found[row] == expected_tokens(tiny, decoder, memory, row, prompt, bare[row], **settings)
        answers.append(found)
    if decoder not in ("ck-plug", "dola"):  # one never takes fewer than ten, one penalizes repetitions
        assert answers[1] == plain


def step(decoder, shown, hidden, **settings):
    """Scores and strengths of one step, ``(B, V)`` and ``(B,)``, from logits made by hand."""
    made = DECODERS[decoder](DecodingSettings(**settings), None)
    return made.scores(StepLogits(shown, hidden, hidden)), made.note


SETTINGS = {
    "adacad": [{}, {"alpha": 0.5, "alpha_min": 0.2}, {"alpha": 3.0, "relative_top": 0.2}],
    "adacd": [{}, {"alpha": 0.5, "alpha_min": 0.2}, {"alpha": 3.0, "relative_top": 0.2}],
    "coiecd": [{}, {"alpha": 0.3, "entropy_bound": 0.6}, {"entropy_bound": 0.9, "relative_top": 0.2}],
    "cocoa": [{}, {"renyi_order": 0.8, "gap_weight": 0.3}, {"peak_weight": 0.5, "relative_top": 0.2}],
    "ck-plug": [{}, {"alpha": 0.0}, {"alpha": 0.9, "relative_top": 0.5}, {"alpha": 1.0}],
}


@pytest.mark.parametrize(
    ("decoder", "settings"), [(name, given) for name in ADAPTIVE for given in SETTINGS[name]], ids=str
)
def test_scores_and_strengths_of_one_step(decoder, settings):
    shown, hidden = torch.randn(2, 12, 40, generator=torch.Generator().manual_seed(1)).unbind(0)
    # From flat to peaked, the two sides in opposite order.
    scale = torch.linspace(0.2, 4, 12)[:, None]
    shown, hidden = shown * scale, hidden * scale.flip(0)
    scores, note = step(decoder, shown, hidden, **settings)
    strengths = []
    for row in range(12):
        expected, strength = plain_adaptive(
            decoder,
            shown[row],
            hidden[row],
            {
                **settings,
                "relative_top": settings.get("relative_top") or (0.01 if decoder == "ck-plug" else 1e-30),
            },
        )
        assert scores[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert note[row].item() == pytest.approx(strength, rel=1e-4, nan_ok=True)
        strengths.append(strength)
    assert len(set(strengths)) > (1 if decoder == "ck-plug" else 6), "a test that could not fail"


@pytest.mark.parametrize("decoder", ADAPTIVE)
def test_a_context_that_changes_nothing_changes_no_score(decoder):
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    scores, note = step(decoder, logits, logits.clone(), relative_top=0.0)
    assert torch.allclose(scores.log_softmax(-1), logits.log_softmax(-1), atol=1e-5)
    if decoder in ("adacad", "adacd"):
        assert note.tolist() == [0.0] * 5
    if decoder == "ck-plug":
        assert note.isnan().all(), "no gain and no loss of confidence is nothing to choose"


@pytest.mark.parametrize(
    ("decoder", "alpha"),
    [*((name, None) for name in (*ADAPTIVE, "cad", "cd")), ("ck-plug", 0.0), ("ck-plug", 1.0)],
)
@pytest.mark.parametrize("relative_top", [0.0, 0.1])
def test_degenerate_predictions(decoder, alpha, relative_top):
    """Certain, flat and opposite predictions, and tokens that must not be chosen, in one or both of them."""
    low = -torch.inf
    sure, other, flat = [60.0, 0.0, 0.0, 0.0], [0.0, 60.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    only, half, gone = [2.0, low, low, low], [1.0, 2.0, low, low], [low, low, 3.0, 1.0]
    sides = [sure, other, flat, only, half, gone]
    pairs = [(one, two) for one in sides for two in sides]
    shown, hidden = (torch.tensor(side) for side in zip(*pairs, strict=True))
    scores, note = step(decoder, shown, hidden, relative_top=relative_top, alpha=alpha)
    assert not scores.isnan().any()
    assert not (scores == torch.inf).any()
    assert (scores[shown == low] == low).all(), "a token that must not be chosen"
    assert (scores > low).any(-1).all(), "no token is left"
    assert torch.isfinite(scores.softmax(-1)).all()
    if decoder in ADAPTIVE:
        chosen = note[~note.isnan()]
        assert ((chosen >= 0) & (chosen <= 1)).all()
    if decoder == "adacad":
        strengths = dict(
            zip([(sides.index(a), sides.index(b)) for a, b in pairs], note.tolist(), strict=True)
        )
        assert strengths[0, 1] == strengths[3, 5] == pytest.approx(math.log(2)), (
            "nothing in common: ln 2 nats"
        )
        assert strengths[0, 0] == strengths[2, 2] == strengths[5, 5] == 0
    # A row does not depend on the others.
    for row in range(0, len(pairs), 7):
        alone = (shown[row : row + 1], hidden[row : row + 1])
        one, _ = step(decoder, *alone, relative_top=relative_top, alpha=alpha)
        assert torch.allclose(one[0], scores[row])


def test_where_the_context_is_followed():
    """Each rule on predictions that it tells apart."""
    flat, sure = torch.tensor([[1.0, 0.9, 0.8, 0.0]]), torch.tensor([[0.0, 9.0, 0.0, 0.0]])
    # The context makes less sure: the blend leans to what the model knew; so does the dial.
    scores, (weight,) = step("cocoa", flat, sure, peak_weight=0.0)
    assert scores.argmax() == 1
    assert weight < 0.5
    scores, (dial,) = step("ck-plug", flat, sure)
    assert scores.argmax() == 1
    assert dial > 0.8
    # With the dial at the context's end, what it adds to the model's knowledge decides.
    assert step("ck-plug", flat, sure, alpha=0.0)[0].argmax() != 1
    # The context makes surer: it is followed.
    assert step("cocoa", sure, flat)[1] > 0.99
    scores, note = step("ck-plug", sure, flat)
    assert scores.argmax() == 1
    assert note.isnan()
    # Four tokens close together are in conflict; a bound of 1 contrasts none, one near 0 contrasts all.
    other = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    assert step("coiecd", flat, other)[0].argmax() == step("cad", flat, other, alpha=1.0)[0].argmax() == 1
    assert step("coiecd", flat, other, entropy_bound=1.0)[0].argmax() == 0
    everywhere = step("coiecd", flat, other, entropy_bound=1e-6)[0].softmax(-1)
    assert torch.allclose(everywhere, step("cad", flat, other, alpha=1.0)[0].softmax(-1))


def test_the_dial_ends_at_one():
    with pytest.raises(
        FastMemError, match=r"decode\.alpha: 1\.5 is out of range for ck-plug; allowed: 0 to 1"
    ):
        DECODERS["ck-plug"](DecodingSettings(alpha=1.5), None)


class Own(Decoder):
    """A strength for every row and step, kept as it is."""

    needs_without_context = True

    def scores(self, logits):
        gap = logits.model - logits.without_context
        self.note = gap.abs().mean(-1).clamp(max=self.settings.alpha)
        return logits.model + self.note[:, None] * gap

    def details(self, notes):
        return {"strengths": notes}


@pytest.mark.parametrize("decoder", ["own", *ADAPTIVE])
def test_a_strength_a_token_is_kept_and_a_batch_is_single_rows(tiny, contexts, monkeypatch, decoder):
    monkeypatch.setitem(DECODERS, "own", Own)
    memory = Memorizer(tiny, **STRONG)(contexts[:3])
    common = {"alpha": None if decoder == "ck-plug" else 2.0, "max_new_tokens": 30}
    free = start(tiny, decoder, memory, **common).run()
    stops = (free[0].text[2:4], free[1].text[6:8])
    together = start(tiny, decoder, memory, stop=stops, **common).run()
    assert len({len(found.token_ids) for found in together}) > 1, "a test that could not fail"
    for row, found in enumerate(together):
        strengths = found.details["strengths"]
        assert len(strengths) == len(found.token_ids)
        assert all(strength is None or 0 <= strength <= 2 for strength in strengths)
        assert decoder == "ck-plug" or None not in strengths
        assert any(a != b for a, b in pairwise(strengths))
        one = ([PROMPTS[row]], [BARE[row]])
        (alone,) = start(tiny, decoder, memory.rows([row]), *one, stop=stops, **common).run()
        assert alone.token_ids == found.token_ids
        expected = [math.nan if strength is None else strength for strength in strengths]
        kept = [math.nan if strength is None else strength for strength in alone.details["strengths"]]
        assert kept == pytest.approx(expected, rel=1e-3, abs=1e-6, nan_ok=True)


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
        ("alpha", -1.0, "out of range; allowed: 0 or above, or null"),
        *(
            (name, -1.0, "out of range; allowed: 0 or above")
            for name in ("alpha_min", "gap_weight", "peak_weight")
        ),
        *(("entropy_bound", value, "out of range; allowed: above 0, at most 1") for value in (0.0, 1.5)),
        *(("renyi_order", value, "out of range; allowed: above 0, below 1") for value in (0.0, 1.0)),
        *(
            ("temperature", value, "out of range; allowed: 0, or from 0.001")
            for value in (-1.0, 1e-40, float("inf"), float("nan"))
        ),
        ("seed", -1, "out of range; allowed: 0 or above"),
        *(("top_p", value, "out of range; allowed: above 0, at most 1") for value in (0.0, 1.1)),
        *(("relative_top", value, "out of range; allowed: 0 (all) to 1, or null") for value in (-0.1, 2.0)),
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
