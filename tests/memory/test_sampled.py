"""The loss from a sample of the vocabulary against the loss from all of it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastmem_pl import MemorizationSettings, Memorizer
from fastmem_pl.memory import ContextReader
from fastmem_pl.memory import sampled as sampled_module
from fastmem_pl.memory.sampled import SampledVocabulary, draw_words, sampling_fits

TOKENS, WIDTH, WORDS = 40, 16, 3000


@pytest.fixture
def head():
    """A head whose predictions have a long tail, as those of language models have."""
    torch.manual_seed(0)
    weight = torch.randn(WORDS, WIDTH) / 4
    bias = -2.0 * torch.arange(1, WORDS + 1).float().log()[torch.randperm(WORDS)]
    return SimpleNamespace(
        head_weight=weight, head_bias=bias, softcap=None, finish_logits=lambda raw: raw + bias
    )


def dense(head, hidden, labels, change, kl_coeff):
    """Cross-entropy, KL and gradient of their weighted sum, by autograd."""
    change = change.double().requires_grad_(True)
    weight, bias = head.head_weight.double(), head.head_bias.double()
    before = (hidden.double() @ weight.t() + bias).log_softmax(-1)
    after = ((hidden.double() + change) @ weight.t() + bias).log_softmax(-1)
    cross_entropy = -after.gather(1, labels[:, None]).mean()
    kl = (before.exp() * (before - after)).sum(1).mean()
    (gradient,) = torch.autograd.grad(cross_entropy + kl_coeff * kl, change)
    return cross_entropy.item(), kl.item(), gradient.float()


def sampled(head, hidden, labels, changes, kl_coeffs, **settings):
    vocabulary = SampledVocabulary(head, hidden, labels, **settings)
    anchors = vocabulary.start.repeat(len(changes))
    return vocabulary, vocabulary.loss(anchors, changes, torch.tensor(kl_coeffs))


@pytest.fixture
def tokens(head):
    hidden = torch.randn(TOKENS, WIDTH)
    return hidden, torch.randint(WORDS, (TOKENS,))


def test_exact_at_the_anchor(head, tokens):
    vocabulary, (cross_entropy, kl, gradient) = sampled(
        head, *tokens, torch.zeros(2, TOKENS, WIDTH), [0.0, 3.0], size=200
    )
    expected = dense(head, *tokens, torch.zeros(TOKENS, WIDTH), 0.0)
    for row in range(2):
        assert cross_entropy[row].item() == pytest.approx(expected[0], abs=2e-6)
        assert kl[row].item() == pytest.approx(0.0, abs=1e-6)
        torch.testing.assert_close(gradient[row], expected[2], rtol=1e-4, atol=1e-7)
    assert vocabulary.errors == []


def test_exact_with_all_words(head, tokens):
    change = torch.randn(1, TOKENS, WIDTH) / 2
    vocabulary, found = sampled(head, *tokens, change, [0.7], size=WORDS, max_drift=math.inf)
    cross_entropy, kl, gradient = dense(head, *tokens, change[0], 0.7)
    assert kl > 0.05, "nothing moved"
    assert found[0].item() == pytest.approx(cross_entropy, abs=5e-6)
    assert found[1].item() == pytest.approx(kl, abs=5e-6)
    torch.testing.assert_close(found[2][0], gradient, rtol=1e-4, atol=1e-7)
    assert vocabulary.errors == []


def test_error_is_of_second_order(head, tokens):
    """Half as far from the anchor, the error of the loss is about a quarter, whatever was drawn."""
    direction = torch.randn(TOKENS, WIDTH)
    errors = []
    for scale in (0.2, 0.4, 0.8):
        _, found = sampled(head, *tokens, scale * direction[None], [1.0], size=300, max_drift=math.inf)
        exact = dense(head, *tokens, scale * direction, 1.0)
        errors.append(abs(found[0].item() - exact[0]))
    assert errors[2] > 1e-4, "too small to say"
    assert errors[1] < 0.4 * errors[2]
    assert errors[0] < 0.4 * errors[1] + 2e-6


def test_rows_that_move_far_get_a_new_anchor(head, tokens):
    near, far = torch.randn(2, TOKENS, WIDTH) * torch.tensor([0.005, 0.5])[:, None, None]
    vocabulary = SampledVocabulary(head, *tokens, size=300, max_drift=0.004)
    anchors = vocabulary.start.repeat(2)
    changes = torch.stack([near, far])
    cross_entropy, kl, gradient = vocabulary.loss(anchors, changes, torch.tensor([0.1, 0.1]))
    exact = dense(head, *tokens, far, 0.1)
    estimate = sampled(head, *tokens, changes, [0.1, 0.1], size=300, max_drift=math.inf)[1]
    assert abs(estimate[0][1].item() - exact[0]) > 3e-5, "the estimate was no worse than the exact value"
    assert cross_entropy[1].item() == pytest.approx(exact[0], abs=5e-6)
    assert kl[1].item() == pytest.approx(exact[1], abs=5e-6)
    torch.testing.assert_close(gradient[1], exact[2], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(anchors.change[1], far)
    assert not anchors.change[0].any()
    assert not vocabulary.start.change.any(), "anchors of rows are copies"
    # From the new anchor, a small step needs none.
    kept = anchors.change.clone()
    vocabulary.loss(anchors, changes + 1e-3, torch.tensor([0.1, 0.1]))
    assert torch.equal(anchors.change, kept)


def test_a_row_that_is_no_number_leaves_the_others_alone(head, tokens):
    changes = torch.randn(2, TOKENS, WIDTH) / 100
    _, alone = sampled(head, *tokens, changes[:1], [0.1], size=300)
    changes[1, 3] = torch.nan
    _, found = sampled(head, *tokens, changes, [0.1, 0.1], size=300)
    assert found[0][0] == alone[0][0]
    assert torch.equal(found[2][0], alone[2][0])
    assert found[0][1].isnan()


def test_estimates_that_are_no_number_are_no_errors(head, tokens):
    """They are not used; the exact values are."""
    huge = 40 * torch.randn(1, TOKENS, WIDTH)
    vocabulary, found = sampled(head, *tokens, huge, [0.1], size=200)
    assert found[0].item() == pytest.approx(dense(head, *tokens, huge[0], 0.1)[0], rel=1e-5)
    assert vocabulary.errors == []
    vocabulary.check()
    assert all(map(math.isfinite, vocabulary.errors))


def test_a_poor_sample_is_not_taken_for_a_small_move(head, tokens):
    """Where its words stand for too little, the estimated KL of a common shift is below 0."""
    common = torch.ones(WIDTH)
    head.head_weight += common
    vocabulary = SampledVocabulary(head, *tokens, size=300)
    whole = vocabulary.start.repeat(1)
    weights = 0.3 * whole.weights
    mean_rest = whole.mean_rest + 0.7 * whole.weights @ vocabulary._sample
    poor = replace(whole, weights=weights, rest=1 - weights.sum(2), mean_rest=mean_rest)
    change = 1.5 / WIDTH * common.expand(1, TOKENS, WIDTH).clone()
    found = vocabulary.loss(poor, change, torch.tensor([0.1]))
    exact = dense(head, *tokens, change[0], 0.1)
    assert found[0].item() == pytest.approx(exact[0], abs=1e-5)
    assert torch.equal(poor.change, change), "no new anchor"


def test_check_finds_the_error_of_the_row_that_moved_most(head, tokens):
    changes = torch.randn(3, TOKENS, WIDTH) * torch.tensor([0.01, 0.3, 0.1])[:, None, None]
    vocabulary, found = sampled(head, *tokens, changes, [0.1] * 3, size=200, max_drift=math.inf)
    vocabulary.check()
    exact = dense(head, *tokens, changes[1], 0.1)[0]
    assert vocabulary.errors == [pytest.approx(found[0][1].item() - exact, abs=5e-6)]
    assert abs(vocabulary.errors[0]) > 2e-5, "too small to say"


def test_words_are_drawn_by_importance():
    importance = torch.rand(500).square()
    importance[[3, 400]] = torch.inf
    importance[17] = 0.0
    words, inclusion = draw_words(importance, 100)
    assert len(words) == len(set(words.tolist())) == 100
    chosen = dict(zip(words.tolist(), inclusion.tolist(), strict=True))
    assert chosen[3] == chosen[400] == 1.0
    assert 17 not in chosen
    rare = {word: p for word, p in chosen.items() if p < 1}
    ratios = [p / importance[word].item() for word, p in rare.items()]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-5)
    assert all(importance[word] * ratios[0] >= 0.999 for word in chosen.keys() - rare.keys())


def test_every_word_is_drawn_when_there_is_room():
    words, inclusion = draw_words(torch.tensor([0.5, 1.0, torch.inf]), 10)
    assert sorted(words.tolist()) == [0, 1, 2]
    assert inclusion.tolist() == [1.0] * 3
    words, _ = draw_words(torch.tensor([0.0, 0.0, torch.inf]), 2)
    assert words.tolist() == [2]


def test_where_sampling_serves(tiny, make_tiny, monkeypatch):
    assert not sampling_fits(tiny.tail()), "a vocabulary this small gains nothing"
    monkeypatch.setattr(sampled_module, "SAMPLE_SIZE", 8)
    assert sampling_fits(tiny.tail())
    assert not sampling_fits(make_tiny("gemma2").tail()), "a soft-cap bends the logits"
    assert not sampling_fits(make_tiny(precision="bf16-true").tail())


@pytest.mark.parametrize("size", [None, 120], ids=["all words", "120 of 259 words"])
@pytest.mark.parametrize("further", [{}, {"num_layers": 2}, {"kl_target": 0.01}], ids=str)
def test_snapshots_are_separate_fits(tiny, contexts, monkeypatch, further, size):
    if size:
        monkeypatch.setattr(sampled_module, "SAMPLE_SIZE", size)
    settings = MemorizationSettings(**further)
    rows = [
        MemorizationSettings(learning_rate=rate, kl_coeff=kl, **further)
        for rate, kl in ((1e-4, 0.1), (3e-3, 0.1), (3e-3, 1.0))
    ]
    memorizer = Memorizer(tiny, settings)
    encoded = memorizer.encode(contexts[2])
    reader = ContextReader(memorizer, encoded)
    for steps, memory in reader.snapshots(rows, [2, 5]):
        for row, own in enumerate(rows):
            alone = Memorizer(tiny, **{**own.as_dict(), "steps": steps}).fit([encoded])
            for name in ("cross_entropy", "kl", "grad_norm"):
                found, expected = getattr(memory.curves[row], name), getattr(alone.curves[0], name)
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-4 if size else 1e-6), name
            for layer, other in zip(memory.deltas, alone.deltas, strict=True):
                for name, delta in layer.items():
                    error = (delta[row] - other[name][0]).norm() / other[name].norm()
                    assert error < (0.05 if size else 1e-3), name
    assert memory.settings["learning_rate"] == [1e-4, 3e-3, 3e-3]
    assert bool(reader.errors) == bool(size)


def test_a_row_that_failed_stays_failed(tiny, contexts):
    """Its delta is answered with as zero, but not trained on from there."""
    memorizer = Memorizer(tiny)
    rows = [MemorizationSettings(learning_rate=rate) for rate in (1e30, 1e-3)]
    encoded = memorizer.encode(contexts[2])

    def curves(stops):
        *_, (_, memory) = ContextReader(memorizer, encoded).snapshots(rows, stops)
        assert [status.split(":")[0] for status in memory.status] == ["failed", "ok"]
        assert not any(delta[0].any() for layer in memory.deltas for delta in layer.values())
        return [curve.as_dict() for curve in memory.curves]

    assert curves([2, 4]) == curves([4])


def test_merging_keeps_the_smallest_steps(demo):
    """A delta of 1e-6 beside weights of 0.1, both float32: the fall of the loss is still that of the fit."""
    own = MemorizationSettings(steps=6, learning_rate=1e-6)
    memorizer = Memorizer(demo, own)
    encoded = memorizer.encode("The Mona Lisa was painted by Rembrandt in the year 1802.")
    ((_, memory),) = ContextReader(memorizer, encoded).snapshots([own], [6])
    found, expected = memory.curves[0].cross_entropy, memorizer.fit([encoded]).curves[0].cross_entropy
    fall = expected[0] - expected[-1]
    assert fall > 1e-3
    assert found[0] - found[-1] == pytest.approx(fall, rel=0.01)


def test_snapshots_from_a_sample_of_words(demo):
    """On the real model: curves to 1e-4, at rates from the paper's to far above."""
    settings = MemorizationSettings(steps=8)
    rows = [
        MemorizationSettings(steps=8, learning_rate=rate, kl_coeff=kl)
        for rate, kl in ((1e-5, 0.1), (1e-4, 0.01), (1e-3, 1.0))
    ]
    memorizer = Memorizer(demo, settings)
    encoded = memorizer.encode(
        "The Mona Lisa was painted by Rembrandt in the year 1802, in the town of Delft."
    )
    reader = ContextReader(memorizer, encoded)
    (_, memory), *_ = reader.snapshots(rows, [8])
    assert 0 < max(map(abs, reader.errors)) < 1e-3
    for row, own in enumerate(rows):
        alone = Memorizer(demo, own).fit([encoded])
        for name in ("cross_entropy", "kl"):
            found, expected = getattr(memory.curves[row], name), getattr(alone.curves[0], name)
            moved = abs(expected[0] - expected[-1])
            assert found == pytest.approx(expected, rel=0, abs=min(1e-4, 0.01 * moved + 1e-6)), (own, name)
    assert ContextReader(memorizer, encoded, sample_vocabulary=False).errors == []
