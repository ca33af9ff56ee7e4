"""Scores that need a model of their own, computed for a whole run once its answers are known."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fastmem_pl.data import TASKS, ContextSample
from fastmem_pl.errors import FastMemError
from fastmem_pl.metrics import load_metric_model

log = logging.getLogger(__name__)

_CHUNK = 64


def add_model_scores(
    records: Sequence[dict[str, Any]],
    samples: Sequence[ContextSample],
    wanted: Mapping[str, str],
    known: Mapping[str, str],
    device: torch.device,
) -> dict[str, str]:
    """Add to the records' scores what metric models say of them.

    A metric whose model cannot be had is left out with one line in the log; the others still come.

    Args:
        records: of all methods; their ``scores`` grow.
        samples: that they answer, by ``index``.
        wanted: metrics and the source (Hub id or folder) of the model of each.
        known: the sources that scores already in the records come from.
        device: to compute on.

    Returns:
        the sources of the scores that the records hold now.
    """
    contexts = {sample.index: sample.context for sample in samples}
    done = dict(known)
    for name, source in wanted.items():
        applicable = [r for r in records if name in TASKS[r["task"]].scores]
        missing = [r for r in applicable if known.get(name) != source or name not in r["scores"]]
        if not missing:
            continue
        try:
            model = load_metric_model(name, source, device)
            values = []
            for start in tqdm(
                range(0, len(missing), _CHUNK), desc=name, unit="chunk", disable=not sys.stderr.isatty()
            ):
                chunk = missing[start : start + _CHUNK]
                articles = [contexts[r["index"]] for r in chunk]
                values += model([r["prediction"] for r in chunk], articles)
        except FastMemError as error:
            log.warning("%s", error)
            continue
        except torch.OutOfMemoryError:
            log.warning("%s: out of memory on %s beside the language model; left out", name, device)
            continue
        for record, value in zip(missing, values, strict=True):
            record["scores"][name] = value
        done[name] = source
    return done
