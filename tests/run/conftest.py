"""Runs of the tiny model on a few short contexts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_module
from towers import write_towers

from fastmem_pl import FastMemDataModule, FastMemTrainer
from fastmem_pl.run.session import RunResult

COUNT = 5


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_towers(tmp_path, COUNT)


@pytest.fixture
def tiny_run(tmp_path: Path, data_file: Path, tiny, monkeypatch) -> Callable[..., RunResult]:
    """Runs one command in Python: settings of the model in a dictionary, the others are the trainer's."""
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: tiny)

    def go(mode="fit_predict", name="run", limit=None, batch_size=2, model=None, trainer=None, **settings):
        given = {"accelerator": "cpu", "enable_progress_bar": False, **settings}
        module = make_module(**{"steps": 2, "learning_rate": 1e-3, "max_new_tokens": 4, **(model or {})})
        data = FastMemDataModule("qa", str(data_file), limit=limit, batch_size=batch_size)
        return getattr(trainer or FastMemTrainer(**given), mode)(module, data, run_dir=str(tmp_path / name))

    return go


@pytest.fixture
def records() -> Callable[[Path], list[dict]]:
    """Reads the records of a run folder."""
    return lambda folder: [
        json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()
    ]
