"""The loop around decoders: draws, ends of answers, and prefills that decodes share."""

import pytest
import torch
from conftest import CONTEXTS
from decodes import BARE, DECODER_NAMES, PROMPTS, SAMPLED, STRONG, start, token_ids

from fastmem_pl import Backbone, DecodingSettings, FastMemError, Memorizer, Memory
from fastmem_pl.base.phases import PhaseMeter
from fastmem_pl.decoding import DECODERS, Decoding, Prefill, Prefills, decode

pytestmark = pytest.mark.usefixtures("one_thread")


def test_draws_depend_on_seed_and_key_alone(tiny):
    settings = {"temperature": 2.0, "max_new_tokens": 12}
    same = [token_ids(tiny, **settings) for _ in range(2)]
    assert same[0] == same[1]
    assert token_ids(tiny, seed=1, **settings) != same[0]
    twice = token_ids(tiny, prompts=PROMPTS[:1] * 2, keys=[5, 6], **settings)
    assert twice[0] != twice[1]


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_top_k_of_one_and_a_tiny_top_p_are_greedy(tiny, decoder):
    greedy = token_ids(tiny, decoder)
    assert token_ids(tiny, decoder, temperature=3.0, top_k=1) == greedy
    assert token_ids(tiny, decoder, temperature=3.0, top_p=1e-6) == greedy
    assert token_ids(tiny, decoder, temperature=3.0) != greedy


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_stop_texts_and_limits_end_an_answer(tiny, decoder):
    free = start(tiny, decoder, max_new_tokens=12).run()
    stop = free[1].text[3:5]
    assert len(stop) == 2
    stopped = start(tiny, decoder, max_new_tokens=12, stop=(stop, "not there at all")).run()
    for before, after in zip(free, stopped, strict=True):
        assert len(before.token_ids) == 12 or before.token_ids[-1] in tiny.stop_ids
        assert after.text == before.text.split(stop)[0]
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        assert sum(after.details.get("dola_layers", {"": len(after.token_ids)}).values()) == len(
            after.token_ids
        )
    assert len(stopped[1].token_ids) < len(free[1].token_ids)
    assert token_ids(tiny, decoder, max_new_tokens=2) == [generated.token_ids[:2] for generated in free]


@pytest.fixture
def saying(tiny, monkeypatch):
    """Make the tiny model say given tokens to one prompt."""

    def make(text, **settings):
        said = iter([*tiny.tokenizer(text).input_ids, tiny.stop_ids[0]])
        scores = torch.zeros(1, 259)
        monkeypatch.setattr("fastmem_pl.decoding.state.Views.logits", lambda self, *inputs: None)
        monkeypatch.setattr("fastmem_pl.decoding.Decoder.scores", lambda self, logits: scores)
        chooser = lambda scores: torch.tensor([next(said)])  # noqa: E731
        return Decoding(Prefill(tiny, [[1]]), "greedy", DecodingSettings(**settings), chooser=chooser)

    return make


def test_a_stop_text_may_be_a_control_token(saying):
    (free,) = saying("so <|im_start|> on").run()
    assert free.text == "so  on"
    (stopped,) = saying("so <|im_start|> on", stop=("<|im_start|>", "zzz")).run()
    assert stopped.text == "so "
    assert len(stopped.token_ids) == 4


@pytest.mark.parametrize("stop", ["aé", "é", "é and", "d m"])
def test_a_stop_text_of_many_bytes_does_not_leak_its_start(saying, stop):
    text = "xyaé and more"
    assert "".join(saying(text, stop=(stop,)).texts()) == text.split(stop)[0]
    assert saying(text, stop=(stop,)).run()[0].text == text.split(stop)[0]


def test_what_a_decoding_lacks_is_said(tiny):
    prefill = Prefill(tiny, [[1, 2]])
    with pytest.raises(FastMemError, match="'cad' contrasts with the prompt without its context"):
        Decoding(prefill, "cad", DecodingSettings())
    with pytest.raises(FastMemError, match=r"'dola' looks at layers \[0, 2\]; give them to the prefill"):
        Decoding(prefill, "dola", DecodingSettings(dola_layers="high"))
    with pytest.raises(FastMemError, match="only a single answer can be streamed, not 2"):
        next(Decoding(Prefill(tiny, [[1], [2]]), "greedy", DecodingSettings()).texts())
    decoding = Decoding(prefill, "greedy", DecodingSettings(max_new_tokens=1))
    decoding.step()
    with pytest.raises(FastMemError, match="this decode has its 1 tokens; start another"):
        decoding.step()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_methods_share_prefills_and_do_not_disturb_each_other(tiny, contexts, monkeypatch, num_layers):
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(contexts[:3])
    ids = [[tiny.chat.prompt(text) for text in texts] for texts in (PROMPTS, PROMPTS[::-1], BARE)]
    forms = dict(zip(("prompt", "one_shot", "without_context"), ids, strict=True))
    settings = DecodingSettings(max_new_tokens=8, dola_layers=(0, 1, 2))
    prefills_made, run_trunk = [], Backbone.run_trunk

    def counted(self, num_layers, input_ids, *args, **kwargs):
        prefills_made.extend([input_ids.shape] if input_ids.shape[1] > 1 else [])
        return run_trunk(self, num_layers, input_ids, *args, **kwargs)

    monkeypatch.setattr(Backbone, "run_trunk", counted)
    meter = PhaseMeter(tiny.device, [])
    early = dict.fromkeys(("prompt", "one_shot"), DECODERS["dola"](settings, tiny).early_layers)
    prefills = Prefills(tiny, forms, num_layers, early, meter)
    expected = {name: token_ids(tiny, name, memory, num_layers=num_layers) for name in DECODER_NAMES}
    prefills_made.clear()
    for decoder in ("cad", "greedy", "cd", "greedy", "dola", "cad"):
        answers, seconds, read_seconds = decode(prefills, decoder, settings, memory.deltas, part=decoder)
        assert [generated.token_ids for generated in answers] == expected[decoder]
        read = ["prompt", "without_context"] if decoder == "cad" else ["prompt"]
        assert read_seconds == sum(prefills.seconds[form] for form in read) > 0
        assert seconds > 0
    assert len(prefills_made) == 2
    last = meter.calls[-1]
    assert (last.phase, last.part, last.samples) == ("decode", "cad", 3)
    assert (last.tokens, last.steps) == (sum(map(len, expected["cad"])), max(map(len, expected["cad"])))
    # Of the forms with contexts one is kept at a time.
    for form, made in (("one_shot", 3), ("one_shot", 3), ("prompt", 4)):
        decode(prefills, "cad", settings, memory.deltas, form)
        assert len(prefills_made) == made


RATES = (1e-5, 3e-3, 1e-2, 1e-2, 3e-2)
QUESTION = "Who did what, and where?"


def rows(backbone, num_layers=1):
    """Memories of one context, of different strength; two of them alike."""
    fits = (Memorizer(backbone, steps=8, num_layers=num_layers, learning_rate=rate) for rate in RATES)
    return Memory.stack([memorizer(CONTEXTS[2]) for memorizer in fits])


@pytest.mark.parametrize(
    ("family", "decoder", "given", "num_layers"),
    [
        *((family, "greedy", SAMPLED, 1) for family in ("llama", "gemma2", "gpt2", "mistral")),
        ("llama", "greedy", {}, 2),
        ("llama", "cd", {"alpha": 0.7}, 1),
        ("gemma2", "cad", {"alpha": 0.7}, 1),
        ("mistral", "dola", {}, 1),
    ],
)
def test_many_memories_on_one_prompt(make_tiny, family, decoder, given, num_layers):
    """They answer as with a prompt of its own for each, and rows that end leave the others as they were."""
    backbone = make_tiny(family, seed=1)
    memory = rows(backbone, num_layers)

    def run(expanded, stop=()):
        prompt, bare = (
            Prefill(backbone, [backbone.chat.prompt(text)] * (1 if expanded else 5), num_layers, (0, 1, 2))
            for text in (QUESTION, "Who?")
        )
        if expanded:
            prompt, bare = prompt.expand(5), bare.expand(5)
        settings = {"max_new_tokens": 24, "stop": stop, **given}
        return start(backbone, decoder, memory, prompt, bare, num_layers, range(5), **settings).run()

    first = run(True)
    assert first == run(False)
    assert len({tuple(generated.token_ids) for generated in first}) > 1, "all rows said the same"
    stop = tuple(generated.text[2:4] for generated in first if len(generated.text) > 6)[:2]
    found = run(True, stop)
    assert found == run(False, stop)
    assert found != first


def test_the_trunk_runs_once_for_rows_that_agree(make_tiny, monkeypatch):
    backbone = make_tiny(seed=1)
    memory = rows(backbone).rows([0, 0, 0, 4, 4])
    batches, run_trunk = [], Backbone.run_trunk
    monkeypatch.setattr(
        Backbone,
        "run_trunk",
        lambda self, k, ids, *rest: batches.append(len(ids)) or run_trunk(self, k, ids, *rest),
    )
    prefill = Prefill(backbone, [backbone.chat.prompt(QUESTION)])
    layers = [layer for layer in prefill.cache.layers if layer.is_initialized]
    before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    settings = DecodingSettings(max_new_tokens=12)
    first, again = (Decoding(prefill.expand(5), "greedy", settings, memory.deltas).run() for _ in range(2))
    assert first == again
    assert len({tuple(generated.token_ids) for generated in first}) == 2, "the memories do not differ"
    assert set(batches) == {1, 2}
    for layer, (keys, values) in zip(layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
