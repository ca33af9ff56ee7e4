"""Options of batching and of the optimizer's state: refused in one line, before anything is written."""

import re

import pytest
from conftest import make_module
from towers import write_towers

from fastmem_pl import FastMemDataModule, FastMemError, MemorizationSettings
from fastmem_pl.cli import main

# Option, value, and what the line says beside the option.
BAD = [
    ("data.max_batch_tokens", "0", ("0", "at least 1")),
    ("data.max_batch_tokens", "2.5", ("2.5", "int")),
    ("data.batch_size", "-1", ("-1", "at least 1")),
    ("data.batch_size", "auto", ("'auto'", "int")),
    ("model.memorize.optimizer_state", "flaot32", ("'flaot32'", "auto", "float32", "did you mean 'float32'")),
    ("model.memorize.optimizer_state", "32", ("32", "auto", "float32")),
    ("model.auto_batch", "maybe", ("'maybe'", "bool")),
    ("data.max_batch_tokns", "5", ("data.max_batch_tokens",)),
    ("model.optimiser_state", "auto", ("model.memorize.optimizer_state",)),
]


@pytest.mark.parametrize(
    ("name", "option", "value", "parts"),
    [*(("fit-predict", *bad) for bad in BAD), ("fit", *BAD[4]), ("predict", *BAD[0])],
)
def test_a_bad_value_is_refused_in_one_line(tmp_path, capsys, monkeypatch, name, option, value, parts):
    monkeypatch.chdir(tmp_path)
    data = write_towers(tmp_path, 1)
    assert (
        main([name, "--data.task", "qa", "--data.path", str(data), "--run_dir", "r", f"--{option}", value])
        == 2
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"fastmem: error: .*\n", err), f"not one line: {err!r}"
    assert [part for part in (option, *parts) if part not in err] == []
    assert list(tmp_path.iterdir()) == [data], "something was written"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FastMemDataModule("qa", "x.jsonl", max_batch_tokens=0), "data.max_batch_tokens"),
        (lambda: make_module(optimizer_state="float16"), "optimizer_state"),
        (lambda: MemorizationSettings(optimizer_state="float16"), "optimizer_state"),
    ],
)
def test_bad_values_from_python(make, name):
    with pytest.raises(FastMemError) as caught:
        make()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
