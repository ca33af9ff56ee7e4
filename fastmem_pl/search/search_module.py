"""The LightningModule of a search: a predict step evaluates one sample at all of its points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule

from fastmem_pl.data import ContextSample
from fastmem_pl.decoding import Method
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.search.evaluate import SampleSearch
from fastmem_pl.search.grid import Point


class SearchModule(LightningModule):
    """Answers every sample zero-shot and at every point that is asked for.

    Args:
        model: with the backbone loaded; its settings hold where a point does not say otherwise.
        method: that is searched for.
        todo: points to evaluate by index of the sample; ``None`` among them stands for zero-shot.
        exact: compute losses from the whole vocabulary.

    Attributes:
        progress: told the number of answers done, as they are.
    """

    mode = "search"

    def __init__(
        self,
        model: FastMemModule,
        method: Method,
        todo: Mapping[int, Sequence[Point | None]],
        exact: bool = False,
    ) -> None:
        super().__init__()
        # Kept out of the module tree, as the model keeps its backbone.
        object.__setattr__(self, "_model", model)
        self._method, self.todo, self._exact = method, todo, exact
        self.progress: Callable[[int], None] = lambda count: None

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the texts alone."""
        return batch

    def predict_step(self, batch: list[ContextSample], batch_idx: int = 0) -> list[dict[str, Any]]:
        """Evaluate samples, one after the other; returns one record per sample and point."""
        return [record for sample in batch for record in self._search(sample)]

    def _search(self, sample: ContextSample) -> list[dict[str, Any]]:
        todo = self.todo[sample.index]
        search = SampleSearch(self._model, sample, self._method, self._exact)
        records = []
        if None in todo:
            records.append(search.zero_shot())
            self.progress(1)
        records += search.points([point for point in todo if point is not None], self.progress)
        for record in records:
            record["loss_error"] = search.loss_error
        return records
