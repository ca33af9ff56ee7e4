"""Memories inside transformers: gradients, nesting, and what a backbone's own answers see of it."""

import pytest
import torch
from conftest import assert_untouched, snapshot

from fastmem_pl import FastMemError, Memorizer, answer, stream_answer
from fastmem_pl.decoding import PromptCache
from fastmem_pl.export import to_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
STRONG = {"steps": 4, "learning_rate": 2e-2}
TEXT = "The tower of Velm was built in 1312."


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_gradients_of_the_input_are_those_of_the_merged_model(make_tiny, tmp_path, family, num_layers):
    from transformers import AutoModelForCausalLM

    backbone = make_tiny(family)
    memory = Memorizer(backbone, num_layers=num_layers, **STRONG)(TEXT)
    to_checkpoint(memory, backbone, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").requires_grad_(False)
    ids = torch.tensor([backbone.chat.prompt("Who?")])

    def gradient(model):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=embedded).logits.logsumexp(-1).sum().backward()
        return embedded.grad

    with memory.attached(backbone.model):
        found = gradient(backbone.model)
    expected = gradient(merged)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert (gradient(backbone.model) - expected).norm() > 0.01 * expected.norm()


def test_a_second_memory_is_refused_and_the_first_goes_on(tiny):
    first, second = (Memorizer(tiny, **STRONG)(text) for text in (TEXT, "Water is blue."))
    before = snapshot(tiny)
    ids = torch.tensor([tiny.chat.prompt("Who?")])
    with torch.no_grad(), first.attached(tiny):
        expected = tiny.model(ids).logits
        with (
            pytest.raises(FastMemError, match="a memory is attached to this model already"),
            second.attached(tiny),
        ):
            pass
        assert torch.equal(tiny.model(ids).logits, expected)
        # What the backbone answers by itself looks at no hook.
        inside = answer(tiny, "Who?", memory=second, max_new_tokens=6)
    assert inside == answer(tiny, "Who?", memory=second, max_new_tokens=6)
    assert_untouched(tiny, before)


def test_other_hooks_keep_their_effect(tiny):
    memory = Memorizer(tiny, **STRONG)(TEXT)
    ids = torch.tensor([tiny.chat.prompt("Who?")])
    handle = tiny.anatomy.blocks[-1].mlp.register_forward_hook(lambda module, args, output: output + 1.0)
    try:
        with torch.no_grad():
            moved = tiny.model(ids).logits
            with memory.attached(tiny):
                both = tiny.model(ids).logits
    finally:
        handle.remove()
    with torch.no_grad(), memory.attached(tiny):
        alone = tiny.model(ids).logits
    assert not torch.allclose(both, alone)
    assert not torch.allclose(both, moved)


def test_a_memory_of_more_layers_than_there_are(tiny):
    memory = Memorizer(tiny, **STRONG)(TEXT)
    memory.deltas = memory.deltas * 5
    with (
        pytest.raises(FastMemError, match="the memory is of 5 layers, this model has 3"),
        memory.attached(tiny),
    ):
        pass


def test_prompts_of_another_model_are_read_anew(make_tiny):
    models = [make_tiny(seed=0), make_tiny(seed=1)]
    seen = PromptCache()
    for backbone in (*models, models[0]):
        found = "".join(stream_answer(backbone, "Who?", TEXT, prompts=seen, max_new_tokens=8))
        assert found == answer(backbone, "Who?", TEXT, max_new_tokens=8)[0]
