"""Scores that need a model of their own, computed for a whole run once its answers are known."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.phases import is_out_of_memory
from fastmem_pl.data import TASKS, ContextSample, FastMemDataModule
from fastmem_pl.metrics import METRIC_MODELS, load_metric_model
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.predict import FastMemModule

log = logging.getLogger(__name__)

_CHUNK = 64
_SAVE_EVERY = 30.0  # seconds


def wanted_models(settings: Mapping[str, Any], samples: Sequence[ContextSample]) -> dict[str, str]:
    """Metrics with a model of their own that the settings name a source for and the samples' tasks have."""
    found = {name: settings[model.setting.removeprefix("model.")] for name, model in METRIC_MODELS.items()}
    listed = {score for sample in samples for score in TASKS[sample.task].scores}
    return {name: source for name, source in found.items() if source and name in listed}


def score_records(run: RunFolder, model: FastMemModule, datamodule: FastMemDataModule) -> list[str]:
    """Add the scores that need a model of their own to a run's records; returns which came."""
    wanted = wanted_models(model.metric_models, datamodule.samples)
    if not wanted:
        return []
    records = run.records()
    indices = {sample.index for sample in datamodule.samples}
    asked = [record for record in records if record["index"] in indices]
    device = model.backbone.device
    return add_model_scores(asked, datamodule.samples, wanted, device, lambda: run.replace(records))


def add_model_scores(
    records: Sequence[dict[str, Any]],
    samples: Sequence[ContextSample],
    wanted: Mapping[str, str],
    device: torch.device,
    save: Callable[[], None],
) -> list[str]:
    """Add to the records' scores what metric models say of them; ``score_models`` tells whose they are.

    A metric whose model cannot be had is left out with one line in the log; the others still come.

    Args:
        records: of all methods; they grow.
        samples: that they answer, by ``index``.
        wanted: metrics and the source (Hub id or folder) of the model of each.
        device: to compute on.
        save: keeps the records as they are now; called every half minute and at the end of each metric.

    Returns:
        metrics that records got new values of.
    """
    contexts = {sample.index: sample.context for sample in samples}
    added = []
    for name, source in wanted.items():
        missing = [
            record
            for record in records
            if name in TASKS[record["task"]].scores and record.get("score_models", {}).get(name) != source
        ]
        if not missing:
            continue
        try:
            model = load_metric_model(name, source, device)
            saved = time.monotonic()
            quiet = not sys.stderr.isatty()
            for start in tqdm(range(0, len(missing), _CHUNK), desc=name, unit="chunk", disable=quiet):
                chunk = missing[start : start + _CHUNK]
                values = model([r["prediction"] for r in chunk], [contexts[r["index"]] for r in chunk])
                for record, value in zip(chunk, values, strict=True):
                    record["scores"][name] = value
                    record.setdefault("score_models", {})[name] = source
                if time.monotonic() - saved > _SAVE_EVERY:
                    save()
                    saved = time.monotonic()
        except FastMemError as error:
            log.warning("%s", error)
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s: out of memory on %s beside the language model", name, device)
            continue
        finally:
            save()
        added.append(name)
    return added
