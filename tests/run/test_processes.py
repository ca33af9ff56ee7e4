"""Processes of one run: agreement, failures, and results equal to those of one process."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from ranks import fork_ranks
from towers import write_towers

from fastmem_pl import FastMemDataModule, FastMemError, FastMemModule, FastMemTrainer
from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.run.processes import Processes, leave
from fastmem_pl.search import SearchSettings

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(200)]
COUNT = 5


def processes(count, **settings):
    return Processes(Trainer(accelerator="cpu", devices=count, logger=False, **settings).strategy)


@pytest.fixture
def data_file(tmp_path):
    return write_towers(tmp_path, COUNT)


@pytest.fixture
def run(tmp_path, data_file, tiny, monkeypatch):
    """Answer, alone or as one of several processes; returns the run's folder."""
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: tiny)

    def start(name, devices=1, mode="fit_predict", limit=None, batch_size=2, model=None, **trainer):
        loop = FastMemTrainer(accelerator="cpu", devices=devices, enable_progress_bar=False, **trainer)
        module = model or FastMemModule("tiny", steps=3, learning_rate=1e-3, max_new_tokens=6)
        data = FastMemDataModule("qa", str(data_file), limit=limit, batch_size=batch_size)
        getattr(loop, mode)(module, data, run_dir=str(tmp_path / name))
        return tmp_path / name

    return start


def records(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def essence(folder):
    """All but what rounding changes when samples come in other batches."""
    return [{**record, "curve": None} for record in records(folder)]


def scores(folder):
    groups = json.loads((folder / "metrics.json").read_text())["groups"]
    for methods in groups.values():
        for entry in methods.values():
            entry["metrics"] = {n: v for n, v in entry["metrics"].items() if not n.startswith("seconds")}
    return groups


def test_alone_nothing_is_exchanged():
    alone = processes(1)
    alone.start()
    assert (alone.rank, alone.count) == (0, 1)
    assert alone.first(lambda: 3) == 3
    assert alone.each(lambda: 4) == 4
    assert alone.gather("x") == ["x"]


@pytest.mark.parametrize("count", [2, 3])
def test_all_get_what_the_first_says(count, tmp_path):
    def work(rank):
        several = processes(count)
        several.start()
        said = several.first(lambda: f"from {several.rank}")
        return said, several.each(lambda: several.rank), several.gather(10 * several.rank)

    tens = [10 * rank for rank in range(count)]
    assert fork_ranks(count, work, tmp_path) == [("from 0", rank, tens) for rank in range(count)]


def test_a_failure_of_one_ends_all_and_one_says_it(tmp_path):
    def work(rank):
        several = processes(3)
        several.start()

        def fail():
            if rank:
                raise OutOfMemoryError("no room")

        try:
            several.each(fail)
        except FastMemError as error:
            return type(error).__name__, str(error), error.exit_status

    elsewhere = ("FailedElsewhereError", "process 1 of 3 failed: no room", 2)
    assert fork_ranks(3, work, tmp_path) == [elsewhere, ("OutOfMemoryError", "no room", 2), elsewhere]


def test_the_death_of_one_is_noticed_by_the_others(tmp_path):
    def work(rank):
        several = processes(3)
        several.start()
        several.each(lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None)

    found = fork_ranks(3, work, tmp_path)
    assert found[1] == -signal.SIGKILL
    for rank in (0, 2):
        assert found[rank][0] == "LostProcessError"
        assert re.search("another process of this run died; .* the same command goes on", found[rank][1])


KILLED_CHILD = """
import os, signal
from lightning.pytorch import Trainer
from fastmem_pl.run import processes

several = processes.Processes(Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False).strategy)
several.start()
# Nobody looks in between: the loss itself has to be what tells.
processes._POLL_SECONDS = 1.0 if several.rank else 5.0
several.each(lambda: os.kill(os.getpid(), signal.SIGKILL) if several.rank == 1 else None)
"""


def test_a_killed_process_is_named_before_its_loss_is_said(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED_CHILD)
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    named = ran.stderr.index("process 1 was ended by signal 9")
    assert named < ran.stderr.index("LostProcessError: another process of this run died")
    assert ran.stderr.count("ended by signal") == 1


@pytest.mark.parametrize(("count", "limit"), [(2, None), (3, None), (3, 2), (2, 1)])
def test_several_processes_answer_as_one_does(run, count, limit, tmp_path):
    expected = run("one", limit=limit)
    assert (
        fork_ranks(count, lambda rank: run("several", count, limit=limit).name, tmp_path)
        == ["several"] * count
    )
    assert essence(tmp_path / "several") == essence(expected)
    assert scores(tmp_path / "several") == scores(expected)
    left = {path.name for path in (tmp_path / "several").iterdir()}
    assert left == {path.name for path in expected.iterdir()}


def test_automatic_batches_are_the_same_in_all_processes(run, tmp_path, monkeypatch):
    expected = run("one")
    # Each would plan other batches by what it finds free.
    monkeypatch.setattr(
        "fastmem_pl.run.session.usable_bytes", lambda device: [1e15, 3e8][int(os.environ["RANK"])]
    )
    fork_ranks(2, lambda rank: run("several", 2, batch_size=None).name, tmp_path)
    assert essence(tmp_path / "several") == essence(expected)


def test_fit_then_predict_of_several(run, tmp_path):
    expected = run("one")
    fork_ranks(3, lambda rank: run("several", 3, mode="fit").name, tmp_path)
    assert len(list((tmp_path / "several" / "memories").iterdir())) == COUNT
    fork_ranks(2, lambda rank: run("several", 2, mode="predict").name, tmp_path)
    assert [r["token_ids"] for r in records(tmp_path / "several")] == [
        r["token_ids"] for r in records(expected)
    ]


def test_a_killed_process_loses_its_batch_at_most(run, tmp_path, monkeypatch):
    expected = run("one", batch_size=1)
    process = FastMemModule._process

    def killed(self, pairs):
        found = process(self, pairs)
        # Of its second batch, nothing is on disk.
        killed.calls += 1
        if os.environ["RANK"] == "1" and killed.calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    killed.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(FastMemModule, "_process", killed)
        found = fork_ranks(2, lambda rank: run("several", 2, batch_size=1), tmp_path)
    assert found[0][0] == "LostProcessError"
    assert found[1] == -signal.SIGKILL
    folder = tmp_path / "several"
    before = [json.loads(line)["index"] for path in folder.rglob("*.jsonl") for line in path.open()]
    # Three of the first process, one of the second.
    assert len(set(before)) == 4
    answered = []
    with monkeypatch.context() as patch:
        patch.setattr(
            FastMemModule,
            "_process",
            lambda self, pairs: answered.extend(s.index for s, _ in pairs) or process(self, pairs),
        )
        run("several", batch_size=1)
    assert sorted(answered) == sorted(set(range(COUNT)) - set(before))
    assert essence(folder) == essence(expected)
    assert scores(folder) == scores(expected)


def test_sigterm_ends_all_after_their_batch(run, tmp_path, monkeypatch):
    expected = run("one", batch_size=1)
    process = FastMemModule._process

    def asked_to_end(self, pairs):
        os.kill(os.getpid(), signal.SIGTERM)
        return process(self, pairs)

    with monkeypatch.context() as patch:
        patch.setattr(FastMemModule, "_process", asked_to_end)
        found = fork_ranks(2, lambda rank: run("several", 2, batch_size=1), tmp_path)
    assert {kind for kind, _ in found} == {"TerminatedError", "FailedElsewhereError"}
    folder = tmp_path / "several"
    lines = [json.loads(line) for path in folder.rglob("*.jsonl") for line in path.open()]
    assert len({record["index"] for record in lines}) == 2
    assert len(lines) == 2 * 3
    run("several", batch_size=1)
    assert essence(folder) == essence(expected)


def test_a_grid_is_shared_out(run, tmp_path):
    axes = {"learning_rate": [1e-3, 1e-2], "steps": [1, 2], "kl_coeff": [0.1]}
    settings = SearchSettings(axes, every=1)

    def search(name, devices):
        loop = FastMemTrainer(accelerator="cpu", devices=devices, enable_progress_bar=False)
        data = FastMemDataModule("qa", str(tmp_path / "data.jsonl"))
        module = FastMemModule("tiny", max_new_tokens=4)
        result = loop.search(module, data, settings, str(tmp_path / name))
        return [(point.point, point.value) for point in result.ranking.points]

    expected = search("one", 1)
    assert fork_ranks(2, lambda rank: search("several", 2), tmp_path) == [expected] * 2
    one, several = records(tmp_path / "one"), records(tmp_path / "several")
    key = lambda r: (r["index"], str(r["point"]), r["token_ids"], r["scores"])  # noqa: E731
    assert sorted(map(key, one)) == sorted(map(key, several))


def test_mistakes_are_said_once_and_nothing_is_written(run, tmp_path):
    model = FastMemModule("tiny", strict=True, max_context_tokens=3)
    found = fork_ranks(2, lambda rank: run("several", 2, model=model), tmp_path)
    assert [kind for kind, _ in found] == ["FastMemError", "FailedElsewhereError"]
    assert not (tmp_path / "several").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 2, "strategy": "ddp_spawn"}, r"trainer\.strategy: processes are started as commands"),
        ({"devices": 2, "elastic": True}, r"trainer\.elastic: each process works on its own, but .* for 2"),
        ({"model": FastMemModule("tiny", tp_plan="auto")}, r"model\.tp_plan: shards the model over several"),
        (
            {"devices": 2, "model": FastMemModule("tiny", device_map="auto")},
            r"model\.device_map: .*--trainer\.devices 1",
        ),
    ],
)
def test_ways_that_exclude_each_other(run, tmp_path, settings, message):
    with pytest.raises(FastMemError, match=message):
        run("refused", **settings)
    assert not (tmp_path / "refused").exists()


def test_silent_processes_are_waited_for_once(monkeypatch):
    # A call at the error, and one at the end of the program; this process lives on.
    monkeypatch.setattr("fastmem_pl.run.processes._silent", [os.getpid()])
    monkeypatch.setattr("fastmem_pl.run.processes._END_SECONDS", 0.5)
    waited = []
    for _ in range(2):
        before = time.monotonic()
        leave()
        waited.append(time.monotonic() - before)
    assert waited[0] >= 0.5
    assert waited[1] < 0.25


def test_strategies_that_shard_parameters_are_refused():
    with pytest.raises(
        FastMemError, match=r"trainer\.strategy: FSDPStrategy shards .*--model\.device_map auto"
    ):
        Processes(FSDPStrategy())


def test_torchrun_without_devices_is_refused(run, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(FastMemError, match=r"torchrun started 2 processes, .* give --trainer\.devices with"):
        run("refused")


def test_srun_without_devices_is_refused(run, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(FastMemError, match=r"srun started 4 processes, .* give --trainer\.devices with"):
        run("refused")


@pytest.mark.parametrize("writer", [0, 1])
def test_what_any_process_could_not_write_is_taken_in_later(run, tmp_path, monkeypatch, writer):
    expected = run("one", batch_size=1)
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))
    fsync, calls = os.fsync, []

    def full(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        calls.append(name.endswith(".jsonl") and "several" in name and int(os.environ["RANK"]) == writer)
        if sum(calls) == 2 and calls[-1]:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        found = fork_ranks(2, lambda rank: run("several", 2, batch_size=1), tmp_path)
    assert found[writer][0] == "RunStoppedError"
    assert (
        "No space left on device; what was answered before stays, the batch in work is kept"
        in found[writer][1]
    )
    assert found[1 - writer][0] == "FailedElsewhereError"
    (kept,) = (tmp_path / "cache" / "rescued").iterdir()
    rescued = {json.loads(line)["index"] for line in kept.read_text().splitlines()}
    answered, process = [], FastMemModule._process
    monkeypatch.setattr(
        FastMemModule,
        "_process",
        lambda self, pairs: answered.extend(s.index for s, _ in pairs) or process(self, pairs),
    )
    run("several", batch_size=1)
    assert rescued
    assert not rescued & set(answered)
    assert not kept.exists()
    assert essence(tmp_path / "several") == essence(expected)


def test_sigterm_while_waiting_for_the_others(run, tmp_path, monkeypatch):
    process = FastMemModule._process

    def slow(self, pairs):
        if os.environ["RANK"] == "1":
            # The first process has done its share long before.
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                time.sleep(0.05)
        return process(self, pairs)

    def work(rank):
        if rank == 0:
            threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return run("several", 2, limit=2, batch_size=1)

    monkeypatch.setattr(FastMemModule, "_process", slow)
    found = fork_ranks(2, work, tmp_path)
    assert found[0][0] == "TerminatedError"
    assert found[1][0] == "LostProcessError"
    # Both have written what they answered.
    assert len(list((tmp_path / "several").rglob("*.jsonl"))) == 2


def test_processes_of_torchrun_must_be_as_many_as_devices(run, tmp_path):
    found = fork_ranks(2, lambda rank: run("refused", 3), tmp_path)
    for kind, text in found:
        assert kind == "FastMemError"
        assert re.match(r"trainer\.devices: .*devices=3.*does not match the world size \(2\)", text)
