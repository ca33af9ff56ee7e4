"""A progress bar that counts samples, not batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class SampleProgress(ProgressBar):
    """Shows samples done, rate and time left; samples of an earlier, killed run count as done.

    Attributes:
        count: returns the samples that are done, where other processes do some of them.
    """

    unit = "sample"

    def __init__(self) -> None:
        super().__init__()
        self.count: Callable[[], int] | None = None
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (Lightning calls this on ranks other than 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def extent(self, trainer: Trainer, pl_module: LightningModule) -> tuple[int, int]:
        """What is done already, and all."""
        data = trainer.datamodule
        done = self.count() if self.count else len(data.samples) - len(data.remaining)
        return done, len(data.samples)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        done, total = self.extent(trainer, pl_module)
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=pl_module.mode,
            unit=self.unit,
            disable=not self._enabled,
            # In a log file, one line now and then.
            mininterval=0.1 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance by the samples of the batch."""
        self._bar.update(self.count() - self._bar.n if self.count else len(batch))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message stands on its own line."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
