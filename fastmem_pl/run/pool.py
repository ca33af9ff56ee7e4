"""Answering on Ray: batches go through an actor pool of Ray Data, and their records come back here.

Ray places the workers, starts others in the place of those that die, and gives a lost batch to another. The
process that runs the command reads the data, writes the run folder, and needs no device.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import IterableDataset

from fastmem_pl.base.errors import FastMemError, RunStoppedError
from fastmem_pl.data import BatchLimits, ContextSample, FastMemDataModule
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.provenance import Provenance
from fastmem_pl.run.records import Record
from fastmem_pl.run.worker import Answered, Work, Worker, other_model

# Until the least number of workers have their machines and have loaded the model; some may have to be rented.
_START_SECONDS = 1800
# Workers in a row that may die while they load, after the first came up; and with one share, before it is
# taken for what kills them.
_DEATHS, _TRIES = 10, 20
# Of the object store that a local Ray allocates: texts pass through it, and no tensors.
_LOCAL_STORE_BYTES = 100 << 20
# Read when Ray is imported and started. What stops a run is raised; all else is in Ray's own log files. Its
# workers run at the lowest priority by default, and here they do the work.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_niceness": "0",
}
_CONNECT_SECONDS = 10
# Samples that go to a worker at once, which forms its own batches of them.
_SHARE = 32


class RayPool:
    """Workers on a Ray cluster.

    Args:
        address: of the cluster; ``True`` for the one that ``RAY_ADDRESS`` names, or else one on this machine.
        workers: least and most of them; by default from one to as many as the cluster has GPUs, or machines
            where it has none.
        gpus: of each worker; by default 1 where the cluster has any.

    Raises:
        FastMemError: without the package ``ray``.
    """

    def __init__(
        self, address: str | bool, workers: int | Sequence[int] | None = None, gpus: float | None = None
    ) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise FastMemError(
                'trainer.ray: the package ray is not installed; pip install "fastmem-pl[ray]"'
            ) from error
        bounds = [workers] * 2 if isinstance(workers, int) else workers and list(workers)
        if bounds and not (len(bounds) == 2 and 1 <= bounds[0] <= bounds[1]):
            raise FastMemError(f"trainer.ray_workers: {workers!r}; allowed: a number from 1, or [least,most]")
        if gpus is not None and gpus < 0:
            raise FastMemError(f"trainer.ray_gpus: {gpus} is out of range; allowed: at least 0")
        self._address, self._bounds, self._gpus = address, bounds, gpus
        self.provenance: Provenance | None = None

    def begin(self) -> None:
        """Begin another run; refuses an address at which nothing answers, as Ray would try for minutes."""
        self.provenance = None
        if str(self._address).startswith("ray://"):
            raise FastMemError(
                "trainer.ray: Ray Data does not run in clients (ray://); give auto to a command on a "
                "machine of the cluster, such as by ray job submit"
            )
        host, colon, port = str(self._address).rpartition(":")
        if not (colon and port.isdigit()):
            return
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise FastMemError(
                f"trainer.ray: nothing answers at {self._address}; give the address of a cluster (ray status "
                "shows it), or true"
            ) from error

    @staticmethod
    def plan(datamodule: FastMemDataModule, measured: bool, limits: BatchLimits | None = None) -> None:
        """Form the shares of workers, by characters.

        Args:
            datamodule: the samples, of which those that are done were left out.
            measured: whether what workers tell of their model is needed even if nothing is left to do.
            limits: bounds of a share.
        """
        lengths = [len(sample.context) for sample in datamodule.remaining]
        shares = datamodule.plan(lengths, limits or BatchLimits(datamodule.batch_size or _SHARE))
        datamodule.use_plan(shares or ([[]] if measured else []))

    @contextmanager
    def loop(
        self,
        model: FastMemModule,
        step: LightningModule,
        datamodule: FastMemDataModule,
        precision: str,
        run: RunFolder,
    ) -> Iterator[LightningModule]:
        """Let Lightning's predict loop over the samples take in what workers answer.

        Args:
            model: for workers to load.
            step: whose predict step they run.
            datamodule: gives workers their shares of the samples.
            precision: of the trainer.
            run: folder of the results, which the workers' model may not belong to.
        """
        import ray

        joined = ray.is_initialized()
        # For good: its threads still write when the cluster has ended.
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        work = Work(
            (model, step),
            precision,
            (datamodule.batch_size, datamodule.max_batch_tokens),
            run.known_fingerprint,
            os.getcwd(),
        )
        datamodule.remote = lambda shares: _Answers(
            len(shares), self._answers(work, shares) if shares else iter(())
        )
        try:
            with warnings.catch_warnings():
                # Of Lightning's, which looks for the order of batches, and of Ray's where the last are few.
                for message in ("batch indices", "IterableDataset", "number of concurrent", "remote_args"):
                    warnings.filterwarnings("ignore", message=f".*{message}.*")
                yield Remote(self, step.mode, run.confirm)
        except ray.exceptions.RayError as error:
            raise _stopped(error) from error
        finally:
            datamodule.remote = None
            if not joined:
                ray.shutdown()

    def _connect(self) -> None:
        """Join the cluster, or start one on this machine."""
        import ray

        address = os.environ.get("RAY_ADDRESS", "local") if self._address is True else self._address
        local = {"include_dashboard": False, "object_store_memory": _LOCAL_STORE_BYTES}
        # Ray would end this process on SIGTERM without a word, and Lightning's notice would be gone.
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with _silent_stderr():
                more = local if address == "local" else {}
                ray.init(address, log_to_driver=False, logging_level="ERROR", **more)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise FastMemError(f"trainer.ray: cannot join {address!r}: {reason}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)

    def _answers(self, work: Work, shares: Sequence[Sequence[ContextSample]]) -> Iterator[Answered]:
        """What workers answer, as it comes."""
        import ray

        if not ray.is_initialized():
            self._connect()
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.wait_for_min_actors_s = _START_SECONDS
        context.max_consecutive_actor_init_deaths = _DEATHS
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cards = sum(node.get("GPU", 0) for node in nodes)
        gpus = (1 if cards else 0) if self._gpus is None else self._gpus
        least, most = self._bounds or [1, max(1, int(cards // gpus)) if gpus else len(nodes)]
        # On CPUs, workers of a machine share its memory and all of its cores.
        on_a_node = math.ceil(most / len(nodes))
        cores = min(node["CPU"] for node in nodes if node.get("CPU"))
        rows = [{"samples": json.dumps([asdict(sample) for sample in share])} for share in shares]
        with ray.data.DataContext.current(context):
            answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                Worker,
                fn_constructor_args=(work, min(1.0, gpus) if gpus else 1 / on_a_node),
                batch_size=1,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
                num_gpus=gpus or None,
                num_cpus=1 if gpus else max(1, int(cores // on_a_node)),
                ray_remote_args_fn=lambda: {"max_task_retries": _TRIES},
            )
            # Without looking ahead: what a worker has answered is on disk when the next answer is waited for.
            for batch in answers.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy"):
                content = json.loads(batch["answered"][0])
                provenance = content.pop("provenance")
                yield Answered(**content, provenance=provenance and Provenance(**provenance))


class Remote(LightningModule):
    """Stands in for a module whose steps run elsewhere: its batches are what workers answered.

    ``confirm`` is called with the fingerprint of their model.
    """

    def __init__(self, pool: RayPool, mode: str, confirm: Callable[[str], None]) -> None:
        super().__init__()
        self.mode, self._pool, self._confirm = mode, pool, confirm

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the texts alone."""
        return batch

    def predict_step(self, batch: Answered, batch_idx: int = 0) -> list[Record]:
        """The records of a share."""
        if batch.error is not None:
            failure = RunStoppedError(batch.error)
            failure.exit_status = batch.exit_status
            raise failure
        known, found = self._pool.provenance, batch.provenance
        if known is None:
            self._confirm(found.model["fingerprint"])
        elif found.model != known.model:
            raise other_model()
        self._pool.provenance = Provenance.joined([known, found])
        return batch.records


class _Answers(IterableDataset):
    """Answers as they come; of a known number, so that Lightning does not wait for the one after."""

    def __init__(self, number: int, answers: Iterator[Answered]) -> None:
        self._number, self._answers = number, answers

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Answered]:
        return self._answers


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what Ray writes there while it starts: that it will log nothing below what it was told."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _stopped(error: Exception) -> RunStoppedError:
    """The failure of a cluster in one line: Ray's messages have the worker's traceback."""
    import ray

    if isinstance(error, ray.exceptions.GetTimeoutError):
        reason = (
            f"fewer workers came up within {_START_SECONDS // 60} minutes than trainer.ray_workers asks for "
            "at least: the cluster lacks what they need (ray status shows it), or they die while they load"
        )
    else:
        reason = f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2].strip()}"
    return RunStoppedError(
        f"trainer.ray: {reason}; what was answered is kept, and the same command goes on from there"
    )
