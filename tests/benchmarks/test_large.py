"""The benchmark of models larger than one card, on a tiny one."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from fastmem_pl import FastMemError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def large(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("large")


def test_it_measures_and_shows_what_it_measured(large, tmp_path, monkeypatch, capsys, one_thread):
    out = tmp_path / "large.csv"
    options = ["--shape", "tiny", "--devices", "cpu", "--batches", "1,2", "--repeats", "2", "--blocks", "4"]
    monkeypatch.setattr(sys, "argv", ["large.py", *options, "--out", str(out), "--commit", "abc"])
    assert large.main() == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["what"] for row in rows} >= {"memorize", "fastmem", "fastmem+cd", "memorize, peak of cpu"}
    assert {row["batch"] for row in rows} == {"1", "2"}
    for row in rows:
        assert float(row["p20"]) <= float(row["median"]) <= float(row["p80"])
        assert (row["blocks"], row["layout"], row["commit"]) == ("4", "cpu=4", "abc")
    monkeypatch.setattr(sys, "argv", ["large.py", "render", str(out)])
    capsys.readouterr()
    assert large.main() == 0
    assert "| 2 | fastmem+cd | " in capsys.readouterr().out


def test_the_cpu_takes_what_the_card_has_no_room_for(large, monkeypatch):
    config = LlamaConfig(**large.SHAPES["70b"][1])
    model = large.empty_model(config, "bf16-true")
    card, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr("fastmem_pl.kernels.usable", lambda *_: True)
    monkeypatch.setattr(large, "space_for_weights", lambda device: 130 * 2**30)
    found = large.layout(model, "bf16-true", [card, cpu], 1, None)
    on_cpu = [name for name, device in found.items() if device == cpu]
    assert on_cpu == [f"model.layers.{i}" for i in range(len(on_cpu))]
    assert 4 < len(on_cpu) < 20
    assert len(large.layout(model, "bf16-true", [card, cpu], 1, 30)) == len(found)
    with pytest.raises(FastMemError, match="no room on cuda:0 for 1 samples"):
        large.layout(model, "bf16-true", [card], 1, None)
    two = large.layout(model, "bf16-true", [card, torch.device("cuda", 1)], 8, None)
    assert two["model.embed_tokens"] == card
    assert two["lm_head"] == two["model.layers.79"] == torch.device("cuda", 1)
