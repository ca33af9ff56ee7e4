"""Adapters for PEFT: what they compute, what they state, and what writing them may replace."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import QUESTIONS, STRONG, TEXT, assert_deltas, generated, logits_of, truncated
from runs import files
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastmem_pl import Backbone, FastMemError, Memorizer, Memory
from fastmem_pl.export import to_checkpoint, to_lora, to_memory
from fastmem_pl.export.deviation import Deviation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text("utf-8"))


def adapted(peft, model_folder: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter).eval()


def test_lora_is_the_low_rank_memory(peft, backbone, tiny_folder: Path, memory: Memory, tmp_path) -> None:
    to_lora(memory, backbone, tmp_path / "lora", rank=5, dtype="float32")
    exact = replace(memory, deltas=truncated(memory, 5))
    low = to_memory(memory, backbone, tmp_path / "low.fastmem", rank=5).memory
    assert_deltas(low, exact, 4e-3)
    model = adapted(peft, tiny_folder, tmp_path / "lora")
    found, base = logits_of(model, TEXT), logits_of(backbone.model, TEXT)
    prompts = [backbone.chat.prompt(question) for question in QUESTIONS]
    with low.attached(backbone):
        expected, wanted = logits_of(backbone.model, TEXT), generated(backbone.model, prompts)
    assert (expected - base).abs().max() > 0.5
    assert (found - expected).norm() / (expected - base).norm() < 1e-2
    with exact.attached(backbone):
        torch.testing.assert_close(found, logits_of(backbone.model, TEXT), rtol=1e-3, atol=1e-3)
    assert generated(model, prompts) == wanted != generated(backbone.model, prompts)


@pytest.mark.parametrize(
    ("family", "layers", "dtype", "most"),
    [
        *(("llama", 1, "float32", 1e-4), ("llama", 1, "bfloat16", 2e-2), ("gemma2", 1, "float32", 1e-3)),
        *((family, 1, "float32", 1e-3) for family in ("phi3", "gpt2", "gpt_neox")),
        ("qwen2", 2, "float32", 1e-3),
    ],
)
def test_full_rank_is_the_memory(peft, make_tiny, tmp_path: Path, family, layers, dtype, most) -> None:
    backbone = make_tiny(family)
    backbone.model.save_pretrained(tmp_path / "model")
    memory = Memorizer(backbone, **STRONG, num_layers=layers)([TEXT])
    report = to_lora(memory, backbone, tmp_path / "lora", rank=32, dtype=dtype)
    model = adapted(peft, tmp_path / "model", tmp_path / "lora")
    with memory.attached(backbone):
        expected = logits_of(backbone.model, TEXT)
    change = (expected - logits_of(backbone.model, TEXT)).norm()
    assert change > 1
    assert (logits_of(model, TEXT) - expected).norm() / change < most
    assert (logits_of(model.merge_and_unload(), TEXT) - expected).norm() / change < most
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    assert report.rank == 32
    assert report.relative_error < (1e-2 if dtype == "bfloat16" else 1e-5 if family == "llama" else 1e-4)


def test_lora_report_states_what_is_true(fastmem, kept: Path, backbone, memory: Memory) -> None:
    out, folder = fastmem("export", kept, to="lora", rank=6, dtype="float32", out="lora").out, Path("lora")
    report, sizes = report_of(folder), {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes.keys() == {"adapter_config.json", "adapter_model.safetensors", "export.json"}
    assert (report["to"], report["rank"], report["form"]) == ("lora", 6, "float32")
    assert report["bytes"] == sum(sizes.values()) - sizes["export.json"]
    assert report["fingerprint"] == backbone.fingerprint()
    low = truncated(memory, 6)
    total = sum((low[0][n] - d).square().sum() for n, d in memory.deltas[0].items())
    error = (total / sum(d.square().sum() for d in memory.deltas[0].values())).sqrt().item()
    assert error > 0.01
    assert report["relative_error"] == pytest.approx(error, rel=1e-3)
    assert report["kl"] == pytest.approx(Deviation(memory, backbone).kl(low), rel=0.02)
    for word in ("rank", "6", "bytes", "relative error", "KL"):
        assert word.lower() in out.lower()
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["task_type"]) == ("LORA", 6, "CAUSAL_LM")
    # By default the KL is at most 0.01, by the smallest rank.
    fastmem("export", kept, to="lora", dtype="float32", out="default")
    found = report_of(Path("default"))
    tried = {one["rank"]: one["kl"] for one in found["tried"]}
    assert tried[found["rank"]] <= 0.01 < tried[found["rank"] - 1]


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_what_was_there(tiny, tmp_path, monkeypatch):
    memory = Memorizer(tiny, **STRONG)(TEXT)
    target = tmp_path / "lora"
    to_lora(memory, tiny, target, rank=2)
    before = files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("fastmem_pl.export.lora.write_atomic", full)
        with pytest.raises(FastMemError, match=r"cannot write .*lora: No space left on device"):
            to_lora(memory, tiny, target, force=True)
    assert files(tmp_path) == before

    # The new one cannot take the place of the old.
    rename = Path.rename

    def refuse(path, to):
        stated = path / "export.json"
        if Path(to) == target and stated.is_file() and '"rank": 3' in stated.read_text():
            full()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(FastMemError, match="No space left"):
        to_lora(memory, tiny, target, rank=3, force=True)
    assert files(tmp_path) == before


def test_no_private_folder_is_shipped(tiny_folder, tmp_path):
    backbone = Backbone.load(str(tiny_folder))
    memory = Memorizer(backbone, **STRONG)(TEXT)
    memory.save(tmp_path / "m.fastmem")
    to_lora(memory, backbone, tmp_path / "lora", rank=1)
    to_checkpoint(memory, backbone, tmp_path / "merged")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or str(tiny_folder.parent).encode() not in path.read_bytes(), path
    assert Memory.load(tmp_path / "m.fastmem").backbone == tiny_folder.name


@pytest.mark.parametrize("write", [to_lora, to_checkpoint])
def test_an_export_that_fails_leaves_nothing(memory, batch, backbone, stranger, tmp_path, write) -> None:
    failed = replace(memory, status=["failed: the memorization loss is not finite at step 2; answered by"])
    for one, model, options, words in (
        (memory, Backbone.load(str(stranger)), {}, "belongs to another model"),
        (memory, backbone, {"dtype": "float8"}, "float8"),
        (memory, backbone, {"context": "Something else."}, "this is not the text that was memorized"),
        (batch, backbone, {}, "the memory has 3 rows"),
        (failed, backbone, {}, "the memorization loss is not finite at step 2; memorize"),
    ):
        with pytest.raises(FastMemError, match=words):
            write(one, model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.demo
def test_demo_adapter_gives_the_answers_of_the_low_rank_memory(
    peft, demo, demo_memory, tmp_path: Path
) -> None:
    report = to_lora(demo_memory, demo, tmp_path / "lora", rank=4, dtype="float32")
    low = replace(demo_memory, deltas=truncated(demo_memory, 4))
    prompts = [demo.chat.prompt("Who founded the museum of Lindt?")]
    settings = {"pad": demo.pad_id, "max_new_tokens": 6}
    with low.attached(demo):
        expected = generated(demo.model, prompts, **settings)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(demo.model), tmp_path / "lora").eval()
    assert generated(model, prompts, **settings) == expected
    assert 0 < report.kl < report.kl_base
    assert report.bytes < sum(d.numel() for d in demo_memory.deltas[0].values()) * 4
