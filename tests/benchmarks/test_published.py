"""benchmarks/published.py: the published loop has the losses and tokens of the package."""

import importlib
from pathlib import Path

import pytest
from conftest import assert_untouched, snapshot

from fastmem_pl import DecodingSettings, MemorizationSettings, Memorizer
from fastmem_pl.decoding import Decoding, Prefill

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("published")


@pytest.mark.parametrize("alpha", [None, 0.8])
def test_the_published_loop_has_the_losses_and_tokens_of_the_package(tiny, contexts, published, alpha):
    settings = MemorizationSettings(steps=10, learning_rate=0.01, kl_coeff=0.5)
    decoding = DecodingSettings(max_new_tokens=20, **({} if alpha is None else {"alpha": alpha}))
    before, memorizer = snapshot(tiny), Memorizer(tiny, settings)
    memory = memorizer(contexts)
    for row, context in enumerate(contexts):
        encoded, prompt = memorizer.encode(context), tiny.chat.prompt(f"{context} Who?")
        model, stops = tiny.model, tiny.stop_ids
        tokens, curve = published.memorize_and_answer(
            model, encoded.input_ids, encoded.header_length, prompt, stops, settings, 20, alpha
        )
        assert_untouched(tiny, before)
        for name, values in memory.curves[row].as_dict().items():
            assert getattr(curve, name) == pytest.approx(values, rel=1e-4, abs=1e-6), name
        deltas = memory.rows([row]).deltas
        (found,) = Decoding(Prefill(tiny, [prompt]), "cd" if alpha else "greedy", decoding, deltas).run()
        assert tokens == found.token_ids


def test_the_published_loop_puts_the_weights_back_after_an_error(tiny, contexts, published):
    before, encoded = snapshot(tiny), Memorizer(tiny).encode(contexts[0])
    with pytest.raises(IndexError):  # no token has this number
        published.memorize_and_answer(
            tiny.model, encoded.input_ids, encoded.header_length, [10**6], tiny.stop_ids
        )
    assert_untouched(tiny, before)


@pytest.mark.parametrize("fault", [None, "curve", "nan", "memory"])
def test_the_published_loops_check_finds_differences(tiny, published, monkeypatch, fault):
    fit = Memorizer.fit

    def other(self, encoded):
        memory = fit(self, encoded)
        if fault == "memory":
            for layer in memory.deltas:
                for delta in layer.values():
                    delta.zero_()
        elif fault:
            memory.curves[0].kl[2] = memory.curves[0].kl[2] * 1.01 if fault == "curve" else float("nan")
        return memory

    monkeypatch.setattr(Memorizer, "fit", other)
    settings = MemorizationSettings(steps=5, learning_rate=0.01)
    if fault is None:
        assert published.check(tiny, settings=settings) < 1e-4
    else:
        with pytest.raises(published.Mismatch, match="tokens" if fault == "memory" else "kl of step 2"):
            published.check(tiny, settings=settings)
