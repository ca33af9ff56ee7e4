"""Texts longer than a window: the policies against plain loops over the model's own weights."""

from dataclasses import replace

import pytest
import torch
from conftest import FAMILY_CONFIGS, assert_untouched, snapshot
from memories import assert_deltas, plain_fit, prose

from fastmem_pl import FastMemError, Memorizer, WindowSettings, memorize_document
from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.memory import DocumentFit, document
from fastmem_pl.memory import memorizer as memorizing

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = (
    "The Velm rises in the hills of Ardow and runs for ninety miles to the sea. Its water is blue in May and "
    "brown in June, when the snow melts. Nobody fishes in it. The queen owns both banks and the bridge."
)
STRONG = {"steps": 4, "learning_rate": 2e-3, "kl_coeff": 0.3}
SMALL = WindowSettings("joint", window=48, overlap=16)


def curve_of(memory):
    return torch.tensor([memory.curve.cross_entropy, memory.curve.kl, memory.curve.grad_norm]).T


@pytest.mark.parametrize(
    ("family", "texts", "windows"),
    [*((family, TEXT, 6) for family in FAMILY_CONFIGS), ("llama", [TEXT[:90], "Bob.", TEXT[90:]], 7)],
)
def test_joint_is_one_loss_over_all_windows(make_tiny, family, texts, windows):
    backbone = make_tiny(family)
    before = snapshot(backbone)
    fit = DocumentFit(Memorizer(backbone, **STRONG), texts, SMALL)
    assert len(fit.encoded) == windows
    assert list(fit.run()) == [1, 2, 3, 4]
    found = curve_of(fit.memory())
    torch.testing.assert_close(found, plain_fit(backbone, [fit.encoded], **STRONG)[0], rtol=2e-3, atol=1e-5)
    assert found[-1, 0] < found[0, 0]
    assert_untouched(backbone, before)


def test_parts_of_a_document_add_up(tiny, monkeypatch):
    memorizer = Memorizer(tiny, **STRONG)
    whole = memorize_document(memorizer, TEXT, SMALL)
    monkeypatch.setattr(memorizing, "_TOKENS_AT_ONCE", 30)
    parts = DocumentFit(memorizer, TEXT, SMALL)
    assert len(parts._parts(parts.encoded)) > 3
    list(parts.run())
    torch.testing.assert_close(curve_of(parts.memory()), curve_of(whole), rtol=1e-4, atol=1e-6)
    assert_deltas(parts.memory(), whole, 1e-3)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_sequential_goes_on_from_window_to_window(make_tiny, family, num_layers):
    backbone = make_tiny(family)
    before = snapshot(backbone)
    memorizer = Memorizer(backbone, num_layers=num_layers, **STRONG)
    fit = DocumentFit(memorizer, TEXT, replace(SMALL, policy="sequential"))
    assert fit.num_updates == 4 * len(fit.encoded)
    assert list(fit.run()) == list(range(1, fit.num_updates + 1))
    memory = fit.memory()
    groups = [[part] for part in fit.encoded]
    expected = plain_fit(backbone, groups, num_layers=num_layers, **STRONG)[0]
    torch.testing.assert_close(curve_of(memory), expected, rtol=5e-3, atol=1e-4)
    assert_untouched(backbone, before)


def test_windows_give_every_token_one_loss(tiny):
    ids = tiny.tokenizer(TEXT, add_special_tokens=False).input_ids
    header = tiny.chat.context("x", 1).header_length
    for window, overlap in ((48, 16), (48, 0), (50, 49), (7, 3), (len(ids) - 1, 5)):
        parts = tiny.chat.windows(TEXT, window, overlap)
        labels = [token for part in parts for token in part.input_ids[part.header_length :]]
        # The end of turn closes the last window, and only that.
        assert labels[:-1] == ids
        assert labels[-1] == tiny.tokenizer.eos_token_id
        assert all(len(part.input_ids) - header <= window + 1 for part in parts)
        repeated = [part.header_length - header for part in parts]
        assert repeated[0] == 0
        assert all(0 <= count <= overlap for count in repeated[1:])


@pytest.mark.parametrize("policy", ["joint", "sequential"])
def test_a_fit_that_is_left_early(tiny, policy):
    fit = DocumentFit(Memorizer(tiny, **STRONG), TEXT, replace(SMALL, policy=policy))
    for done in fit.run():
        if done == 2:
            break
    early = fit.memory()
    assert (early.windows["updates"], early.windows["planned"]) == (2, fit.num_updates)
    # Of windows one after the other, fewer updates are not those of fewer steps.
    assert early.settings["steps"] == (2 if policy == "joint" else 4)
    if policy == "joint":
        short = memorize_document(Memorizer(tiny, **{**STRONG, "steps": 2}), TEXT, SMALL)
        assert early.curve == short.curve
        assert_deltas(early, short)


def test_windows_are_what_settings_and_model_take(tiny):
    limit = Memorizer(tiny, max_context_tokens=64).context_limit
    assert (limit, Memorizer(tiny).context_limit) == (64, 2048 - 32)
    assert WindowSettings("joint", 64).resolved(100) == (64, 8)
    assert WindowSettings().resolved(limit) == (64, 8)
    fit = DocumentFit(Memorizer(tiny, max_context_tokens=64), prose(150))
    assert fit.encoded == tiny.chat.windows(prose(150), 64, 8)


def test_joint_refuses_upper_layers_and_names_the_way_out(tiny):
    memorizer = Memorizer(tiny, num_layers=2, **STRONG)
    with pytest.raises(FastMemError, match=r"joint trains one layer, not num_layers 2, .* use sequential"):
        memorize_document(memorizer, TEXT, SMALL)
    # One window has no need of it.
    assert memorize_document(memorizer, TEXT[:40], SMALL).num_layers == 2


def test_several_texts_are_found_again_in_the_one_that_is_kept(tiny):
    memorizer = Memorizer(tiny, **STRONG)
    texts = [TEXT[:70], "Bob lives here.", TEXT[70:]]
    fit = DocumentFit(memorizer, texts, SMALL)
    list(fit.run())
    memory = fit.memory()
    assert document.encoded_text(memory, memorizer) == fit.encoded
    with pytest.raises(FastMemError, match="this is not the text that was memorized"):
        document.encoded_text(memory, memorizer, memory.texts[0].replace("Bob", "Rob"))


def test_a_non_finite_window_ends_a_sequential_fit(tiny):
    memorizer = Memorizer(tiny, steps=3, learning_rate=1e38, kl_coeff=0.1)
    fit = DocumentFit(memorizer, TEXT, replace(SMALL, policy="sequential"))
    list(fit.run())
    memory = fit.memory()
    assert memory.status[0].startswith("failed: the memorization loss is not finite")
    assert all((delta == 0).all() for delta in memory.deltas[0].values())


def test_what_a_fit_hands_out_stays_as_it_was(tiny):
    fit = DocumentFit(Memorizer(tiny, **STRONG), TEXT, SMALL)
    norms = [fit.memory().deltas[0]["up"].norm() for _ in fit.run()]
    memories = [norm.item() for norm in norms]
    assert memories == sorted(memories)
    fit = DocumentFit(Memorizer(tiny, **STRONG), TEXT, SMALL)
    kept = [fit.memory() for _ in fit.run()]
    assert [memory.deltas[0]["up"].norm().item() for memory in kept] == memories
    with pytest.raises(FastMemError, match="this fit has taken its updates"):
        next(fit.run())


def test_a_text_whose_activations_have_no_room_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(document, "usable_bytes", lambda device: 1e4)
    with pytest.raises(OutOfMemoryError, match=r"windows: joint needs .* use --windows sequential"):
        memorize_document(Memorizer(tiny, **STRONG), TEXT, SMALL)


@pytest.mark.parametrize("policy", ["joint", "sequential", "cut"])
def test_a_text_that_fits_is_memorized_as_ever(tiny, policy: str) -> None:
    memorizer = Memorizer(tiny, **STRONG)
    for size in (None, len(TEXT.encode()), 1500):
        found = memorize_document(memorizer, TEXT, WindowSettings(policy=policy, window=size))
        assert_deltas(found, memorizer([TEXT]))
        assert found.curve == memorizer(TEXT).curve


@pytest.mark.parametrize("policy", ["joint", "sequential", "cut"])
def test_only_cut_forgets_the_end(tiny, policy: str) -> None:
    memorizer = Memorizer(tiny, **STRONG)
    one, other = (prose(120) + end for end in ("xyz", "abc"))
    windows = WindowSettings(policy, 64, 16)
    found, changed = (memorize_document(memorizer, text, windows) for text in (one, other))
    same = torch.equal(found.deltas[0]["down"], changed.deltas[0]["down"])
    assert same == (policy == "cut")
    if same:
        assert_deltas(found, memorizer([one[:64]]), 1e-6)


@pytest.mark.parametrize(
    ("texts", "windows"),
    [
        *(("", {}), (" \n", {}), ([], {}), (["Bob.", " "], {}), ("Bob.", {"policy": "some"})),
        *(("Bob.", {"window": size}) for size in (0, 2.5, float("nan"))),
        *(("Bob.", {"window": 8, "overlap": overlap}) for overlap in (8, -1)),
    ],
    ids=str,
)
def test_a_document_that_is_none_is_refused(tiny, texts, windows: dict) -> None:
    with pytest.raises(FastMemError):
        memorize_document(Memorizer(tiny, **STRONG), texts, WindowSettings(**windows))
