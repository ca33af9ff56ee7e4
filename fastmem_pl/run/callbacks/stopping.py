"""SIGTERM from a scheduler: the batch in work is finished and kept, then the run ends."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import Popen
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fastmem_pl.base.errors import TerminatedError


class StopOnSignal(Callback):
    """Ends a run by SIGTERM after the batch in work, once it is on disk.

    It replaces Lightning's own notice of the signal, in which all processes exchange a message: those that
    are busy or gone do not answer.

    Args:
        agree: whether any process was asked to end, given whether this one was; for processes that have to
            end after the same batch.
    """

    def __init__(self, agree: Callable[[bool], bool] = bool) -> None:
        self._agree = agree
        self._asked = False
        self._started: list[Popen] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of what Lightning is about to register, and to remove after the loop."""

        def note(number: int, frame: Any) -> None:
            self._asked = True
            launcher = trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(number)
                # Lightning's observer looks at this list, and kills all when one ends with another status
                # than 0: the batch in work would be lost.
                self._started += launcher.procs
                launcher.procs.clear()

        trainer._signal_connector._sigterm_notifier_fn = note

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """End the run, if that was asked for.

        Raises:
            TerminatedError: then, once the processes that this one started have ended.
        """
        self._end_if(self._agree(self._asked))

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """End the run, if that was asked for after the last batch.

        Raises:
            TerminatedError: as after a batch.
        """
        self._end_if(self._asked)

    def _end_if(self, asked: bool) -> None:
        if not asked:
            return
        for process in self._started:
            process.wait()
        raise TerminatedError(
            "ended by SIGTERM after the batch in work; what was answered is kept, and the same command "
            "goes on from there"
        )
