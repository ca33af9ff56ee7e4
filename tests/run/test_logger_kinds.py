"""Every kind of logger, by name and by class, from the command line and in Python."""

import importlib.util
import os
from pathlib import Path

import pytest
import yaml
from runs import final_metrics

from fastmem_pl.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--trainer.logger", "CSVLogger"], "CSVLogger: the following arguments are required: save_dir"),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.dir", "x"], "Option 'dir' is not accepted"),
        (
            ["--config", "mine.yaml"],
            "CSWLogger: module 'lightning.pytorch.loggers' has no attribute 'CSWLogger'",
        ),
    ],
)
def test_what_is_wrong_with_a_class_is_said_in_short(refused_small, given, message):
    logger = {"class_path": "lightning.pytorch.loggers.CSWLogger"}
    Path("mine.yaml").write_text(yaml.safe_dump({"trainer": {"logger": ["csv", logger]}}))
    assert refused_small(*given).endswith(
        f"trainer.logger: {message}; allowed: csv, tensorboard, wandb, mlflow, false, or one of Lightning's "
        "loggers with its arguments (class_path and init_args in a config)\n"
    )


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_done(name, monkeypatch, refused_small):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package: None if package.startswith(name) else find(package)
    )
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *a, **k: pytest.fail("loaded"))
    line = refused_small("--trainer.logger", name)
    assert line.endswith(f"trainer.logger: {name} needs a package that is not here; pip install {name}\n")


def test_the_command_takes_lightnings_loggers(small_run):
    own = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "mine", "--trainer.logger.name", "x"]
    folder = small_run("--data.limit", 2, *own)
    lines = Path("mine/x/version_0/metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 4 + 1
    assert sorted(os.listdir()) == ["mine", "run"]
    assert not (folder / "logs").exists()
    # The resolved settings take the same logger again.
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["logger"]["class_path"].endswith("CSVLogger")
    assert main(["fit-predict", "--config", "run/config.yaml", "--run_dir", "again"]) == 0
    assert Path("mine/x/version_1/metrics.csv").is_file()


def test_tensorboard_shows_curves_metrics_and_settings(tiny_run, records):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_run(limit=2, logger="tensorboard")
    result = tiny_run(logger=["csv", "tensorboard"])
    place = result.path / "logs" / "tensorboard"
    assert len(list(place.glob("events.*"))) == 1
    assert (result.path / "logs" / "metrics.csv").is_file()
    events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
    assert "hp_metric" not in events.Tags()["scalars"]
    sample_of = {event.step: int(event.value) for event in events.Scalars("sample")}
    found = {}
    for event in events.Scalars("cross_entropy"):
        found.setdefault(sample_of[event.step], []).append(event.value)
    expected = {r["index"]: r["curve"]["cross_entropy"] for r in records(result.path) if r["curve"]}
    assert found.keys() == expected.keys()
    assert all(found[index] == pytest.approx(curve) for index, curve in expected.items())
    for name, value in final_metrics(result.path).items():
        (final,) = events.Scalars(name)
        assert final.value == pytest.approx(value), name
    assert events.PluginTagToContent("hparams")


def test_mlflow_keeps_a_run_of_each_session(tiny_run, records):
    mlflow = pytest.importorskip("mlflow")
    result = tiny_run(logger="mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{result.path}/logs/mlflow/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "fastmem"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (result.path.name, "FINISHED")
    assert found.data.params["model.memorize.steps"] == "2"
    history = client.get_metric_history(found.info.run_id, "cross_entropy")
    curves = [r["curve"]["cross_entropy"] for r in records(result.path) if r["method"] == "fastmem"]
    assert sorted(m.value for m in history) == sorted(value for curve in curves for value in curve)
    for name, value in final_metrics(result.path).items():
        assert found.data.metrics[name.replace("+", "_")] == pytest.approx(value), name


def test_a_run_does_not_wait_long_for_mlflow(tiny_run, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    for name in names:
        # So that both are taken back at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # The port that discards: nobody answers.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tiny_run(logger="mlflow")
    assert "trainer.logger: mlflow stopped" in caplog.text
    assert [os.environ[name] for name in names] == ["3", "30"]


def test_wandb_keeps_a_run_of_each_session(tiny_run, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tiny_run(logger="wandb", limit=2).path
    assert wandb.run is None
    tiny_run(logger="wandb")
    assert len(list((folder / "logs" / "wandb").glob("offline-run-*/*.wandb"))) == 2
