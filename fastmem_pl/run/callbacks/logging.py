"""Tells loggers of every batch, and keeps Lightning's own use of them out of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

if TYPE_CHECKING:
    from fastmem_pl.run.loggers import RunLog


class RunLogging(Callback):
    """Logs the curves and scores of each batch when it is done, so that a run can be watched.

    Args:
        log: to tell.
    """

    def __init__(self, log: RunLog) -> None:
        self._log = log

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the samples of the batch."""
        self._log.add(outputs)


class LoggersAside(Callback):
    """Shows loggers as ``trainer.loggers`` while batches run, and not to Lightning before and after.

    At each start of a loop Lightning logs the module's arguments, and at each end it closes the loggers; a
    run has settings of its own to log, and may have several loops.

    Args:
        loggers: to show.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show them."""
        trainer.loggers = self.loggers

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hide them."""
        trainer.loggers = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hide them."""
        trainer.loggers = []
