"""What callbacks of a user find as ``trainer.loggers``, and that Lightning logs nothing of its own."""

import json

import pytest
from conftest import make_module
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from fastmem_pl import FastMemDataModule, FastMemTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Watcher(Callback):
    def __init__(self):
        self.seen = {}

    def on_predict_start(self, trainer, pl_module):
        self.seen["start"] = list(trainer.loggers)

    def on_predict_batch_end(self, trainer, *args):
        self.seen["batch"] = list(trainer.loggers)
        trainer.logger.log_metrics({"own": 1.0}, 0)

    def on_predict_end(self, trainer, pl_module):
        self.seen["end"] = list(trainer.loggers)


class Counted(DummyLogger):
    def __init__(self):
        super().__init__()
        self.calls = []

    def log_hyperparams(self, params, *args, **kwargs):
        self.calls.append(params)

    def log_graph(self, *args, **kwargs):
        self.calls.append("graph")

    def finalize(self, status):
        self.calls.append(status)


@pytest.fixture
def run(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: tiny)
    data_file = tmp_path / "data.jsonl"
    data_file.write_text(json.dumps({"context": "The tower is red.", "question": "q?", "answers": ["red"]}))

    def go(trainer, name="run"):
        data = FastMemDataModule("qa", str(data_file))
        return trainer.fit_predict(
            make_module("tiny", steps=2, max_new_tokens=3), data, str(tmp_path / name)
        ).path

    return go


def test_callbacks_find_the_loggers_and_lightning_none(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    counted, watcher = Counted(), Watcher()
    trainer = FastMemTrainer(
        accelerator="cpu", enable_progress_bar=False, logger=["csv", counted], callbacks=watcher
    )
    assert trainer.loggers == [counted]
    folder = run(trainer)
    for found in watcher.seen.values():
        assert isinstance(found[0], CSVLogger)
        assert found[1:] == [counted]
    assert set(watcher.seen) == {"start", "batch", "end"}
    # After the run as in it; the user's own value is there.
    assert trainer.loggers == watcher.seen["batch"]
    assert "own" in (folder / "logs" / "metrics.csv").read_text().split("\n")[0]
    # The settings once, the end once, and not the module's arguments.
    settings, status = counted.calls
    assert settings["model.memorize.steps"] == 2
    assert status == "success"
    assert not (tmp_path / "lightning_logs").exists()


def test_a_trainer_logs_each_of_its_runs(run):
    trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
    first, second = run(trainer, "first"), run(trainer, "second")
    for folder in (first, second):
        assert len((folder / "logs" / "metrics.csv").read_text().splitlines()) == 1 + 2 + 1 + 1
    assert str(second) in trainer.logger.log_dir


def test_without_loggers_there_are_none(run):
    trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False, logger=False)
    assert trainer.logger is None
    run(trainer)
    assert trainer.logger is None
