"""The benchmark of quantized trunks, on tiny shapes."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.usefixtures("one_thread")
def test_benchmark_of_memory_on_tiny_shapes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command = ["memory", "--shape", "tiny", "--kind", "none", "bnb-4bit", "--batch-size", "2"]
    command += ["--steps", "3", "--device", "cpu", "--commit", "abc", "--out", str(tmp_path / "out.csv")]
    monkeypatch.setattr(sys, "argv", ["quantization.py", *command])
    for _ in range(2):
        runpy.run_path(str(BENCHMARKS / "quantization.py"), run_name="__main__")
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    # A second run replaces its rows.
    assert [row["kind"] for row in rows] == ["none", "bnb-4bit"]
    assert {row["fits"] for row in rows} == {"yes"}
    assert all(float(row["last_loss"]) < float(row["first_loss"]) for row in rows)
    assert {row["commit"] for row in rows} == {"abc"}
    assert "bnb-4bit" in capsys.readouterr().out
