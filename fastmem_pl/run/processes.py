"""The processes of a run: starting them, agreement among them, and what happens when one fails."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import distributed

from fastmem_pl.base.errors import FailedElsewhereError, FastMemError, LostProcessError, RunStoppedError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Processes that start may wait for each other as long as nodes of a cluster take to come up; those that
# have answered their share wait for the others as long as it takes.
_START_TIMEOUT, _WAIT_TIMEOUT = timedelta(minutes=10), timedelta(days=60)
_POLL_SECONDS, _END_SECONDS = 1.0, 30.0
_LONGEST_PAUSE, _PATIENCE = 0.05, 10.0
_PARENT = "FASTMEM_PARENT"
# Those that this process started; as with Lightning, they live as long as the program.
_children: list[subprocess.Popen] = []
# Ranks of them whose early end was said.
_told: set[int] = set()
_telling = threading.Lock()
# Process ids of higher ranks on this machine that leave it to this process to say that one died.
_silent: list[int] = []
_joined = threading.Event()


class Processes:
    """This process among those of a run; alone unless the strategy says otherwise.

    Every process runs the same program. What one of them does for all, and what all must have done before
    any goes on, is said with :meth:`first` and :meth:`each`, and a failure anywhere ends the run everywhere.

    Args:
        strategy: of the trainer.
        command: starts the same program again; by default, the command line of this process.

    Raises:
        FastMemError: for a strategy that does not share out samples.
    """

    def __init__(self, strategy: Strategy, command: Sequence[str] | None = None) -> None:
        self._strategy, self._command = strategy, command
        self._group: Any = None
        # Process ids of the ranks on this machine, below this one and above it.
        self._lower: list[int] = []
        self._higher: list[int] = []
        self.rank, self.count = 0, 1
        parent = int(os.environ.get(_PARENT, "0"))
        if parent == os.getppid() and not _joined.is_set():
            threading.Thread(target=_follow, args=(parent,), daemon=True).start()
        if isinstance(strategy, DDPStrategy):
            if not isinstance(strategy.launcher, _SubprocessScriptLauncher):
                raise FastMemError(
                    "trainer.strategy: processes are started as commands of their own, which forks and "
                    "notebooks are not; allowed: auto or ddp, in a script or as fastmem fit-predict"
                )
            self.count = strategy.num_processes * strategy.num_nodes
        elif not isinstance(strategy, SingleDeviceStrategy):
            raise FastMemError(
                f"trainer.strategy: {type(strategy).__name__} shards what is trained, and only memories are; "
                "allowed: auto or ddp, which share out samples (for a model too large for one device: "
                "--model.backbone.device_map auto, .tp_plan auto or .quantization)"
            )

    def start(self, tensor_parallel: bool = False) -> None:
        """Start the other processes of this node, unless torchrun, SLURM or a caller did, and join them.

        Args:
            tensor_parallel: whether devices will exchange activations; else only the hosts talk.

        Raises:
            FastMemError: when their number is not that of the strategy, or one of them does not come.
        """
        if self.count == 1 or self._group is not None:
            return
        strategy, environment = self._strategy, self._strategy.cluster_environment
        try:
            environment.validate_settings(num_devices=strategy.num_processes, num_nodes=strategy.num_nodes)
        except ValueError as error:
            raise FastMemError(f"trainer.devices: {' '.join(str(error).split())}") from error
        ended = [child.returncode for child in _children if child.poll() is not None]
        if ended:
            raise RunStoppedError(
                f"{len(ended)} of the processes that this program started have ended (status {ended[0]}), so "
                "there is nobody to go on with; the same command goes on"
            )
        if not environment.creates_processes_externally:
            self._launch()
        strategy.set_world_ranks()
        self.rank = strategy.global_rank
        if strategy.root_device.type == "cuda":
            torch.cuda.set_device(strategy.root_device)
        if not distributed.is_initialized():
            os.environ["MASTER_ADDR"] = environment.main_address
            os.environ["MASTER_PORT"] = str(environment.main_port)
            on_gpu = strategy.root_device.type == "cuda"
            # Lightning's choice for GPUs would hold memory on each of them for nothing.
            backend = "cpu:gloo,cuda:nccl" if tensor_parallel and on_gpu else "gloo"
            try:
                distributed.init_process_group(
                    backend, rank=self.rank, world_size=self.count, timeout=_START_TIMEOUT
                )
            except (RuntimeError, ValueError) as error:
                raise RunStoppedError(
                    f"process {self.rank} of {self.count} did not meet the others: {_first_line(error)}"
                ) from error
            atexit.register(leave)
        if distributed.get_world_size() != self.count:
            raise FastMemError(
                f"trainer.devices: {self.count} processes here, {distributed.get_world_size()} in an earlier "
                "run of this program; give the same, or use a program of its own"
            )
        self._group = distributed.new_group(backend="gloo", timeout=_WAIT_TIMEOUT)
        _joined.set()
        places = self.gather((socket.gethostname(), os.getpid()))
        here = places[self.rank][0]
        self._lower = [pid for host, pid in places[: self.rank] if host == here]
        self._higher = [pid for host, pid in places[self.rank + 1 :] if host == here]

    def each(self, work: Callable[[], Result]) -> Result:
        """Do work in every process; go on when it is done in all of them.

        Returns:
            what it returned in this process.

        Raises:
            FailedElsewhereError: when it failed in another process but not in this one.
            RunStoppedError: when another process died.
        """
        if self._group is None:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        status = None if failure is None else (getattr(failure, "exit_status", 1), str(failure))
        try:
            statuses = self.gather(status, str(failure) if failure else None)
        except RunStoppedError as died:
            raise failure or died from failure
        failed = [(rank, status) for rank, status in enumerate(statuses) if status is not None]
        if failed:
            first, (exit_status, message) = failed[0]
            # One process says it, those that met the same need not.
            if failure is not None and (first == self.rank or str(failure) != message):
                raise failure
            elsewhere = FailedElsewhereError(f"process {first} of {self.count} failed: {message}")
            elsewhere.exit_status = exit_status
            raise elsewhere from failure
        return result

    def first(self, work: Callable[[], Result]) -> Result:
        """Do work in the first process only, while the others wait; all get what it returned.

        Raises:
            FastMemError: as :meth:`each`.
        """
        result = self.each(lambda: work() if self.rank == 0 else None)
        return self.gather(result)[0] if self._group is not None else result

    def gather(self, value: Any, waits_with: str | None = None) -> list[Any]:
        """The values of all processes, by rank.

        Args:
            value: of this one.
            waits_with: message to show when the others keep this process waiting.

        Raises:
            RunStoppedError: when another process died.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            self._meet(waits_with)
            distributed.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            lost = LostProcessError(
                "another process of this run died; what was answered is kept, and the same command goes on "
                "from there"
            )
            lost.said_by_another = any(_is_alive(pid) for pid in self._lower)
            _silent[:] = self._higher
            _tell_of_killed(patience=_POLL_SECONDS)
            raise lost from error
        return values

    def _meet(self, waits_with: str | None) -> None:
        """Wait for all processes as Python code, which signals reach."""
        meeting = distributed.barrier(self._group, async_op=True)
        begin, pause = time.monotonic(), 1e-3
        while not meeting.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            if waits_with and time.monotonic() - begin > _PATIENCE:
                log.warning("%s (waiting for the other processes to finish their samples)", waits_with)
                waits_with = None
        meeting.wait()

    @property
    def on_this_node(self) -> int:
        """Processes that share this machine's memory."""
        return self._strategy.num_processes if self.count > 1 else 1

    def _launch(self) -> None:
        """Start the other processes of this node; Lightning finds the variables that its launcher sets."""
        environment = self._strategy.cluster_environment
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        os.environ["NODE_RANK"] = str(environment.node_rank())
        os.environ["WORLD_SIZE"] = str(self.count)
        command = list(self._command or _own_command())
        for local_rank in range(1, self._strategy.num_processes):
            variables = {**os.environ, "LOCAL_RANK": str(local_rank), _PARENT: str(os.getpid())}
            _children.append(subprocess.Popen(command, env=variables))
        # From here on, this process is one that was started: nothing starts the others again.
        os.environ["LOCAL_RANK"] = "0"
        atexit.register(_end_children)
        threading.Thread(target=_watch, daemon=True).start()


def forward_signal(number: int) -> None:
    """Pass a signal on to the processes that this one started."""
    for child in _children:
        if child.poll() is None:
            child.send_signal(number)


def launched_by_others() -> tuple[int, str]:
    """How many processes torchrun or SLURM started for this program, and which of them did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1")), "torchrun"
    if "SLURM_PROCID" in os.environ:
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")), "srun"
    return 1, ""


def has_joined() -> bool:
    """Whether this process met the others: from then on, a failure is said by one."""
    return _joined.is_set()


def _is_alive(pid: int) -> bool:
    try:
        # A process that nobody has waited for yet still has its number.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _own_command() -> list[str]:
    import __main__

    module = getattr(__main__, "__spec__", None)
    program = ["-m", module.name.removesuffix(".__main__")] if module else [os.path.abspath(sys.argv[0])]
    return [sys.executable, *program, *sys.argv[1:]]


def _watch() -> None:
    """Notice processes that end too early: at the start nobody would, as joining waits for them."""
    while True:
        time.sleep(_POLL_SECONDS)
        ended = [
            (rank, child.returncode) for rank, child in enumerate(_children, 1) if child.poll() is not None
        ]
        if ended and not _joined.is_set():
            rank, status = ended[0]
            # This one waits for it in a call that nothing interrupts.
            _end_children(0)
            message = f"process {rank} ended at its start (status {status}); the same command tries again"
            print(f"fastmem: error: {message}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(status if status > 0 else RunStoppedError.exit_status)
        _tell_of_killed()


def _tell_of_killed(patience: float = 0.0) -> None:
    """Say once which processes that this one started were killed.

    Args:
        patience: seconds to wait for the first that has ended: its connections close a moment before.
    """
    deadline = time.monotonic() + patience
    while _children and all(child.poll() is None for child in _children) and time.monotonic() < deadline:
        time.sleep(_LONGEST_PAUSE)
    with _telling:
        for rank, child in enumerate(_children, 1):
            status = child.poll()
            if status is None or rank in _told:
                continue
            _told.add(rank)
            if status < 0:
                log.warning(
                    "process %d was ended by signal %d; the others finish their samples, and the same "
                    "command then does the rest",
                    *(rank, -status),
                )


def _follow(parent: int) -> None:
    """End as by SIGTERM when the process that started this one is gone: nobody would merge the records."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _end_children(patience: float = _END_SECONDS) -> None:
    """Wait a while for the processes that this one started; end those that stay."""
    for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):
        deadline = time.monotonic() + patience
        for child in _children:
            try:
                child.wait(max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                stop(child)
        # Those that were asked to end finish their batch.
        patience = _END_SECONDS


def leave() -> None:
    """Leave the group; after a loss, the process that says so stays until those that need not have ended."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
    # They say it themselves when they find nobody of lower rank.
    deadline = time.monotonic() + _END_SECONDS
    while any(_is_alive(pid) for pid in _silent) and time.monotonic() < deadline:
        time.sleep(_LONGEST_PAUSE)
    # At the end of the program this is called once more.
    _silent.clear()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
