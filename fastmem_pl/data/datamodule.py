"""The LightningDataModule over one data file."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from fastmem_pl.base.errors import FastMemError, unknown
from fastmem_pl.data.batches import BatchLimits, plan
from fastmem_pl.data.reader import data_file, file_hash, read_samples
from fastmem_pl.data.tasks import OWN_FIELDS, ContextSample


class ShareSampler(DistributedSampler):
    """The batches of one process: its share of all, none of them twice, and none at all if they are few.

    Lightning would put in a sampler of its own, which refuses an empty share, for anything that is no
    :class:`DistributedSampler`.
    """

    def __init__(self, batches: Sequence[Any], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(batches, num_replicas, rank, shuffle=False)
        # The first ranks get the longest of every round.
        self._places = range(rank, len(batches), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class FastMemDataModule(LightningDataModule):
    """Samples of one data file; results stand in the file's order.

    Args:
        task: nqswap, nq, nqswap_icl, nq_icl, memotrap, hotpotqa, xsum, cnndm, wikihow; qa or summary for a
            file of your own; mixed where every record names its task. It fixes the record format, the
            prompts and the scores; `fastmem tasks` shows them.
        path: JSON list or JSON Lines file; packaged are "demo" (task mixed) and "long" (qa: questions about
            one context of some 3,000 tokens, for profiles).
        limit: use the first records only; leave out for all.
        batch_size: samples memorized and answered together; left out, as many as free memory holds, 32 at
            most (16 on a CPU). Answers do not depend on it.
        max_batch_tokens: bound of a batch's samples times the tokens of its longest context; left out, none.
        answer_prefix: text that opens the assistant's turn, such as "The answer is:"; it counts as part
            of the answer when it is scored.
        fields: the file's own field names for task qa, such as {context: passage, question: q,
            answers: gold}, or summary ({article: text, summary: gold}).

    Attributes:
        planner: called when the batches are wanted, to choose them (:meth:`skip`, :meth:`use_plan`): by then,
            the model is loaded and the processes have met.
        whole: let every process do all batches, as processes do that hold one model together.
        remote: gets the batches where other processes answer them; what it returns is iterated over instead.
    """

    def __init__(
        self,
        task: str = "mixed",
        path: str = "demo",
        limit: int | None = None,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        answer_prefix: str = "",
        fields: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in ("limit", "batch_size", "max_batch_tokens"):
            value = self.hparams[name]
            if value is not None and value < 1:
                raise FastMemError(f"data.{name}: {value} is out of range; allowed: at least 1")
        if fields and task not in OWN_FIELDS:
            raise FastMemError(f"data.fields: only tasks {' and '.join(OWN_FIELDS)} take names, not {task!r}")
        for field in fields or ():
            if field not in OWN_FIELDS[task]:
                raise unknown("data.fields", field, OWN_FIELDS[task])
        self.task, self.limit = task, limit
        self.batch_size, self.max_batch_tokens = batch_size, max_batch_tokens
        self.answer_prefix, self.fields = answer_prefix, fields
        self.path = data_file(path)
        self.samples: list[ContextSample] = []
        self._done: Container[int] = ()
        self._batches: list[list[ContextSample]] | None = None
        self.planner: Callable[[], None] | None = None
        self.whole = False
        self.remote: Callable[[list[list[ContextSample]]], IterableDataset] | None = None
        # With few samples, some processes have none.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def setup(self, stage: str | None = None) -> None:
        """Read the file once."""
        if not self.samples:
            self.samples = read_samples(self.path, self.task, self.fields, self.answer_prefix, self.limit)

    @contextmanager
    def every(self, stride: int) -> Iterator[None]:
        """Hold the first of every ``stride`` samples only, under their own indices, while this lasts."""
        self.setup()
        whole = self.samples
        self.samples = [sample for sample in whole if sample.index % stride == 0]
        try:
            yield
        finally:
            self.samples = whole
            self.skip(())

    def file_hash(self) -> str:
        """Short hash of the data file, by which a run folder recognizes its data."""
        return file_hash(self.path)

    def skip(self, done: Container[int]) -> None:
        """Leave out samples with these indices: they are done."""
        self._done = done
        self._batches = None

    @property
    def remaining(self) -> list[ContextSample]:
        """Samples that are still to do, in the file's order."""
        return [sample for sample in self.samples if sample.index not in self._done]

    def plan(self, lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
        """Batches of the remaining samples, given their tokens, as lists of their places among them."""
        if len(lengths) != len(self.remaining):
            raise ValueError(f"{len(lengths)} lengths for {len(self.remaining)} samples")
        return plan(lengths, limits)

    def use_plan(self, batches: Sequence[Sequence[int]]) -> None:
        """Answer in these batches (:meth:`plan`), the same in all processes."""
        remaining = self.remaining
        self._batches = [[remaining[i] for i in batch] for batch in batches]

    def predict_dataloader(self) -> DataLoader:
        """Batches of the remaining samples, as lists: of like length, the longest first.

        Without a planner, characters stand in for tokens. Every process of the trainer gets its share.
        """
        if self.planner is not None:
            self.planner()
        if self._batches is None:
            limits = BatchLimits(self.batch_size or 8)
            self.use_plan(self.plan([len(sample.context) for sample in self.remaining], limits))
        if self.remote is not None:
            return DataLoader(self.remote(self._batches), batch_size=None, collate_fn=lambda item: item)
        share = {} if self.whole or self.trainer is None else self.trainer.distributed_sampler_kwargs or {}
        sampler = ShareSampler(self._batches, **share)
        return DataLoader(self._batches, batch_size=1, sampler=sampler, collate_fn=operator.itemgetter(0))
