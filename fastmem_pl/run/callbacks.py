"""Callbacks of a run: metric aggregation, the writer of records, the progress bar, the end by SIGTERM."""

import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from subprocess import Popen
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from torchmetrics import CatMetric
from tqdm import tqdm

from fastmem_pl.base.errors import TerminatedError
from fastmem_pl.base.progress import watched
from fastmem_pl.decoding import BASELINE
from fastmem_pl.metrics import SCORES, estimate, paired
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.ranks import Ranks

ALL = "all"


class MetricAggregation(Callback):
    """Feeds torchmetrics by group (all samples, and each task of a mixed file), method and score."""

    def __init__(self) -> None:
        # Fed with the records of all processes, by one of them: nothing is left to exchange.
        self._values: dict[tuple[str, str, str], CatMetric] = defaultdict(
            partial(CatMetric, nan_strategy="ignore", sync_on_compute=False)
        )
        self._pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
        self._tasks: set[str] = set()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Feed the records of a batch."""
        self.feed(outputs)

    def feed(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records; all methods of one sample must come together."""
        baselines = {r["index"]: r["scores"] for r in records if r["method"] == BASELINE}
        values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for record in records:
            self._tasks.add(record["task"])
            baseline = baselines.get(record["index"], {}) if record["method"] != BASELINE else {}
            for group in (ALL, record["task"]):
                for name, value in _averaged(record).items():
                    values[group, record["method"], name].append(value)
                for name in (name for name in SCORES if SCORES[name].binary):
                    if name in baseline and name in record["scores"]:
                        pair = (baseline[name], record["scores"][name])
                        self._pairs[group, record["method"], name].append(pair)
        for key, several in values.items():
            self._values[key].update(torch.tensor(several, dtype=torch.float64))

    def compute(self) -> dict[str, dict[str, Any]]:
        """Values with standard errors and paired tests, by group and method."""
        groups: dict[str, dict[str, Any]] = {}
        for (group, method, name), values in self._values.items():
            if group != ALL and len(self._tasks) == 1:
                continue
            entry = groups.setdefault(group, {}).setdefault(
                method, {"n": 0, "metrics": {}, "against_zero_shot": {}}
            )
            found = estimate(values.compute().reshape(-1).tolist())
            entry["n"] = max(entry["n"], found.n)
            # Seconds are shares of a batch, not independent values.
            error = None if name.startswith("seconds") else found.error
            entry["metrics"][name] = {"value": found.value, "standard_error": error, "n": found.n}
        for (group, method, name), pairs in self._pairs.items():
            if group in groups:
                test = paired(*zip(*pairs, strict=True), binary=True)
                groups[group][method]["against_zero_shot"][name] = {
                    "gained": test.gained,
                    "lost": test.lost,
                    "p_value": test.p_value,
                    "test": test.test,
                }
        for entry in (entry for methods in groups.values() for entry in methods.values()):
            order = [*SCORES, *entry["metrics"]]
            entry["metrics"] = dict(sorted(entry["metrics"].items(), key=lambda item: order.index(item[0])))
        return groups


def _averaged(record: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a record that are averaged."""
    seconds = record["seconds"]
    return {
        **record["scores"],
        "output_words": record["output_words"],
        "seconds_memorize": seconds["memorize"],
        "seconds_decode": seconds["decode"],
        "seconds": seconds["memorize"] + seconds["decode"],
        "failed": float(record["status"] != "ok"),
        "truncated": float(record["n_truncated_tokens"] > 0),
    }


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
    """Shows samples done, rate and time left; samples of an earlier, killed run count as done.

    Within a batch it advances by parts of samples, as a batch may take minutes: every pass over it, be it
    memorizing or a method's answers, counts the same.
    """

    def __init__(self) -> None:
        super().__init__()
        # Returns the samples that are done, where other processes do some of them.
        self.count: Callable[[], int] | None = None
        self._bar: tqdm | None = None
        self._watching = ExitStack()
        self._enabled = True
        # Of the batch in work: samples done before it, its own, the passes over it, those that have begun.
        self._before, self._samples, self._passes, self._begun = 0, 0, 0, 0

    def disable(self) -> None:
        """Show nothing (Lightning calls this on ranks other than 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        data = trainer.datamodule
        self._before = self.count() if self.count else len(data.samples) - len(data.remaining)
        self._bar = tqdm(
            total=len(data.samples),
            initial=self._before,
            desc=pl_module.mode,
            unit="sample",
            disable=not self._enabled,
            # In a log file, one line now and then.
            mininterval=0.1 if sys.stderr.isatty() else 15,
            # Else steps that are shorter than the last batch would not be shown.
            miniters=0,
            # tqdm's own, without the digits of a part of a sample.
            bar_format="{l_bar}{bar}| {n:.7g}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            dynamic_ncols=True,
        )
        self._watching.enter_context(watched(self._within_batch))

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any
    ) -> None:
        """Begin to count the steps of a batch."""
        # A search has another number of passes for every sample: the bar shows the steps alone then.
        self._samples, self._passes, self._begun = len(batch), getattr(pl_module, "num_passes", 0), 0

    def _within_batch(self, what: str, done: int, total: int) -> None:
        self._begun += done == 1
        # Answers may end early, and a batch that does not fit is tried again in halves.
        part = min(1.0, (self._begun - 1 + done / total) / self._passes) if self._passes else 0.0
        self._bar.set_postfix_str(f"{what} {done}/{total}", refresh=False)
        self._move_to(round(self._before + self._samples * part, 1))

    def _move_to(self, samples: float) -> None:
        self._bar.update(samples - self._bar.n)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Advance by the samples of the batch."""
        self._before = self.count() if self.count else self._before + len(batch)
        self._bar.set_postfix_str("", refresh=False)
        self._move_to(self._before)

    def on_predict_end(self, *args: Any) -> None:
        """Close the bar; a message stands on its own line then."""
        self._watching.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_predict_end


class StopOnSignal(Callback):
    """Ends a run by SIGTERM, or as its terminal closes (SIGHUP), after the batch in work, once it is on disk.

    It replaces Lightning's own notice of the signal, in which all processes exchange a message: those that
    are busy or gone do not answer. ``agree`` takes whether this process was asked to end to whether any was,
    for processes that have to end after the same batch. It ends ``at_once`` where others do the work.
    """

    def __init__(self, agree: Callable[[bool], bool] = bool, at_once: bool = False) -> None:
        self._agree, self._at_once = agree, at_once
        self._asked = 0  # number of the signal
        self._hears_hangup = False
        self._started: list[Popen] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of what Lightning is about to register, and to remove after the loop."""

        def note(number: int, frame: Any) -> None:
            self._asked = number
            self._end_if(self._at_once)
            launcher = trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(number)
                # Lightning's observer looks at this list, and kills all when one ends with another status
                # than 0: the batch in work would be lost.
                self._started += launcher.procs
                launcher.procs.clear()

        trainer._signal_connector._sigterm_notifier_fn = note
        # nohup has it ignored, and stays in force.
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, note)
            self._hears_hangup = True

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """End the run with :class:`TerminatedError`, if that was asked for."""
        self._end_if(self._agree(bool(self._asked)))

    def on_exception(self, *args: Any) -> None:
        """Leave SIGHUP as it was."""
        if self._hears_hangup:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """End the run, if that was asked for after the last batch."""
        self.on_exception()
        self._end_if(bool(self._asked))

    def _end_if(self, asked: bool) -> None:
        if not asked:
            return
        for process in self._started:
            process.wait()
        number = signal.Signals(self._asked or signal.SIGTERM)
        error = TerminatedError(
            f"ended by {number.name} after the batch in work; what was answered is kept, and the same "
            "command goes on from there"
        )
        error.exit_status = 128 + number
        raise error
