"""Loggers get the curve and scores of every sample and the final metrics, whatever happens to a run."""

import csv
import importlib.util
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from ranks import fork_ranks
from towers import write_towers

from fastmem_pl import FastMemDataModule, FastMemError, FastMemModule, FastMemTrainer
from fastmem_pl.base.errors import TerminatedError
from fastmem_pl.cli import main
from fastmem_pl.memory import MemoryFolder
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.loggers import RunLog, make_logger, select_loggers
from fastmem_pl.search import SearchSettings

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]
COUNT, STEPS = 5, 3
CURVE = ("cross_entropy", "kl", "grad_norm")


class Kept(Logger):
    """Keeps what it is told; like W&B, it takes no step that goes back."""

    name, version = "kept", 0

    def __init__(self, fails_at=math.inf):
        self.rows, self.hyperparameters, self.ended, self.fails_at = [], [], [], fails_at

    def log_metrics(self, metrics, step=None):
        assert not self.rows or step > self.rows[-1]["step"]
        if len(self.rows) >= self.fails_at:
            raise ConnectionError("the network\nis gone")
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, params, *args, **kwargs):
        self.hyperparameters.append(params)

    def finalize(self, status):
        self.ended.append(status)


@pytest.fixture
def data_file(tmp_path):
    return write_towers(tmp_path, COUNT)


@pytest.fixture
def run(tmp_path, data_file, tiny, monkeypatch):
    """Run one command in Python on the tiny model; returns the run's folder."""
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: tiny)

    def go(mode="fit_predict", name="run", limit=None, batch_size=2, model=None, **trainer):
        loop = FastMemTrainer(accelerator="cpu", enable_progress_bar=False, **trainer)
        module = FastMemModule("tiny", steps=STEPS, learning_rate=1e-3, max_new_tokens=5, **(model or {}))
        data = FastMemDataModule("qa", str(data_file), limit=limit, batch_size=batch_size)
        return getattr(loop, mode)(module, data, run_dir=str(tmp_path / name)).path

    return go


def table(folder):
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def records(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def curves_of(rows):
    found = {}
    for row in rows:
        if "cross_entropy" in row:
            found.setdefault(row["sample"], []).append([row[name] for name in CURVE])
    return found


def expected_curves(folder):
    return {
        r["index"]: [list(values) for values in zip(*(r["curve"][name] for name in CURVE), strict=True)]
        for r in records(folder)
        if r["curve"]
    }


def scores_of(rows):
    return {
        (row["sample"], name): value
        for row in rows
        if "sample" in row
        for name, value in row.items()
        if "/" in name
    }


def expected_scores(folder):
    return {
        (r["index"], f"{r['method']}/{name}"): value
        for r in records(folder)
        for name, value in r["scores"].items()
    }


def expected_metrics(folder):
    found = {}
    for group, methods in json.loads((folder / "metrics.json").read_text())["groups"].items():
        for method, entry in methods.items():
            for name, metric in entry["metrics"].items():
                found[f"{group}/{method}/{name}"] = metric["value"]
                if metric["standard_error"] is not None:
                    found[f"{group}/{method}/{name}/standard_error"] = metric["standard_error"]
            for name, test in entry["against_zero_shot"].items():
                found[f"{group}/{method}/{name}/p_value"] = test["p_value"]
    return found


def assert_complete(rows, folder, count=COUNT):
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(expected_curves(folder)) == count
    assert curves_of(rows) == expected_curves(folder)
    assert scores_of(rows) == expected_scores(folder)
    final = {name: value for name, value in rows[-1].items() if name != "step"}
    assert final == expected_metrics(folder)
    # A row for each update and one for each sample's scores, then the metrics.
    assert len(rows) == count * (STEPS + 1) + 1


def test_a_run_leaves_a_whole_csv_file(run):
    folder = run()
    assert_complete(table(folder), folder)
    assert {path.name for path in (folder / "logs").iterdir()} == {"metrics.csv", "hparams.yaml"}
    header = (folder / "logs" / "metrics.csv").read_text().split("\n")[0].split(",")
    assert header[:5] == ["step", "sample", *CURVE]
    settings = yaml.safe_load((folder / "logs" / "hparams.yaml").read_text())
    assert settings["model.memorize.steps"] == STEPS
    assert settings["data.task"] == "qa"


def test_samples_come_while_the_run_is_at_work(run, tmp_path, monkeypatch):
    process, seen = FastMemModule._process, []

    def watched(self, pairs):
        file = tmp_path / "run" / "logs" / "metrics.csv"
        seen.append(len(file.read_text().splitlines()) - 1 if file.exists() else 0)
        return process(self, pairs)

    monkeypatch.setattr(FastMemModule, "_process", watched)
    run(batch_size=1)
    assert seen == [i * (STEPS + 1) for i in range(COUNT)]


def test_a_resumed_run_has_all_samples(run):
    run(limit=2)
    first = run(limit=2)
    before = (first / "logs" / "metrics.csv").read_bytes()
    assert_complete(table(first), first, 2)
    kept = Kept()
    folder = run(logger=["csv", kept])
    assert (folder / "logs" / "metrics.csv").read_bytes() != before
    assert_complete(table(folder), folder)
    assert_complete(kept.rows, folder)
    # Those of the earlier session come first.
    assert {row["sample"] for row in kept.rows[: 2 * (STEPS + 1)]} == {0, 1}


def test_a_stopped_run_says_so_and_the_next_is_complete(run, monkeypatch):
    process, calls = FastMemModule._process, []

    def stopped(self, pairs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return process(self, pairs)

    kept = Kept()
    with monkeypatch.context() as patch:
        patch.setattr(FastMemModule, "_process", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            run(logger=kept)
    assert kept.ended == ["failed"]
    assert len(curves_of(kept.rows)) == 4
    again = Kept()
    folder = run(logger=again)
    assert_complete(again.rows, folder)
    assert again.ended == ["success"]


def test_nothing_new_touches_no_logger(run):
    folder = run()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "logs").iterdir()}
    kept = Kept()
    run(logger=["csv", kept])
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "logs").iterdir()
    } == before
    assert kept.rows == kept.hyperparameters == kept.ended == []


def test_scores_that_come_later_are_logged_beside_the_others(run, monkeypatch):
    folder = run(logger=False)
    assert not (folder / "logs").exists()

    def added(run, model, datamodule):
        content = run.records()
        for record in content:
            record["scores"]["factkb"] = 0.5
        run.replace(content)
        return ["factkb"]

    with monkeypatch.context() as patch:
        patch.setattr("fastmem_pl.run.session.score_records", added)
        run()
    assert scores_of(table(folder)) == expected_scores(folder)

    live = Kept()
    with monkeypatch.context() as patch:
        patch.setattr("fastmem_pl.run.session.score_records", added)
        other = run(name="live", logger=live)
    assert scores_of(live.rows) == expected_scores(other)


def test_the_samples_of_all_processes_arrive(run, tmp_path):
    def work(rank):
        kept = Kept()
        run(name="several", devices=2, logger=["csv", kept], batch_size=1)
        return len(kept.rows)

    total = COUNT * (STEPS + 1) + 1
    assert fork_ranks(2, work, tmp_path) == [total, 0]
    assert_complete(table(tmp_path / "several"), tmp_path / "several")


def test_elastic_workers_leave_one_whole_log(run, tmp_path):
    def work(rank):
        # As srun would number it.
        rank_zero_only.rank = rank
        run(name="shared", elastic=True, chunk_samples=1, stale_after=1.0)

    fork_ranks(2, work, tmp_path)
    folder = tmp_path / "shared"
    assert_complete(table(folder), folder)
    before = (folder / "logs" / "metrics.csv").stat().st_mtime_ns
    run(name="shared", elastic=True)
    assert (folder / "logs" / "metrics.csv").stat().st_mtime_ns == before


def test_fit_logs_curves_and_predict_scores(run):
    folder = run("fit")
    rows = table(folder)
    assert len(rows) == COUNT * STEPS
    assert not scores_of(rows)
    headers = MemoryFolder(folder / "memories").headers(range(COUNT))
    for index, header in headers.items():
        curve = json.loads(header["curve"])
        assert [[c[i] for i in range(3)] for c in curves_of(rows)[index]] == [
            [curve[name][step] for name in CURVE] for step in range(STEPS)
        ]
    before = (folder / "logs" / "metrics.csv").read_bytes()
    assert (run("fit") / "logs" / "metrics.csv").read_bytes() == before
    run("predict")
    assert_complete(table(folder), folder)


@pytest.mark.parametrize("elastic", [False, True])
def test_fit_of_several_workers_logs_all_curves(run, tmp_path, elastic):
    devices = {"elastic": True, "chunk_samples": 1, "stale_after": 1.0} if elastic else {"devices": 2}
    fork_ranks(2, lambda rank: str(run("fit", batch_size=1, **devices)), tmp_path)
    rows = table(tmp_path / "run")
    assert {len(curve) for curve in curves_of(rows).values()} == {STEPS}
    assert len(rows) == COUNT * STEPS


def test_a_search_logs_nothing(run, tmp_path, data_file):
    kept = Kept()
    trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False, logger=["csv", kept])
    settings = SearchSettings({"learning_rate": [1e-3], "steps": [1], "kl_coeff": [0.1]}, every=1)
    data = FastMemDataModule("qa", str(data_file), limit=1)
    trainer.search(FastMemModule("tiny", max_new_tokens=3), data, settings, str(tmp_path / "s"))
    assert not (tmp_path / "s" / "logs").exists()
    assert kept.rows == kept.hyperparameters == kept.ended == []


@pytest.mark.parametrize("fails_at", [0, 6, COUNT * (STEPS + 1)])
def test_a_run_goes_on_without_a_logger_that_fails(run, caplog, fails_at):
    kept = Kept(fails_at)
    folder = run(logger=[kept, "csv"])
    assert len(kept.rows) == fails_at
    said = [r.getMessage() for r in caplog.records if "trainer.logger" in r.getMessage()]
    assert said == ["trainer.logger: Kept stopped (the network is gone); the run goes on without it"]
    assert_complete(table(folder), folder)


def test_a_full_disk_ends_the_csv_file_only(run, caplog, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastmem_pl.run.loggers._TableWriter.save", full)
    assert len(records(run())) == COUNT * 3
    (said,) = [r.getMessage() for r in caplog.records if "trainer.logger" in r.getMessage()]
    assert "No space left on device" in said


def test_what_ends_the_run_too_is_said_by_the_run(run, caplog, monkeypatch):
    append, calls = RunFolder.append, []

    def gone(self, records):
        calls.append(1)
        if len(calls) == 2:
            raise FastMemError("the folder is gone")
        append(self, records)

    monkeypatch.setattr(RunFolder, "append", gone)
    with pytest.raises(FastMemError, match="the folder is gone"):
        run(logger=Kept(fails_at=2))
    assert "trainer.logger" not in caplog.text


def test_a_logger_that_fails_last_is_said_when_a_signal_ends_the_run(run, caplog, monkeypatch):
    process, calls = FastMemModule._process, []

    def asked_to_end(self, pairs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return process(self, pairs)

    monkeypatch.setattr(FastMemModule, "_process", asked_to_end)
    with pytest.raises(TerminatedError):
        # In the batch after which the run ends.
        run(logger=Kept(fails_at=2 * (STEPS + 1) + 1))
    said = [r.getMessage() for r in caplog.records if "trainer.logger" in r.getMessage()]
    assert said == ["trainer.logger: Kept stopped (the network is gone); the run goes on without it"]


def test_a_logs_folder_that_cannot_be_made_costs_the_log_only(run, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").write_text("")
    assert len(records(run())) == COUNT * 3
    assert "csv stopped" in caplog.text


def test_failed_fits_are_logged_as_they_are(tmp_path):
    kept = Kept()
    log = RunLog([kept], tmp_path, "model: {steps: 2}")
    curve = {"cross_entropy": [1.0, None], "kl": [0.0, math.nan], "grad_norm": [1.0, math.inf]}
    log.add([{"index": 3, "curve": curve}])
    log.finish({})
    log.close()
    assert [row["sample"] for row in kept.rows] == [3, 3]
    assert math.isnan(kept.rows[1]["cross_entropy"])
    assert math.isnan(kept.rows[1]["kl"])
    assert kept.rows[1]["grad_norm"] == math.inf
    assert kept.hyperparameters == [{"model.memorize.steps": 2}]


def test_a_damaged_curve_of_an_earlier_session_is_logged_as_far_as_it_goes(run):
    folder = run(limit=2)
    damaged = records(folder)
    for record in damaged:
        if record["curve"]:
            del record["curve"]["kl"][1:]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in damaged))
    kept = Kept()
    run(logger=kept)
    curves = curves_of(kept.rows)
    assert set(curves) == set(range(COUNT))
    assert [[math.isnan(value) for value in row] for row in curves[0]] == [
        [False, index > 0, False] for index in range(STEPS)
    ]
    assert kept.ended == ["success"]


def test_settings_of_loggers_stay_with_them(tmp_path):
    kept = Kept()
    text = "trainer: {devices: 1, logger: {class_path: X, init_args: {key: secret}}}"
    RunLog([kept], tmp_path, text).open()
    assert kept.hyperparameters == [{"trainer.devices": 1}]


def test_nothing_is_logged_without_loggers(run):
    folder = run(logger=False)
    assert not (folder / "logs").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorbord", r"'tensorbord' is unknown; allowed: csv, false, .*; did you mean 'tensorboard'\?"),
        (["csv", "wandbb"], r"'wandbb' is unknown; .* did you mean 'wandb'\?"),
        (3, r"3 is no logger; allowed: csv, tensorboard, wandb, mlflow, Lightning's loggers, or false"),
    ],
)
def test_what_is_no_logger_is_refused(given, message):
    with pytest.raises(FastMemError, match=rf"^trainer\.logger: {message}"):
        FastMemTrainer(accelerator="cpu", logger=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--trainer.logger", "CSVLogger"], "CSVLogger: the following arguments are required: save_dir"),
        (
            ["--trainer.logger", "[csv, CSVLogger]"],
            "CSVLogger: the following arguments are required: save_dir",
        ),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.dir", "x"], "Option 'dir' is not accepted"),
        (
            ["--config", "mine.yaml"],
            "CSWLogger: module 'lightning.pytorch.loggers' has no attribute 'CSWLogger'",
        ),
    ],
)
def test_what_is_wrong_with_a_class_is_said_in_short(capsys, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    logger = {"class_path": "lightning.pytorch.loggers.CSWLogger"}
    Path("mine.yaml").write_text(yaml.safe_dump({"trainer": {"logger": ["csv", logger]}}))
    assert main(["fit-predict", "--data.path", "x.json", *given, "--run_dir", "r"]) == 2
    file = "mine.yaml: " if "mine.yaml" in given else ""
    assert capsys.readouterr().err == (
        f"fastmem: error: {file}trainer.logger: {message}; allowed: csv, tensorboard, wandb, mlflow, false, or one of "
        "Lightning's loggers with its arguments (class_path and init_args in a config)\n"
    )


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_done(name, monkeypatch, tmp_path, capsys, data_file):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda package, *args: None if package.startswith(name) else find(package, *args),
    )
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    arguments = ["--data.task", "qa", "--data.path", str(data_file), "--trainer.logger", f"[csv,{name}]"]
    assert main(["fit-predict", *arguments, "--run_dir", "r"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        error
        == f"fastmem: error: trainer.logger: {name} needs a package that is not here; pip install {name}"
    )
    assert not Path("r").exists()


def test_names_are_taken_in_every_form():
    kept = Kept()
    assert select_loggers("csv, tensorboard") == ["csv", "tensorboard"]
    assert select_loggers(("csv", kept, "csv")) == ["csv", kept]
    assert select_loggers(None) == select_loggers(True) == ["csv"]
    assert select_loggers(False) == select_loggers([]) == []


def test_the_command_takes_lightnings_loggers(tmp_path, data_file, tiny, monkeypatch):
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: tiny)
    monkeypatch.chdir(tmp_path)
    own = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "mine", "--trainer.logger.name", "x"]
    common = ["--data.path", str(data_file), "--model.memorize.steps", "2", "--trainer.accelerator", "cpu"]
    common += ["--data.task", "qa", "--model.decode.max_new_tokens", "3"]
    assert main(["fit-predict", *common, *own, "--run_dir", "r"]) == 0
    lines = Path("mine/x/version_0/metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + COUNT * 3 + 1
    assert not Path("r/logs").exists()
    assert sorted(os.listdir()) == ["data.jsonl", "mine", "r"]
    # The resolved settings take the same logger again.
    config = yaml.safe_load(Path("r/config.yaml").read_text())
    assert config["trainer"]["logger"]["class_path"].endswith("CSVLogger")
    assert main(["fit-predict", "--config", "r/config.yaml", "--run_dir", "again"]) == 0
    assert Path("mine/x/version_1/metrics.csv").is_file()


def test_trainer_logger_is_lightnings(run, tmp_path):
    logger = make_logger("csv", tmp_path / "r")
    assert isinstance(logger, CSVLogger)
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_metrics({"b": 2.0, "a": 3.0}, 1)
    logger.finalize("success")
    assert (tmp_path / "r" / "logs" / "metrics.csv").read_text() == "step,a,b\n0,1.0,\n1,3.0,2.0\n"
    logger.log_metrics({"c": 'x,"y"\nz'}, 2)
    logger.save()
    logger.log_metrics({"d": 4.0}, 3)
    logger.save()
    rows = list(csv.DictReader((tmp_path / "r" / "logs" / "metrics.csv").open(newline="")))
    assert [row["c"] for row in rows] == ["", "", 'x,"y"\nz', ""]
    assert list(rows[-1].values()) == ["3", "", "", "", "4.0"]


def test_tensorboard_shows_curves_metrics_and_settings(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(limit=2, logger="tensorboard")
    folder = run(logger="tensorboard")
    place = folder / "logs" / "tensorboard"
    assert len(list(place.glob("events.*"))) == 1
    events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    assert "hp_metric" not in tags

    def values(tag):
        return [event.value for event in events.Scalars(tag)]

    samples = [int(v) for v in values("sample")]
    steps = [event.step for event in events.Scalars("cross_entropy")]
    assert steps == sorted(set(steps))
    assert len(steps) == COUNT * STEPS
    by_step = {event.step: int(event.value) for event in events.Scalars("sample")}
    found = {}
    for event in events.Scalars("cross_entropy"):
        found.setdefault(by_step[event.step], []).append(event.value)
    for index, curve in expected_curves(folder).items():
        assert found[index] == pytest.approx([row[0] for row in curve])
    assert set(samples) == set(range(COUNT))
    for name, value in expected_metrics(folder).items():
        assert values(name) == pytest.approx([value])
    assert events.PluginTagToContent("hparams")


def test_mlflow_keeps_a_run_of_each_session(run):
    mlflow = pytest.importorskip("mlflow")
    folder = run(logger="mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/logs/mlflow/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "fastmem"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (folder.name, "FINISHED")
    assert found.data.params["model.memorize.steps"] == str(STEPS)
    history = client.get_metric_history(found.info.run_id, "cross_entropy")
    assert sorted(m.value for m in history) == sorted(
        row[0] for curve in expected_curves(folder).values() for row in curve
    )
    for name, value in expected_metrics(folder).items():
        assert found.data.metrics[name.replace("+", "_")] == pytest.approx(value)


def test_a_run_does_not_wait_long_for_mlflow(run, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    for name in names:
        # So that both are taken back at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # The port that discards: nobody answers.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    before = time.perf_counter()
    run(logger="mlflow")
    assert time.perf_counter() - before < 60
    assert "trainer.logger: mlflow stopped" in caplog.text
    assert [os.environ[name] for name in names] == ["3", "30"]


def test_wandb_keeps_a_run_of_each_session(run, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run(logger="wandb", limit=2)
    assert wandb.run is None
    run(logger="wandb")
    assert len(list((folder / "logs" / "wandb").glob("offline-run-*/*.wandb"))) == 2


def test_lightnings_loggers_of_a_python_user(run, tmp_path):
    pytest.importorskip("tensorboard")
    mine = TensorBoardLogger(tmp_path / "tb")
    run(logger=[mine, Kept()])
    assert list((tmp_path / "tb" / "lightning_logs" / "version_0").glob("events.*"))
