"""Agreement among the processes of a run, which Lightning starts, places and joins."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event
from typing import Any, TypeVar

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import distributed

from fastmem_pl.base.errors import FailedElsewhereError, FastMemError, RunStoppedError, one_line

Result = TypeVar("Result")

# Those that have answered their share wait for the others as long as it takes.
_TIMEOUT = timedelta(days=30)
_met = Event()
_PARENT = "FASTMEM_PARENT"
_PR_SET_PDEATHSIG = 1


class Ranks:
    """This process among those of a run; alone unless the strategy has several.

    Every process runs the same program. They meet where what follows depends on all of them: before the loop
    and after it, never at a batch, as some have more batches than others. Only hosts exchange data, unless
    devices share a model (tensor parallelism, ``exchanges_activations``).
    """

    def __init__(self, strategy: Strategy, exchanges_activations: bool = False) -> None:
        self._strategy = strategy
        self.count = 1
        if isinstance(strategy, DDPStrategy):
            if not isinstance(strategy.launcher, _SubprocessScriptLauncher):
                raise FastMemError(
                    "trainer.strategy: processes are started as commands of their own, which forks and "
                    "notebooks are not; allowed: auto or ddp, in a script or as fastmem fit-predict"
                )
            self.count = strategy.num_processes * strategy.num_nodes
            try:
                strategy.cluster_environment.validate_settings(strategy.num_processes, strategy.num_nodes)
            except ValueError as error:
                raise FastMemError(f"trainer.devices: {one_line(error)}") from error
            on_gpu = strategy.root_device.type == "cuda"
            # Lightning's choice for GPUs, NCCL, would hold memory on each of them for nothing.
            both = exchanges_activations and on_gpu
            strategy._process_group_backend = "cpu:gloo,cuda:nccl" if both else "gloo"
            strategy._timeout = _TIMEOUT
        elif not isinstance(strategy, SingleDeviceStrategy):
            raise FastMemError(
                f"trainer.strategy: {type(strategy).__name__} shards what is trained, and only memories are; "
                "allowed: auto or ddp, which share out samples (for a model too large for one device: "
                "--model.backbone.device_map auto, --model.backbone.tp_plan auto or "
                "--model.backbone.quantization)"
            )

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self._strategy.global_rank if self.count > 1 else 0

    @property
    def on_this_node(self) -> int:
        """Processes that share this machine's memory."""
        return self._strategy.num_processes if self.count > 1 else 1

    def first(self, work: Callable[[], Result]) -> Result:
        """Do work in the first process, while the others wait; all get what it returned, or fail with it."""
        if self.count == 1:
            return work()
        result, failure = None, None
        if self.rank == 0:
            try:
                result = work()
            except FastMemError as error:
                failure = error
        status = None if failure is None else failure.exit_status
        result, status = self._exchange((result, status))[0]
        if failure is not None:
            raise failure
        if status is not None:
            elsewhere = FailedElsewhereError("the first process of this run failed, and says why")
            elsewhere.exit_status = status
            raise elsewhere
        return result

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        return [value] if self.count == 1 else self._exchange(value)

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise _gone() from error
        _met.set()
        return values


def have_met() -> bool:
    """Whether this process has met others: until then, all see the same mistakes."""
    return _met.is_set()


@contextmanager
def one_may_be_gone() -> Iterator[None]:
    """Raise :class:`RunStoppedError` where an exchange of Lightning's fails as another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise _gone() from error


def _gone() -> RunStoppedError:
    return RunStoppedError(
        "another process of this run is gone; what was answered is kept, and the same command goes on from "
        "there"
    )


def check_launcher(count: int) -> None:
    """Refuse a launcher whose processes the trainer does not know: each would do all of the work."""
    for launcher, variable, sign in (
        ("torchrun", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
        ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ):
        launched = int(os.environ.get(variable) or 1) if sign in os.environ else 1
        if launched > 1 and count == 1:
            raise FastMemError(
                f"trainer.devices: {launcher} started {launched} processes, and each would do all of the "
                "work; give --trainer.devices with those of a node, and --trainer.num_nodes"
            )


def end_with_first(strategy: Strategy) -> None:
    """Let the processes that Lightning starts get SIGTERM when the first, which starts them, is gone.

    Else they would answer all of their share, beside those of the same command when it goes on.
    """
    if not isinstance(strategy, DDPStrategy):
        return
    if not strategy.cluster_environment.creates_processes_externally:
        os.environ[_PARENT] = str(os.getpid())
    parent = int(os.environ.get(_PARENT) or os.getpid())
    if parent != os.getpid() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # It was gone before.
            os.kill(os.getpid(), signal.SIGTERM)
