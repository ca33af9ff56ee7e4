"""SIGTERM from a scheduler: the batch in work is finished and kept, then the run ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fastmem_pl.errors import TerminatedError


class StopOnSignal(Callback):
    """Ends the loop after the batch in which SIGTERM came, once all of the batch is on disk.

    It takes the place of Lightning's own handler, which has all processes exchange a message: those that are
    busy or gone do not answer.

    Args:
        forward: passes the signal on to processes that this one started.
        parent: process whose end is taken for the signal.
    """

    def __init__(self, forward: Callable[[int], None], parent: int | None = None) -> None:
        self._forward, self._parent = forward, parent
        self._asked = False
        self._earlier: Any = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for the signal."""
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._note)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """End the run, if that was asked for.

        Raises:
            TerminatedError: then.
        """
        if self._parent is not None and os.getppid() != self._parent:
            raise TerminatedError("the process that started this one is gone; what was answered is kept")
        if self._asked:
            raise TerminatedError(
                "ended by SIGTERM after the batch in work; what was answered is kept, and the same command "
                "goes on from there"
            )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the signal to whoever had it."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the signal to whoever had it."""
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True
        self._forward(number)

    def _restore(self) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)
            self._earlier = None
