"""Loggers get the curve and scores of every sample and the final metrics, whatever happens to a run."""

import csv
import json
import math
import os
import signal

import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger
from ranks import fork_ranks
from runs import final_metrics

from fastmem_pl import FastMemError, FastMemTrainer
from fastmem_pl.memory import MemoryFolder
from fastmem_pl.run.loggers import RunLogging, select_loggers

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, STEPS = 5, 2
CURVE = ("cross_entropy", "kl", "grad_norm")
ROWS = STEPS + 1
"""Of a sample: one for each update and one for its scores."""


class Kept(Logger):
    """Keeps what it is given; like W&B, it takes no step that goes back."""

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


class BeforeBatch(Callback):
    """Does something before each batch, given the trainer and how many batches were done."""

    def __init__(self, act):
        self.act = act

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.act(trainer, batch_idx)


def table(folder):
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def curves_of(rows):
    found = {}
    for row in rows:
        if "cross_entropy" in row:
            found.setdefault(row["sample"], []).append([row[name] for name in CURVE])
    return found


def by_step(curve):
    return [list(values) for values in zip(*(curve[name] for name in CURVE), strict=True)]


def scores_of(rows):
    return {(r["sample"], name): r[name] for r in rows if "sample" in r for name in r if "/" in name}


def states(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "logs").iterdir()}


@pytest.fixture
def assert_complete(records):
    def check(rows, folder):
        kept = records(folder)
        assert [row["step"] for row in rows] == list(range(COUNT * ROWS + 1))
        assert curves_of(rows) == {r["index"]: by_step(r["curve"]) for r in kept if r["curve"]}
        scores = {(r["index"], f"{r['method']}/{k}"): v for r in kept for k, v in r["scores"].items()}
        assert scores_of(rows) == scores
        assert rows[-1] == {"step": COUNT * ROWS, **final_metrics(folder)}

    return check


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "trainer.logger" in r.getMessage()]


def test_a_run_leaves_a_whole_csv_file(tiny_run, assert_complete):
    folder = tiny_run().path
    assert_complete(table(folder), folder)
    assert {path.name for path in states(folder)} == {"metrics.csv", "hparams.yaml"}
    settings = yaml.safe_load((folder / "logs" / "hparams.yaml").read_text())
    assert (settings["model.memorize.steps"], settings["data.task"]) == (STEPS, "qa")


def test_a_killed_run_has_logged_every_batch_and_the_next_logs_all(tiny_run, tmp_path, assert_complete):
    def look_and_die(trainer, done):
        assert len(table(tmp_path / "run")) == done * ROWS if done else True
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    watcher = BeforeBatch(look_and_die)
    killed = fork_ranks(1, lambda rank: tiny_run(batch_size=1, callbacks=watcher), tmp_path)
    assert killed == [-signal.SIGKILL]
    kept = Kept()
    folder = tiny_run(logger=["csv", kept]).path
    assert_complete(table(folder), folder)
    assert_complete(kept.rows, folder)


def test_a_stopped_run_says_so_and_nothing_new_touches_no_logger(tiny_run, assert_complete):
    def stop(trainer, done):
        if done == 1:
            raise RuntimeError("stopped")

    kept, again, never = Kept(), Kept(), Kept()
    with pytest.raises(RuntimeError, match="stopped"):
        tiny_run(logger=kept, callbacks=BeforeBatch(stop))
    assert (kept.ended, len(kept.rows)) == (["failed"], 2 * ROWS)
    folder = tiny_run(logger=["csv", again]).path
    assert_complete(again.rows, folder)
    # Those of the earlier session come first.
    assert {row["sample"] for row in again.rows[: 2 * ROWS]} == {row["sample"] for row in kept.rows}
    assert again.ended == ["success"]
    before = states(folder)
    tiny_run(logger=["csv", never])
    assert states(folder) == before
    assert never.rows == never.hyperparameters == never.ended == []


def test_scores_that_come_later_are_logged_beside_the_others(tiny_run, monkeypatch, assert_complete):
    def added(run, *others):
        content = run.records()
        for record in content:
            record["scores"]["factkb"] = 0.5
        run.replace(content)
        return ["factkb"]

    folder = tiny_run(logger=False).path
    assert not (folder / "logs").exists()
    monkeypatch.setattr("fastmem_pl.run.session.score_records", added)
    tiny_run()
    assert_complete(table(folder), folder)
    live = Kept()
    tiny_run(name="live", logger=live)
    assert sum("fastmem/factkb" in row for row in live.rows) == COUNT


def test_the_samples_of_all_processes_arrive(tiny_run, tmp_path, assert_complete):
    def work(rank):
        kept = Kept()
        tiny_run(name="several", devices=2, logger=["csv", kept], batch_size=1)
        tiny_run("fit", name="fitted", devices=2, batch_size=1)
        return len(kept.rows)

    assert fork_ranks(2, work, tmp_path) == [COUNT * ROWS + 1, 0]
    assert_complete(table(tmp_path / "several"), tmp_path / "several")
    assert {len(curve) for curve in curves_of(table(tmp_path / "fitted")).values()} == {STEPS}
    assert len(table(tmp_path / "fitted")) == COUNT * STEPS


def test_fit_logs_curves_and_predict_scores(tiny_run, assert_complete):
    folder = tiny_run("fit").path
    rows = table(folder)
    headers = MemoryFolder(folder / "memories").headers(range(COUNT))
    assert curves_of(rows) == {i: by_step(json.loads(header["curve"])) for i, header in headers.items()}
    assert (len(rows), scores_of(rows)) == (COUNT * STEPS, {})
    tiny_run("predict")
    assert_complete(table(folder), folder)


@pytest.mark.parametrize("fails_at", [0, 7, COUNT * ROWS])
def test_a_run_goes_on_without_a_logger_that_fails(tiny_run, caplog, fails_at, assert_complete):
    kept, warned = Kept(fails_at), []
    watcher = BeforeBatch(lambda trainer, done: warned.append(bool(warnings_of(caplog))))
    folder = tiny_run(logger=[kept, "csv"], callbacks=watcher).path
    assert warned == [done * 2 * ROWS > fails_at for done in range(3)]
    stopped = "trainer.logger: Kept stopped (the network is gone); the run goes on without it"
    assert (len(kept.rows), kept.ended, warnings_of(caplog)) == (fails_at, [], [stopped])
    assert_complete(table(folder), folder)


@pytest.mark.parametrize("fault", ["No space left on device", "csv stopped"])
def test_a_file_that_cannot_be_written_costs_the_log_only(tiny_run, records, caplog, monkeypatch, fault):
    def full(self):
        raise OSError(28, "No space left on device")

    if fault == "csv stopped":
        (tiny_run(limit=1, logger=False).path / "logs").write_text("")
    else:
        monkeypatch.setattr("lightning.fabric.loggers.csv_logs._ExperimentWriter.save", full)
    assert len(records(tiny_run().path)) == COUNT * 3
    (warning,) = warnings_of(caplog)
    assert fault in warning


def test_curves_are_logged_as_far_as_they_go_and_settings_of_loggers_stay_with_them(tmp_path):
    kept = Kept()
    text = "{model: {steps: 2}, trainer: {logger: {class_path: X, init_args: {key: secret}}}}"
    logging = RunLogging([kept], tmp_path, text)
    logging.open()
    curve = {"cross_entropy": [1.0, None], "kl": [0.0], "grad_norm": [1.0, math.inf]}
    logging.add([{"index": 3, "curve": curve}])
    assert [tuple(map(str, row.values())) for row in kept.rows] == [
        ("0", "3", "1.0", "0.0", "1.0"),
        ("1", "3", "nan", "nan", "inf"),
    ]
    assert kept.hyperparameters == [{"model.steps": 2}]


def test_callbacks_find_the_loggers_and_lightning_none(tiny_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen, kept = [], Kept()

    def log_own(trainer, done):
        seen.append(list(trainer.loggers))
        trainer.logger.log_metrics({"own": 1.0}, 0)

    settings = {"logger": ["csv", kept], "callbacks": BeforeBatch(log_own)}
    trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False, **settings)
    for number, name in enumerate(("first", "second"), 1):
        kept.rows.clear()
        folder = tiny_run(name=name, limit=2, trainer=trainer).path
        assert [type(logger) for logger in seen[-1]] == [CSVLogger, Kept]
        assert [row.get("own") for row in table(folder)].count(1.0) == 1
        assert len(table(folder)) == 2 * ROWS + 1 + 1
        # The settings once, the end once, and not the module's arguments.
        assert kept.ended == ["success"] * number
        assert [given["model.memorize.steps"] for given in kept.hyperparameters] == [STEPS] * number
    assert trainer.loggers == []
    assert not (tmp_path / "lightning_logs").exists()


def test_names_are_taken_in_every_form():
    kept = Kept()
    assert select_loggers("csv, tensorboard") == ["csv", "tensorboard"]
    assert select_loggers(("csv", kept, "csv")) == ["csv", kept]
    assert select_loggers(None) == select_loggers(True) == ["csv"]
    assert select_loggers(False) == select_loggers([]) == []
    for given, message in (
        ("tensorbord", r"'tensorbord' is unknown; allowed: csv, false, .*; did you mean 'tensorboard'\?"),
        (["csv", "wandbb"], r"'wandbb' is unknown; .* did you mean 'wandb'\?"),
        (3, r"3 is no logger; allowed: csv, tensorboard, wandb, mlflow, Lightning's loggers, or false"),
    ):
        with pytest.raises(FastMemError, match=rf"^trainer\.logger: {message}"):
            FastMemTrainer(accelerator="cpu", logger=given)
