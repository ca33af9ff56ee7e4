"""Elastic workers: every sample once, whoever comes, goes, dies or sleeps."""

import json
import os
import signal
import time

import pytest
from ranks import fork_ranks
from towers import write_towers

from fastmem_pl import FastMemDataModule, FastMemError, FastMemModule, FastMemTrainer
from fastmem_pl.run.claims import ClaimFolder
from fastmem_pl.search import SearchSettings

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(200)]
COUNT = 11


@pytest.fixture
def data_file(tmp_path):
    return write_towers(tmp_path, COUNT)


@pytest.fixture
def run(tmp_path, data_file, tiny, monkeypatch):
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: tiny)

    def start(name, mode="fit_predict", limit=None, elastic=True, **trainer):
        settings = {"elastic": elastic, "chunk_samples": 2, "stale_after": 1.0, **trainer}
        loop = FastMemTrainer(accelerator="cpu", enable_progress_bar=False, **settings)
        module = FastMemModule("tiny", steps=2, learning_rate=1e-3, max_new_tokens=5)
        data = FastMemDataModule("qa", str(data_file), limit=limit, batch_size=1)
        return getattr(loop, mode)(module, data, run_dir=str(tmp_path / name))

    return start


def records(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def scores(folder):
    groups = json.loads((folder / "metrics.json").read_text())["groups"]
    for entry in groups["all"].values():
        entry["metrics"] = {n: v for n, v in entry["metrics"].items() if not n.startswith("seconds")}
    return groups


@pytest.fixture
def expected(run, tmp_path):
    run("alone", elastic=False)
    return records(tmp_path / "alone"), scores(tmp_path / "alone")


def assert_whole(folder, expected):
    assert (records(folder), scores(folder)) == expected
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "config.yaml", "logs", "metrics.json", "predictions.jsonl", "run.json")
    }


@pytest.mark.parametrize(("workers", "chunk"), [(1, 3), (3, 1), (2, 100)])
def test_workers_do_together_what_one_does(run, expected, tmp_path, workers, chunk):
    def work(rank):
        result = run("shared", chunk_samples=chunk)
        return result.num_new, result.metrics["groups"] == scores_of_file()

    def scores_of_file():
        return json.loads((tmp_path / "shared" / "metrics.json").read_text())["groups"]

    found = fork_ranks(workers, work, tmp_path)
    assert sum(new for new, _ in found) == COUNT
    assert all(same for _, same in found)
    assert_whole(tmp_path / "shared", expected)


def test_a_dead_workers_chunk_is_taken_over_where_it_was(run, expected, tmp_path, monkeypatch):
    process, answered = FastMemModule._process, tmp_path / "answered"

    def noted(self, pairs):
        with open(answered, "a") as file:
            file.write(f"{os.environ['RANK']} {pairs[0][0].index}\n")
        # The second sample of its first chunk: one is on disk.
        if os.environ["RANK"] == "1" and answered.read_text().count("1 ") == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return process(self, pairs)

    monkeypatch.setattr(FastMemModule, "_process", noted)
    # A chunk of half the data, so that both have one.
    found = fork_ranks(2, lambda rank: run("shared", chunk_samples=6).num_new, tmp_path)
    lines = [line.split() for line in answered.read_text().splitlines()]
    dead = [index for rank, index in lines if rank == "1"]
    alive = [index for rank, index in lines if rank == "0"]
    assert found[1] == -signal.SIGKILL
    assert len(alive) == len(set(alive)) == COUNT - 1
    assert set(dead) & set(alive) == {dead[1]}
    assert_whole(tmp_path / "shared", expected)


def test_sigterm_gives_the_chunk_back_at_once(run, expected, tmp_path, monkeypatch):
    process = FastMemModule._process

    def ended(self, pairs):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            time.sleep(0.2)
        return process(self, pairs)

    monkeypatch.setattr(FastMemModule, "_process", ended)
    # Nobody waits a thousand seconds.
    found = fork_ranks(2, lambda rank: run("shared", chunk_samples=6, stale_after=1000).num_new, tmp_path)
    assert found[1][0] == "TerminatedError"
    assert_whole(tmp_path / "shared", expected)


def test_a_worker_that_slept_finds_the_run_finished(run, expected, tmp_path, monkeypatch):
    process = FastMemModule._process

    def sleeps(self, pairs):
        if os.environ["RANK"] == "1":
            # All of it sleeps, its signs of life too.
            monkeypatch.setattr("os.utime", lambda *args: None)
            deadline = time.monotonic() + 60
            while not (tmp_path / "shared" / "metrics.json").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)
        return process(self, pairs)

    monkeypatch.setattr(FastMemModule, "_process", sleeps)
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))
    found = fork_ranks(2, lambda rank: run("shared", chunk_samples=6).metrics["num_samples"], tmp_path)
    assert found == [COUNT, COUNT]
    assert_whole(tmp_path / "shared", expected)


def test_a_late_worker_finds_nothing_to_do(run, expected, tmp_path):
    run("shared")
    before = (tmp_path / "shared" / "metrics.json").read_bytes()
    result = run("shared")
    assert result.num_new == 0
    assert result.metrics["num_samples"] == COUNT
    assert (tmp_path / "shared" / "metrics.json").read_bytes() == before
    assert_whole(tmp_path / "shared", expected)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True)])
def test_a_run_goes_on_the_other_way(run, expected, tmp_path, monkeypatch, first, second):
    process, calls = FastMemModule._process, []

    def stopped(self, pairs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return process(self, pairs)

    monkeypatch.setattr(FastMemModule, "_process", stopped)
    with pytest.raises(SystemExit):
        run("shared", elastic=first)
    monkeypatch.setattr(FastMemModule, "_process", process)
    # The claims of a worker that was ended are no obstacle.
    assert run("shared", elastic=second).num_new == COUNT - 3
    assert_whole(tmp_path / "shared", expected)


def test_more_data_makes_another_last_chunk(run, expected, tmp_path):
    run("shared", limit=5)
    assert run("shared").num_new == COUNT - 5
    assert_whole(tmp_path / "shared", expected)


def test_a_run_that_was_killed_before_its_claims_were_gone_is_finished(run, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ClaimFolder, "close", lambda self: None)
        run("shared")
    assert (tmp_path / "shared" / "work").is_dir()
    assert run("shared").num_new == 0
    assert_whole(tmp_path / "shared", expected)


def test_workers_of_other_limits_are_refused_while_one_works(run, expected, tmp_path, monkeypatch):
    process, refused = FastMemModule._process, []

    def meanwhile(self, pairs):
        if not refused:
            refused.append(1)
            with pytest.raises(
                FastMemError, match=rf"data\.limit: {COUNT} samples here, 6 where .* is being"
            ):
                run("shared")
        return process(self, pairs)

    monkeypatch.setattr(FastMemModule, "_process", meanwhile)
    assert run("shared", limit=6).num_new == 6
    assert refused
    assert run("shared").num_new == COUNT - 6
    assert_whole(tmp_path / "shared", expected)


def test_memories_are_shared_out(run, expected, tmp_path):
    fork_ranks(2, lambda rank: run("shared", mode="fit").num_new, tmp_path)
    assert len(list((tmp_path / "shared" / "memories").iterdir())) == COUNT
    assert not (tmp_path / "shared" / "work").exists()
    assert run("shared", mode="predict", elastic=False).num_new == COUNT
    assert [r["token_ids"] for r in records(tmp_path / "shared")] == [r["token_ids"] for r in expected[0]]


def test_answers_that_vanished_are_given_again(run, expected, tmp_path, monkeypatch):
    finish, lost = ClaimFolder.finish, []

    def loses(self, part):
        finish(self, part)
        if len(lost) < 1:
            (file,) = (tmp_path / "shared" / "parts").iterdir()
            lost.append(file.unlink())

    monkeypatch.setattr(ClaimFolder, "finish", loses)
    run("shared")
    assert lost
    assert_whole(tmp_path / "shared", expected)


def test_a_process_that_shares_nothing_is_refused_beside_workers(run, tmp_path, monkeypatch):
    process, refused = FastMemModule._process, []

    def meanwhile(self, pairs):
        if not refused:
            refused.append(1)
            with pytest.raises(
                FastMemError, match=r"another process is writing to .*--trainer\.elastic true"
            ):
                run("shared", elastic=False)
        return process(self, pairs)

    monkeypatch.setattr(FastMemModule, "_process", meanwhile)
    run("shared")
    assert refused


def test_a_search_is_not_elastic(run, tmp_path, data_file):
    trainer = FastMemTrainer(accelerator="cpu", elastic=True, enable_progress_bar=False)
    with pytest.raises(FastMemError, match=r"trainer\.elastic: a grid is shared out .* --trainer\.devices"):
        trainer.search(
            FastMemModule("tiny"),
            FastMemDataModule("qa", str(data_file)),
            SearchSettings(),
            str(tmp_path / "s"),
        )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("settings", [{"chunk_samples": 0}, {"stale_after": 0.5}])
def test_settings_out_of_range(settings):
    (name,) = settings
    with pytest.raises(FastMemError, match=rf"trainer\.{name}: .* is out of range; allowed: at least 1"):
        FastMemTrainer(accelerator="cpu", **settings)
