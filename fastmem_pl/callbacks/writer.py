"""Writes the records of every batch to the run folder as they come."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from fastmem_pl.run import RunFolder


class PredictionWriter(BasePredictionWriter):
    """Appends each batch to ``predictions.jsonl``: a killed run loses the batch in work at most."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(write_interval="batch")
        self.run = run

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
        self.run.append(prediction)
