"""Lightning's predict loop over the samples of a search, and its progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from fastmem_pl.data import BatchLimits, FastMemDataModule
from fastmem_pl.run.callbacks import PredictionWriter, SampleProgress
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.search.search_module import SearchModule

if TYPE_CHECKING:
    from fastmem_pl.run.trainer import FastMemTrainer


def answer_loop(
    trainer: FastMemTrainer,
    search: SearchModule,
    model: FastMemModule,
    datamodule: FastMemDataModule,
    run: RunFolder,
    bar: AnswerProgress,
    further: Sequence[Callback] = (),
) -> None:
    """Run Lightning's predict loop, one sample a batch; further callbacks find its answers on disk."""
    datamodule.skip({s.index for s in datamodule.samples} - search.todo.keys())
    datamodule.use_plan(datamodule.plan(model.context_lengths(datamodule.remaining), BatchLimits(1)))
    try:
        trainer.run_loop(search, datamodule, [PredictionWriter(run), *further], bar)
    finally:
        model.graphs.clear()


class AnswerProgress(SampleProgress):
    """Counts answers: a sample has one for every point.

    Args:
        total: answers of the whole search; those of an earlier session count as done.
        title: before the bar.
        count: tells the answers that are there, where other processes give some of them.
    """

    def __init__(self, total: int, title: str = "search", count: Callable[[], int] | None = None) -> None:
        super().__init__()
        self._total, self._title, self._count = total, title, count

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        left = sum(map(len, pl_module.todo.values()))
        self._bar = tqdm(
            total=self._total,
            initial=self._total - left,
            desc=self._title,
            unit="answer",
            disable=not self._enabled,
            mininterval=0.1 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )
        if not self._count:
            pl_module.progress = self._bar.update

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance where the answers are counted; else the module tells of every one."""
        if self._count:
            super().on_predict_batch_end(*args, **kwargs)
