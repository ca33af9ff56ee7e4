"""FastMem's decoders inside the generate of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decodes import expected_tokens
from memories import OTHER, QUESTIONS, STRONG, TEXT, cut_at_end, generated
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from fastmem_pl import Backbone, FastMemError, Memorizer, Memory, answer, generator

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("decoder", "settings"),
    [
        ("greedy", {}),
        ("cd", {}),
        ("cd", {"alpha": 3.0}),
        ("adacd", {"alpha": 20.0, "alpha_min": 0.1}),
        ("dola", {"dola_layers": (0, 2), "relative_top": 0.01}),
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", [1, 2])
def test_custom_generate_decodes_as_fastmem_does(backbone, decoder: str, settings: dict, layers: int) -> None:
    memory = Memorizer(backbone, **STRONG, num_layers=layers)([TEXT, OTHER, "Bob."])
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS]
    custom = generator(backbone, memory, decoder, **settings)
    # FastMem's dola has this penalty of its own accord; in a generate call it is generate's to say.
    penalty = {"repetition_penalty": 1.2} if decoder == "dola" else {}
    found = generated(backbone.model, prompts, custom_generate=custom, **penalty)
    rows = cut_at_end(found, backbone.stop_ids)
    for row, prompt in enumerate(prompts):
        assert rows[row] == expected_tokens(backbone, decoder, memory, row, prompt, prompt, 10, **settings)
    texts = [backbone.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    expected = answer(backbone, QUESTIONS, None, memory, decoder, max_new_tokens=10, **settings)
    assert [text.strip() for text in texts] == [text.strip() for text in expected]
    assert found != generated(backbone.model, prompts)


class Tokens(BaseStreamer):
    def __init__(self) -> None:
        self.seen, self.ended = [], False

    def put(self, value) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("decoder", ["greedy", "cd"])
def test_custom_generate_streams(backbone, memory: Memory, decoder: str) -> None:
    # Given to generate itself it would see the prompt only: transformers hands it to no callable.
    prompt, streamer = backbone.chat.prompt(QUESTIONS[0]), Tokens()
    custom = generator(backbone, memory, decoder, streamer=streamer)
    (found,) = generated(backbone.model, [prompt], custom_generate=custom)
    assert streamer.seen == [prompt, *([token] for token in found)]
    assert streamer.ended
    text = TextIteratorStreamer(backbone.tokenizer, skip_prompt=True, timeout=5)
    custom = generator(backbone, memory, decoder, streamer=text)
    assert generated(backbone.model, [prompt], custom_generate=custom) == [found]
    assert "".join(text) == backbone.tokenizer.decode(found)


@pytest.mark.parametrize("decoder", ["greedy", "cd", "dola"])
def test_custom_generate_honours_criteria_and_processors(backbone, memory: Memory, decoder: str) -> None:
    prompt, custom = backbone.chat.prompt(QUESTIONS[0]), generator(backbone, memory, decoder)
    (free,) = generated(backbone.model, [prompt], custom_generate=custom)
    assert len(free) >= 5

    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= len(prompt) + 3)

    def ban(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Forbids what would have been said."""
        return scores.index_fill(1, torch.tensor(free), -torch.inf)

    (stopped,) = generated(backbone.model, [prompt], custom_generate=custom, stopping_criteria=[stop])
    assert stopped == free[:3]
    (short,) = generated(backbone.model, [prompt], custom_generate=custom, max_new_tokens=2)
    assert short == free[:2]
    (banned,) = generated(backbone.model, [prompt], custom_generate=custom, logits_processor=[ban])
    assert banned
    assert set(banned).isdisjoint(free)
    (suppressed,) = generated(backbone.model, [prompt], custom_generate=custom, suppress_tokens=free)
    assert suppressed == banned
    (ended,) = generated(backbone.model, [prompt], custom_generate=custom, eos_token_id=free[1])
    assert ended == free[: free.index(free[1]) + 1]


def test_custom_generate_samples(backbone, memory: Memory) -> None:
    prompt, custom = backbone.chat.prompt(QUESTIONS[0]), generator(backbone, memory)

    def draw(seed: int, **settings: Any) -> list[int]:
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, **settings}
        return generated(backbone.model, [prompt], custom_generate=custom, **settings)[0]

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(6)}) > 2
    (greedy,) = generated(backbone.model, [prompt], custom_generate=custom)
    assert draw(3, top_k=1) == greedy


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 2}, "beam"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores|return_dict"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits|return_dict"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup|assist"),
        ({"guidance_scale": 2.0}, "guidance"),
    ],
    ids=str,
)
def test_custom_generate_refuses_by_name(backbone, memory: Memory, settings: dict, words: str) -> None:
    prompt = backbone.chat.prompt(QUESTIONS[0])
    with pytest.raises(FastMemError, match=words):
        generated(backbone.model, [prompt], custom_generate=generator(backbone, memory), **settings)


def test_generator_refuses_what_it_cannot_use(backbone, memory: Memory, batch, stranger: Path) -> None:
    with pytest.raises(FastMemError, match="belongs to another model"):
        generator(Backbone.load(str(stranger)), memory)
    for decoder in ("cad", "beam"):
        with pytest.raises(FastMemError, match=decoder):
            generator(backbone, memory, decoder)
    with pytest.raises(FastMemError, match="alfa"):
        generator(backbone, memory, "cd", alfa=1)
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS[:2]]
    with pytest.raises(FastMemError, match="3 rows for 2 sequences"):
        generated(backbone.model, prompts, custom_generate=generator(backbone, batch))


def test_one_row_serves_a_batch_of_prompts(backbone, memory: Memory) -> None:
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS]
    custom = generator(backbone, memory)
    together = cut_at_end(generated(backbone.model, prompts, custom_generate=custom), backbone.stop_ids)
    alone = [generated(backbone.model, [prompt], custom_generate=custom)[0] for prompt in prompts]
    assert together == cut_at_end(alone, backbone.stop_ids)
