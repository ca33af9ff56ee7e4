"""What is computed for a whole run once its answers are known: scores by models of their own, and metrics."""

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.phases import is_out_of_memory
from fastmem_pl.data import TASKS, FastMemDataModule
from fastmem_pl.decoding import BASELINE
from fastmem_pl.metrics import METRIC_MODELS, SCORES, estimate, load_metric_model, paired
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.predict import FastMemModule
from fastmem_pl.run.records import Record

log = logging.getLogger(__name__)

ALL = "all"
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


def aggregate(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Means with standard errors and paired tests, by group (all samples, and tasks) and method."""
    tasks = dict.fromkeys(record["task"] for record in records)
    baselines = {r["index"]: r["scores"] for r in records if r["method"] == BASELINE}
    groups: dict[str, dict[str, Any]] = {}
    for group in (ALL, *(tasks if len(tasks) > 1 else ())):
        by_method: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            if group in (ALL, record["task"]):
                by_method[record["method"]].append(record)
        groups[group] = {method: _entry(own, baselines) for method, own in by_method.items()}
    return groups


def _entry(records: Sequence[Record], baselines: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """The metrics of one method."""
    values: dict[str, list[float]] = defaultdict(list)
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for name, value in _averaged(record).items():
            values[name].append(value)
        baseline = {} if record["method"] == BASELINE else baselines.get(record["index"], {})
        for name, score in SCORES.items():
            if score.binary and name in baseline and name in record["scores"]:
                pairs[name].append((baseline[name], record["scores"][name]))
    metrics, against = {}, {}
    for name in (name for name in dict.fromkeys([*SCORES, *values]) if name in values):
        found = estimate(values[name])
        # Seconds are shares of a batch, not independent values.
        error = None if name.startswith("seconds") else found.error
        metrics[name] = {"value": found.value, "standard_error": error, "n": found.n}
    for name, several in pairs.items():
        test = paired(*zip(*several, strict=True), binary=True)
        against[name] = {key: getattr(test, key) for key in ("gained", "lost", "p_value", "test")}
    return {"n": len(records), "metrics": metrics, "against_zero_shot": against}


def _averaged(record: Record) -> dict[str, float]:
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
