"""Callbacks of a run: the writer of records, the progress bar, the end by SIGTERM."""

import sys
from collections.abc import Callable
from subprocess import Popen
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from tqdm import tqdm

from fastmem_pl.base.errors import TerminatedError
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.ranks import Ranks


class PredictionWriter(BasePredictionWriter):
    """Appends each batch to ``predictions.jsonl``: a killed run loses the batch in work at most.

    Of processes ``together``, which all have the same results, the first writes, and all wait for it to
    succeed: they could not go on with their model alone.
    """

    def __init__(self, run: RunFolder, together: Ranks | None = None) -> None:
        super().__init__(write_interval="batch")
        self._run, self._together = run, together

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any
    ) -> None:
        """Append the records of a batch."""
        if self._together is None:
            self._run.append(prediction)
        else:
            self._together.first(lambda: self._run.append(prediction))


class SampleProgress(ProgressBar):
    """Shows samples done, rate and time left; samples of an earlier, killed run count as done."""

    def __init__(self) -> None:
        super().__init__()
        # Returns the samples that are done, where other processes do some of them.
        self.count: Callable[[], int] | None = None
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (Lightning calls this on ranks other than 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        data = trainer.datamodule
        self._bar = tqdm(
            total=len(data.samples),
            initial=self.count() if self.count else len(data.samples) - len(data.remaining),
            desc=pl_module.mode,
            unit="sample",
            disable=not self._enabled,
            # In a log file, one line now and then.
            mininterval=0.1 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Advance by the samples of the batch."""
        self._bar.update(self.count() - self._bar.n if self.count else len(batch))

    def on_predict_end(self, *args: Any) -> None:
        """Close the bar; a message stands on its own line then."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_predict_end


class StopOnSignal(Callback):
    """Ends a run by SIGTERM after the batch in work, once it is on disk.

    It replaces Lightning's own notice of the signal, in which all processes exchange a message: those that
    are busy or gone do not answer. ``agree`` takes whether this process was asked to end to whether any was,
    for processes that have to end after the same batch.
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
        """End the run with :class:`TerminatedError`, if that was asked for."""
        self._end_if(self._agree(self._asked))

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """End the run, if that was asked for after the last batch."""
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
