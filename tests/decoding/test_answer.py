"""Questions from Python: answers at once and in pieces, prompts that go on from earlier ones, refusals."""

import pytest
from conftest import FAMILY_CONFIGS, assert_untouched, snapshot
from decodes import DECODER_NAMES, STRONG

from fastmem_pl import Backbone, FastMemError, Memorizer, answer, stream_answer
from fastmem_pl.decoding import PromptCache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_p": 0.95, "seed": 3}])
@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_streamed_pieces_make_the_answer(tiny, contexts, decoder, settings):
    memory, before = Memorizer(tiny, **STRONG)(contexts[1]), snapshot(tiny)
    common = {"context": contexts[1], "memory": memory, "decoder": decoder, "answer_prefix": "So:"}
    common |= {"max_new_tokens": 30, **settings}
    (whole,) = answer(tiny, "Where? é", **common)
    stops = [whole[i : i + 2] for i in range(5, len(whole) - 1) if "\ufffd" not in whole[i : i + 2]]
    for stop in (None, stops[0], stops[-1]):
        common["stop"] = () if stop is None else (stop,)
        (text,) = answer(tiny, "Where? é", **common)
        assert text == whole[: whole.index(stop, 3) if stop else None]
        pieces = list(stream_answer(tiny, "Where? é", **common))
        assert "".join(pieces) == text
        assert stop or len(pieces) > 5
    assert_untouched(tiny, before)


@pytest.mark.demo
@pytest.mark.parametrize(("decoder", "settings"), [("greedy", {}), ("cad", {"stop": ("e",)})])
def test_streamed_pieces_of_a_real_tokenizer(demo, contexts, decoder, settings):
    settings = {"max_new_tokens": 12, "answer_prefix": "So ", **settings}
    pieces = list(stream_answer(demo, "Why? é", contexts[0], None, decoder, **settings))
    assert ["".join(pieces)] == answer(demo, "Why? é", contexts[0], None, decoder, **settings)


def test_pieces_come_while_the_answer_is_made(make_tiny):
    backbone, steps = make_tiny(), []
    backbone.model.get_input_embeddings().register_forward_hook(lambda *_: steps.append(1))
    pieces = stream_answer(backbone, "Where?", "Rome.", max_new_tokens=30)
    next(pieces)
    assert len(steps) < 10
    assert len([*pieces]) > 5
    assert len(steps) >= 20


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize(("decoder", "num_layers"), [("greedy", 1), ("cad", 1), ("dola", 1), ("cd", 2)])
def test_a_prompt_that_goes_on_from_an_earlier_one_is_the_prompt(
    make_tiny, contexts, family, decoder, num_layers
):
    if family == "gemma3_text" and num_layers == 2:
        pytest.skip("its upper blocks have an attention of their own")
    backbone = make_tiny(family)
    memory = Memorizer(backbone, steps=3, learning_rate=1e-2, num_layers=num_layers)(contexts[0])
    seen = PromptCache()
    settings = {"max_new_tokens": 8, "repetition_penalty": 1.0}
    # Alike but for the question, longer, shorter, the same again, and another altogether.
    for context, question in (
        (contexts[3], "Who?"),
        (contexts[3], "Who crosses them, and where to?"),
        (contexts[3], "W"),
        (contexts[3], "W"),
        (contexts[1], "Who?"),
    ):
        arguments = (backbone, question, context, memory, decoder)
        pieces = stream_answer(*arguments, prompts=seen, **settings)
        assert "".join(pieces) == "".join(stream_answer(*arguments, **settings))


def test_what_prompts_share_is_read_once(tiny, contexts, monkeypatch):
    read, run = [], Backbone.run_trunk

    def counted(self, num_layers, input_ids, *args, **kwargs):
        read.append(input_ids.shape[1])
        return run(self, num_layers, input_ids, *args, **kwargs)

    monkeypatch.setattr(Backbone, "run_trunk", counted)
    seen = PromptCache()
    for question in ("Who is it?", "Who was it?"):
        list(stream_answer(tiny, question, contexts[3], prompts=seen, max_new_tokens=1))
    assert len(read) == 2
    # From the letter on in which the questions differ, to the end of the turn.
    end = tiny.tokenizer(tiny.chat.pieces.user_end, add_special_tokens=False).input_ids
    assert read[1] == len("was it?") + len(end)


def test_prompts_of_another_model_are_read_anew(make_tiny, contexts):
    models, seen = [make_tiny(seed=0), make_tiny(seed=1)], PromptCache()
    for backbone in (*models, models[0]):
        found = "".join(stream_answer(backbone, "Who?", contexts[0], prompts=seen, max_new_tokens=8))
        assert found == answer(backbone, "Who?", contexts[0], max_new_tokens=8)[0]


@pytest.mark.parametrize("function", [answer, stream_answer])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "cad"}, "'cad' contrasts with and without context; give one"),
        ({"decoder": "cd", "context": "Bob."}, "'cd' contrasts a memory with the base model; give a memory"),
        ({"decoder": "dolla"}, r"decoder: 'dolla' is unknown; .* did you mean 'dola'"),
        ({"temperature": -1.0}, r"temperature: -1\.0 is out of range"),
        ({"decoder": "dola", "dola_layers": (9,)}, r"dola_layers: 9 is no layer; allowed: 0 to 2"),
        ({"context": "a" * 3000}, r"prompt and answer take \d+ tokens, allowed: 2048"),
    ],
)
def test_bad_calls(tiny, function, options, message):
    with pytest.raises(FastMemError, match=message) as caught:
        list(function(tiny, "Who?", **options))
    assert "\n" not in str(caught.value)


def test_counts_that_do_not_match(tiny, contexts):
    memory = Memorizer(tiny, steps=1)(contexts[:2])
    with pytest.raises(FastMemError, match="3 questions but 2 memories"):
        answer(tiny, ["a", "b", "c"], memory=memory)
    with pytest.raises(FastMemError, match="1 questions but 2 contexts"):
        answer(tiny, "a", contexts[:2])
    with pytest.raises(FastMemError, match="no questions; give one or more"):
        answer(tiny, [])


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "alpha"])
def test_whole_numbers_do(tiny, name):
    settings = {"temperature": 2.0, "max_new_tokens": 8, "decoder": "cad", "context": "Rome."}
    expected = answer(tiny, "Where?", **settings | {name: 1.0})
    assert answer(tiny, "Where?", **settings | {name: 1}) == expected
