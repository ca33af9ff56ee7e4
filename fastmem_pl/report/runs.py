"""One run folder as a report reads it: its records, its settings, and the data it answered about."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.data import ContextSample, read_samples
from fastmem_pl.data.reader import data_file, file_hash
from fastmem_pl.report.profile_table import read_profile
from fastmem_pl.report.table import count_of
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.records import Record

_ZERO_SHOT = (
    *("fingerprint", "quantization", "template", "system_prompt", "max_context_tokens"),
    *("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"),
    "answer_quirks",
)
_KINDS = {"task": str, "prediction": str, "scores": dict, "seconds": dict, "output_words": int}


@dataclass
class ReportRun:
    """One run folder as a report sees it.

    Attributes:
        path: the folder.
        label: short name, unlike that of any other run of the report.
        identity: nested settings that the results depend on (``run.json``).
        records: answers to the samples that all methods have answered, in the order of the data.
        metrics: content of ``metrics.json``; empty while the run is not complete.
        profile: content of ``profile.json``; empty without one.
        samples: the data by index, where the file was found unchanged.
        notices: lines for the reader.
    """

    path: Path
    label: str
    identity: dict[str, Any]
    records: list[Record]
    metrics: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    samples: dict[int, ContextSample] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def data_hash(self) -> str:
        """Hash of the data file."""
        return str(self.identity["data"].get("file_hash"))

    @property
    def data_key(self) -> str:
        """Name of the samples: the file, and the fields of it that were read."""
        fields = self.identity["data"].get("fields")
        return f"{self.data_hash} {json.dumps(fields, sort_keys=True)}" if fields else self.data_hash

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings of the model by their short names, which differ between groups."""
        return flat_settings(self.identity["model"])

    @property
    def model_key(self) -> str:
        """Hash of the model's weights, or its name where a run does not state them."""
        return str(self.settings.get("fingerprint") or self.settings.get("source"))

    @property
    def model(self) -> str:
        """Name of the model, with its quantization."""
        source, quantization = str(self.settings.get("source", "model")), self.settings.get("quantization")
        name = "SmolLM2-135M-Instruct" if source == "demo" else Path(source).name
        return f"{name} ({quantization})" if quantization else name

    @property
    def asked(self) -> Any:
        """What zero-shot answers depend on beside the sample: runs that agree in it have the same ones."""
        settings = {name: self.settings.get(name) for name in _ZERO_SHOT}
        settings |= {name: self.identity["data"].get(name) for name in ("task", "answer_prefix")}
        settings |= {"model": self.model_key, "data": self.data_key}
        return {**settings, "precision": self.precision}

    @property
    def precision(self) -> str:
        """That of the trainer; empty where a run does not state it."""
        return str(self.identity.get("trainer", {}).get("precision") or "")

    @cached_property
    def answered(self) -> int:
        """Number of samples."""
        return len({record["index"] for record in self.records})

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks of the answers, in the order of the data."""
        return list(dict.fromkeys(record["task"] for record in self.records))


def flat_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model without their groups: ``memorize.steps`` as ``steps``."""
    flat: dict[str, Any] = {}
    for name, value in model.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return flat


def read_run(path: Path, label: str = "") -> ReportRun:
    """Read one run folder; of a run that was stopped, the samples that all methods have answered.

    Raises:
        FastMemError: when it is no run, holds no answers, or a file of it is damaged.
    """
    if not path.is_dir():
        raise FastMemError(f"no such run folder: {path}")
    if not (path / "run.json").is_file():
        raise FastMemError(f"{path} is no run folder (it holds no run.json)")
    identity = _read_json(path / "run.json").get("identity")
    if not (isinstance(identity, dict) and all(isinstance(identity.get(k), dict) for k in ("model", "data"))):
        raise FastMemError(f"{path / 'run.json'} is damaged (no settings in it)")
    if "search" in identity or (path / "search.json").is_file():
        raise FastMemError(f"{path} is a search; its report is {path / 'search.md'}")
    folder = RunFolder(path, identity, identity["model"].get("methods") or [])
    folder.check()
    records = folder.records()
    if not records:
        saved = (path / "memories").is_dir()
        why = "memories, not answers; `fastmem predict` answers with them" if saved else "no answers yet"
        raise FastMemError(f"{path} holds {why}")
    for record in records:
        _check(record, path)
    run = ReportRun(path, label or path.resolve().name, identity, records)
    if folder.metrics_path.is_file():
        run.metrics = _read_json(folder.metrics_path)
    run.profile = read_profile(path)
    lines = notices_of(records, run.metrics.get("num_samples"))
    if not run.metrics:
        lines.insert(0, f"the run is not complete; {count_of(run.answered, 'sample')} so far")
    run.notices = [f"{run.label}: {line}" for line in lines]
    return run


def _check(record: Record, path: Path) -> None:
    """Refuse a record that is not as a run writes them."""
    fits = {name: isinstance(record.get(name), kind) for name, kind in _KINDS.items()}
    for name in ("scores", "seconds"):
        fits[name] = fits[name] and all(map(_is_finite, record[name].values()))
    curve = record.get("curve")
    fits["curve"] = not curve or _is_curve(curve, record.get("status") == "ok")
    wrong = [name for name, fit in fits.items() if not fit]
    if wrong:
        raise FastMemError(
            f"{path / 'predictions.jsonl'} is damaged: {wrong[0]!r} of sample {record['index']} is "
            "not as a run writes it"
        )


def _is_curve(curve: Any, whole: bool) -> bool:
    """Whether these are lists of numbers, one a step; those of a memory that failed end in what is none."""
    if not (isinstance(curve, dict) and curve.keys() >= {"cross_entropy", "kl"}):
        return False
    columns = list(curve.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return False
    values = [value for column in columns for value in column]
    return all(_is_finite(value) or (not whole and isinstance(value, float | None)) for value in values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastMemError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise FastMemError(f"{path} is damaged: no JSON object")
    return content


def notices_of(records: Sequence[Record], total: int | None) -> list[str]:
    """What a reader should know of answers, where ``total`` samples were to be answered."""
    answered = len({record["index"] for record in records})
    failed = {record["index"] for record in records if record.get("status", "ok") != "ok"}
    cut = {record["index"] for record in records if record.get("n_truncated_tokens")}
    lines = []
    if total and answered < total:
        lines.append(f"only {answered} of {total} samples are answered so far")
    if failed:
        shown = count_of(len(failed), "sample")
        lines.append(f"{shown} could not be memorized; the base model answered (see 'status')")
    if cut:
        lines.append(f"{count_of(len(cut), 'sample')} had a context over the limit, which was cut off")
    return lines


def find_samples(run: ReportRun, given: str | Path | None) -> None:
    """Read the data again, if the file is there as the run found it (or is ``given``); else, a notice."""
    names = [str(given)] if given is not None else []
    with suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
        names.append(str(config["data"]["path"]))
    # From here, or from a folder above the run's.
    places = [folder / data_file(name) for name in names for folder in (Path(), *run.path.resolve().parents)]
    path = next((p for p in places if p.is_file() and file_hash(p) == run.data_hash), None)
    if path is None:
        named = f" ({', '.join(names)})" if names else ""
        run.notices.append(
            f"{run.label}: contexts and prompts are missing: the data file{named} is not there or has "
            "changed; give it with --data FILE"
        )
        return
    data = run.identity["data"]
    prefix = data.get("answer_prefix", "")
    samples = read_samples(path, data["task"], data.get("fields"), prefix, data.get("limit"))
    run.samples = {sample.index: sample for sample in samples}


def perplexity(record: Mapping[str, Any]) -> float | None:
    """Perplexity of the context under the base model: ``exp`` of the loss before any update."""
    losses = (record.get("curve") or {}).get("cross_entropy") or []
    return math.exp(min(losses[0], 50.0)) if losses and isinstance(losses[0], (int, float)) else None
