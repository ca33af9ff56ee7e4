"""The side of the workers of a Ray cluster: a loaded model that answers shares of the samples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule

from fastmem_pl.backbone.footprint import usable_bytes
from fastmem_pl.base.errors import FastMemError, RunStoppedError
from fastmem_pl.data import ContextSample
from fastmem_pl.data.batches import plan
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.provenance import Provenance
from fastmem_pl.run.records import Record


@dataclass
class Answered:
    """What a worker returns for its share: records, and by what model and where they were made."""

    indices: list[int]
    records: list[Record]
    provenance: Provenance | None = None
    error: str | None = None
    exit_status: int = 0

    def __len__(self) -> int:
        return len(self.indices)


@dataclass
class Work:
    """What workers do.

    Attributes:
        modules: the model to load, and the module whose predict step is run; pickled as one, as the step may
            hold the model.
        precision: of the trainer.
        sizes: ``data.batch_size`` and ``data.max_batch_tokens``.
        fingerprint: of the model that the run was begun with, where that is known.
        folder: that relative paths start from, where a worker's machine has it.
    """

    modules: tuple[FastMemModule, LightningModule]
    precision: str
    sizes: tuple[int | None, int | None]
    fingerprint: str | None
    folder: str


class Worker:
    """One actor: the loaded model, which answers shares of the samples.

    ``room`` is the part of the free memory that it may fill.
    """

    def __init__(self, work: Work, room: float) -> None:
        import ray

        self._model, self._step = work.modules
        self._failure: FastMemError | None = None
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        with suppress(OSError):
            os.chdir(work.folder)
        try:
            self._model.load_backbone(work.precision, device)
            if work.fingerprint not in (None, self._model.backbone.fingerprint()):
                raise other_model()
            self._limits = self._model.limits(*work.sizes, None, usable_bytes(device) * room)
        except FastMemError as error:
            # Raised here, it would come as a traceback of Ray's.
            self._failure = error

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[str]]:
        """Answer the one row, a share of the samples; what is refused comes back as an error."""
        samples = [_sample(fields) for fields in json.loads(rows["samples"][0])]
        answered = Answered([sample.index for sample in samples], [])
        try:
            if self._failure is not None:
                raise self._failure
            self._model.check_samples(samples)
            for places in plan(self._model.context_lengths(samples), self._limits):
                answered.records += self._step.predict_step([samples[place] for place in places])
            answered.provenance = Provenance.of(self._model)
        except FastMemError as error:
            answered.error, answered.exit_status = str(error), error.exit_status
        return {"answered": [json.dumps(asdict(answered))]}


def other_model() -> RunStoppedError:
    """The error for a worker whose model has another fingerprint."""
    return RunStoppedError(
        "trainer.ray: a worker has another model than the run was begun with, or than the others; give all "
        "machines the same files"
    )


def _sample(fields: Mapping[str, Any]) -> ContextSample:
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return ContextSample(**{**fields, **lists})
