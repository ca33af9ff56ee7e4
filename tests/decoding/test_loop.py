"""Decoding: generate's tokens without memory, a merged model's tokens with one, row by row."""

import copy

import pytest
import torch
from conftest import FAMILY_CONFIGS, assert_untouched, snapshot

from fastmem_pl import Backbone, Memorizer, answer, stream_answer
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.decoding import Decoding, DecodingSettings, Prefill, PromptCache

PROMPTS = ["Who?", "A much longer question about what stands where, and why?", "x"]
STRONG = {"steps": 5, "learning_rate": 3e-3}


def decode(prefill, decoder, deltas, tokens, **settings):
    """Token ids of every row."""
    decoding = Decoding(prefill, decoder, DecodingSettings(max_new_tokens=tokens, **settings), deltas)
    return [generated.token_ids for generated in decoding.run()]


def generate(model, prompt, tokens):
    """transformers' own greedy decoding of one prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens
    )
    return output[0, len(prompt) :].tolist()


def merged(backbone, memory, row):
    """A copy of the model whose weights hold one memory."""
    model = copy.deepcopy(backbone.model)
    blocks = model.model.layers[-memory.num_layers :]
    for block, deltas in zip(blocks, memory.deltas, strict=True):
        for name, delta in deltas.items():
            getattr(block.mlp, f"{name}_proj").weight.data += delta[row]
    return model


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_zero_shot_is_generate(make_tiny, family):
    backbone = make_tiny(family)
    prompts = [backbone.chat.prompt(text) for text in PROMPTS]
    found = decode(Prefill(backbone, prompts), "greedy", None, 12)
    assert found == [generate(backbone.model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_memory_is_the_merged_model(tiny, contexts, num_layers):
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(contexts[:3])
    prompts = [tiny.chat.prompt(text) for text in PROMPTS]
    before = snapshot(tiny)
    found = decode(Prefill(tiny, prompts, num_layers), "greedy", memory.deltas, 12)
    base = decode(Prefill(tiny, prompts, num_layers), "greedy", None, 12)
    assert_untouched(tiny, before)
    assert found == [generate(merged(tiny, memory, row), p, 12) for row, p in enumerate(prompts)]
    assert found != base


@pytest.mark.parametrize("num_layers", [1, 2])
def test_contrast_is_the_formula_on_two_models(tiny, contexts, num_layers):
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(contexts[:3])
    prompts = [tiny.chat.prompt(text) for text in PROMPTS]
    found = decode(Prefill(tiny, prompts, num_layers), "cd", memory.deltas, 8, alpha=0.8)
    for row, prompt in enumerate(prompts):
        tuned, ids = merged(tiny, memory, row), list(prompt)
        for _ in range(8):
            after = tuned(input_ids=torch.tensor([ids])).logits[0, -1]
            before = tiny.model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int((1.8 * after - 0.8 * before).argmax()))
            if ids[-1] in tiny.stop_ids:
                break
        assert found[row] == ids[len(prompt) :]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_alpha_zero_is_greedy(make_tiny, contexts, precision, num_layers):
    tiny = make_tiny(precision=precision)
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(contexts[:3])
    prefill = Prefill(tiny, [tiny.chat.prompt(text) for text in PROMPTS], num_layers)
    greedy = decode(prefill, "greedy", memory.deltas, 12)
    assert decode(prefill, "cd", memory.deltas, 12, alpha=0.0) == greedy


def test_contrast_without_memory_is_the_base(tiny):
    prefill = Prefill(tiny, [tiny.chat.prompt(text) for text in PROMPTS])
    assert decode(prefill, "cd", None, 12, alpha=0.5) == decode(prefill, "greedy", None, 12)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_batch_is_one_by_one_and_methods_do_not_disturb_each_other(tiny, contexts, num_layers):
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(contexts[:3])
    prompts = [tiny.chat.prompt(text) for text in PROMPTS]
    prefill = Prefill(tiny, prompts, num_layers)
    for decoder in ("greedy", "cd", "greedy"):
        together = decode(prefill, decoder, memory.deltas, 12)
        for row, prompt in enumerate(prompts):
            alone = Prefill(tiny, [prompt], num_layers)
            assert decode(alone, decoder, memory.rows([row]).deltas, 12) == [together[row]]


def test_stops_after_the_end_token(tiny):
    prompts = [tiny.chat.prompt(text) for text in PROMPTS]
    prefill = Prefill(tiny, prompts)
    free = decode(prefill, "greedy", None, 12)
    tiny.model.generation_config.eos_token_id = [free[0][2], tiny.tokenizer.eos_token_id]
    try:
        stopped = decode(prefill, "greedy", None, 12)
    finally:
        tiny.model.generation_config.eos_token_id = tiny.tokenizer.eos_token_id
    first = free[0].index(free[0][2])
    assert stopped[0] == free[0][: first + 1]


def test_answers_from_python(tiny, contexts):
    memory = Memorizer(tiny, **STRONG)(contexts[:1])
    together = answer(tiny, ["a?", "b?"], contexts[0], memory, "cd", 6, answer_prefix="So")
    assert together == [
        answer(tiny, q, contexts[0], memory, "cd", 6, answer_prefix="So")[0] for q in ("a?", "b?")
    ]
    assert all(text.startswith("So") for text in together)


def test_one_text_is_one_context(tiny):
    assert len(Memorizer(tiny, steps=1)("hello")) == 1


def test_answer_refuses_what_does_not_match(tiny, make_tiny, contexts):
    memory = Memorizer(tiny, steps=1)(contexts[:2])
    with pytest.raises(FastMemError, match="3 questions but 2 memories"):
        answer(tiny, ["a", "b", "c"], memory=memory)
    with pytest.raises(FastMemError, match="1 questions but 2 contexts"):
        answer(tiny, "a", contexts[:2])
    with pytest.raises(FastMemError, match="the memory belongs to another model: its fingerprint is"):
        answer(make_tiny(seed=3), "a", memory=memory.rows([0]))
    with pytest.raises(FastMemError, match=r"decoder: 'gready' is unknown; .* did you mean 'greedy'"):
        answer(tiny, "a", decoder="gready")
    with pytest.raises(FastMemError, match="'cd' contrasts a memory with the base model; give a memory"):
        answer(tiny, "a", decoder="cd")
    with pytest.raises(FastMemError, match=r"prompt and answer take \d+ tokens, allowed: 2048"):
        answer(tiny, "a" * 3000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"model\.max_new_tokens: 0 is out of range; allowed: at least 1"),
        ({"alpha": -1.0}, r"model\.alpha: -1.0 is out of range; allowed: 0 or above"),
    ],
)
def test_decoding_settings_out_of_range(settings, message):
    with pytest.raises(FastMemError, match=message):
        DecodingSettings(**settings)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize(("decoder", "num_layers"), [("greedy", 1), ("cd", 1), ("dola", 1), ("cd", 2)])
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
