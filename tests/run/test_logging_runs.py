"""What loggers of real runs keep, from the command line."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from real_runs import answers, read

from fastmem_pl.cli import main

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]


def logged(folder: Path) -> dict[str, list[str]]:
    """What stands in each column of `logs/metrics.csv`."""
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows if row[name]] for name in rows[0]}


def lengths(folder: Path) -> dict[str, int]:
    return {name: len(values) for name, values in logged(folder).items()}


def test_csv_by_default(real: Path) -> None:
    columns = logged(real)
    curves = [float(v) for name in columns if re.search("cross_entropy|loss", name) for v in columns[name]]
    for record in read(real):
        for value in (record["curve"] or {}).get("cross_entropy", ()):
            assert any(v == pytest.approx(value, rel=1e-3) for v in curves), "a curve is not there"
    groups = json.loads((real / "metrics.json").read_text())["groups"]
    accuracy = groups["all"]["fastmem"]["metrics"]["accuracy"]
    finals = [float(v) for name, values in columns.items() if "accuracy" in name for v in values]
    assert any(v == pytest.approx(accuracy["value"]) for v in finals)


def test_no_logger(run, real: Path) -> None:
    run("--trainer.logger", "false")
    assert not Path("run/logs").exists()
    assert answers(Path("run")) == answers(real)


def test_going_on_logs_nothing_twice(run, real: Path) -> None:
    run("--data.limit", "2")
    run()
    assert lengths(Path("run")) == lengths(real)
    run()
    assert lengths(Path("run")) == lengths(real), "a complete run is logged again"


def test_tensorboard_beside_csv(run) -> None:
    if find_spec("tensorboard") is None:
        pytest.skip("no tensorboard")
    run("--trainer.logger", "[csv, tensorboard]")
    assert logged(Path("run"))
    assert [path for path in Path("run/logs").rglob("events.out.tfevents*") if path.stat().st_size > 500]


def test_lightnings_own_loggers(run) -> None:
    run("--trainer.logger", "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: mine}}")
    assert any("accuracy" in path.read_text().splitlines()[0] for path in Path("mine").rglob("metrics.csv"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("way", ["--trainer.logger", "--config"])
def test_loggers_that_are_not_installed(refused_run, name: str, way: str) -> None:
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    line = refused_run(way, name)
    assert name in line
    assert "pip install" in line


def test_the_csv_is_complete_after_a_kill(run, options: list[str], tmp_path: Path, real: Path) -> None:
    slow = [
        "--model.memorize.steps",
        "300",
        "--model.memorize.learning_rate",
        "1e-5",
        "--data.batch_size",
        "1",
    ]
    arguments = ["fit-predict", *options, "--run_dir", "run", *slow]
    killed = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
    killed.start()
    done = Path("run/predictions.jsonl")
    end = time.monotonic() + 60
    while not (done.exists() and done.read_bytes().count(b"\n") >= 6) and time.monotonic() < end:
        assert killed.is_alive(), "ended too early"
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not Path("run/metrics.json").exists()
    run(*slow)
    ours, theirs = lengths(Path("run")), lengths(real)
    assert set(theirs) <= set(ours)
    for name, count in theirs.items():
        if re.search("accuracy|contained|f1", name):
            assert ours[name] == count, name
    columns = logged(Path("run"))
    curves = {
        round(float(v), 3) for name in columns if re.search("cross_entropy|loss", name) for v in columns[name]
    }
    for record in read(Path("run")):
        if record["curve"]:
            first, last = (round(record["curve"]["cross_entropy"][i], 3) for i in (0, -1))
            assert {first, last} <= curves, f"the curve of sample {record['index']} is not whole"
