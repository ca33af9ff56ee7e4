"""SIGTERM from a scheduler: the batch in work is finished and kept, then the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fastmem_pl.base.errors import TerminatedError


class StopOnSignal(Callback):
    """Ends a run by SIGTERM: after the batch in work, once it is on disk, or at once where there is none.

    In the loop it takes the place of Lightning's own handler, which has all processes exchange a message:
    those that are busy or gone do not answer.

    Args:
        forward: passes the signal on to processes that this one started.
        agree: whether any process was asked to end, given whether this one was; for processes that have to
            end after the same batch.
    """

    def __init__(self, forward: Callable[[int], None], agree: Callable[[bool], bool] = bool) -> None:
        self._forward, self._agree = forward, agree
        self._asked = self._busy = False
        self._listens = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Mind the signal meanwhile.

        Raises:
            TerminatedError: when it comes.
        """
        # Python lets the main thread alone set handlers.
        self._listens = threading.current_thread() is threading.main_thread()
        earlier = signal.signal(signal.SIGTERM, self._note) if self._listens else None
        try:
            yield
        finally:
            if self._listens:
                # Python knows no handler that other code has set.
                signal.signal(signal.SIGTERM, signal.SIG_DFL if earlier is None else earlier)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal back from Lightning."""
        if self._listens:
            signal.signal(signal.SIGTERM, self._note)

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """From here on, wait for the end of the batch."""
        self._busy = True

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """End the run, if that was asked for.

        Raises:
            TerminatedError: then.
        """
        self._busy = False
        if self._agree(self._asked):
            raise _terminated()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """The batch has ended, too."""
        self._busy = False

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True
        self._forward(number)
        if not self._busy:
            raise _terminated()


def _terminated() -> TerminatedError:
    return TerminatedError(
        "ended by SIGTERM after the batch in work; what was answered is kept, and the same command goes on "
        "from there"
    )
