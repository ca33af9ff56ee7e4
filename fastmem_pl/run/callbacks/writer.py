"""Writes the records of every batch to the run folder as they come."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.ranks import Ranks


class PredictionWriter(BasePredictionWriter):
    """Appends each batch to ``predictions.jsonl``: a killed run loses the batch in work at most.

    Args:
        run: folder to write to.
        together: processes that all have the same results. The first writes, and all wait for it to succeed:
            they could not go on with their model alone.
    """

    def __init__(self, run: RunFolder, together: Ranks | None = None) -> None:
        super().__init__(write_interval="batch")
        self.run, self._together = run, together

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the records of a batch."""
        if self._together is None:
            self.run.append(prediction)
        else:
            self._together.first(lambda: self.run.append(prediction))
