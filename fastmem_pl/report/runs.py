"""One run folder as a report reads it: its records, its settings, and the data it answered about."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.data import ContextSample, read_samples
from fastmem_pl.data.reader import data_file
from fastmem_pl.report.profile_table import read_profile
from fastmem_pl.run.folder import RunFolder
from fastmem_pl.run.records import Record

_ZERO_SHOT = (
    *("fingerprint", "quantization", "chat_template", "system_prompt", "max_context_tokens"),
    *("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"),
    "answer_quirks",
)


@dataclass
class ReportRun:
    """One run folder as a report sees it.

    Attributes:
        path: of the folder.
        label: short name, unlike that of any other run of the report.
        identity: what the results depend on, nested (``run.json``).
        methods: that it answered by, in order.
        records: of samples answered by all methods, in the order of the data.
        metrics: content of ``metrics.json``; empty while the run is not complete.
        profile: content of ``profile.json``; empty without one.
        samples: the data by index, where the file was found unchanged.
        notices: what a reader should know.
    """

    path: Path
    label: str
    identity: dict[str, Any]
    methods: list[str]
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
        """What the samples are known by: the file, and the fields of it that were read."""
        fields = self.identity["data"].get("fields")
        return f"{self.data_hash} {json.dumps(fields, sort_keys=True)}" if fields else self.data_hash

    @property
    def model_key(self) -> str:
        """What the model is known by: its weights, or its name where a run does not state them."""
        settings = self.identity["model"]
        return str(settings.get("fingerprint") or settings.get("backbone"))

    @property
    def model(self) -> str:
        """Name of the model, with its quantization."""
        settings = self.identity["model"]
        backbone = str(settings.get("backbone", "model"))
        name = "SmolLM2-135M-Instruct" if backbone == "demo" else Path(backbone).name
        return f"{name} ({settings['quantization']})" if settings.get("quantization") else name

    @property
    def asked(self) -> Any:
        """What zero-shot answers depend on beside the sample: runs that agree in it have the same ones."""
        settings = {name: self.identity["model"].get(name) for name in _ZERO_SHOT}
        settings |= {name: self.identity["data"].get(name) for name in ("task", "answer_prefix")}
        settings |= {"model": self.model_key, "data": self.data_key}
        return {**settings, "precision": self.identity.get("trainer", {}).get("precision")}

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks of the answers, in the order of the data."""
        return list(dict.fromkeys(record["task"] for record in self.records))


def read_run(path: Path, label: str = "") -> ReportRun:
    """Read one run folder; of a run that was stopped, the samples that all methods have answered.

    Raises:
        FastMemError: when it is no run, holds no answers, or a file of it is damaged.
    """
    if not path.is_dir():
        raise FastMemError(f"no such run folder: {path}")
    if not (path / "run.json").is_file():
        raise FastMemError(f"{path} is no run folder (it holds no run.json)")
    content = _read_json(path / "run.json")
    identity = content.get("identity")
    if not isinstance(identity, dict) or not all(
        isinstance(identity.get(k), dict) for k in ("model", "data")
    ):
        raise FastMemError(f"{path / 'run.json'} is damaged (no settings in it)")
    if "search" in identity or (path / "search.json").is_file():
        raise FastMemError(f"{path} is a search; its report is {path / 'search.md'}")
    methods = list(identity["model"].get("methods") or [])
    folder = RunFolder(path, identity, methods)
    folder.check()
    records = folder.records()
    if not records:
        saved = (path / "memories").is_dir()
        why = "memories, not answers; `fastmem predict` answers with them" if saved else "no answers yet"
        raise FastMemError(f"{path} holds {why}")
    for record in records:
        _check(record, path)
    run = ReportRun(path, label or path.resolve().name, identity, methods, records)
    run.methods = run.methods or list(dict.fromkeys(record["method"] for record in records))
    if folder.metrics_path.is_file():
        run.metrics = _read_json(folder.metrics_path)
    run.profile = read_profile(path)
    _add_notices(run)
    return run


def _check(record: Record, path: Path) -> None:
    """Refuse a record that is not as a run writes them."""
    kinds = {"task": str, "prediction": str, "scores": dict, "seconds": dict, "output_words": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    for name in ("scores", "seconds"):
        if name not in wrong and not _numbers(record[name].values()):
            wrong.append(name)
    if record.get("curve") and not _is_curve(record["curve"], record.get("status") == "ok"):
        wrong.append("curve")
    if wrong:
        raise FastMemError(
            f"{path / 'predictions.jsonl'} is damaged: {wrong[0]!r} of sample {record['index']} is "
            "not as a run writes it"
        )


def _is_curve(curve: Any, finite: bool) -> bool:
    """Whether these are lists of numbers, one a step; those of a memory that failed end in what is none."""
    if not isinstance(curve, dict) or not curve.keys() >= {"cross_entropy", "kl"}:
        return False
    columns = list(curve.values())
    return (
        all(isinstance(column, list) for column in columns)
        and len({len(column) for column in columns}) == 1
        and all(_numbers(column) if finite else all(map(_is_number_or_null, column)) for column in columns)
    )


def _numbers(values: Iterable[Any]) -> bool:
    return all(value is not None and _is_number_or_null(value) and math.isfinite(value) for value in values)


def _is_number_or_null(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastMemError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise FastMemError(f"{path} is damaged: no JSON object")
    return content


def _add_notices(run: ReportRun) -> None:
    answered = len({record["index"] for record in run.records})
    total = run.metrics.get("num_samples")
    if not run.metrics:
        run.notices.append(f"{run.label}: the run is not complete; {_count(answered, 'sample')} so far")
    elif total and answered < total:
        run.notices.append(f"{run.label}: only {answered} of {total} samples are answered so far")
    failed = {record["index"] for record in run.records if record.get("status", "ok") != "ok"}
    if failed:
        run.notices.append(
            f"{run.label}: {_count(len(failed), 'sample')} could not be memorized; the base model answered"
        )
    cut = {record["index"] for record in run.records if record.get("n_truncated_tokens")}
    if cut:
        run.notices.append(f"{run.label}: {_count(len(cut), 'sample')} had a context over the limit, cut off")


def find_samples(run: ReportRun, given: str | Path | None) -> None:
    """Read the data again, if the file is there as the run found it (or is ``given``); else, a notice."""
    settings = run.identity["data"]
    names = _data_names(run, given)
    path = _data_path(run, names)
    if path is None:
        named = f" ({', '.join(names)})" if names else ""
        run.notices.append(
            f"{run.label}: contexts and prompts are missing: the data file{named} is not there or has "
            "changed; give it with --data FILE"
        )
        return
    samples = read_samples(
        path,
        settings["task"],
        settings.get("fields"),
        settings.get("answer_prefix", ""),
        settings.get("limit"),
    )
    run.samples = {sample.index: sample for sample in samples}


def _data_names(run: ReportRun, given: str | Path | None) -> list[str]:
    """What the data file may be called: as given, and as the run had it."""
    names = [str(given)] if given is not None else []
    try:
        config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
        names.append(str(config["data"]["path"]))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        pass
    return names


def _data_path(run: ReportRun, names: Sequence[str]) -> Path | None:
    """The data file of a run, known by its hash: from here, or from a folder above the run's."""
    for name in names:
        path = data_file(name)
        for place in (path, *(folder / path for folder in run.path.resolve().parents)):
            if place.is_file() and hash_of(place) == run.data_hash:
                return place
    return None


def hash_of(path: Path) -> str:
    """Hash of a data file, as in a run's settings."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def perplexity(record: Mapping[str, Any]) -> float | None:
    """Perplexity of the context under the base model: of the curve's first value, before any update."""
    losses = (record.get("curve") or {}).get("cross_entropy") or []
    return math.exp(min(losses[0], 50.0)) if losses and isinstance(losses[0], (int, float)) else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
