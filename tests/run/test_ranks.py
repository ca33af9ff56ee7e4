"""Several processes of one run: agreement, results equal to those of one process, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import pytest
from conftest import make_module
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from ranks import assert_same, assert_same_memories, finish, fork_ranks, kept, launched_by
from towers import write_towers

from fastmem_pl import FastMemDataModule, FastMemError, FastMemTrainer
from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.run.ranks import Ranks

COUNT = 7
pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"data": {"batch_size": 3}, "model": {"methods": ["fastmem+cad", "zero-shot", "dola"]}}
DRAWN = {"data": {"limit": 6}, "model": {"temperature": 0.8, "seed": 3}}


@pytest.fixture
def jobs(shared_jobs):
    return shared_jobs


# Agreement


def test_alone_nothing_is_exchanged():
    ranks = Ranks(Trainer(accelerator="cpu", devices=1, logger=False).strategy)
    assert (ranks.rank, ranks.count, ranks.on_this_node) == (0, 1, 1)
    assert ranks.first(lambda: 3) == 3
    assert ranks.gather("x") == ["x"]


def joined(count):
    strategy = Trainer(accelerator="cpu", devices=count, logger=False).strategy
    ranks = Ranks(strategy)
    strategy.setup_environment()
    return ranks


def test_all_get_what_the_first_says(tmp_path):
    def work(rank):
        ranks = joined(3)
        return ranks.first(lambda: f"from {ranks.rank}"), ranks.gather(10 * ranks.rank)

    assert fork_ranks(3, work, tmp_path) == [("from 0", [0, 10, 20])] * 3


def test_a_failure_of_the_first_ends_all_with_its_status(tmp_path):
    def fail():
        raise OutOfMemoryError("no room")

    def work(rank):
        try:
            joined(3).first(fail)
        except FastMemError as error:
            return type(error).__name__, str(error), error.exit_status

    elsewhere = ("FailedElsewhereError", "the first process of this run failed, and says why", 2)
    assert fork_ranks(3, work, tmp_path) == [("OutOfMemoryError", "no room", 2), elsewhere, elsewhere]


def test_the_death_of_one_is_noticed_by_the_others(tmp_path):
    def work(rank):
        ranks = joined(3)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.gather(rank)

    found = fork_ranks(3, work, tmp_path)
    assert found[1] == -signal.SIGKILL
    for kind, text in (found[0], found[2]):
        assert kind == "RunStoppedError"
        assert re.search("another process of this run is gone; .* the same command goes on", text)


# Results


@pytest.mark.parametrize(
    ("world", "options"),
    [(2, {}), (3, {}), (3, {"data": {"limit": 2}}), (2, {"data": {"limit": 1}}), (3, DRAWN), (2, FEW)],
    ids=str,
)
def test_processes_give_the_results_of_one(jobs, alone, name, world, options):
    assert finish(jobs.ranks(world, name, **options)) == []
    assert_same(jobs.root / name, alone(**options))
    assert read(jobs.root / name, "metrics.json")["environment"]["processes"] == world


def read(folder, file):
    return json.loads((folder / file).read_text())


def test_results_move_so_that_the_others_can_fail(alone):
    records = [json.loads(line) for line in kept(alone())]
    assert len({record["prediction"] for record in records}) > COUNT
    methods = read(alone(), "metrics.json")["groups"]["all"]
    for score in ("output_words", "truncated"):
        assert {method["metrics"][score]["value"] for method in methods.values()} != {0.0}, score


@pytest.mark.parametrize(("launcher", "nodes"), [("slurm", 1), ("slurm", 2), ("torchrun", 2)])
def test_slurm_and_two_nodes(jobs, alone, name, launcher, nodes):
    assert finish(jobs.ranks(2, name, launcher, nodes, {"strategy": "ddp"})) == []
    assert_same(jobs.root / name, alone())


def test_processes_that_lightning_starts(jobs, alone, name):
    jobs.run(name, trainer={"devices": 3})
    assert_same(jobs.root / name, alone())


@pytest.mark.parametrize("way", ["script", "torchrun"])
def test_real_launches(jobs, alone, name, way):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch = [sys.executable, *(torchrun if way == "torchrun" else [])]
    jobs.run(name, launch=launch, trainer={"devices": 2})
    assert_same(jobs.root / name, alone())


def test_automatic_batches_are_the_same_in_all_processes(jobs, alone, name, monkeypatch):
    # Each would plan other batches by what it finds free.
    free = lambda device: [1e15, 3e8][int(os.environ.get("RANK", 0))]  # noqa: E731
    monkeypatch.setattr("fastmem_pl.run.session.usable_bytes", free)
    assert finish(jobs.ranks(2, name, data={"batch_size": None})) == []
    # In other batches, losses may differ by rounding.
    assert [_answer(line) for line in kept(jobs.root / name)] == [_answer(line) for line in kept(alone())]


def test_goes_on_with_other_numbers_of_processes_and_more_data(jobs, alone, name):
    folder, before = jobs.root / name, []
    for world, limit in ((2, 2), (3, 5), (1, 6), (2, None), (3, None)):
        finish(jobs.ranks(world, name, data={"limit": limit}))
        assert set(before) <= set(kept(folder)), "answered again"
        before = kept(folder)
        assert len(before) == 3 * (limit or COUNT)
    assert_same(folder, alone(), before)


def test_fit_then_predict_with_other_numbers_of_processes(jobs, alone, name):
    folder, expected = jobs.root / name, alone(mode="fit")
    finish(jobs.ranks(3, name, mode="fit"))
    assert len(list((folder / "memories").iterdir())) == COUNT
    assert_same_memories(folder, expected)
    finish(jobs.ranks(2, name, mode="predict"))
    assert [_answer(line) for line in kept(folder)] == [_answer(line) for line in kept(alone())]
    assert not (folder / "parts").exists()


def _answer(line):
    record = json.loads(line)
    return record["index"], record["method"], record["token_ids"], record["scores"]


# Refusals


def test_a_mistake_is_said_once_and_nothing_is_written(jobs, name):
    strict = {"model": {"strict": True}}
    for started in (jobs.ranks(2, name, **strict), [jobs.start(name, trainer={"devices": 2}, **strict)]):
        (said,) = finish(started, 2)
        assert said.startswith("FastMemError: ")
        assert not (jobs.root / name).exists()


@pytest.mark.parametrize("world", [1, 2])
def test_a_folder_in_use_is_refused(jobs, alone, name, world):
    gate = jobs.gate()
    first = jobs.start(name, gate=gate)
    gate.wait([first], "0-0")
    (said,) = finish(jobs.ranks(world, name), 2)
    assert re.search("run_dir: another process is writing to", said)
    gate.open()
    finish([first])
    assert_same(jobs.root / name, alone())


SPAWNED = r"trainer\.strategy: processes are started as commands"
OTHER_NUMBER = r"trainer\.devices: {} started 2 processes, .* give --trainer\.devices with"


@pytest.mark.parametrize(
    ("launcher", "trainer", "backbone", "message"),
    [
        (None, {"devices": 2, "strategy": "ddp_spawn"}, {}, SPAWNED),
        (None, {"devices": 2, "strategy": "ddp_fork"}, {}, SPAWNED),
        (None, {}, {"tp_plan": "auto"}, r"model\.backbone\.tp_plan: shards the model over several"),
        (None, {"devices": 2}, {"device_map": "auto"}, r"\.backbone\.device_map: .*--trainer\.devices 1"),
        ("torchrun", {"devices": 1}, {}, OTHER_NUMBER.format("torchrun")),
        ("slurm", {"devices": 1}, {}, OTHER_NUMBER.format("srun")),
        ("torchrun", {"devices": 3}, {}, r"devices: .*devices=3.* does not match the world size \(2\)"),
        ("slurm", {"devices": 3}, {}, r"devices: .*devices=3.*--ntasks-per-node=2. does not match"),
    ],
    ids=str,
)
def test_ways_that_exclude_each_other(tmp_path, monkeypatch, launcher, trainer, backbone, message):
    for variable, value in (launched_by(launcher, 2, 2)[0] if launcher else {}).items():
        monkeypatch.setenv(variable, str(value))
    data, folder = FastMemDataModule("qa", str(write_towers(tmp_path, 1))), tmp_path / "run"
    with pytest.raises(FastMemError, match=message):
        FastMemTrainer(accelerator="cpu", **trainer).fit_predict(make_module(**backbone), data, str(folder))
    assert not folder.exists()


def test_strategies_that_shard_parameters_are_refused():
    with pytest.raises(FastMemError, match=r"trainer\.strategy: FSDPStrategy shards .*device_map auto"):
        Ranks(FSDPStrategy())
