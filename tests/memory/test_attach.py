"""Memories inside a transformers model: its forward pass, its gradients, its generate."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import assert_untouched, make_model, snapshot
from memories import OTHER, QUESTIONS, STRONG, TEXT, cut_at_end, generated, logits_of, merged
from transformers import AutoModelForCausalLM

from fastmem_pl import FastMemError, Memorizer, Memory, answer, generator

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        *(("llama", 1), ("llama", 2), ("gemma2", 1), ("gemma2", 2), ("gemma3_text", 2), ("phi3", 1)),
        *(("phi3", 2), ("gpt2", 1), ("gpt2", 2), ("gpt_neox", 2), ("olmo2", 3)),
    ],
)
def test_an_attached_memory_is_a_merged_model(make_tiny, family: str, layers: int) -> None:
    backbone = make_tiny(family)
    memory = Memorizer(backbone, **STRONG, num_layers=layers)([TEXT, OTHER])
    before, base = snapshot(backbone), logits_of(backbone.model, TEXT)

    def gradient(model) -> torch.Tensor:
        ids = torch.tensor([backbone.chat.prompt("Who?")])
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=embedded).logits.logsumexp(-1).sum().backward()
        return embedded.grad

    for row in range(2):
        whole = merged(backbone, memory, row)
        with memory.rows([row]).attached(backbone.model):
            found, found_gradient = logits_of(backbone.model, TEXT), gradient(backbone.model)
            assert_untouched(backbone, before)
        assert (found - base).abs().max() > 0.05
        torch.testing.assert_close(found, logits_of(whole, TEXT), rtol=1e-4, atol=1e-4)
        expected = gradient(whole)
        assert (found_gradient - expected).norm() < 1e-3 * expected.norm()
        assert (gradient(backbone.model) - expected).norm() > 0.01 * expected.norm()
        # A row to each sequence, and one row to all.
        texts = (OTHER, TEXT[:99])
        for used in (memory, memory.rows([row])):
            with used.attached(backbone):
                together = logits_of(backbone.model, *texts)
            expected = logits_of(whole, texts[row])[0]
            torch.testing.assert_close(together[row], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(backbone.model, TEXT), base)


@pytest.mark.parametrize("sequences", [1, 2, 4, 5])
def test_rows_that_serve_no_sequence_are_refused(backbone, batch: Memory, sequences: int) -> None:
    base = logits_of(backbone.model, TEXT)
    with batch.attached(backbone), pytest.raises(FastMemError, match=f"3 rows for {sequences} sequences"):
        logits_of(backbone.model, *[TEXT] * sequences)
    assert torch.equal(logits_of(backbone.model, TEXT), base)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str
)
def test_generate_uses_every_row(backbone, batch: Memory, settings: dict, rows: int) -> None:
    prompts, memory = [backbone.chat.prompt(question) for question in QUESTIONS], batch.rows(range(rows))
    with memory.attached(backbone):
        found = generated(backbone.model, prompts, **settings)
    each, ends = settings.get("num_return_sequences", 1), backbone.stop_ids
    for row, prompt in enumerate(prompts):
        expected = generated(merged(backbone, memory, row % rows), [prompt], **settings)
        assert cut_at_end(found[row * each : (row + 1) * each], ends) == cut_at_end(expected, ends)
    assert found != generated(backbone.model, prompts, **settings)


@torch.no_grad()
def greedy_with(models: list, prompt: list[int]) -> list[int]:
    """One token of each model in turn, computed on the whole sequence."""
    ids: list[int] = []
    for model in models:
        ids.append(int(model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize(("step", "until"), [(1, 10**9), (4, 10**9), (2, 6)])
def test_a_memory_joins_a_running_generate(backbone, batch, where: str, step: int, until: int) -> None:
    memory, prompt = batch.rows([0]), backbone.chat.prompt(QUESTIONS[0])
    tuned, base = merged(backbone, memory), backbone.model
    # The last FFN feeds no attention, so that the keys and values of the base model stay right.
    models = [tuned if step < place <= until else base for place in range(1, 11)]
    expected, without, before = greedy_with(models, prompt), generated(base, [prompt]), snapshot(backbone)
    with ExitStack() as attached:

        def at_step(ids, scores):
            place = ids.shape[1] - len(prompt) + (where == "logits_processor")
            if place == step:
                attached.enter_context(memory.attached(base))
            if place == until:
                attached.close()
            return scores if where == "logits_processor" else torch.zeros(len(ids), dtype=torch.bool)

        found = generated(base, [prompt], eos_token_id=None, **{where: [at_step]})
    assert found == [expected]
    assert found != generated(base, [prompt], eos_token_id=None)
    assert_untouched(backbone, before)
    assert generated(base, [prompt]) == without


def test_an_exception_takes_the_memory_off(backbone, memory: Memory) -> None:
    def state():
        attributes = {name: set(vars(module)) for name, module in backbone.model.named_modules()}
        return attributes, sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules()
        )

    def fail(ids, scores):
        raise RuntimeError("pulled the plug")

    prompt, before, parts = backbone.chat.prompt(QUESTIONS[0]), snapshot(backbone), state()
    base, expected = logits_of(backbone.model, TEXT), generated(backbone.model, [prompt])
    for settings in ({}, {"custom_generate": generator(backbone, memory)}):
        with pytest.raises(RuntimeError, match="pulled"), memory.attached(backbone):
            generated(backbone.model, [prompt], logits_processor=[fail], **settings)
        assert torch.equal(logits_of(backbone.model, TEXT), base)
        assert generated(backbone.model, [prompt]) == expected
    assert_untouched(backbone, before)
    assert state() == parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_ones_own_takes_a_memory(backbone, memory: Memory, tiny_folder: Path, dtype) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
    base = logits_of(plain, TEXT).float()
    with memory.attached(plain), memory.attached(backbone):
        found, expected = logits_of(plain, TEXT), logits_of(backbone.model, TEXT)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() <= (0.0 if dtype == torch.float32 else 0.1) * expected.norm()
    assert torch.equal(logits_of(plain, TEXT).float(), base)
    assert (found - base).abs().max() > 0.5


def test_a_model_of_another_kind_takes_no_memory(memory: Memory, stranger: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(stranger)
    for wrong in (other, make_model(hidden_size=64), make_model("gpt2")):
        before = logits_of(wrong, TEXT)
        with pytest.raises(FastMemError, match=memory.fingerprint), memory.attached(wrong):
            pass
        assert torch.equal(logits_of(wrong, TEXT), before)


def test_a_second_memory_is_refused_and_the_first_goes_on(backbone, batch: Memory) -> None:
    first, second = batch.rows([0]), batch.rows([1])
    before = snapshot(backbone)
    with first.attached(backbone):
        expected = logits_of(backbone.model, TEXT)
        with (
            pytest.raises(FastMemError, match="a memory is attached to this model already"),
            second.attached(backbone),
        ):
            pass
        assert torch.equal(logits_of(backbone.model, TEXT), expected)
        # What the backbone answers by itself looks at no hook.
        inside = answer(backbone, "Who?", memory=second, max_new_tokens=6)
    assert inside == answer(backbone, "Who?", memory=second, max_new_tokens=6)
    with second.attached(backbone):
        assert not torch.equal(logits_of(backbone.model, TEXT), expected)
    with first.attached(backbone):
        assert torch.equal(logits_of(backbone.model, TEXT), expected)
    assert_untouched(backbone, before)


def test_other_hooks_keep_their_effect(backbone, memory: Memory) -> None:
    ffn = backbone.anatomy.blocks[-1].mlp
    handle = ffn.register_forward_hook(lambda module, args, output: output + 1.0)
    try:
        moved = logits_of(backbone.model, TEXT)
        with memory.attached(backbone):
            both = logits_of(backbone.model, TEXT)
    finally:
        handle.remove()
    with memory.attached(backbone):
        alone = logits_of(backbone.model, TEXT)
    assert not torch.allclose(both, alone)
    assert not torch.allclose(both, moved)
