"""Scores that need a model of their own, computed for a whole run once its answers are known."""

import logging
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.phases import is_out_of_memory
from fastmem_pl.data import TASKS, FastMemDataModule
from fastmem_pl.metrics import METRIC_MODELS, load_metric_model
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.predict import FastMemModule

log = logging.getLogger(__name__)

_CHUNK = 64
_SAVE_EVERY = 30.0  # seconds


def score_records(
    run: RunFolder, model: FastMemModule, datamodule: FastMemDataModule, device: torch.device
) -> list[str]:
    """Add the scores of metric models, run on a device, to a run's records; ``score_models`` names them.

    A metric whose model cannot be had is left out with one line in the log. Returns those with new values.
    """
    samples = {sample.index: sample for sample in datamodule.samples}
    wanted = {
        name: model.metric_models[metric.setting.removeprefix("model.")]
        for name, metric in METRIC_MODELS.items()
        if any(name in TASKS[sample.task].scores for sample in samples.values())
    }
    added = []
    for name, source in wanted.items():
        if source is None:
            continue
        records = run.records()
        missing = [
            record
            for record in records
            if record["index"] in samples
            and name in TASKS[record["task"]].scores
            and record.get("score_models", {}).get(name) != source
        ]
        if not missing:
            continue
        try:
            _score(name, source, missing, samples, device, lambda: run.replace(records))  # noqa: B023
            added.append(name)
        except FastMemError as error:
            log.warning("%s", error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s: out of memory on %s beside the language model", name, device)
        finally:
            run.replace(records)
    return added


def _score(
    name: str, source: str, missing: list[dict[str, Any]], samples: Any, device: torch.device, save: Any
) -> None:
    metric, saved = load_metric_model(name, source, device), time.monotonic()
    chunks = range(0, len(missing), _CHUNK)
    for start in tqdm(chunks, desc=name, unit="chunk", disable=not sys.stderr.isatty()):
        chunk = missing[start : start + _CHUNK]
        contexts = [samples[record["index"]].context for record in chunk]
        values = metric([record["prediction"] for record in chunk], contexts)
        for record, value in zip(chunk, values, strict=True):
            record["scores"][name] = value
            record.setdefault("score_models", {})[name] = source
        if time.monotonic() - saved > _SAVE_EVERY:
            save()
            saved = time.monotonic()
