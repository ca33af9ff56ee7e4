"""Runs of the tiny model on a few short contexts, in this process and in others."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_module
from ranks import Jobs
from runs import read
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
    return read


@pytest.fixture(scope="module")
def shared_jobs(request, tmp_path_factory, tiny_folder):
    """Processes in a folder that all tests of a file share, and data of ``COUNT`` samples."""
    root = tmp_path_factory.mktemp("jobs")
    found = Jobs(root, tiny_folder, write_towers(root, request.module.COUNT))
    yield found
    found.end()


@pytest.fixture(scope="module")
def alone(shared_jobs) -> Callable[..., Path]:
    """Folder of a run of one process without faults, by its options; made once, not to be written to."""
    made = {}

    def run(mode="fit_predict", **options):
        key = json.dumps([mode, options], sort_keys=True)
        if key not in made:
            made[key] = shared_jobs.run(f"alone{len(made)}", mode=mode, **options)
        return made[key]

    return run


@pytest.fixture
def name(request) -> str:
    """Of a run folder, in the folder that all tests of a file share."""
    return re.sub(r"\W+", "-", request.node.name)
