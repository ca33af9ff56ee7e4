"""Several processes of one run, forked from the test's own, which has imported all that takes long."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork_ranks(count: int, work: Callable[[int], Any], folder: Path, seconds: float = 90) -> list[Any]:
    """Run ``work(rank)`` in processes as torchrun starts them.

    Returns:
        by rank, what it returned, the exception it raised as ``(type name, text)``, or the number of the
        signal that ended it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = [folder / f"rank-{rank}.pickle" for rank in range(count)]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
            os.environ.update({name: str(value) for name, value in names.items()})
            _run(work, rank, results[rank])
        children.append(child)
    deadline, found = time.monotonic() + seconds, []
    for child, path in zip(children, results, strict=True):
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                raise AssertionError(f"the processes took more than {seconds} s")
            time.sleep(0.02)
        status = os.waitstatus_to_exitcode(ended[1])
        found.append(pickle.loads(path.read_bytes()) if status == 0 else status)
    return found


def _run(work: Callable[[int], Any], rank: int, path: Path) -> None:
    try:
        try:
            result = work(rank)
        except Exception as error:
            traceback.print_exc()
            result = (type(error).__name__, str(error))
        path.write_bytes(pickle.dumps(result))
        os._exit(0)
    finally:
        os._exit(1)
