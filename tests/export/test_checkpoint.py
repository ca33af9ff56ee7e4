"""Memories merged into checkpoints for plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import assert_untouched, snapshot
from memories import QUESTIONS, STRONG, TEXT, cut_at_end, generated, log_probs, logits_of, merged
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastmem_pl import Backbone, Memorizer, Memory, answer, generator
from fastmem_pl.export import to_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", 1), ("llama", 2), ("gemma2", 1), ("phi3", 1), ("gpt2", 1), ("gpt_neox", 1), ("gpt2", 3)],
)
def test_checkpoint_is_the_memory_for_plain_transformers(
    make_tiny, tmp_path: Path, family: str, layers: int, dtype: str
) -> None:
    backbone = make_tiny(family)
    memory = Memorizer(backbone, **STRONG, num_layers=layers)([TEXT])
    before = snapshot(backbone)
    report = to_checkpoint(memory, backbone, tmp_path / "out", dtype)
    assert_untouched(backbone, before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoded = [Memorizer(backbone).encode(TEXT)]
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS]
    with torch.no_grad(), memory.attached(backbone):
        expected, tokens = logits_of(backbone.model, TEXT), generated(backbone.model, prompts)
        exact = log_probs(backbone.model, encoded, torch.float64)
        # What rounding loses is in the report: the KL is that of what plain transformers loads.
        other = log_probs(model, encoded, torch.float64)
    assert (expected - logits_of(backbone.model, TEXT)).abs().max() > 0.05
    kl = (exact.exp() * (exact - other)).sum(-1).mean().item()
    assert report.kl == pytest.approx(kl, rel=0.05, abs=1e-6)
    assert (report.kl < 1e-6) == (report.relative_error < 1e-4) == (dtype == "float32")
    assert str(model.dtype) == f"torch.{dtype}"
    if dtype == "float32":
        torch.testing.assert_close(logits_of(model, TEXT), expected, rtol=1e-4, atol=1e-4)
        assert generated(model, prompts) == tokens
    elif family == "llama":
        # The sum is rounded, not base and delta one by one.
        wanted = merged(backbone, memory).model.layers[2].mlp.down_proj.weight.bfloat16()
        assert torch.equal(model.model.layers[2].mlp.down_proj.weight, wanted)
    assert tokenizer(TEXT).input_ids == backbone.tokenizer(TEXT).input_ids
    assert tokenizer.chat_template == backbone.tokenizer.chat_template
    assert model.generation_config.eos_token_id == backbone.model.generation_config.eos_token_id
    names = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert names.isdisjoint({".bin", ".pt", ".pth", ".pkl", ".ckpt"})


def test_checkpoint_of_a_bfloat16_model_is_bfloat16(make_tiny, tmp_path: Path) -> None:
    backbone = make_tiny(precision="bf16-true")
    report = to_checkpoint(Memorizer(backbone, **STRONG)([TEXT]), backbone, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert report.form == "bfloat16"


@pytest.mark.demo
def test_demo_memories_give_identical_tokens(demo: Backbone, demo_memory: Memory, tmp_path: Path) -> None:
    questions = ["Who founded the museum of Lindt?", "How many lanterns does it keep?"]
    demo_memory.save(tmp_path / "m.fastmem")
    to_checkpoint(demo_memory, demo, tmp_path / "merged")
    loaded = Memory.load(tmp_path / "m.fastmem", demo)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    prompts = [demo.chat.prompt(question) for question in questions]
    settings = {"pad": demo.pad_id, "max_new_tokens": 8}
    found = {"merged": generated(plain, prompts, **settings)}
    with loaded.attached(demo):
        found["attached"] = generated(demo.model, prompts, **settings)
    own = generator(demo, loaded)
    found["custom"] = generated(demo.model, prompts, custom_generate=own, **settings)
    cut = {name: cut_at_end(rows, demo.stop_ids) for name, rows in found.items()}
    assert all(rows == cut["merged"] for rows in cut.values()), cut
    base = cut_at_end(generated(demo.model, prompts, **settings), demo.stop_ids)
    assert base != cut["merged"], "the memory changes nothing"
    texts = [demo.tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut["merged"]]
    for one in (demo_memory, loaded):
        assert [a.strip() for a in answer(demo, questions, None, one, max_new_tokens=8)] == texts
