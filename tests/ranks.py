"""Processes of runs: forked from the test's own, which has imported all that takes long, or started anew.

    python ranks.py MODEL DATA RUN_DIR OPTIONS

is a program such as users write; ``OPTIONS`` is JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import make_module
from lightning.pytorch import Callback
from safetensors.torch import load_file
from transformers.utils import logging

from fastmem_pl import FastMemDataModule, FastMemError, FastMemTrainer
from fastmem_pl.base.errors import FailedElsewhereError

METHODS = 3

# What launchers set; a process sees only what its test gives it.
_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_", "RANK", "WORLD_SIZE", "NODE_RANK")
# Half an hour and more: what waits that long waits in vain on the slowest machine.
_NAP, _NAPS = 0.02, 90_000


class Gate(Callback):
    """Holds processes before each batch until the test lets them pass."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self.hold(f"{trainer.global_rank}-{batch_idx}")

    def hold(self, place: str) -> None:
        """Wait at a place, by default named RANK-BATCH."""
        (self.folder / f"at-{place}").touch()
        until(lambda: (self.folder / "open").exists() or (self.folder / f"open-{place}").exists())

    def open(self, *places: str) -> None:
        """Let processes pass there; without places, all everywhere."""
        for name in [f"open-{place}" for place in places] or ["open"]:
            (self.folder / name).touch()

    def wait(self, jobs: list[Job], *places: str) -> None:
        """Wait until processes are there."""
        until(lambda: all((self.folder / f"at-{place}").exists() for place in places), *jobs)


def main(model: str, data: str, run_dir: str, given: str) -> int:
    """Run one of the trainer's modes, and end as the command does."""
    options = json.loads(given)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    fast = {"steps": 3, "learning_rate": 1e-2, "max_context_tokens": 60, "max_new_tokens": 6}
    gate = [Gate(Path(options["gate"]))] if "gate" in options else None
    usual = {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": gate}
    try:
        trainer = FastMemTrainer(**usual, **options.get("trainer", {}))
        module = make_module(model, **fast, **options.get("model", {}))
        samples = FastMemDataModule("qa", data, **{"batch_size": 1, **options.get("data", {})})
        getattr(trainer, options.get("mode", "fit_predict"))(module, samples, options.get("url", run_dir))
    except FastMemError as error:
        if not isinstance(error, FailedElsewhereError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_status
    return 0


class Forked:
    """What of :class:`subprocess.Popen` is needed here, of a fork that does some work."""

    def __init__(self, work: Callable[[], int], variables: dict[str, str], output: int | None = None) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _in_fork(work, variables, output)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int | None:
        until(lambda: self.poll() is not None)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _in_fork(work: Callable[[], int], variables: dict[str, str], output: int | None) -> None:
    status = 1
    try:
        if output is not None:
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            sys.stdout, sys.stderr = (os.fdopen(one, "w", 1, closefd=False) for one in (1, 2))
        os.environ.clear()
        os.environ.update(variables)
        # Lightning's launcher would import everything anew.
        subprocess.Popen = lambda command, env, cwd: Forked(work, env, 1)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Job:
    """A process at work, and what it says."""

    def __init__(self, process: Forked | subprocess.Popen, output: Path) -> None:
        self.process, self._output = process, output

    @property
    def said(self) -> str:
        return self._output.read_text("utf-8", "replace")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if "Error" in line]

    def send(self, number: signal.Signals) -> None:
        assert self.process.poll() is None, f"ended before it was sent {number.name}: {self.said}"
        self.process.send_signal(number)

    def wait(self) -> int:
        """Status at the end, or minus the number of the signal."""
        until(lambda: self.process.poll() is not None)
        return self.process.returncode

    def children(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in found.split()]


class Jobs:
    """Starts processes that answer with one model and one data file."""

    def __init__(self, root: Path, model: Path, data: Path) -> None:
        self.root, self.model, self.data = root, model, data
        self.cache = root / "cache"
        self.started: list[Job] = []

    def gate(self) -> Gate:
        return Gate(self.root / f"gate{len(self.started)}")

    def start(
        self,
        run_dir: str,
        variables: dict[str, object] | None = None,
        launch: list[str] | None = None,
        gate: Gate | None = None,
        **options: Any,
    ) -> Job:
        """Start a process: forked, or anew with ``launch``, a program and its options."""
        given = json.dumps(options | ({"gate": str(gate.folder)} if gate else {}))
        arguments = [str(self.model), str(self.data), str(self.root / run_dir), given]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
        more = {"OMP_NUM_THREADS": 1, "FASTMEM_CACHE": self.cache, **(variables or {})}
        environment = kept | {name: str(value) for name, value in more.items()}
        output = self.root / f"job{len(self.started)}.txt"
        with open(output, "wb") as file:
            if launch is None:
                process: Any = Forked(lambda: main(*arguments), environment, file.fileno())
            else:
                command = [*launch, __file__, *arguments]
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=self.root)
        self.started.append(Job(process, output))
        return self.started[-1]

    def run(self, run_dir: str, expect: int = 0, **options: Any) -> Path:
        job = self.start(run_dir, **options)
        assert job.wait() == expect, job.said
        return self.root / run_dir

    def ranks(
        self,
        world: int,
        run_dir: str,
        launcher: str = "torchrun",
        nodes: int = 1,
        trainer: dict[str, object] | None = None,
        **options: Any,
    ) -> list[Job]:
        """Start the processes of a run as torchrun or srun does."""
        local = world // nodes
        trainer = {"devices": local, "num_nodes": nodes, **(trainer or {})}
        variables = launched_by(launcher, world, local)
        return [self.start(run_dir, each, trainer=trainer, **options) for each in variables]

    def end(self) -> None:
        for job in self.started:
            job.process.send_signal(signal.SIGKILL)
            job.wait()


def finish(jobs: list[Job], expect: int = 0) -> list[str]:
    """Wait for all; returns the lines with errors that they wrote."""
    found = [job.wait() for job in jobs]
    assert found == [expect] * len(jobs), [(job.process.returncode, job.said) for job in jobs]
    return [line for job in jobs for line in job.errors]


def launched_by(launcher: str, world: int, local: int) -> list[dict[str, object]]:
    """Variables of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    found: list[dict[str, object]] = []
    for rank in range(world):
        torchrun = {
            "RANK": rank,
            "LOCAL_RANK": rank % local,
            "GROUP_RANK": rank // local,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": local,
            "TORCHELASTIC_RUN_ID": "none",
        }
        slurm = {
            "SLURM_JOB_ID": 1234,
            "SLURM_JOB_NAME": "fastmem",
            "SLURM_NTASKS": world,
            "SLURM_STEP_NUM_TASKS": world,
            "SLURM_NTASKS_PER_NODE": local,
            "SLURM_NNODES": world // local,
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank % local,
            "SLURM_NODEID": rank // local,
            "SLURM_NODELIST": "127.0.0.1",
        }
        found.append(address | (torchrun if launcher == "torchrun" else slurm))
    return found


def lines(folder: Path) -> list[bytes]:
    """Records on disk, merged or not."""
    paths = [folder / "predictions.jsonl", *sorted((folder / "parts").glob("*.jsonl"))]
    return [line for path in paths if path.exists() for line in path.read_bytes().splitlines(keepends=True)]


def kept(folder: Path, methods: int = METHODS) -> list[bytes]:
    """Records on disk; fails where one is there twice, by halves, or without the others of its sample."""
    found = lines(folder)
    records = [json.loads(line) for line in found]
    assert len({(record["index"], record["method"]) for record in records}) == len(found), "answered twice"
    samples = Counter(record["index"] for record in records)
    assert set(samples.values()) <= {methods}, "answered by some methods"
    return found


def assert_same(folder: Path, expected: Path, before: Iterable[bytes] = ()) -> None:
    """Records and metrics are those of the other run, and nothing is left beside them.

    Args:
        folder: of a run.
        expected: of the other.
        before: lines that stand there unchanged, seconds included: they were not answered again.
    """
    for name in ("predictions.jsonl", "metrics.json"):
        found, wanted = (_timeless(path / name) for path in (folder, expected))
        assert found == wanted
    assert set(before) <= set(lines(folder)), "answered again"
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}


def assert_same_memories(folder: Path, expected: Path) -> None:
    """The memories in a run folder are those of the other run."""
    found, wanted = (sorted((path / "memories").iterdir()) for path in (folder, expected))
    assert [path.name for path in found] == [path.name for path in wanted]
    for ours, theirs in zip(map(load_file, found), map(load_file, wanted), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


def _timeless(path: Path) -> Any:
    """Content without what the machine, or the number of processes, may change."""

    def essence(value: Any) -> Any:
        if isinstance(value, dict):
            found = {name: essence(one) for name, one in value.items() if not name.startswith("seconds")}
            return {name: one for name, one in found.items() if name not in ("peak_memory_gib", "processes")}
        return [essence(one) for one in value] if isinstance(value, list) else value

    text = path.read_text()
    return essence(
        [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    )


def until(condition: Callable[[], Any], *jobs: Job) -> None:
    """Wait for an event; fails when a job ends before."""
    for _ in range(_NAPS):
        if condition():
            return
        for job in jobs:
            # It may have come with the end.
            if job.process.poll() is not None and not condition():
                raise AssertionError(f"ended too early: {job.process.returncode} {job.said}")
        time.sleep(_NAP)
    raise AssertionError(f"waited in vain: {[job.said for job in jobs]}")


def fork_ranks(count: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Run ``work(rank)`` in forked processes as torchrun starts them.

    Returns:
        by rank, what it returned, the exception it raised as ``(type name, text)``, or minus the number of
        the signal that ended it.
    """

    def keep(rank: int, path: Path) -> int:
        try:
            result = work(rank)
        except Exception as error:
            traceback.print_exc()
            result = (type(error).__name__, str(error))
        path.write_bytes(pickle.dumps(result))
        return 0

    found = {}
    for rank, variables in enumerate(launched_by("torchrun", count, count)):
        path = folder / f"rank-{rank}.pickle"
        told = {name: str(value) for name, value in variables.items()}
        found[path] = Forked(partial(keep, rank, path), {**os.environ, **told})
    return [fork.wait() or pickle.loads(path.read_bytes()) for path, fork in found.items()]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
