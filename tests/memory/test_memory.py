"""Saving, loading and arranging memories; settings out of range."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastmem_pl import FastMemError, MemorizationSettings, Memorizer, Memory


@pytest.fixture
def memory(tiny, contexts):
    return Memorizer(tiny, steps=3, learning_rate=1e-3)(contexts)


def test_save_and_load(memory, tiny, tmp_path):
    path = tmp_path / "one.safetensors"
    memory.save(path, row=1, id="seven")
    loaded = Memory.load(path, tiny.fingerprint())
    assert loaded.curves == [memory.curves[1]]
    assert loaded.settings["learning_rate"] == 1e-3
    for found, expected in zip(loaded.deltas, memory.deltas, strict=True):
        for name in expected:
            assert torch.equal(found[name][0], expected[name][1])
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["id"] == "seven"
    assert json.loads(header["curve"])["kl"][0] == 0.0
    assert list(tmp_path.iterdir()) == [path]


def test_other_model_is_refused_with_both_fingerprints(memory, tmp_path):
    memory.save(tmp_path / "m.safetensors")
    with pytest.raises(FastMemError, match=rf"fingerprint is {memory.fingerprint}, this model's 0123"):
        Memory.load(tmp_path / "m.safetensors", "0123")


def test_truncated_file_is_refused(memory, tmp_path):
    path = tmp_path / "m.safetensors"
    memory.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FastMemError, match=r"m\.safetensors is damaged .* memorize it again"):
        Memory.load(path)


def test_foreign_and_missing_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(FastMemError, match="is not a FastMem memory"):
        Memory.load(tmp_path / "x.safetensors")
    with pytest.raises(FastMemError, match="no such memory"):
        Memory.load(tmp_path / "y.safetensors")


def test_unwritable_folder(memory, tmp_path):
    with pytest.raises(FastMemError, match=r"cannot write the memory .*No such file or directory"):
        memory.save(tmp_path / "gone" / "m.safetensors")


def test_rows_and_stack_are_inverse(memory):
    parts = [memory.rows([i]) for i in range(len(memory))]
    again = Memory.stack(parts)
    assert again.curves == memory.curves
    assert all(torch.equal(again.deltas[0][n], memory.deltas[0][n]) for n in memory.deltas[0])


@pytest.mark.parametrize(
    ("setting", "value", "bound"),
    [
        ("steps", -1, "at least 0"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("kl_coeff", -0.1, "at least 0"),
        ("num_layers", 0, "at least 1"),
        ("weight_decay", float("inf"), "at least 0"),
        ("max_grad_norm", 0.0, "above 0"),
        ("max_context_tokens", 0, "at least 1"),
    ],
)
def test_settings_out_of_range(setting, value, bound):
    with pytest.raises(FastMemError, match=rf"^model\.{setting}: {value} is out of range; allowed: {bound}$"):
        MemorizationSettings(**{setting: value})
