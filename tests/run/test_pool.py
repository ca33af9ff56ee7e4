"""Runs on Ray: the records of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial

import pytest
from conftest import make_module
from ranks import (
    METHODS,
    Jobs,
    assert_same,
    assert_same_memories,
    fork_ranks,
    kept,
    launched_by,
    lines,
    until,
)
from towers import write_towers

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'fastmem-pl[ray]'")
psutil = pytest.importorskip("psutil")

from fastmem_pl import FastMemDataModule, FastMemError, FastMemModule, FastMemTrainer  # noqa: E402
from fastmem_pl.run import pool  # noqa: E402
from fastmem_pl.search.grid import OptunaSettings, SearchSettings  # noqa: E402
from fastmem_pl.search.trainer import SearchTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
# A cluster of two cores, for as long as its standard input is open.
_CLUSTER = """
import ray, sys
started = ray.init("local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
print(started.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
COUNT, MANY = 6, 48


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patched:
        for name, value in pool._ENVIRONMENT.items():
            patched.setenv(name, value)
        # Drivers in other processes lack the token of a cluster that is started by one.
        patched.setenv("RAY_AUTH_MODE", "disabled")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, "-c", _CLUSTER], text=True, **pipes)
        process.address = process.stdout.readline().strip()
        yield process
        process.stdin.close()
        process.wait()


@pytest.fixture
def jobs(tmp_path, shared_jobs):
    found = Jobs(tmp_path, shared_jobs.model, shared_jobs.data)
    yield found
    found.end()


@pytest.fixture(scope="module")
def many(tmp_path_factory, shared_jobs):
    """Jobs about more samples, and what one process makes of them."""
    root = tmp_path_factory.mktemp("many")
    found = Jobs(root, shared_jobs.model, write_towers(root, MANY))
    found.expected = found.run("alone")
    yield found
    found.end()


def on(cluster, workers=2, **more):
    return {"ray": cluster.address, "ray_workers": workers, **more}


def kill_a_worker(cluster):
    for process in psutil.Process(cluster.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()[:1]):
                process.kill()
                return 1
    return 0


def in_a_fork(work, folder):
    """The result of some work, or its exception as type and text: forks of a process that had Ray would hang."""
    (found,) = fork_ranks(1, lambda rank: work(), folder)
    return found


def test_two_workers_answer_as_one_process(cluster, jobs, alone):
    assert_same(jobs.run("run", trainer=on(cluster)), alone())
    # Nothing is left to do, and no worker starts.
    before = lines(jobs.root / "run")
    assert_same(jobs.run("run", trainer=on(cluster, 99)), alone(), before)


def test_metrics_that_are_missing_come_without_new_answers(cluster, jobs, alone):
    half = {"precision": "bf16-true"}
    folder = jobs.run("run", trainer=on(cluster, 1, **half))
    before = lines(folder)
    (folder / "metrics.json").unlink()
    assert_same(jobs.run("run", trainer=on(cluster, 1, **half)), alone(trainer=half), before)


@pytest.mark.slow
def test_killed_workers_lose_and_double_nothing(cluster, many):
    moments = sorted(random.Random(0).sample(range(MANY * METHODS - METHODS), 5))
    job, folder = many.start("workers", trainer=on(cluster)), many.root / "workers"
    killed = 0
    for moment in moments:
        until(lambda: len(lines(folder)) >= moment, job)  # noqa: B023 (called at once)
        killed += kill_a_worker(cluster)
    assert job.wait() == 0, job.said
    assert killed
    assert_same(folder, many.expected)


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_command(cluster, many):
    moments = sorted(random.Random(0).sample(range(1, MANY * METHODS - METHODS), 5))
    folder, before = many.root / "drivers", []
    for moment in moments:
        job = many.start(folder.name, trainer=on(cluster))
        until(lambda: len(lines(folder)) >= moment or job.process.poll() is not None)  # noqa: B023
        job.process.send_signal(signal.SIGKILL)
        job.wait()
        found = kept(folder)
        assert set(before) <= set(found), "answered again"
        before = found
    assert_same(many.run(folder.name, trainer=on(cluster)), many.expected, before)


@pytest.mark.slow
def test_sigterm_ends_the_driver_with_all_on_disk(cluster, many):
    job = many.start("ended", trainer=on(cluster))
    until(lambda: lines(many.root / "ended"), job)
    job.send(signal.SIGTERM)
    assert job.wait() == 143
    assert "the same command goes on" in job.said
    before = kept(many.root / "ended")
    assert len(before) < MANY * METHODS
    assert_same(many.run("ended", trainer=on(cluster)), many.expected, before)


@pytest.mark.slow
def test_memories_of_workers_are_those_of_one_process(cluster, jobs, alone):
    jobs.run("run", mode="fit", trainer=on(cluster))
    (jobs.root / "run" / "memories" / "000003.safetensors").unlink()
    jobs.run("run", mode="fit", trainer=on(cluster, 1))
    assert_same_memories(jobs.root / "run", alone("fit"))


class Deadly(FastMemModule):
    """Ends its process at one sample."""

    def predict_step(self, batch, batch_idx=0):
        if any(sample.index == 2 for sample in batch):
            os._exit(1)
        return super().predict_step(batch)


def pooled(cluster, kind, jobs, folder, workers=1, backbone=None, **settings):
    """Run a module of the tests' own on workers, which cannot import it."""

    def run():
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        options = on(cluster, workers, **settings)
        trainer = FastMemTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, **options)
        data = FastMemDataModule("qa", str(jobs.data), batch_size=1)
        trainer.fit_predict(kind(backbone or str(jobs.model)), data, str(folder))

    return in_a_fork(run, jobs.root)


@pytest.mark.slow
def test_a_share_that_kills_its_workers_ends_the_run(cluster, jobs, monkeypatch):
    monkeypatch.setattr(pool, "_TRIES", 1)
    kind, text = pooled(cluster, Deadly, jobs, jobs.root / "run")
    assert kind == "RunStoppedError"
    assert re.fullmatch(r"trainer\.ray: .*Actor.*; what was answered is kept, and .*", text)
    assert {json.loads(line)["index"] for line in lines(jobs.root / "run")} <= {0, 1, 3, 4, 5}


@pytest.mark.slow
def test_srun_may_start_the_command_of_a_cluster(monkeypatch, jobs, alone, cluster):
    # `srun ray symmetric-run` runs it on the first of several machines.
    (variables, _) = launched_by("srun", 2, 1)
    job = jobs.start("run", variables, trainer=on(cluster, 1))
    assert job.wait() == 0, job.said


GRID = SearchSettings(grid={"learning_rate": [1e-3, 1e-2], "steps": [2, 3]}, every=2)
TRIALS = SearchSettings(
    optuna=OptunaSettings({"learning_rate": [1e-3, 1e-1]}, trials=3, parallel=2, sampler="random"), every=2
)


@pytest.mark.parametrize(
    ("settings", "points"),
    [(GRID, 4), pytest.param(TRIALS, 3, marks=pytest.mark.slow)],
    ids=["grid", "trials"],
)
def test_a_search_on_workers_is_that_of_one_process(cluster, jobs, settings, points):
    def search(name, **more):
        trainer = SearchTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, **more)
        data, module = FastMemDataModule("qa", str(jobs.data)), make_module(str(jobs.model), max_new_tokens=6)
        return trainer.search(module, data, settings, str(jobs.root / name)).num_new

    found = []
    for name, more in (("alone", {}), ("pool", on(cluster))):
        assert in_a_fork(partial(search, name, **more), jobs.root) == (COUNT // 2) * (points + 1)
        names = ("index", "method", "point", "token_ids", "trial")
        records = map(json.loads, lines(jobs.root / name))
        found.append([[record.get(name) for name in names] for record in records])
    # Trials stay in the order in which they came.
    assert sorted(found[0], key=str) == sorted(found[1], key=str)


def refusal(jobs, **options):
    job = jobs.start("refused", **options)
    assert job.wait() == 2, job.said
    assert not (jobs.root / "refused").exists()
    (line,) = job.errors
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {"ray": "127.0.0.1:1"}}, "trainer.ray: nothing answers at 127.0.0.1:1"),
        ({"trainer": {"ray": "ray://head:10001"}}, "Ray Data does not run in clients"),
        ({"trainer": {"ray": True, "ray_workers": [2, 1]}}, "trainer.ray_workers: [2, 1]; allowed: a number"),
        ({"trainer": {"ray": True, "ray_gpus": -1}}, "trainer.ray_gpus: -1 is out of range"),
        ({"trainer": {"ray": True, "devices": 2}}, "trainer.devices: not with trainer.ray"),
        ({"trainer": {"ray": True, "profile": ["phases"]}}, "trainer.profile: not with trainer.ray"),
    ],
)
def test_what_ray_is_not_given_to(jobs, options, message):
    assert message in refusal(jobs, **options)


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray.data", raising=False)
    with pytest.raises(
        FastMemError, match=r"trainer\.ray: the package ray .* pip install \"fastmem-pl\[ray\]\""
    ):
        FastMemTrainer(ray=True)


class Dying(FastMemModule):
    """Ends its process while it loads."""

    def load_backbone(self, *args, **kwargs):
        os._exit(1)


@pytest.mark.parametrize(
    ("kind", "backbone", "settings", "message"),
    [
        (
            FastMemModule,
            None,
            {"ray_gpus": 1},
            "fewer workers came up within 0 minutes .*: the cluster lacks what",
        ),
        pytest.param(Dying, None, {}, "fewer workers came .* die while they load", marks=pytest.mark.slow),
        (FastMemModule, "/nowhere", {}, "cannot load '/nowhere'"),
    ],
)
def test_workers_that_never_come_up_end_in_one_line(
    cluster, jobs, monkeypatch, kind, backbone, settings, message
):
    if backbone is None:
        monkeypatch.setattr(pool, "_START_SECONDS", 8)
    _, text = pooled(cluster, kind, jobs, jobs.root / "run", backbone=backbone, **settings)
    assert re.search(message, text)
    assert "\n" not in text
