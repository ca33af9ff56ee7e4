"""Killed and stopped processes, full disks: what was done stays, nothing is done twice, the command goes on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from disks import own_disk
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from ranks import METHODS, Jobs, assert_same, assert_same_memories, finish, kept, until

from fastmem_pl import FastMemModule

COUNT = 6
pytestmark = pytest.mark.usefixtures("one_thread")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")


@pytest.fixture
def jobs(tmp_path, shared_jobs):
    found = Jobs(tmp_path, shared_jobs.model, shared_jobs.data)
    yield found
    found.end()


@pytest.fixture
def quick_observer(monkeypatch, tmp_path):
    """Let Lightning look more often whether the processes that it started are alive.

    Gives what waits until it has looked once more, or will not look again.
    """
    looks, look = tmp_path / "looks", _ChildProcessObserver._run
    looks.touch()

    def noted(self):
        ended = look(self)
        with open(looks, "a") as file:
            file.write("!" if ended else ".")
        return ended

    monkeypatch.setattr(_ChildProcessObserver.__init__, "__defaults__", (0.1,))
    monkeypatch.setattr(_ChildProcessObserver, "_run", noted)

    def looked(job):
        before = len(looks.read_text())
        # One look may have begun already.
        until(lambda: "!" in looks.read_text() or len(looks.read_text()) >= before + 2, job)

    return looked


def at_second_batch(jobs, world=1, launcher="torchrun", run_dir="run", **options):
    """Start processes; returns them when each has done a batch and waits at the gate before its second."""
    gate = jobs.gate()
    if world > 1 and launcher != "lightning":
        started = jobs.ranks(world, run_dir, launcher, gate=gate, **options)
    else:
        started = [jobs.start(run_dir, gate=gate, trainer={"devices": world}, **options)]
    gate.open(*(f"{rank}-0" for rank in range(world)))
    gate.wait(started, *(f"{rank}-1" for rank in range(world)))
    return started, gate


def assert_goes_on(jobs, expected, before, world=1, folder=None):
    """The same command, with any number of processes, does what is left and no more."""
    folder = folder or jobs.root / "run"
    assert not (folder / "metrics.json").exists()
    assert finish(jobs.ranks(world, str(folder)) if world > 1 else [jobs.start(str(folder))]) == []
    assert_same(folder, expected, before)
    assert not rescued(jobs), "rescued batches are left"


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Killed


@pytest.mark.parametrize(("world", "victim", "done"), [(2, 1, 4), (2, 0, 4), (3, 2, 5), (3, 0, 5)])
def test_a_killed_process_leaves_the_others_work(jobs, alone, world, victim, done):
    started, gate = at_second_batch(jobs, world)
    before, killed = kept(jobs.root / "run"), started.pop(victim)
    killed.send(signal.SIGKILL)
    killed.wait()
    gate.open()
    for said in finish(started, 75):
        assert "RunStoppedError: another process of this run is gone; what was answered is kept" in said
        assert "the same command goes on" in said
    # They have answered their share, not only the batch in work.
    after = kept(jobs.root / "run")
    assert len(after) == METHODS * done
    assert set(before) <= set(after)
    assert_goes_on(jobs, alone(), after, 4 - world)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=linux), 1])
def test_no_process_outlives_a_killed_one_that_lightning_joined(jobs, alone, victim, quick_observer):
    (job,), gate = at_second_batch(jobs, 2, "lightning")
    before = kept(jobs.root / "run")
    (child,) = job.children()
    os.kill(child if victim else job.process.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    gate.open("1-1")
    until(lambda: not running(child))
    after = kept(jobs.root / "run")
    # The process that the first had started ends after its batch.
    assert len(after) == len(before) + (0 if victim else METHODS)
    assert set(before) <= set(after)
    assert_goes_on(jobs, alone(), after, 2)


def test_a_process_that_is_killed_while_it_loads_is_noticed(jobs, monkeypatch):
    load = FastMemModule.configure_model

    def killed(self):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        load(self)

    with monkeypatch.context() as patch:
        patch.setattr(FastMemModule, "configure_model", killed)
        started = jobs.ranks(2, "run")
    (said,) = finish(started[:1], 75)
    assert "RunStoppedError: another process of this run is gone" in said
    assert not (jobs.root / "run").exists()


def test_memories_that_were_half_written_are_made_anew(jobs, alone, monkeypatch):
    replace, calls = Path.replace, []

    def killed(self, target):
        calls.append(self.parent.name == "memories")
        if sum(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    folder = jobs.root / "run" / "memories"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        assert jobs.start("run", mode="fit").wait() == -signal.SIGKILL
    first, second = sorted(folder.glob("*.safetensors"))
    assert list(folder.glob(".fastmem-*.partial"))
    before = first.read_bytes(), first.stat().st_mtime_ns
    # As a file system may leave what it did not bring to the disk.
    second.write_bytes(second.read_bytes()[:-100])
    jobs.run("run", mode="fit")
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert_same_memories(folder.parent, alone(mode="fit"))


# SIGTERM


@pytest.mark.parametrize(
    ("mode", "number"),
    [*((mode, signal.SIGTERM) for mode in ("fit_predict", "fit", "predict")), ("fit_predict", signal.SIGHUP)],
)
def test_sigterm_and_a_closed_terminal_finish_the_batch(jobs, alone, mode, number):
    # What started the tests may ignore it, as nohup does, and jobs would as well.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    (job,), gate = at_second_batch(jobs, mode=mode)
    folder = jobs.root / "run"
    job.send(number)
    gate.open()
    (said,) = finish([job], 128 + number)
    assert f"TerminatedError: ended by {number.name} after the batch in work" in said
    assert "the same command goes on" in said
    if mode == "fit":
        done = {path: path.stat().st_mtime_ns for path in (folder / "memories").iterdir()}
        assert len(done) == 2
        jobs.run("run", mode="fit")
        assert {path: path.stat().st_mtime_ns for path in done} == done, "memorized again"
        assert_same_memories(folder, alone(mode="fit"))
        return
    # Without memories, predict answers zero-shot.
    methods = 1 if mode == "predict" else METHODS
    before = kept(folder, methods)
    assert len(before) == 2 * methods
    assert not (folder / "metrics.json").exists()
    jobs.run("run", mode=mode)
    assert_same(folder, alone(mode=mode), before)


@pytest.mark.parametrize(("launcher", "everyone"), [("torchrun", False), ("torchrun", True), ("slurm", True)])
def test_sigterm_to_several_processes(jobs, alone, launcher, everyone):
    started, gate = at_second_batch(jobs, 2, launcher)
    for job in started if everyone else started[:1]:
        job.send(signal.SIGTERM)
    gate.open()
    finish(started[:1], 143)
    finish(started[1:], 143 if everyone else 75)
    before = kept(jobs.root / "run")
    # Who is not asked answers all of its share.
    assert len(before) == METHODS * (4 if everyone else 5)
    assert_goes_on(jobs, alone(), before, 2)


@pytest.mark.parametrize("slower", [0, 1])
def test_sigterm_to_the_process_that_started_the_other(jobs, alone, quick_observer, slower):
    (job,), gate = at_second_batch(jobs, 2, "lightning")
    (child,) = job.children()
    job.send(signal.SIGTERM)
    gate.open(f"{1 - slower}-1")
    until(lambda: len(kept(jobs.root / "run")) == METHODS * 3, job)
    if slower == 0:
        until(lambda: not running(child), job)
    quick_observer(job)
    gate.open(f"{slower}-1")
    finish([job], 143)
    assert not running(child)
    before = kept(jobs.root / "run")
    assert len(before) == METHODS * 4
    assert_goes_on(jobs, alone(), before, 2)


def test_sigterm_before_the_first_batch_is_not_lost(jobs, alone, monkeypatch):
    gate, lengths = jobs.gate(), FastMemModule.context_lengths

    def held(self, samples):
        # The first process plans; the others wait for what it says.
        gate.hold("plan")
        return lengths(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(FastMemModule, "context_lengths", held)
        started = jobs.ranks(2, "run")
    gate.wait(started, "plan")
    for job in started:
        job.send(signal.SIGTERM)
    gate.open()
    finish(started, 143)
    before = kept(jobs.root / "run")
    assert len(before) == METHODS * 2
    assert_goes_on(jobs, alone(), before, 2)


def test_sigterm_while_waiting_for_the_others(jobs, alone):
    started, gate = at_second_batch(jobs, 2)
    gate.open("0-1", "0-2")
    until(lambda: len(kept(jobs.root / "run")) == METHODS * 4, *started)
    started[0].send(signal.SIGTERM)
    # After the loop, there is nothing to finish: the signal itself ends it.
    assert started[0].wait() in (143, -signal.SIGTERM)
    gate.open()
    finish(started[1:], 75)
    before = kept(jobs.root / "run")
    assert len(before) == METHODS * COUNT
    assert_goes_on(jobs, alone(), before)


# Disks


@pytest.fixture
def disk(tmp_path):
    with own_disk(tmp_path) as found:
        yield found


def rescued(jobs):
    """Lines that are kept outside of the run folder."""
    return [line for path in jobs.cache.glob("rescued/*") for line in path.read_bytes().splitlines(True)]


@pytest.mark.parametrize("left", [4096, 0])
def test_a_full_disk_loses_nothing(jobs, alone, disk, left):
    folder = disk.here / "run"
    started, gate = at_second_batch(jobs, run_dir=str(folder))
    before = kept(folder)
    filler = disk.fill(left)
    gate.open()
    (said,) = finish(started, 75)
    parts = (f"cannot write {folder}", "No space left on device", "is kept in", "the same command goes on")
    assert [part for part in parts if part not in said] == []
    assert len(rescued(jobs)) == METHODS
    for _ in range(2):
        # It stays full.
        again = jobs.start(str(folder))
        assert again.wait() == 75
        assert "No space left on device" in "".join(again.errors)
    saved = rescued(jobs)
    assert len(saved) >= METHODS
    assert set(before) <= set(kept(folder))
    filler.unlink()
    assert_goes_on(jobs, alone(), [*before, *saved], 2, folder)


def test_a_rescue_that_is_not_possible_is_said(jobs, alone, disk):
    folder, jobs.cache = disk.here / "run", disk.here / "cache"
    started, gate = at_second_batch(jobs, run_dir=str(folder))
    filler = disk.fill(0)
    gate.open()
    (said,) = finish(started, 75)
    assert "the batch in work is lost, and the same command goes on" in said
    filler.unlink()
    assert_goes_on(jobs, alone(), kept(folder), folder=folder)


def test_a_full_disk_while_memories_are_saved(jobs, alone, disk):
    folder = disk.here / "run"
    started, gate = at_second_batch(jobs, run_dir=str(folder), mode="fit")
    filler = disk.fill(8192)
    gate.open()
    (said,) = finish(started, 75)
    assert "No space left on device" in said
    assert "memories that were saved before stay, and the same command goes on" in said
    filler.unlink()
    jobs.run(str(folder), mode="fit")
    assert_same_memories(folder, alone(mode="fit"))


def test_a_file_system_that_goes_and_comes_back(jobs, alone, disk):
    folder = disk.here / "run"
    started, gate = at_second_batch(jobs, run_dir=str(folder))
    disk.detach()
    gate.open()
    (said,) = finish(started, 75)
    assert f"cannot write {folder}" in said
    assert not list(disk.here.iterdir()), "written to the place where the file system was"
    disk.attach()
    assert_goes_on(jobs, alone(), [*kept(folder), *rescued(jobs)], folder=folder)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_folder_that_is_removed_in_the_middle(jobs, alone, world):
    folder, moved = jobs.root / "run", jobs.root / "moved"
    started, gate = at_second_batch(jobs, world)
    folder.rename(moved)
    gate.open()
    for said in finish(started, 75):
        assert "the same command goes on" in said
    saved = rescued(jobs)
    assert len(saved) == METHODS * world
    shutil.rmtree(folder, ignore_errors=True)
    moved.rename(folder)
    assert_goes_on(jobs, alone(), [*kept(folder), *saved])


@pytest.mark.parametrize("writer", [0, 1])
def test_what_one_of_two_could_not_write_is_taken_in_later(jobs, alone, monkeypatch, writer):
    fsync, calls = os.fsync, []

    def full(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        calls.append(name.endswith(".jsonl") and "run" in name and int(os.environ["RANK"]) == writer)
        if sum(calls) == 2 and calls[-1]:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        started = jobs.ranks(2, "run")
    said = finish([started[writer], started[1 - writer]], 75)
    assert "No space left on device; what was answered before stays, the batch in work is kept" in said[0]
    assert "another process of this run is gone" in said[1]
    saved = rescued(jobs)
    assert len(saved) == METHODS
    assert_goes_on(jobs, alone(), [*kept(jobs.root / "run"), *saved])
