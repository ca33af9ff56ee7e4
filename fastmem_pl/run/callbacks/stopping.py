"""SIGTERM from a scheduler: the batch in work is finished and kept, then the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fastmem_pl.base.errors import TerminatedError


class StopOnSignal(Callback):
    """Ends a run by SIGTERM after the batch in work, once it is on disk.

    It replaces Lightning's own handler, in which all processes exchange a message: those that are busy or
    gone do not answer. Lightning puts the earlier handler back after the loop.

    Args:
        agree: whether any process was asked to end, given whether this one was; for processes that have to
            end after the same batch.
    """

    def __init__(self, agree: Callable[[bool], bool] = bool) -> None:
        self._agree = agree
        self._asked = False

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal from Lightning."""

        def note(number: int, frame: Any) -> None:
            self._asked = True
            launcher = trainer.strategy.launcher
            if launcher is not None:
                # To the processes that this one started.
                launcher.kill(number)

        self._asked = trainer.received_sigterm
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, note)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """End the run, if that was asked for.

        Raises:
            TerminatedError: then.
        """
        if self._agree(self._asked):
            raise TerminatedError(
                "ended by SIGTERM after the batch in work; what was answered is kept, and the same command "
                "goes on from there"
            )
